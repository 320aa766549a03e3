"""The journal stays small, private, and out of the way of the work."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from worker import journal
from worker.events import Paused, Resumed, WorkerEvent
from worker.journal import FILE_NAME, Journal


def test_events_are_written_down_and_passed_on_and_the_file_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 300)
    passed: list[WorkerEvent] = []
    write = Journal(tmp_path, passed.append)
    for number in range(30):
        write(Paused(f"reason {number}"))
    write(Resumed())
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert lines[-1].endswith(" Going on")
    assert lines[-2].endswith(" Paused: reason 29")
    assert len(passed) == 31
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME, FILE_NAME + ".old"}
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 400
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_journal_that_cannot_be_written_is_given_up_silently(tmp_path: Path) -> None:
    passed: list[WorkerEvent] = []
    Journal(tmp_path / "not there", passed.append)(Resumed())
    assert passed == [Resumed()]
