"""`rankup worker doctor`: can this machine train, and what to do where it cannot.

What always holds: every finding that is not ok carries a remedy; nothing heavy is imported (extras are looked up, not
loaded); a check that cannot be made says so instead of raising.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankup.errors import RankupError, SetupError
from rankup.settings import WorkerSettings
from worker import device, identity
from worker.client import GatewayClient
from worker.retry import RetryPolicy

TRAINER_LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
MIN_FREE_DISK_BYTES = 5 * 1024**3
MIN_MEMORY_BYTES = 4 * 1024**3
MAX_CLOCK_OFFSET_S = 300.0
_INSTALL = "Install the trainer: pip install 'rankup[worker]'."


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it is fine, what was found, and what to do if it is not."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def missing_libraries(find: Callable[[str], object] = importlib.util.find_spec) -> list[str]:
    """The trainer's libraries that are not installed; `find` looks one up without importing it."""
    return [name for name in TRAINER_LIBRARIES if find(name) is None]


def require_trainer() -> None:
    """Raise `SetupError` when the trainer's libraries are missing."""
    missing = missing_libraries()
    if missing:
        raise SetupError(f"the trainer needs {', '.join(missing)}, not installed here", remedy=_INSTALL)


def examine(settings: WorkerSettings, url: str | None) -> list[Finding]:
    """All checks of this machine, and of the server at `url` when there is one."""
    findings = [
        _libraries(missing_libraries()),
        _disk(settings.home),
        _memory(device.total_memory()),
        _device(settings),
    ]
    return [*findings, *_server(settings, url)] if url else findings


def _libraries(missing: Sequence[str]) -> Finding:
    detail = f"missing: {', '.join(missing)}" if missing else ", ".join(TRAINER_LIBRARIES)
    return Finding("libraries", not missing, detail, _INSTALL)


def _disk(home: Path) -> Finding:
    existing = next((path for path in (home, *home.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(existing).free
    remedy = f"Free some space; base versions and deltas need {MIN_FREE_DISK_BYTES / 2**30:.0f} GiB at the least."
    return Finding("disk", free >= MIN_FREE_DISK_BYTES, f"{free / 2**30:.1f} GiB free at {existing}", remedy)


def _memory(total: int) -> Finding:
    if total == 0:
        return Finding("memory", False, "unknown", "Install psutil, so that the memory can be read.")
    remedy = f"Training needs {MIN_MEMORY_BYTES / 2**30:.0f} GiB at the least; use another machine."
    return Finding("memory", total >= MIN_MEMORY_BYTES, f"{total / 2**30:.1f} GiB", remedy)


def _device(settings: WorkerSettings) -> Finding:
    found = device.profile(settings.device, settings.threads)
    wanted = settings.device.partition(":")[0]
    size = f"{found.memory_bytes / 2**30:.1f} GiB" if found.memory_bytes else "memory unknown"
    detail = f"{found.kind}: {found.name or 'unnamed'}, {size}, {found.threads} threads"
    remedy = f"{settings.device} was asked for; install its driver or set RANKUP_WORKER_DEVICE to what is there."
    return Finding("device", wanted in ("auto", found.kind), detail, remedy)


def _server(settings: WorkerSettings, url: str) -> Iterator[Finding]:
    try:
        server = identity.normalise_url(url)
        with GatewayClient(server, timeout_s=min(settings.timeout_s, 10.0), policy=RetryPolicy(0.0)) as client:
            info = client.info()
            offset = client.server_clock_offset_s()
    except RankupError as exc:
        yield Finding("server", False, exc.cause, exc.remedy)
        return
    models = ", ".join(info.models) or "no model yet"
    yield Finding("server", True, f"protocol {info.protocol}, rankup {info.server_version}, {models}")
    yield clock_finding(offset)


def clock_finding(offset_s: float | None) -> Finding:
    """Enrolment is refused when the clocks are an hour apart; a few minutes are a sign of trouble to come."""
    if offset_s is None:
        return Finding("clock", True, "the server does not tell its time")
    off = abs(offset_s)
    detail = f"{off:.0f} s {'behind' if offset_s > 0 else 'ahead of'} the server"
    return Finding("clock", off <= MAX_CLOCK_OFFSET_S, detail, "Set the clock: timedatectl set-ntp true.")
