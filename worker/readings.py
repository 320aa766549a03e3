"""How the machine is read for `worker.limits`: battery, programs, the last key, the card's temperature.

What always holds: a look never raises and never waits longer than `TOOL_TIMEOUT_S` for a tool; tools are started
without a shell; only what the limits ask for is read, and what cannot be read is named in `Readings.unread`.

The time since the last key comes from the first of these that answers: `xprintidle` (X11), GNOME's idle monitor over
D-Bus (Wayland and X11), logind's hint of the seat (KDE and others set it; nobody sits at an empty one), ioreg (macOS).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

from worker.limits import Limits, Readings
from worker.nvml import Card

TOOL_TIMEOUT_S = 2.0
MAX_TOOL_OUTPUT = 64 * 1024

Tool = Callable[[Sequence[str]], str | None]
"""Runs a command and returns its output, or None when it is not there or failed."""


class Sense(Protocol):
    """One look at the machine."""

    def __call__(self, limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings: ...


def run_tool(command: Sequence[str]) -> str | None:
    """The command's output; None when it is not installed, fails, or takes too long."""
    binary = shutil.which(command[0])
    if binary is None:
        return None
    try:
        done = subprocess.run(
            [binary, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TOOL_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout[:MAX_TOOL_OUTPUT].decode(errors="replace")


class Machine:
    """Reads this machine. `gpu_number` is the card that trains."""

    def __init__(self, gpu_number: int = 0, *, tool: Tool = run_tool, clock: Callable[[], float] = time.time) -> None:
        self._tool = tool
        self._clock = clock
        self._card = Card(gpu_number)

    def __call__(self, limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings:
        """What `limits` ask for, read now."""
        unread: list[str] = []
        battery = None if limits.run_on_batteries else on_battery()
        idle = None
        if not (limits.run_gpu_if_user_active if gpu else limits.run_if_user_active):
            idle = self._idle_s()
            if idle is None:
                unread.append("the time since the last key cannot be read here: the machine counts as idle")
        programs: frozenset[str] | None = frozenset()
        if limits.exclusive_app:
            programs = _programs()
            if programs is None:
                unread.append("programs cannot be listed without psutil: exclusive_app has no effect")
        temperature = None
        if limits.gpu_temp_limit_c and gpu:
            temperature = self._card.temperature_c()
            if temperature is None:
                unread.append("the card's temperature cannot be read (nvidia-ml-py): gpu_temp_limit_c has no effect")
        return Readings(
            now=datetime.fromtimestamp(self._clock()).astimezone(),
            on_battery=battery,
            idle_s=idle,
            programs=programs or frozenset(),
            gpu_temp_c=temperature,
            gpu=gpu,
            transferred_bytes=transferred_bytes,
            unread=tuple(unread),
        )

    def _idle_s(self) -> float | None:
        if sys.platform == "darwin":
            return parse_ioreg(self._tool(("ioreg", "-c", "IOHIDSystem", "-d", "4")) or "")
        if os.environ.get("DISPLAY"):
            idle = parse_milliseconds(self._tool(("xprintidle",)) or "")
            if idle is not None:
                return idle
        monitor = "org.gnome.Mutter.IdleMonitor"
        idle = parse_milliseconds(
            self._tool(
                ("busctl", "--user", "call", monitor, "/org/gnome/Mutter/IdleMonitor/Core", monitor, "GetIdletime")
            )
            or ""
        )
        if idle is not None:
            return idle
        seat = self._tool(
            ("loginctl", "show-seat", "seat0", "-p", "ActiveSession", "-p", "IdleHint", "-p", "IdleSinceHint")
        )
        return parse_seat(seat or "", self._clock())


def parse_milliseconds(text: str) -> float | None:
    """Seconds, from a number of milliseconds, with busctl's type letter before it or without."""
    found = re.fullmatch(r"\s*(?:t\s+)?(\d{1,15})\s*", text)
    return int(found[1]) / 1000.0 if found else None


def parse_seat(text: str, now: float) -> float | None:
    """Seconds since somebody was active at logind's seat, from `loginctl show-seat`; infinite where nobody sits.

    A desktop that does not tell logind about idleness counts as active as long as its session is open. None: no answer.
    """
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if "ActiveSession" not in fields:
        return None
    if not fields["ActiveSession"]:
        return float("inf")
    if fields.get("IdleHint") != "yes":
        return 0.0
    since = fields.get("IdleSinceHint", "")
    return max(0.0, now - int(since) / 1e6) if since.isdecimal() and int(since) else 0.0


def parse_ioreg(text: str) -> float | None:
    """Seconds, from HIDIdleTime in nanoseconds."""
    found = re.search(r'"HIDIdleTime"\s*=\s*(\d{1,20})', text)
    return int(found[1]) / 1e9 if found else None


def on_battery() -> bool | None:
    """Whether the machine runs on its battery; None where it has none, or does not tell."""
    try:
        import psutil
    except ImportError:
        return None
    try:
        battery = psutil.sensors_battery()
    except (OSError, AttributeError, RuntimeError):
        return None  # not every platform has the call
    if battery is None or battery.power_plugged is None:
        return None
    return not battery.power_plugged


def _programs() -> frozenset[str] | None:
    try:
        import psutil
    except ImportError:
        return None
    return frozenset(name.lower() for process in psutil.process_iter(["name"]) if (name := process.info.get("name")))
