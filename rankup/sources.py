"""Where versions are read from: a gateway, a static web server, a bucket or a plain folder, all behind one port.

What always holds:
- a source hands out bytes and trusts nothing: whoever reads checks signatures and hashes;
- answers that are read whole are cut off at their size limit; blobs are streamed, never held;
- a folder is never left: a name that leads out of it, by a symbolic link or otherwise, is refused;
- trouble that may pass is a RetryableError, everything else is not.

Retrying is the caller's: `Patience` is the policy, `patiently` applies it to calls that are read whole. The port is
`rankup.sourceport`; what goes over HTTP is `rankup.websource`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import BinaryIO, TypeVar

from rankup.errors import BusyError, InputError, NotFoundError, RetryableError, TooLargeError, UnreachableError
from rankup.protocol import Pointer
from rankup.records import BlobRef, Retained
from rankup.retained import MAX_RETAINED_BYTES, parse_retained
from rankup.sourceport import BlobStream, Source
from rankup.store import Store, blob_key
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    MAX_POINTER_BYTES,
    manifest_key,
    parse_pointer,
    pointer_key,
    retained_key,
)
from rankup.websource import GatewaySource, StaticSource, WebSource

__all__ = [
    "BlobStream",
    "FolderSource",
    "GatewaySource",
    "Patience",
    "Source",
    "StaticSource",
    "StoreSource",
    "WebSource",
    "patiently",
]

STORE_CHUNK_BYTES = 8 * 1024 * 1024
FILE_CHUNK_BYTES = 1024 * 1024
_system_random = SystemRandom()

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long trouble is ridden out: pauses double up to `longest_pause_s`, and each is shortened by up to half.

    The default waits 90 to 181 seconds in 11 pauses: a killed Ray Serve proxy needs up to half a minute to come back.
    """

    attempts: int = 12
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    uniform: Callable[[], float] = field(default=_system_random.random, compare=False)

    def pause_s(self, failures: int, error: RetryableError) -> float:
        """Seconds to wait after the `failures`-th failure in a row (from 1); at least what a busy server asked for."""
        pause = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 60))
        asked = min(error.retry_after_s, self.longest_pause_s) if isinstance(error, BusyError) else 0.0
        return max(asked, pause * (1.0 - 0.5 * self.uniform()))


def patiently(call: Callable[[], T], patience: Patience, *, sleep: Callable[[float], None] = time.sleep) -> T:
    """The call's result; a RetryableError comes through only after the last attempt."""
    failures = 0
    while True:
        try:
            return call()
        except RetryableError as exc:
            failures += 1
            if failures >= patience.attempts:
                raise
            sleep(patience.pause_s(failures, exc))


# -- the bucket --------------------------------------------------------------------------------------------------------


class StoreSource:
    """Versions read straight from object storage: for the organiser's own machines."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def latest(self, model: str) -> Pointer:
        return parse_pointer(self._store.get(pointer_key(model), max_bytes=MAX_POINTER_BYTES), model=model)

    def envelope(self, model: str, version: int) -> bytes:
        return self._store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)

    def retained(self, model: str) -> Retained:
        try:
            data = self._store.get(retained_key(model), max_bytes=MAX_RETAINED_BYTES)
        except NotFoundError:
            return Retained(model=model)
        return parse_retained(data, model=model)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        key = blob_key(ref.sha256)
        info = self._store.head(key)
        if info is None:
            raise NotFoundError(f"there is no blob {ref.sha256}")
        yield BlobStream(start, info.size_bytes, self._chunks(key, start, info.size_bytes))

    def _chunks(self, key: str, start: int, size_bytes: int) -> Iterator[bytes]:
        for position in range(start, size_bytes, STORE_CHUNK_BYTES):
            yield self._store.get_range(key, position, min(STORE_CHUNK_BYTES, size_bytes - position))


# -- a plain folder ----------------------------------------------------------------------------------------------------


class FolderSource:
    """Versions in a folder with the layout of the bucket: a disk, a USB stick, what a web server serves.

    Safe to use from several threads. Raises InputError where there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._root = folder.resolve(strict=True)
        except OSError as exc:
            raise InputError(f"there is no folder {folder}", remedy="Check the path.") from exc
        if not self._root.is_dir():
            raise InputError(f"{folder} is a file, not a folder", remedy="Name the folder that `rankup mirror` made.")

    def models(self) -> tuple[str, ...]:
        """Names of the models in the folder, sorted."""
        names = []
        for path in self._root.glob("models/*/latest"):
            try:
                pointer_key(path.parent.name)
            except InputError:
                continue
            names.append(path.parent.name)
        return tuple(sorted(names))

    def latest(self, model: str) -> Pointer:
        return parse_pointer(self._whole(pointer_key(model), MAX_POINTER_BYTES), model=model)

    def envelope(self, model: str, version: int) -> bytes:
        return self._whole(manifest_key(model, version), MAX_ENVELOPE_BYTES)

    def retained(self, model: str) -> Retained:
        try:
            data = self._whole(retained_key(model), MAX_RETAINED_BYTES)
        except NotFoundError:
            return Retained(model=model)
        return parse_retained(data, model=model)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        with self._open(blob_key(ref.sha256)) as (file, size_bytes):
            file.seek(start)
            yield BlobStream(start, size_bytes, self._chunks(file))

    def _chunks(self, file: BinaryIO) -> Iterator[bytes]:
        while chunk := self._read(file, FILE_CHUNK_BYTES):
            yield chunk

    def _whole(self, key: str, max_bytes: int) -> bytes:
        with self._open(key) as (file, size_bytes):
            if size_bytes > max_bytes:
                raise TooLargeError(f"{self._root / key} has {size_bytes} bytes; at most {max_bytes} are read")
            return self._read(file, max_bytes)

    def _read(self, file: BinaryIO, count: int) -> bytes:
        try:
            return file.read(count)
        except OSError as exc:
            raise UnreachableError(f"{self._root} cannot be read: {exc.strerror}") from exc

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        """The open file under a key, and its size."""
        path = self._root / key
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(self._root):
                raise InputError(f"{path} leads out of the folder, to {real}", remedy="Put the file itself there.")
            # Without waiting, should the name belong to a pipe; without following a link put there just now.
            descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except RuntimeError as exc:
            raise InputError(f"{path} is a symbolic link that leads to itself") from exc
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NotFoundError(f"there is no {path}") from exc
            if exc.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
                raise InputError(f"{path} cannot be read: {exc.strerror}", remedy="Check its permissions.") from exc
            raise UnreachableError(f"{path} cannot be read: {exc.strerror}") from exc
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise InputError(f"{path} is no file", remedy="Put the file itself there.")
        with os.fdopen(descriptor, "rb") as file:
            yield file, found.st_size
