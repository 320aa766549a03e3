"""How fast bytes go to the server and come from there: measured before work is planned, and remembered for a day.

What always holds:
- at most 1.1 MB go each way, and a few seconds are spent; a slow link is measured with the first 64 KiB only;
- what goes is random bytes that mean nothing;
- the time of a round trip is taken off, so what a small body measures is the link and not the distance.

It is an estimate: TCP is still speeding up during so few bytes, and where deltas go straight to object storage, that
may be another way. A measurement that fails says why instead of raising.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Protocol

from pydantic import Field, ValidationError

from rankup.durable import write_file
from rankup.errors import RankupError
from rankup.message import Finite, Message
from rankup.protocol import MAX_LINK_BYTES, LinkMeasured

FILE_NAME: Final = "links.json"
GOOD_FOR_S: Final = 86_400.0
SIZES: Final = (64 * 1024, MAX_LINK_BYTES)
LONGEST_S: Final = 2.0
"""The larger size is measured only where it should take no longer than this."""
SHORTEST_S: Final = 1e-3
_MAX_FILE_BYTES: Final = 4096
Rate = Annotated[Finite, Field(gt=0, le=1e12)]


class Way(Protocol):
    """What can be measured: `worker.client.GatewayClient`."""

    def link_up(self, data: bytes) -> LinkMeasured: ...

    def link_down(self, size_bytes: int) -> int: ...


class Links(Message):
    """Bytes a second; None: not measured."""

    up: Rate | None = None
    down: Rate | None = None
    trouble: str = Field(default="", max_length=512)
    """Why something was not measured."""
    measured_at: Finite = 0.0


def measure(way: Way, *, clock: Callable[[], float] = time.perf_counter, now: Callable[[], float] = time.time) -> Links:
    """Measure both directions. Never raises a `RankupError`."""

    def up(size_bytes: int) -> float:
        return way.link_up(os.urandom(size_bytes)).seconds

    def down(size_bytes: int) -> float:
        way.link_down(size_bytes)
        return 0.0

    rates: dict[str, float] = {}
    try:
        # The second one finds the connection open.
        trip_s = min(_timed(down, 1, clock)[0] for _ in range(2))
        rates["up"] = _rate(up, trip_s, clock)
        rates["down"] = _rate(down, trip_s, clock)
    except RankupError as exc:
        return Links(**rates, trouble=exc.cause[:512], measured_at=now())
    return Links(**rates, measured_at=now())


def _rate(transfer: Callable[[int], float], trip_s: float, clock: Callable[[], float]) -> float:
    rate = 0.0
    for size_bytes in SIZES:
        if rate and size_bytes / rate > LONGEST_S:
            break
        took_s, told_s = _timed(transfer, size_bytes, clock)
        # What the other end saw is the least that it can have taken: a round trip may have been slow by chance.
        rate = size_bytes / max(took_s - trip_s, told_s, SHORTEST_S)
    return rate


def _timed(transfer: Callable[[int], float], size_bytes: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds that the transfer took here, and what it returned."""
    began = clock()
    told_s = transfer(size_bytes)
    return clock() - began, told_s


def remembered(folder: Path, now: float) -> Links | None:
    """What was measured within a day; None where there is nothing of the kind."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            links = Links.model_validate_json(file.read(_MAX_FILE_BYTES))
    except (OSError, ValidationError):
        return None
    fresh = 0.0 <= now - links.measured_at < GOOD_FOR_S
    return links if fresh and links.up is not None and links.down is not None else None


def remember(folder: Path, links: Links) -> None:
    """Keep the measurement for the next start. Raises OSError."""
    write_file(folder / FILE_NAME, links.model_dump_json().encode())
