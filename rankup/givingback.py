"""A backup folder put back into an empty bucket: `rankup.backup` says what lies where.

What always holds:
- nothing in a bucket is overwritten, and a bucket that has something else in it is left alone;
- what is named is written before what names it, the pointers last: a restore that was cut off shows no version, and the
  next one goes on;
- blobs and uploads have the hash that their names say, or they are not given back; memory is bounded.
"""

from __future__ import annotations

import threading
from pathlib import Path

from rankup.backup import (
    BUCKET_NAME,
    PASSES,
    SCRATCH,
    WHOLE_BYTES,
    Copied,
    Progress,
    digest_in,
    files_under,
    in_parallel,
    read_state,
)
from rankup.errors import ConflictError, IntegrityError, StateError
from rankup.folder import folder_lock, sha256_of
from rankup.store import Store


def restore(store: Store, folder: Path, *, progress: Progress | None = None) -> Copied:
    """Put everything of `folder` into an empty bucket, or go on with one that this has begun to fill.

    Raises:
        StateError: the folder holds no backup, or the bucket has something that is not in it.
        IntegrityError: a file of the backup does not have the hash that its name says.
        What the store raises. Run it again: it goes on.
    """
    with folder_lock(folder):
        state = read_state(folder)
        if state is None:
            raise StateError(
                f"{folder} holds no backup that was finished", remedy="Make one: `rankup admin backup FOLDER`."
            )
        bucket = folder / BUCKET_NAME
        begun = _require_nothing_else(store, bucket)
        run = _Return(store, bucket, begun=begun, progress=progress, total_bytes=state.total_bytes)
        for each_pass in reversed(PASSES):
            keys = (path.relative_to(bucket).as_posix() for path in files_under(bucket / each_pass.prefix))
            in_parallel(run.give, filter(each_pass.takes, keys))
        return Copied(state, run.copied, run.copied_bytes, 0)


def _require_nothing_else(store: Store, bucket: Path) -> bool:
    """Whether the bucket has objects of this backup already."""
    begun = False
    for each in store.scan(""):
        if each.key.startswith(SCRATCH):
            continue
        path = bucket / each.key
        same = path.is_file() and path.stat().st_size == each.size_bytes
        if same and PASSES[0].takes(each.key):
            same = store.get(each.key, max_bytes=WHOLE_BYTES) == path.read_bytes()
        if not same:
            raise StateError(
                f"the bucket is not empty: it has {each.key}, which is not of this backup",
                remedy="Restore into an empty bucket: name a new one in RANKUP_STORE_BUCKET.",
            )
        begun = True
    return begun


class _Return:
    """One run of a restore."""

    def __init__(self, store: Store, bucket: Path, *, begun: bool, progress: Progress | None, total_bytes: int) -> None:
        self._store = store
        self._bucket = bucket
        self._begun = begun
        self._progress = progress
        self._total_bytes = total_bytes
        self._lock = threading.Lock()
        self._done_bytes = 0
        self.copied = self.copied_bytes = 0

    def give(self, key: str) -> None:
        """Write one object, unless it is there."""
        path = self._bucket / key
        size_bytes = path.stat().st_size
        fresh = not (self._begun and self._store.head(key) is not None)
        if fresh:
            digest = digest_in(key)
            if digest is not None and sha256_of(path) != digest:
                raise IntegrityError(
                    f"{path} does not have the hash that its name says",
                    remedy="Put a good copy in its place, then run the same command again.",
                )
            self._write(key, path, size_bytes)
        with self._lock:
            self._done_bytes += size_bytes
            if fresh:
                self.copied += 1
                self.copied_bytes += size_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, max(self._total_bytes, self._done_bytes))

    def _write(self, key: str, path: Path, size_bytes: int) -> None:
        if size_bytes > WHOLE_BYTES:
            self._store.put_file(key, path)
            return
        data = path.read_bytes()
        kind = "application/json" if key.endswith((".json", "/latest")) else "application/octet-stream"
        try:
            self._store.put(key, data, if_absent=True, content_type=kind)
        except ConflictError:
            # A write whose answer was lost, or somebody else who restores the same.
            if self._store.get(key, max_bytes=WHOLE_BYTES) != data:
                raise StateError(f"somebody else has written {key} into the bucket") from None
