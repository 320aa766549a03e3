"""A bucket as a plain folder: everything that a server cannot make again. `rankup.givingback` is the way back.

    FOLDER/bucket/<key>    every object, under its key
    FOLDER/backup.json     what lies there, and since when it is whole (`BackupState`)
    FOLDER/index.sqlite    sizes and etags of the records that were copied: what need not be copied again

What always holds:
- the folder is whole after every run that ended, and after one that was killed it is what the last whole run made of
  it, with some new blobs and records that nothing names yet;
- a record is read before what it names, and put into the folder after it: a server may go on while it is copied, and
  what a pointer in the folder names is in the folder;
- blobs and uploads have the hash that their names say when they arrive; nothing is removed from the folder;
- memory is bounded, whatever the size and the number of objects. One process at a time writes a folder.

Collecting garbage (`rankup admin gc`) while a backup runs may take away what it is about to copy: it would be left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

from pydantic import Field, ValidationError

from rankup.durable import sync_folder, write_file
from rankup.errors import IntegrityError, NotFoundError, StateError
from rankup.folder import disk_errors, folder_lock, sha256_of
from rankup.message import Finite, Message, canonical_json
from rankup.store import Store, StoredObject

STATE_NAME: Final = "backup.json"
INDEX_NAME: Final = "index.sqlite"
BUCKET_NAME: Final = "bucket"
_INCOMING_NAME: Final = ".incoming"
PARALLEL: Final = 8
WINDOW: Final = 64
"""Objects under way or waiting for a thread."""
WHOLE_BYTES: Final = 8 * 1024**2
"""Up to this size an object is written in one request, and never over another one."""

_NAMED_BY_HASH: Final = re.compile(r"(?:blobs/sha256/[0-9a-f]{2}|uploads/[^/]+)/([0-9a-f]{64})(?:\.delta)?")
SCRATCH: Final = "doctor/"

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (bytes that are done, bytes in all); what was there already counts as done."""


class BackupState(Message):
    """`backup.json`."""

    format: Literal["rankup.backup/1"] = "rankup.backup/1"
    bucket: str
    """Where it was copied from, in words."""
    started_at: Finite
    """What was in the bucket at this moment is in the folder."""
    finished_at: Finite
    objects: dict[str, int] = Field(default_factory=dict)
    """First part of the keys -> how many."""
    total_bytes: int


@dataclass(frozen=True)
class Copied:
    """What a run did. `vanished`: objects that went while it ran, as uploads do when they are judged."""

    state: BackupState
    copied: int
    copied_bytes: int
    vanished: int


@dataclass(frozen=True)
class Pass:
    """Objects that are copied before those of the next pass."""

    prefix: str
    takes: Callable[[str], bool]


def _is_receipt(key: str) -> bool:
    return key.startswith("rounds/") and "/receipts/" in key


PASSES: Final = (
    Pass("models/", lambda key: key.endswith("/latest")),
    Pass("models/", lambda key: not key.endswith("/latest")),
    # A submission goes when it has a receipt, which is there by then: so it is looked for first.
    Pass("rounds/", lambda key: not _is_receipt(key)),
    Pass("uploads/", lambda _: True),
    Pass("rounds/", _is_receipt),
    Pass("", lambda key: not key.startswith(("models/", "rounds/", "uploads/", SCRATCH))),
)
"""What names something comes before what it names; the way back is the reverse."""


def back_up(
    store: Store,
    folder: Path,
    *,
    bucket: str,
    clock: Callable[[], float],
    check: bool = False,
    progress: Progress | None = None,
) -> Copied:
    """Bring `folder` up to date with the bucket. `check` hashes again what lies there already.

    Raises:
        IntegrityError: bytes in the bucket do not have the hash that their name says; the folder keeps what it had.
        StateError: another process writes to the folder, or it is no backup.
        DiskFullError, SetupError, and what the store raises. Run it again: it goes on.
    """
    with folder_lock(folder):
        before = read_state(folder)
        if before is None and any((folder / BUCKET_NAME).glob("*")) and not (folder / INDEX_NAME).exists():
            raise StateError(f"{folder} is no backup, but has a {BUCKET_NAME} in it", remedy="Choose an empty folder.")
        run = _Run(store, folder, check=check, progress=progress)
        started_at = clock()
        try:
            objects, total_bytes = run.copy()
        finally:
            run.close()
        state = BackupState(
            bucket=bucket, started_at=started_at, finished_at=clock(), objects=objects, total_bytes=total_bytes
        )
        with disk_errors(folder):
            write_file(folder / STATE_NAME, canonical_json(state))
        return Copied(state, run.copied, run.copied_bytes, run.vanished)


