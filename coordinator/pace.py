"""How often volunteers may call, and how fast they are: pure arithmetic.

What always holds: all heartbeats together stay below `beats_per_s` and all questions for work below `polls_per_s`,
however many volunteers there are, as long as the longest pauses that are asked for (a third of a lease's life,
`MAX_POLL_S`) allow it. Answers have no jitter; who calls adds its own.

No I/O, no clock here.
"""

from __future__ import annotations

from typing import Final

from rankup.protocol import NoWorkCode
from rankup.settings import CoordinatorSettings

MAX_POLL_S: Final = 300.0
IDLE_S: Final = 1.5 * MAX_POLL_S
"""Who was told this long ago that there is no work, and has not asked again, is gone."""
PERSONAL: Final = 6.0
"""Who gets no lease for a reason of its own is asked to wait this much longer than who waits for others."""
SHORTEST_S: Final = 1e-3
"""No lease takes less; who says so is not believed."""
NEWEST_SHARE: Final = 0.5
"""Weight of the latest lease in the mean of a volunteer's speed."""

_FOR_ALL: Final[frozenset[NoWorkCode]] = frozenset({"no_round", "all_handed_out", "paused"})


def beat_interval_s(live: int, lease_s: float, settings: CoordinatorSettings) -> float:
    """How long a volunteer waits between two heartbeats where `live` leases are under way: longer the more there are,
    but at least three times within the life of a lease."""
    return min(max(settings.heartbeat_s, live / settings.beats_per_s), lease_s / 3)


def retry_after_s(why: NoWorkCode, idle: int, settings: CoordinatorSettings) -> float:
    """How long a volunteer without work waits before it asks again, where `idle` volunteers have none."""
    pause_s = max(settings.poll_s, idle / settings.polls_per_s)
    return min(pause_s if why in _FOR_ALL else pause_s * PERSONAL, MAX_POLL_S)


def mean_speed(before: float | None, tokens: int, seconds: float) -> float | None:
    """Tokens per second of a volunteer after a lease of so many tokens and seconds: an exponential mean.

    None before the first lease that took measurable time.
    """
    if seconds < SHORTEST_S:
        return before
    now = tokens / seconds
    return now if before is None else before + NEWEST_SHARE * (now - before)
