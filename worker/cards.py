"""Graphics cards, and whether the torch that is installed can compute on them: found out without importing torch.

What always holds:
- nothing here touches a card's memory or starts anything on it: `nvidia-smi` is asked, the driver's library tells its
  version, and torch's `version.py` is read as text;
- what does not answer is None or an empty list, never an error.

`verdict_on_cards` is pure: the rules about drivers, cards and torch builds in one place.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rankup.finding import Finding, fail, ok, warn

CHECK: Final = "graphics"
OLDEST_CARD: Final = {13: (7, 5)}
"""CUDA's major version -> lowest compute capability that it compiles for: CUDA 13.0 release notes, "Deprecated
architectures" (Maxwell, Pascal and Volta went)."""
Version = tuple[int, int]

_QUERY_TIMEOUT_S = 10.0
_MAX_TEXT = 64 * 1024
_FIELDS: Final = "name,memory.total,memory.free,driver_version,compute_cap"
_OLD_FIELDS: Final = _FIELDS.removesuffix(",compute_cap")
_PCI: Final = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Card:
    """One NVIDIA card; None: it does not tell."""

    name: str
    memory_bytes: int
    free_bytes: int | None = None
    driver: str = ""
    capability: Version | None = None


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for."""

    version: str
    cuda: Version | None = None
    """None: it knows no CUDA."""
    other: str = ""
    """"ROCm" or "XPU", where it was built for these."""


def nvidia_smi(fields: str) -> str | None:
    """These fields of every card, as lines; None where there is no driver, or one that does not answer."""
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return None
    command = [binary, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout[:_MAX_TEXT]


def find_cards() -> list[Card]:
    """Every card that the driver knows; an old `nvidia-smi` does not tell capabilities."""
    told = nvidia_smi(_FIELDS)
    return parse_cards(told if told is not None else nvidia_smi(_OLD_FIELDS) or "")


def parse_cards(text: str) -> list[Card]:
    """The cards in `nvidia-smi`'s lines of name, total and free MiB, driver and, maybe, compute capability."""
    found = []
    for line in text.splitlines():
        # Counted from the right: a name may have a comma.
        fields = [field.strip() for field in line.rsplit(",", 4)]
        capability = _version(fields[-1]) if len(fields) == 5 and re.fullmatch(r"\d+\.\d", fields[-1]) else None
        if capability is None:
            fields = [*(field.strip() for field in line.rsplit(",", 3)), ""]
        if len(fields) == 5 and fields[1].isdigit():
            name, total, free, driver, _ = fields
            free_bytes = int(free) * 1024**2 if free.isdigit() else None
            found.append(Card(name[:128], int(total) * 1024**2, free_bytes, driver[:32], capability))
    return found


def driver_cuda() -> Version | None:
    """The newest CUDA that the driver takes, as its own library says; no context is made for that."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int(0)
        answered = library.cuDriverGetVersion(ctypes.byref(number)) == 0
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if answered and number.value > 0 else None


def silent_cards(devices: Path = _PCI) -> int:
    """How many NVIDIA display controllers are on the bus, whether a driver runs them or not."""
    count = 0
    for device in devices.iterdir() if devices.is_dir() else ():
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == "0x10de" and kind.startswith("0x03")
    return count


def torch_build() -> TorchBuild | None:
    """What the installed torch was built for; None where there is none, or one that does not say."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        with Path(spec.origin).with_name("version.py").open(encoding="utf-8") as file:
            return parse_torch_version(file.read(_MAX_TEXT))
    except (OSError, UnicodeDecodeError):
        return None


def parse_torch_version(text: str) -> TorchBuild | None:
    """From the text of torch's `version.py`."""
    said = dict(re.findall(r"^(\w+)\s*(?::[^=\n]+)?=\s*'([^'\n]{1,64})'", text, re.MULTILINE))
    if "__version__" not in said:
        return None
    other = "ROCm" if said.get("hip") or said.get("rocm") else "XPU" if said.get("xpu") else ""
    return TorchBuild(said["__version__"], _version(said.get("cuda", "")), other)


def knows_cuda(build: TorchBuild | None) -> bool:
    """Whether a card would be used by a trainer with this torch; where torch is missing, that one yet to be
    installed."""
    return build is None or build.cuda is not None


def verdict_on_cards(
    wanted: str, cards: Sequence[Card], number: int, build: TorchBuild | None, newest: Version | None, silent: int
) -> Finding:
    """What `wanted` ("auto", "cuda", "cuda:1", …) comes to.

    number: of the card that is meant. newest: the newest CUDA that the driver takes. silent: cards on the bus.
    """
    must = wanted.startswith("cuda")
    if not must and wanted != "auto":
        return ok(CHECK, f"not used: {wanted} was asked for")
    if number >= len(cards):
        return _no_card(wanted, cards, silent) if must or silent > len(cards) else ok(CHECK, _other(build))
    card = cards[number]
    words = "; ".join(_describe(place, each) for place, each in enumerate(cards))
    words += f"; driver {card.driver or 'unknown'}" + (f" for CUDA up to {_dotted(newest)}" if newest else "")
    if build is None:
        return ok(CHECK, words)
    words += f"; torch {build.version}"
    if build.cuda is None:
        grade = fail if must else warn
        slow = "" if must else ": it would train on the processor"
        return grade(
            CHECK,
            f"{words}, which was built without CUDA{slow}",
            "Install a torch with CUDA (https://pytorch.org/get-started/locally), in the same environment as rankup.",
        )
    if newest is not None and newest[0] < build.cuda[0]:
        return fail(
            CHECK,
            f"{words} needs a driver for CUDA {build.cuda[0]}",
            f"Update the driver, install a torch for CUDA {newest[0]}, or train on the processor: --device cpu.",
        )
    oldest = OLDEST_CARD.get(build.cuda[0])
    if oldest is not None and card.capability is not None and card.capability < oldest:
        return fail(
            CHECK,
            f"{words} no longer computes on this card (capability {_dotted(card.capability)}, it needs "
            f"{_dotted(oldest)})",
            f"Install a torch for CUDA {build.cuda[0] - 1}, or train on the processor: --device cpu.",
        )
    return ok(CHECK, words)


def _no_card(wanted: str, cards: Sequence[Card], silent: int) -> Finding:
    if silent > len(cards):
        found = "an NVIDIA card is in the machine, but its driver does not answer"
        remedy = "Install NVIDIA's driver, so that `nvidia-smi` shows the card; in a container, pass the card on."
        return (fail if wanted != "auto" else warn)(CHECK, found, remedy)
    found = f"{wanted} was asked for; there are {len(cards)} cards" if cards else f"{wanted} was asked for; no card"
    return fail(CHECK, found, "Choose another --device (auto takes what is there), or install the card's driver.")


def _other(build: TorchBuild | None) -> str:
    return f"no NVIDIA card; torch is built for {build.other}" if build and build.other else "no NVIDIA card"


def _describe(number: int, card: Card) -> str:
    free = f" ({card.free_bytes / 2**30:.1f} free)" if card.free_bytes is not None else ""
    return f"{number}: {card.name}, {card.memory_bytes / 2**30:.1f} GiB{free}"


def _version(text: str) -> Version | None:
    found = re.match(r"(\d{1,3})\.(\d{1,3})", text)
    return (int(found[1]), int(found[2])) if found else None


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
