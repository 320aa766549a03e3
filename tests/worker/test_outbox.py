"""The outbox keeps finished deltas through kills and full disks, and moves them only along its diagram."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankup.errors import DiskFullError, StateError
from rankup.protocol import SubmitStatement
from worker.outbox import Outbox, OutboxState


def statement(lease_id: str) -> SubmitStatement:
    return SubmitStatement(
        round_id="r",
        lease_id=lease_id,
        fence=1,
        base_manifest="0" * 64,
        sha256="1" * 64,
        size_bytes=3,
        tokens=5,
        steps=1,
        first_loss=2.0,
        last_loss=1.0,
        seconds=0.5,
    )


def finished(folder: Path, data: bytes = b"abc") -> Path:
    path = folder / "finished.delta"
    path.write_bytes(data)
    return path


def test_a_delta_is_moved_in_and_found_again_after_reopening(tmp_path: Path) -> None:
    source = finished(tmp_path)
    with Outbox(tmp_path / "outbox") as outbox:
        outbox.put(source, statement("l1"))
    assert not source.exists()
    with Outbox(tmp_path / "outbox") as outbox:
        (item,) = outbox.items(OutboxState.READY)
        assert (item.statement, item.path.read_bytes()) == (statement("l1"), b"abc")


@pytest.mark.parametrize("end", [OutboxState.ACCEPTED, OutboxState.REJECTED, OutboxState.DROPPED])
def test_the_file_goes_with_the_verdict_and_the_row_stays(tmp_path: Path, end: OutboxState) -> None:
    with Outbox(tmp_path / "outbox") as outbox:
        item = outbox.put(finished(tmp_path), statement("l1"))
        outbox.move("l1", OutboxState.SUBMITTED)
        assert item.path.exists()
        outbox.move("l1", end, "because")
        outbox.move("l1", end, "because")
        assert not item.path.exists()
        assert [(row.state, row.reason) for row in outbox.items()] == [(end, "because")]


@pytest.mark.parametrize(
    ("moves", "refused"),
    [
        ([], OutboxState.ACCEPTED),
        ([OutboxState.DROPPED], OutboxState.SUBMITTED),
        ([OutboxState.SUBMITTED, OutboxState.ACCEPTED], OutboxState.REJECTED),
    ],
)
def test_other_moves_are_refused(tmp_path: Path, moves: list[OutboxState], refused: OutboxState) -> None:
    with Outbox(tmp_path / "outbox") as outbox:
        outbox.put(finished(tmp_path), statement("l1"))
        for state in moves:
            outbox.move("l1", state)
        with pytest.raises(StateError):
            outbox.move("l1", refused)


def test_a_submitted_delta_is_not_replaced_and_a_dropped_one_is(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox") as outbox:
        outbox.put(finished(tmp_path), statement("l1"))
        outbox.move("l1", OutboxState.DROPPED)
        outbox.put(finished(tmp_path, b"new"), statement("l1"))
        outbox.move("l1", OutboxState.SUBMITTED)
        with pytest.raises(StateError, match="already submitted"):
            outbox.put(finished(tmp_path), statement("l1"))
        assert outbox.items()[0].path.read_bytes() == b"new"


KILLED_CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_outbox import finished, statement
from worker.outbox import Outbox
home = Path(sys.argv[1])
outbox = Outbox(home / "outbox")
outbox.put(finished(home), statement("kept"))
if sys.argv[3] == "between file and row":
    real = outbox._db
    class Killer:
        def execute(self, sql, *rest):
            if sql.startswith("INSERT"):
                os.kill(os.getpid(), signal.SIGKILL)
            return real.execute(sql, *rest)
    outbox._db = Killer()
    outbox.put(finished(home), statement("lost"))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["between put and acknowledgement", "between file and row"])
def test_a_kill_loses_nothing_that_was_put_and_leaves_no_stray_file(tmp_path: Path, moment: str) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED_CHILD, tmp_path, Path(__file__).parent, moment], check=False)
    assert child.returncode == -signal.SIGKILL
    with Outbox(tmp_path / "outbox") as outbox:
        assert [(item.lease_id, item.path.read_bytes()) for item in outbox.items()] == [("kept", b"abc")]
    assert sorted(path.name for path in (tmp_path / "outbox").glob("*.delta")) == ["kept.delta"]


class FullOnce:
    """A database on a full disk, until room is made."""

    def __init__(self, real: sqlite3.Connection, has_room: Callable[[], bool]) -> None:
        self._real = real
        self._has_room = has_room

    def execute(self, sql: str, *rest: object) -> sqlite3.Cursor:
        if sql.startswith("INSERT") and not self._has_room():
            full = sqlite3.OperationalError("database or disk is full")
            full.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise full
        return self._real.execute(sql, *rest)

    def close(self) -> None:
        self._real.close()


def test_a_disk_that_is_full_when_the_work_is_finished_does_not_cost_it(tmp_path: Path) -> None:
    reserve = tmp_path / "outbox" / "reserve"
    with Outbox(tmp_path / "outbox") as outbox:
        outbox._db = FullOnce(outbox._db, lambda: not reserve.exists())  # type: ignore[assignment]
        outbox.put(finished(tmp_path), statement("l1"))
        assert reserve.exists(), "room is kept for the next one"
    with Outbox(tmp_path / "outbox") as outbox:
        assert [item.path.read_bytes() for item in outbox.items(OutboxState.READY)] == [b"abc"]


def test_where_there_is_no_room_at_all_the_delta_stays_where_it_was(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox") as outbox:
        outbox._db = FullOnce(outbox._db, lambda: False)  # type: ignore[assignment]
        source = finished(tmp_path)
        with pytest.raises(DiskFullError):
            outbox.put(source, statement("l1"))
        assert source.read_bytes() == b"abc"
        assert list((tmp_path / "outbox").glob("*.delta")) == []


FULL_CHILD = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_outbox import finished, statement
from rankup.errors import DiskFullError
from worker.outbox import Outbox
home = Path(sys.argv[1])
source = finished(home)
outbox = Outbox(home / "outbox")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
try:
    outbox.put(source, statement("l1"))
except DiskFullError as exc:
    sys.exit(0 if exc.remedy else 2)
sys.exit(1)
"""


def test_a_database_that_cannot_grow_is_a_full_disk(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", FULL_CHILD, tmp_path, Path(__file__).parent], check=False, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
