"""limits.yaml: read, changed, watched, and refused where it cannot be meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankup.errors import InputError
from worker.limits import Limits
from worker.limitsfile import FILE_NAME, MAX_LIMITS_BYTES, LimitsWatch, change_limits, read_limits


def test_no_file_means_the_defaults(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == Limits()


def test_changes_add_up_and_a_name_without_a_value_goes_back(tmp_path: Path) -> None:
    change_limits(tmp_path, ["idle_time_to_run=5", "exclusive_app=cs2"])
    change_limits(tmp_path, ["week={sat: [0, 24], sun: off}", "max_bytes_sec_up=500e3"])
    expected = Limits(
        idle_time_to_run=5, exclusive_app=("cs2",), week={"sat": (0, 24), "sun": "off"}, max_bytes_sec_up=500_000
    )
    assert read_limits(tmp_path) == expected
    assert change_limits(tmp_path, ["week=", "exclusive_app=[a, b]"]).exclusive_app == ("a", "b")
    assert read_limits(tmp_path).week == {}
    change_limits(tmp_path, [f"{name}=" for name in Limits.model_fields])
    assert read_limits(tmp_path) == Limits()


@pytest.mark.parametrize("change", ["idle_time_to_run", "nonsense=1", "idle_time_to_run=soon", "start_hour=[", "=3"])
def test_a_change_that_cannot_be_meant_leaves_the_file_alone(tmp_path: Path, change: str) -> None:
    change_limits(tmp_path, ["idle_time_to_run=7"])
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(InputError) as caught:
        change_limits(tmp_path, ["run_on_batteries=true", change])
    assert caught.value.remedy
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        b"- a",
        b"idle_time_to_run: [",
        b"idle_time_to_runn: 3",
        b"\xff\xfe\x00",
        b"!!python/object/apply:os.system ['true']",
        b"#" * (MAX_LIMITS_BYTES + 1),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, text: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(text)
    with pytest.raises(InputError, match=FILE_NAME):
        read_limits(tmp_path)


def test_a_watch_sees_changes_and_keeps_what_it_had_when_the_file_is_broken(tmp_path: Path) -> None:
    watch = LimitsWatch(tmp_path)
    assert not watch.look()
    change_limits(tmp_path, ["idle_time_to_run=5"])
    assert watch.look()
    assert watch.limits.idle_time_to_run == 5
    assert not watch.look()
    (tmp_path / FILE_NAME).write_text("idle_time_to_run: never")
    os.utime(tmp_path / FILE_NAME, (1, 1))
    with pytest.raises(InputError):
        watch.look()
    assert not watch.look()
    assert watch.limits.idle_time_to_run == 5
