"""The governor with the real readings over faked tools: each limit holds work up; the owner's pause outlives it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from worker import governor, userpause
from worker.events import Problem, WorkerEvent
from worker.governor import Governor
from worker.limits import UserPause
from worker.limitsfile import change_limits
from worker.readings import Machine, Sense
from worker.traffic import Traffic
from worker.userpause import FILE_NAME, read_pause, write_pause

NOON = datetime(2026, 7, 1, 12, 0).astimezone()
"""A Wednesday."""


class Fakes:
    """What the tools of this machine say."""

    idle_s = 1e6
    plugged = True
    celsius = 40.0
    games: Sequence[str] = ()
    now = NOON

    def tool(self, command: Sequence[str]) -> str | None:
        return str(int(self.idle_s * 1000)) if command[0] in ("xprintidle", "busctl") else None


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """The machine of the test, in the libraries that the worker asks."""
    there = Fakes()
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTemperature=lambda handle, sensor: there.celsius,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=there.plugged), raising=False)
    monkeypatch.setattr(
        psutil, "process_iter", lambda fields: [SimpleNamespace(info={"name": name}) for name in there.games]
    )
    monkeypatch.setattr(governor, "LOOK_EVERY_S", 0.01)
    return there


def govern(home: Path, fakes: Fakes, *, gpu: bool = True, reports: list[WorkerEvent] | None = None) -> Governor:
    sense: Sense = Machine(0, tool=fakes.tool, clock=lambda: fakes.now.timestamp())
    seen = reports if reports is not None else []
    return Governor(home, home, Traffic(home), sense, seen.append, gpu=gpu, now=lambda: fakes.now)


HELD: dict[str, tuple[bool, dict[str, Any], list[str], list[str]]] = {
    "run_on_batteries": (False, {"plugged": False}, [], ["run_on_batteries=true"]),
    "run_gpu_if_user_active": (True, {"idle_s": 100.0}, [], ["run_gpu_if_user_active=true"]),
    "run_if_user_active": (False, {"idle_s": 100.0}, ["run_if_user_active=false"], ["run_if_user_active=true"]),
    "idle_time_to_run": (True, {"idle_s": 400.0}, ["idle_time_to_run=10"], ["idle_time_to_run=6"]),
    "start_hour": (False, {}, ["start_hour=13", "end_hour=14"], ["start_hour=11"]),
    "end_hour, over midnight": (False, {}, ["start_hour=22", "end_hour=12"], ["end_hour=13"]),
    "week": (False, {}, ["week={wed: off}"], ["week={wed: [12, 13]}"]),
    "exclusive_app": (False, {"games": ("bash", "CS2.exe")}, ["exclusive_app=cs2"], ["exclusive_app="]),
    "gpu_temp_limit_c": (True, {"celsius": 80.0}, ["gpu_temp_limit_c=80"], ["gpu_temp_limit_c=95"]),
    "gpu_temp_resume_c": (
        True,
        {"celsius": 80.0},
        ["gpu_temp_limit_c=80"],
        ["gpu_temp_limit_c=85", "gpu_temp_resume_c=81"],
    ),
}
"""Name: a graphics card?, what the machine does, limits that do not allow it, changes that do."""


@pytest.mark.parametrize("name", HELD)
def test_each_limit_holds_work_up_and_lets_it_go_on_when_it_allows_it(
    name: str, fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.limits.MIN_PAUSE_S", 0.0)
    monkeypatch.setattr("worker.limits.CLEAR_S", 0.0)
    gpu, machine, before, allowed = HELD[name]
    change_limits(tmp_path, before)
    for reading, value in machine.items():
        setattr(fakes, reading, value)
    there = govern(tmp_path, fakes, gpu=gpu)
    there.look()
    assert there.hold() is not None
    change_limits(tmp_path, allowed)
    there.look()
    assert there.hold() is None


def test_a_quiet_machine_works_by_default(fakes: Fakes, tmp_path: Path) -> None:
    for gpu in (True, False):
        there = govern(tmp_path, fakes, gpu=gpu)
        there.look()
        assert (there.hold(), there.transfer_hold()) == (None, None)


def test_the_days_megabytes_hold_transfers_up_and_not_the_training(fakes: Fakes, tmp_path: Path) -> None:
    change_limits(tmp_path, ["daily_xfer_limit_mb=2"])
    there = govern(tmp_path, fakes)
    there._traffic.received(1_500_000)
    there.look()
    assert there.transfer_hold() is None
    there._traffic.sent(600_000)
    there.look()
    assert "daily_xfer_limit_mb" in str(there.transfer_hold())
    assert there.hold() is None


@pytest.mark.parametrize("way", ["up", "down"])
def test_bytes_a_second_are_those_of_the_limits(way: str, fakes: Fakes, tmp_path: Path) -> None:
    change_limits(tmp_path, [f"max_bytes_sec_{way}=1000"])
    there = govern(tmp_path, fakes)
    there.look()
    waits = {"up": there._traffic.sent(10_000), "down": there._traffic.received(10_000)}
    assert waits.pop(way) > 5
    assert list(waits.values()) == [0.0]
    change_limits(tmp_path, [f"max_bytes_sec_{way}="])
    there.look()
    assert (there._traffic.sent(10_000), there._traffic.received(10_000)) == (0.0, 0.0)


def test_a_dedicated_machine_has_nobody_to_disturb(fakes: Fakes, tmp_path: Path) -> None:
    fakes.plugged, fakes.idle_s = False, 0.0
    sense = Machine(0, tool=fakes.tool, clock=lambda: fakes.now.timestamp())
    there = Governor(tmp_path, tmp_path, Traffic(tmp_path), sense, lambda event: None, gpu=True, dedicated=True)
    there.look()
    assert there.hold() is None


# -- the owner's pause -------------------------------------------------------------------------------------------------


def test_a_pause_outlives_the_worker_and_is_forgotten_when_it_is_over(fakes: Fakes, tmp_path: Path) -> None:
    govern(tmp_path, fakes).pause(7200.0)
    again = govern(tmp_path, fakes)
    with again:
        assert "until 14:00" in str(again.hold())
        assert again.user_pause == UserPause(NOON + timedelta(hours=2))
        fakes.now = NOON + timedelta(hours=2)
        wait_until(lambda: again.hold() is None)
    assert not (tmp_path / FILE_NAME).exists()
    assert read_pause(tmp_path) is None


@pytest.mark.parametrize("end", ["resume", "finish", "leave"])
def test_a_pause_without_an_end_ends_with_the_owners_word(end: str, fakes: Fakes, tmp_path: Path) -> None:
    govern(tmp_path, fakes).pause(None)
    there = govern(tmp_path, fakes)
    there.look()
    assert there.hold() is not None
    getattr(there, end)()
    assert not (tmp_path / FILE_NAME).exists()
    there.look()
    assert there.hold() is None


def test_a_pause_of_another_day_says_which(fakes: Fakes, tmp_path: Path) -> None:
    there = govern(tmp_path, fakes)
    there.pause(86_400.0)
    assert "until Thu 02 Jul 12:00" in str(there.hold())


def test_a_pause_that_cannot_be_read_is_one(tmp_path: Path) -> None:
    assert read_pause(tmp_path) is None
    for text in (b"", b"{", b'{"until": "soon"}', b'{"until": "2026-07-01T12:00:00"}', b'{"until": null}', b" " * 9999):
        (tmp_path / FILE_NAME).write_bytes(text)
        assert read_pause(tmp_path) == UserPause(), text
    write_pause(tmp_path, None)
    assert read_pause(tmp_path) is None


def test_a_pause_that_cannot_be_written_holds_and_is_told(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(userpause, "write_file", full)
    reports: list[WorkerEvent] = []
    there = govern(tmp_path, fakes, reports=reports)
    there.pause(None)
    assert there.hold() is not None
    assert [type(event) for event in reports] == [Problem]


def wait_until(true: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(500):
        if true():
            return
        waited.wait(0.01)
    raise AssertionError("it never came")
