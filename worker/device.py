"""What this machine can train on, found out without importing torch.

What always holds: `profile` answers in about a second, never raises because a tool is missing, and never touches the
GPU's memory; "auto" means a card only where the installed torch can use one, as it does in the trainer. What it says is
for display and for choosing work; the trainer asks torch itself.
"""

from __future__ import annotations

import itertools
import os
import platform
from pathlib import Path

from rankup.protocol import DeviceProfile
from worker.cards import knows_cuda, nvidia_smi, torch_build


def usable_threads(wanted: int = 0) -> int:
    """Threads for the trainer: `wanted`, or every core that this process may run on when it is 0."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted if wanted > 0 else available


def profile(device: str = "auto", threads: int = 0) -> DeviceProfile:
    """The device that `device` ("auto", "cpu", "cuda", "cuda:1", "mps", "xpu") means on this machine.

    `memory_bytes` is the GPU's memory for cuda and the machine's RAM otherwise.
    """
    if means_card(device):
        gpu = _nvidia(gpu_number(device))
        if gpu is not None:
            return DeviceProfile(kind="cuda", name=gpu[0], memory_bytes=gpu[1], threads=usable_threads(threads))
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if device == "mps" or (device == "auto" and apple):
        return DeviceProfile(
            kind="mps", name=processor_name(), memory_bytes=total_memory(), threads=usable_threads(threads)
        )
    if device == "xpu":
        return DeviceProfile(kind="xpu", name="Intel XPU", memory_bytes=total_memory(), threads=usable_threads(threads))
    return DeviceProfile(
        kind="cpu", name=processor_name(), memory_bytes=total_memory(), threads=usable_threads(threads)
    )


def free_memory(device: str = "auto") -> int | None:
    """Bytes that a training may take now: of the card for cuda, of the machine for cpu and mps; None: unknown."""
    if means_card(device):
        card = gpu_number(device)
        free = parse_free_memory(nvidia_smi("memory.free") or "")
        if card < len(free):
            return free[card]
        if device != "auto":
            return None
    if device == "xpu":
        return None
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def gpu_number(device: str) -> int:
    """The number of the card that `device` means: 1 for "cuda:1", 0 where none is named."""
    number = device.partition(":")[2]
    return int(number) if number.isdecimal() else 0


def total_memory() -> int:
    """RAM in bytes; 0 when it cannot be told."""
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.virtual_memory().total)


def processor_name() -> str:
    """The processor as its maker calls it, at most 128 characters."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()[:128]
    except OSError:
        pass  # not Linux, or /proc is hidden: the platform module knows less, but something
    return (platform.processor() or platform.machine())[:128]


def parse_nvidia_smi(text: str) -> list[tuple[str, int]]:
    """(name, memory in bytes) of each GPU, from nvidia-smi's `csv,noheader,nounits` of `name,memory.total`."""
    found = []
    for line in text.splitlines():
        name, comma, mebibytes = line.rpartition(",")
        if comma and mebibytes.strip().isdigit():
            found.append((name.strip()[:128], int(mebibytes) * 1024**2))
    return found


def parse_free_memory(text: str) -> list[int]:
    """Bytes of each GPU, from nvidia-smi's `csv,noheader,nounits` of `memory.free`; a card that does not tell ends the
    list."""
    told = itertools.takewhile(str.isdigit, (line.strip() for line in text.splitlines()))
    return [int(mebibytes) * 1024**2 for mebibytes in told]


def means_card(device: str) -> bool:
    """Whether `device` asks for an NVIDIA card, if there is one."""
    return device.startswith("cuda") or (device == "auto" and knows_cuda(torch_build()))


def _nvidia(number: int) -> tuple[str, int] | None:
    gpus = parse_nvidia_smi(nvidia_smi("name,memory.total") or "")
    return gpus[number] if number < len(gpus) else None