def read_state(folder: Path) -> BackupState | None:
    """What lies in the folder; None before the first run that ended. Raises StateError where it cannot be read."""
    try:
        return BackupState.model_validate_json((folder / STATE_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        raise StateError(f"{folder / STATE_NAME} cannot be read", remedy="Choose another folder.") from exc


class _Run:
    """One run of a backup."""

    def __init__(self, store: Store, folder: Path, *, check: bool, progress: Progress | None) -> None:
        self._store = store
        self._bucket = folder / BUCKET_NAME
        self._incoming = folder / _INCOMING_NAME
        self._check = check
        self._progress = progress
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._total_bytes = 0
        self.copied = self.copied_bytes = self.vanished = 0
        with disk_errors(folder):
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir()
            self._bucket.mkdir(exist_ok=True)
            self._index = sqlite3.connect(folder / INDEX_NAME, isolation_level=None, check_same_thread=False)
            self._index.execute("PRAGMA journal_mode=WAL")
            self._index.execute("PRAGMA synchronous=NORMAL")
            self._index.execute("DROP TABLE IF EXISTS incoming")
            for table in ("records", "incoming"):
                self._index.execute(
                    f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, size INTEGER, etag TEXT)"
                )

    def close(self) -> None:
        self._index.close()

    def copy(self) -> tuple[dict[str, int], int]:
        """Copy all that is new; how many objects of each kind the bucket has, and their bytes."""
        for each in self._store.scan(""):
            self._total_bytes += each.size_bytes
        counts: dict[str, int] = {}
        total_bytes = 0

        def counted(found: Iterable[StoredObject]) -> Iterator[StoredObject]:
            nonlocal total_bytes
            for each in found:
                kind = each.key.split("/", 1)[0]
                counts[kind] = counts.get(kind, 0) + 1
                total_bytes += each.size_bytes
                yield each

        for wanted in PASSES:
            listed = (each for each in self._store.scan(wanted.prefix) if wanted.takes(each.key))
            in_parallel(self._take, counted(listed))
        self._install()
        return counts, total_bytes

    def _take(self, each: StoredObject) -> None:
        """Bring one object in, where the folder does not have it; records wait until all is there."""
        digest = digest_in(each.key)
        try:
            fresh = not self._has(each, digest)
            if fresh and digest is not None:
                self._fetch(each.key, self._bucket / each.key, digest)
            elif fresh:
                self._store.get_file(each.key, self._incoming / each.key)
                with self._lock:
                    self._index.execute(
                        "INSERT OR REPLACE INTO incoming VALUES (?, ?, ?)", (each.key, each.size_bytes, each.etag)
                    )
        except NotFoundError:
            with self._lock:
                self.vanished += 1
            return
        with self._lock:
            self._done_bytes += each.size_bytes
            if fresh:
                self.copied += 1
                self.copied_bytes += each.size_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, max(self._total_bytes, self._done_bytes))

    def _has(self, each: StoredObject, digest: str | None) -> bool:
        path = self._bucket / each.key
        try:
            if path.stat().st_size != each.size_bytes:
                return False
        except OSError:
            return False
        if digest is not None:
            return not self._check or sha256_of(path) == digest
        with self._lock:
            row = self._index.execute("SELECT size, etag FROM records WHERE key = ?", (each.key,)).fetchone()
        return row == (each.size_bytes, each.etag) and each.etag != ""

    def _fetch(self, key: str, path: Path, digest: str) -> None:
        fetched = self._incoming / key
        self._store.get_file(key, fetched)
        if sha256_of(fetched) != digest:
            fetched.unlink()
            raise IntegrityError(
                f"the bytes under {key} have another hash than their name says",
                remedy="Put a good copy in their place (an older backup, a mirror), then run the backup again.",
            )
        _move(fetched, path)

    def _install(self) -> None:
        """Move the records into their places: what is named first, the pointers last."""
        for each_pass in reversed(PASSES):
            for path in files_under(self._incoming / each_pass.prefix):
                key = path.relative_to(self._incoming).as_posix()
                if not each_pass.takes(key):
                    continue
                _move(path, self._bucket / key)
                self._index.execute(
                    "INSERT OR REPLACE INTO records SELECT key, size, etag FROM incoming WHERE key = ?", (key,)
                )
        with disk_errors(self._bucket):
            shutil.rmtree(self._incoming, ignore_errors=True)


# -- files -------------------------------------------------------------------------------------------------------------


def digest_in(key: str) -> str | None:
    """The hash in the name of a blob or an upload; None for a record."""
    found = _NAMED_BY_HASH.fullmatch(key)
    return found[1] if found else None


def _move(source: Path, target: Path) -> None:
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        sync_folder(target.parent)


def files_under(folder: Path) -> Iterator[Path]:
    """Every file below, sorted within its folder."""
    for place, names, files in os.walk(folder):
        names.sort()
        yield from (Path(place) / name for name in sorted(files))


def in_parallel(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do `work` for every item, a few at a time; the first error ends it and is raised."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        running: set[Future[None]] = set()
        try:
            for item in items:
                if len(running) >= WINDOW:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for each in done:
                        each.result()
                running.add(pool.submit(work, item))
            for each in running:
                each.result()
        finally:
            for each in running:
                each.cancel()
            with contextlib.suppress(Exception):
                wait(running)
