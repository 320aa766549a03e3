"""What the doctor finds on this machine: Python, cards, memory, threads, disk, power, and what the owner allows now.

What always holds: each rule is a function of plain values, and tests call it with values; nothing heavy is imported
(packages are looked up, not loaded); a check that cannot be made says so instead of raising.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from rankup.errors import SetupError
from rankup.finding import Finding, fail, ok, warn
from rankup.protocol import DeviceKind
from rankup.settings import WorkerSettings
from worker import cards, device, identity
from worker.limits import Limits, Readings, Stance, first_reason, transfer_reason
from worker.limitsfile import read_limits
from worker.readings import Machine, Sense, on_battery
from worker.traffic import Traffic
from worker.userpause import read_pause

TRAINER_LIBRARIES: Final = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
EXTRAS: Final[Mapping[str, str]] = {
    "psutil": "free memory, battery, programs",
    "pynvml": "temperature and energy of the card",
    "bitsandbytes": "training in 4 bits",
}
"""Package -> what is not there without it; the last two matter with a graphics card only."""
MIN_FREE_DISK_BYTES: Final = 512 * 1024**2
GOOD_FREE_DISK_BYTES: Final = 5 * 1024**3
GOOD_MEMORY_BYTES: Final = 4 * 1024**3
_INSTALL: Final = "Install the trainer: pip install 'rankup[worker]'."


@dataclass(frozen=True)
class Hands:
    """What the trainer would compute on."""

    kind: DeviceKind
    free_bytes: int | None
    """Of memory that a training may take; None: unknown."""
    total_bytes: int
    card: cards.Card | None = None
    all_cards: tuple[cards.Card, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """What the server is told with a claim: what is free, else all."""
        return self.free_bytes if self.free_bytes is not None else self.total_bytes

    @classmethod
    def find(cls, settings: WorkerSettings) -> Hands:
        """Those of this machine."""
        found = tuple(cards.find_cards())
        number = device.gpu_number(settings.device)
        if device.means_card(settings.device) and number < len(found):
            card = found[number]
            return cls("cuda", card.free_bytes, card.memory_bytes, card, found)
        profile = device.profile(settings.device, settings.threads)
        return cls(profile.kind, device.free_memory(settings.device), profile.memory_bytes, None, found)


@dataclass(frozen=True)
class Allowance:
    """What the owner allows at this moment: `paused` and `transfers` say why not, in plain words."""

    limits: Limits
    readings: Readings
    paused: str | None
    transfers: str | None
    traffic: Traffic
    """Counts what the doctor sends and gets."""

    @classmethod
    def read(cls, settings: WorkerSettings, server: str | None, kind: DeviceKind, sense: Sense | None) -> Allowance:
        """Raises `InputError` for limits that cannot be used."""
        limits = read_limits(settings.home)
        limits = limits.for_dedicated() if settings.dedicated else limits
        traffic = Traffic(settings.home)
        sense = sense or Machine(device.gpu_number(settings.device))
        readings = sense(limits, gpu=kind != "cpu", transferred_bytes=traffic.day().total)
        pause = read_pause(identity.folder_of(settings.home, server).root) if server else None
        reason = first_reason(limits, readings, pause, was_hot=False)
        transfers = transfer_reason(limits, readings, Stance(reason))
        return cls(limits, readings, reason.words if reason is not None else None, transfers, traffic)


def missing_libraries(find: Callable[[str], object] = importlib.util.find_spec) -> list[str]:
    """The trainer's libraries that are not installed; `find` looks one up without importing it."""
    return [name for name in TRAINER_LIBRARIES if find(name) is None]


def require_trainer() -> None:
    """Raise `SetupError` when the trainer's libraries are missing."""
    missing = missing_libraries()
    if missing:
        raise SetupError(f"the trainer needs {', '.join(missing)}, not installed here", remedy=_INSTALL)


def look(settings: WorkerSettings, hands: Hands, allowed: Allowance) -> list[Finding]:
    """Every check of this machine."""
    limits = allowed.limits
    number, build = device.gpu_number(settings.device), cards.torch_build()
    newest = cards.driver_cuda() if hands.all_cards else None
    total = device.total_memory()
    found = [
        python_finding(missing_libraries(), versions(TRAINER_LIBRARIES), missing_extras(gpu=bool(hands.all_cards))),
        cards.verdict_on_cards(settings.device, hands.all_cards, number, build, newest, cards.silent_cards()),
        device_finding(settings.device, hands.kind, build),
        memory_finding(total, None if hands.card is not None else hands.free_bytes),
        threads_finding(settings.threads or limits.threads, device.usable_threads(), limits.nice),
        _disk(settings.home, quota_bytes(settings, limits)),
        power_finding(on_battery(), allowed=limits.run_on_batteries),
        limits_finding(limits, allowed.readings, allowed.paused, allowed.transfers),
    ]
    return [finding for finding in found if finding is not None]


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the packages that are installed, read from their metadata."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def python_finding(missing: Sequence[str], installed: Mapping[str, str], without: Mapping[str, str]) -> Finding:
    """Python and the trainer's libraries. `without`: extras that are missing -> what they would bring."""
    python = f"Python {platform.python_version()}"
    if missing:
        return fail("python", f"{python}; missing: {', '.join(missing)}", _INSTALL)
    words = ", ".join((python, *(f"{name} {version}" for name, version in installed.items())))
    lacks = "".join(f"; without {name}: no {what}" for name, what in without.items())
    return ok("python", words + lacks)


