"""What tools say about the machine, and what is asked of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from worker import readings
from worker.limits import Limits
from worker.readings import Machine, parse_ioreg, parse_milliseconds, parse_seat, run_tool

LINUX = pytest.mark.skipif(sys.platform == "darwin", reason="asks other tools there")


@pytest.mark.parametrize(
    ("text", "seconds"), [("12345\n", 12.345), ("t 2000\n", 2.0), ("", None), ("no display", None), ("-5", None)]
)
def test_milliseconds_are_read(text: str, seconds: float | None) -> None:
    assert parse_milliseconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", None),
        ("garbage", None),
        ("IdleHint=no\nIdleSinceHint=0\nActiveSession=\n", float("inf")),
        ("IdleHint=no\nIdleSinceHint=0\nActiveSession=2\n", 0.0),
        ("IdleHint=yes\nIdleSinceHint=940000000\nActiveSession=2\n", 60.0),
        ("IdleHint=yes\nIdleSinceHint=1999000000\nActiveSession=2\n", 0.0),
        ("IdleHint=yes\nIdleSinceHint=x\nActiveSession=2\n", 0.0),
    ],
)
def test_the_seat_of_logind_is_read(text: str, seconds: float | None) -> None:
    assert parse_seat(text, now=1000.0) == seconds


def test_ioreg_is_read() -> None:
    assert parse_ioreg('| "HIDIdleTime" = 1500000000\n') == 1.5
    assert parse_ioreg("") is None


@LINUX
@pytest.mark.parametrize(
    ("display", "answers", "idle_s", "asked"),
    [
        (":0", {"xprintidle": "5000"}, 5.0, ["xprintidle"]),
        (":0", {"busctl": "t 6000"}, 6.0, ["xprintidle", "busctl"]),
        ("", {"busctl": "t 6000"}, 6.0, ["busctl"]),
        ("", {"loginctl": "ActiveSession=\nIdleHint=no\n"}, float("inf"), ["busctl", "loginctl"]),
        ("", {}, None, ["busctl", "loginctl"]),
    ],
)
def test_the_first_tool_that_answers_tells_the_last_key(
    monkeypatch: pytest.MonkeyPatch, display: str, answers: dict[str, str], idle_s: float | None, asked: list[str]
) -> None:
    monkeypatch.setenv("DISPLAY", display)
    seen: list[str] = []

    def tool(command: Sequence[str]) -> str | None:
        seen.append(command[0])
        return answers.get(command[0])

    found = Machine(tool=tool)(Limits(), gpu=True, transferred_bytes=7)
    assert (found.idle_s, found.transferred_bytes, found.gpu) == (idle_s, 7, True)
    assert seen == asked
    assert bool(found.unread) is (idle_s is None)


def test_only_what_the_limits_ask_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("not asked for")

    monkeypatch.setattr(readings, "_programs", never)
    monkeypatch.setattr(readings, "on_battery", never)
    relaxed = Limits(run_on_batteries=True, run_gpu_if_user_active=True, gpu_temp_limit_c=80)
    found = Machine(tool=never)(relaxed, gpu=False, transferred_bytes=0)  # type: ignore[arg-type]
    assert found.unread == ()


def test_running_programs_are_found_by_name(tmp_path: Path) -> None:
    program = tmp_path / "a-game-of-mine"
    program.symlink_to(sys.executable)
    child = subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        until = time.monotonic() + 10
        name = "a-game-of-mine"
        while time.monotonic() < until:
            found = Machine()(Limits(exclusive_app=(name,)), gpu=False, transferred_bytes=0)
            if name in found.programs:
                break
        assert name in found.programs
    finally:
        child.kill()
        child.wait()


def test_a_tool_that_is_missing_fails_or_hangs_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "TOOL_TIMEOUT_S", 0.2)
    assert run_tool(("no-such-tool-anywhere",)) is None
    assert run_tool((sys.executable, "-c", "raise SystemExit(1)")) is None
    assert run_tool(("sleep", "5")) is None
    assert run_tool(("echo", "3")) == "3\n"
