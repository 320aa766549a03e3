"""Finished deltas on their way to the server, in SQLite beside the files: work that is done is never lost.

    put -> READY <-> SUBMITTED -> ACCEPTED | REJECTED
             └────────────┴────-> DROPPED (the server will not take it any more; the reason says why)

What always holds:
- when `put` returns, file and row are on the disk (fsync, WAL with synchronous=FULL): power may fail now; a little room
  is kept for the row, so a disk that is full by then does not cost the work; where it is not enough, the file is where
  it was before;
- a row never names a file that is not whole; a file without a row is the rest of an interrupted `put` and is removed;
- a state only moves along the arrows; repeating a move changes nothing;
- the file goes when the verdict is in, the row stays as the history.

One process at a time (the server folder's lock); its threads may share one `Outbox`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rankup.durable import sync_folder, write_file
from rankup.errors import StateError
from rankup.protocol import SubmitStatement
from worker.disk import full_disk_means_disk_full

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deltas (
    lease_id   TEXT PRIMARY KEY,
    statement  TEXT NOT NULL,
    voucher    TEXT NOT NULL,
    state      TEXT NOT NULL,
    reason     TEXT NOT NULL DEFAULT '',
    created_at REAL NOT NULL,
    changed_at REAL NOT NULL
)"""


_RESERVE_NAME = "reserve"
_RESERVE_BYTES = 64 * 1024


class OutboxState(StrEnum):
    READY = "ready"
    SUBMITTED = "submitted"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    DROPPED = "dropped"

    @property
    def ended(self) -> bool:
        return self in (OutboxState.ACCEPTED, OutboxState.REJECTED, OutboxState.DROPPED)


_MOVES = {
    OutboxState.READY: (OutboxState.SUBMITTED, OutboxState.DROPPED),
    OutboxState.SUBMITTED: (
        OutboxState.READY,
        OutboxState.ACCEPTED,
        OutboxState.REJECTED,
        OutboxState.DROPPED,
    ),
}


@dataclass(frozen=True)
class OutboxItem:
    """One finished delta."""

    statement: SubmitStatement
    path: Path
    state: OutboxState
    reason: str
    created_at: float
    voucher: str = ""
    """Of its lease; empty where its server wrote none."""

    @property
    def lease_id(self) -> str:
        return self.statement.lease_id


class Outbox:
    """The deltas of one server folder, in `folder` (made when missing)."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        with full_disk_means_disk_full(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                folder / "outbox.sqlite", isolation_level=None, check_same_thread=False, timeout=10.0
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_SCHEMA)
        self._remove_strays()
        self._keep_reserve()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; everything acknowledged is on the disk already."""
        with self._lock:
            self._db.close()

    def put(self, delta_file: Path, statement: SubmitStatement, voucher: str = "") -> OutboxItem:
        """Take over `delta_file` (moved, same file system) together with what will be signed about it, and the voucher
        of its lease.

        A delta of the same lease that was not submitted, or was dropped, is replaced. Raises `DiskFullError`, and
        `StateError` when one has been submitted.
        """
        target = self._path(statement.lease_id)
        now = self._clock()
        with self._lock, full_disk_means_disk_full(self._folder):
            known = self._db.execute("SELECT state FROM deltas WHERE lease_id = ?", (statement.lease_id,)).fetchone()
            if known is not None and known[0] not in (OutboxState.READY, OutboxState.DROPPED):
                raise StateError(f"a delta of lease {statement.lease_id} is already {known[0]}")
            with delta_file.open("rb") as file:
                os.fsync(file.fileno())
            delta_file.replace(target)
            sync_folder(self._folder)
            try:
                self._add((statement.lease_id, statement.model_dump_json(), voucher, OutboxState.READY, now, now))
            except sqlite3.Error:
                target.replace(delta_file)
                raise
        return OutboxItem(statement, target, OutboxState.READY, "", now, voucher)

    def move(self, lease_id: str, state: OutboxState, reason: str = "") -> None:
        """Record what became of a delta; the file is removed once the state has ended.

        Raises `StateError` for a move that the diagram does not have, or for a lease that is not here.
        """
        with self._lock, full_disk_means_disk_full(self._folder):
            known = self._db.execute("SELECT state FROM deltas WHERE lease_id = ?", (lease_id,)).fetchone()
            if known is None:
                raise StateError(f"the outbox has no delta of lease {lease_id}")
            now = OutboxState(known[0])
            if now != state:
                if state not in _MOVES.get(now, ()):
                    raise StateError(f"the delta of lease {lease_id} is {now}; it cannot become {state}")
                self._db.execute(
                    "UPDATE deltas SET state = ?, reason = ?, changed_at = ? WHERE lease_id = ?",
                    (state, reason, self._clock(), lease_id),
                )
            if state.ended:
                self._path(lease_id).unlink(missing_ok=True)

    def items(self, *states: OutboxState) -> list[OutboxItem]:
        """Deltas in any of `states` (all when none is named), oldest first."""
        wanted = states or tuple(OutboxState)
        marks = ",".join("?" * len(wanted))
        # All that is formatted into the statement are names of columns and a row of question marks.
        columns = "statement, state, reason, created_at, voucher"
        query = f"SELECT {columns} FROM deltas WHERE state IN ({marks}) ORDER BY created_at"  # noqa: S608
        with self._lock:
            rows = self._db.execute(query, wanted).fetchall()
        found = []
        for text, state, reason, created_at, voucher in rows:
            statement = SubmitStatement.model_validate_json(text)
            path = self._path(statement.lease_id)
            found.append(OutboxItem(statement, path, OutboxState(state), reason, created_at, voucher))
        return found

    def _add(self, row: tuple[str | float, ...]) -> None:
        """Write a row, with the room that is kept for it if there is no other."""
        insert = "INSERT OR REPLACE INTO deltas VALUES (?, ?, ?, ?, '', ?, ?)"
        reserve = self._folder / _RESERVE_NAME
        try:
            self._db.execute(insert, row)
        except sqlite3.OperationalError:
            if not reserve.exists():
                raise
            reserve.unlink()
            self._db.execute(insert, row)
        self._keep_reserve()

    def _keep_reserve(self) -> None:
        reserve = self._folder / _RESERVE_NAME
        with contextlib.suppress(OSError):
            if not reserve.exists():
                write_file(reserve, os.urandom(_RESERVE_BYTES))

    def _path(self, lease_id: str) -> Path:
        return self._folder / f"{lease_id}.delta"

    def _remove_strays(self) -> None:
        kept = {item.path for item in self.items() if not item.state.ended}
        for path in self._folder.glob("*.delta"):
            if path not in kept:
                path.unlink()