def memory_finding(total: int, free: int | None) -> Finding:
    """RAM; `free` where the training takes it from there."""
    if total == 0:
        return warn("memory", "cannot be read", "Install psutil, so that the memory can be read.")
    words = f"{total / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} free" if free is not None else "")
    if total < GOOD_MEMORY_BYTES:
        return warn("memory", words, f"A real model takes {GOOD_MEMORY_BYTES / 2**30:.0f} GiB or more; toys take less.")
    return ok("memory", words)


def threads_finding(wanted: int, usable: int, nice: int) -> Finding:
    """Threads of the trainer."""
    used = wanted or usable
    words = f"{used} of {usable}, niceness {nice}"
    if used > usable:
        return warn("threads", words, "More threads than there are get in each other's way: lower --threads.")
    return ok("threads", words)


def power_finding(on_battery_now: bool | None, *, allowed: bool) -> Finding:
    """Mains or battery."""
    if on_battery_now and not allowed:
        remedy = "Plug it in, or allow it: rankup worker limits set run_on_batteries=true"
        return warn("power", "on its battery", remedy)
    if on_battery_now is None:
        return ok("power", "no battery, or one that does not tell")
    return ok("power", "on its battery, which you allow" if on_battery_now else "plugged in")


def disk_finding(free_bytes: int, quota: int, place: Path, *, writable: bool) -> Finding:
    """Room where the worker keeps base versions and deltas."""
    words = f"{free_bytes / 2**30:.1f} GiB free at {place}, at most {quota / 2**30:.1f} for base versions"
    if not writable:
        return fail("disk", f"{place} cannot be written to", "Choose another folder with RANKUP_WORKER_HOME.")
    if free_bytes < MIN_FREE_DISK_BYTES:
        return fail("disk", words, "Free some space, or choose another folder with RANKUP_WORKER_HOME.")
    if free_bytes < GOOD_FREE_DISK_BYTES:
        return warn("disk", words, "Enough for a small model only; free some space for a larger one.")
    return ok("disk", words)


def quota_bytes(settings: WorkerSettings, limits: Limits) -> int:
    """Room for base versions."""
    return int(limits.disk_max_used_gb * 1e9) or settings.cache_bytes


def limits_finding(limits: Limits, readings: Readings, paused: str | None, transfers: str | None) -> Finding:
    """Whether the worker would work at this moment."""
    changed = limits.model_dump(mode="json", exclude_defaults=True)
    words = ", ".join(changed) if changed else "defaults"
    notes = "".join(f"; {note}" for note in readings.unread)
    if paused is not None:
        return warn("limits", f"paused now: {paused}{notes}", "It begins by itself when that is over.")
    if transfers is not None:
        return warn("limits", f"no transfers now: {transfers}{notes}", "They begin by themselves when that is over.")
    return ok("limits", f"it may work now ({words}){notes}")


def missing_extras(*, gpu: bool) -> dict[str, str]:
    """Extras that are not installed -> what they would bring here."""
    names = tuple(EXTRAS) if gpu else ("psutil",)
    return {name: EXTRAS[name] for name in names if importlib.util.find_spec(name) is None}


def free_disk(home: Path) -> tuple[int, Path]:
    """Bytes that are free where `home` lies, or will lie, and the folder that tells."""
    place = next((path for path in (home, *home.parents) if path.exists()), Path("/"))
    return shutil.disk_usage(place).free, place


def _disk(home: Path, quota: int) -> Finding:
    free_bytes, place = free_disk(home)
    return disk_finding(free_bytes, quota, place, writable=os.access(place, os.W_OK))


def device_finding(
    wanted: str, kind: DeviceKind, build: cards.TorchBuild | None, system: str = platform.system()
) -> Finding | None:
    """Devices other than cards, which `worker.cards` judges."""
    if kind == "cuda" or wanted.startswith("cuda"):
        return None
    words = f"trains on {'the processor' if kind == 'cpu' else kind}: {device.processor_name() or 'unnamed'}"
    there = {"mps": system == "Darwin", "xpu": build is None or build.other == "XPU"}.get(wanted, True)
    if not there or wanted not in ("auto", kind):
        trouble = f"{wanted} was asked for; it is not there, or torch was not built for it"
        return fail("device", trouble, "Set --device to what is there, or to auto.")
    return ok("device", words)
