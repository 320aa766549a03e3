"""Who uses the machine while volunteers are served: processor time and memory of every process of a server, by role.

What always holds: a process is counted from when it was first seen to when it was last seen, so one that comes and goes
between two looks (`EVERY_S`) is missed, and that part of one that ended after its last look.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import psutil

EVERY_S: Final = 0.5
TASKS: Final = "Ray tasks (admission)"
ROLES: Final = (
    # A part of the command line, and what is reported. The raylet's own line names the program of its workers.
    ("raylet/raylet", "raylet"),
    ("gcs/gcs_server", "GCS"),
    ("ray::ServeReplica", "gateway replica"),
    ("ray::ProxyActor", "Serve proxy"),
    ("ray::HAProxyManager", "Serve proxy (HAProxy's manager)"),
    ("haproxy", "HAProxy"),
    ("ray::ServeController", "Serve controller"),
    ("ray::KeeperActor", "keeper"),
    ("ray::DashboardAgent", "other processes of Ray"),
    ("ray::RuntimeEnvAgent", "other processes of Ray"),
    ("ray::", TASKS),
    ("default_worker.py", TASKS),
    ("valkey-server", "Valkey"),
    ("weed", "SeaweedFS"),
    ("load_bare.py", "uvicorn"),
    ("load_volunteers.py", "volunteers (the generator)"),
    ("rankup up", "rankup up"),
)
OTHER: Final = "other processes of Ray"


@dataclass
class Use:
    """Of all processes of one role."""

    processes: int = 0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    """Of resident memory, of all of them together at one moment; shared pages count for each."""


def role_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((role for part, role in ROLES if part in line), OTHER)


class Watch:
    """Looks at some processes and all that descend from them, until the block ends: `uses` and `wall_s` then."""

    def __init__(self, *pids: int) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self._roles: dict[int, str] = {}
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._peaks: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.wall_s = 0.0

    def __enter__(self) -> Watch:
        self._started = time.monotonic()
        self._machine = self._busy_s()
        self._look(first=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        self.wall_s = time.monotonic() - self._started
        self.busy_share = (self._busy_s() - self._machine) / (self.wall_s * (psutil.cpu_count() or 1))
        """Of all cores, by whatever ran."""

    @property
    def uses(self) -> dict[str, Use]:
        found: dict[str, Use] = defaultdict(Use)
        for pid, role in self._roles.items():
            found[role].processes += 1
            found[role].cpu_s += self._last[pid] - self._first[pid]
        for role, peak in self._peaks.items():
            found[role].peak_bytes = peak
        return dict(found)

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            self._look()

    def _look(self, *, first: bool = False) -> None:
        now: dict[str, int] = defaultdict(int)
        for process in self._all():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used = times.user + times.system
                if process.pid not in self._first:
                    self._first[process.pid] = used if first else 0.0
                # Ray renames its workers by what they do at the moment.
                role = role_of(process)
                if self._roles.get(process.pid, OTHER) in (OTHER, TASKS):
                    self._roles[process.pid] = role
                self._last[process.pid] = used
                now[self._roles[process.pid]] += process.memory_info().rss
        for role, used in now.items():
            self._peaks[role] = max(self._peaks.get(role, 0), used)

    def _all(self) -> list[psutil.Process]:
        found = {}
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                for process in (root, *root.children(recursive=True)):
                    found[process.pid] = process
        return list(found.values())

    @staticmethod
    def _busy_s() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.nice + times.system + times.irq + times.softirq)
