"""What the parts of benchmarks/load.py have in common: how much is measured, how, and what comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aggregate_run import FOLDER
from load_processes import Use, Watch
from load_server import Server

GOAL_MS: Final = 250.0
"""The 99th percentile of claims and heartbeats must stay below it."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    scratch: Path
    """Where servers keep their state."""
    volunteers: int = 10_000
    live_s: float = 90.0
    lease_s: float = 1_200.0
    """How long a volunteer trains for one lease."""
    crowd: int = 200
    """Volunteers of the part that looks for the rate that breaks a server."""
    step_s: float = 5.0
    rates: tuple[float, ...] = (50, 100, 150, 200, 300, 400, 600, 800)
    shards: int = 100_000
    claimers: int = 64
    transfer_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Ride:
    """What one process of volunteers found, and what the processes of the server used meanwhile."""

    report: Mapping[str, Any]
    uses: Mapping[str, Use]
    wall_s: float
    busy: float
    """Share of all cores that was busy, with whatever."""

    @property
    def times(self) -> Mapping[str, Sequence[float]]:
        found: Mapping[str, Sequence[float]] = self.report["times"]
        return found

    def p99_ms(self, *kinds: str) -> float:
        return milliseconds([one for kind in kinds for one in self.times.get(kind, ())], 0.99)

    @property
    def busiest(self) -> str:
        """The role that used most of one core."""
        role, use = max(self.uses.items(), key=lambda item: item[1].cpu_s / item[1].processes)
        return f"{role} ({use.cpu_s / self.wall_s / use.processes:.0%} of a core)"


def ride(server: Server, people: Path, act: str, **orders: Any) -> Ride:
    """Let volunteers act on a server (`load_volunteers.Orders`), and watch it."""
    given = {"act": act, "url": server.url, "people": str(people)} | orders
    process = subprocess.Popen(
        [sys.executable, FOLDER / "load_volunteers.py"],
        env=dict(server.environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with Watch(server.pid, process.pid) as watch:
        out, _ = process.communicate(json.dumps(given).encode())
    if process.returncode:
        raise RuntimeError(f"the volunteers failed at {act}")
    report = json.loads(out)
    return Ride(report, watch.uses, report["wall_s"], watch.busy_share)


def milliseconds(seconds: Sequence[float], quantile: float) -> float:
    """The quantile by nearest rank; NaN where nothing was measured."""
    if not seconds:
        return float("nan")
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * quantile))]


def in_words(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(errors.items())) or "0"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}"
