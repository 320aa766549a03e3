"""Fetching blobs into a folder: by hash, in parallel, resumable, bounded.

What always holds:
- `folder/<sha256>` holds a prefix of that blob or, after `fetch` returned, all of it with the right hash;
- a killed fetch goes on where it stopped; bytes that arrived are kept unless the finished blob has a wrong hash, and
  then it is fetched once more from the start before the error is raised;
- never more bytes are written than the reference says, and free space is checked before the first one;
- trouble of the network is ridden out by `Patience`, counted anew whenever bytes arrived;
- with a `Limit`, all threads together take no more bytes a second than it allows.

It knows nothing of versions: `rankup.pull` and `rankup.replay` decide what is fetched and what it is worth.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from rankup.errors import DiskFullError, InputError, IntegrityError, RetryableError, UnreachableError
from rankup.folder import disk_errors
from rankup.records import BlobRef
from rankup.sources import Patience, Source

READ_BYTES = 1024 * 1024
SLICE_S = 0.25
"""The longest wait before a limit is asked again."""


@dataclass(frozen=True)
class PullProgress:
    """How far it is; bytes that were there count. `stage` is "checking", "downloading", "applying", "installing",
    "replaying" or "summing"."""

    stage: str
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[PullProgress], None]


class Limit(Protocol):
    """How fast bytes may come; asked by several threads."""

    def take(self, count: int) -> float:
        """Seconds to wait after `count` bytes that have just arrived, before more are asked for; with 0, what is left
        of that now. What it raises ends the fetch, which keeps what has arrived."""


class RateLimit:
    """A rate that all threads of one or more fetches share: `bytes_per_s`. Who comes late by at most `burst_s` seconds
    makes up for it, so that the average holds on a busy machine; a longer pause saves up nothing.

    `clock` is a monotonic one, in seconds. Law: in any stretch of t seconds no more than
    bytes_per_s * (t + burst_s) bytes are let through, and one chunk of each thread.
    """

    def __init__(
        self, bytes_per_s: float, *, burst_s: float = 0.25, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises InputError where the rate is not above 0."""
        if not bytes_per_s > 0:
            raise InputError(f"a limit of {bytes_per_s:g} bytes a second lets nothing through")
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_s
        self._clock = clock
        self._paid_until = float("-inf")
        self._lock = threading.Lock()

    def change(self, bytes_per_s: float) -> None:
        """Another rate from now on; what came too early under the old one is waited for at the new one."""
        with self._lock:
            now = self._clock()
            ahead_bytes = max(0.0, self._paid_until - now) * self._bytes_per_s
            if ahead_bytes > 0:
                self._paid_until = now + ahead_bytes / bytes_per_s
            self._bytes_per_s = bytes_per_s

    def take(self, count: int) -> float:
        """As `Limit.take`."""
        with self._lock:
            now = self._clock()
            begin = self._paid_until if now - self._paid_until <= self._burst_s else now
            self._paid_until = begin + count / self._bytes_per_s
            return max(0.0, self._paid_until - now)


def fetch(
    source: Source,
    refs: Iterable[BlobRef],
    folder: Path,
    *,
    parallel: int = 4,
    patience: Patience | None = None,
    progress: OnProgress | None = None,
    limit: Limit | None = None,
) -> None:
    """Have every blob of `refs` as `folder/<sha256>`, complete and checked. The caller holds the folder's lock.

    `limit` caps the bytes a second of all threads together; None: as fast as they come.

    Raises:
        DiskFullError: too little space; raised before the first byte where that can be told.
        IntegrityError: a blob came with a wrong size or hash, twice.
        RetryableError: the source kept failing.
        NotFoundError: the source has no such blob.
    """
    wanted = sorted({ref.sha256: ref for ref in refs}.values(), key=lambda ref: (-ref.size_bytes, ref.sha256))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        present = {ref.sha256: _size(folder / ref.sha256) for ref in wanted}
        free_bytes = shutil.disk_usage(folder).free
    needed_bytes = sum(max(0, ref.size_bytes - present[ref.sha256]) for ref in wanted)
    if needed_bytes > free_bytes:
        raise DiskFullError(f"{needed_bytes} bytes are needed in {folder}, {free_bytes} are free")
    task = _Task(source, folder, patience or Patience(), sum(ref.size_bytes for ref in wanted), progress, limit)
    pool = ThreadPoolExecutor(max_workers=max(1, min(parallel, len(wanted))), thread_name_prefix="rankup-fetch")
    try:
        for future in as_completed([pool.submit(task.fetch_one, ref) for ref in wanted]):
            future.result()
    finally:
        task.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _StoppedError(Exception):
    """Another blob failed or the user interrupted; what has arrived stays."""


class _Task:
    """One call of `fetch`, shared by its threads."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        patience: Patience,
        total_bytes: int,
        progress: OnProgress | None,
        limit: Limit | None,
    ) -> None:
        self.stopped = threading.Event()
        self._source = source
        self._folder = folder
        self._patience = patience
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self._limit = limit
        self._lock = threading.Lock()

    def fetch_one(self, ref: BlobRef) -> None:
        path = self._folder / ref.sha256
        problem = None
        for _ in range(2):
            with disk_errors(path), path.open("a+b", buffering=0) as part:
                problem = self._complete(ref, part)
                if problem is None:
                    os.fsync(part.fileno())
                    return
                # What arrived cannot be told apart from what is wrong in it.
                self._report(-min(part.tell(), ref.size_bytes))
                part.truncate(0)
        with disk_errors(path):
            path.unlink(missing_ok=True)
        raise IntegrityError(f"the blob {ref.sha256} came twice with wrong bytes: {problem}")

    def _complete(self, ref: BlobRef, part: BinaryIO) -> str | None:
        """Append what is missing; returns what is wrong with the result. Leaves the position at the part's end."""
        digest = hashlib.sha256()
        if os.fstat(part.fileno()).st_size > ref.size_bytes:
            part.truncate(0)
        part.seek(0)
        while piece := part.read(READ_BYTES):
            digest.update(piece)
            self._report(len(piece))
        failures = 0
        while (before := part.tell()) < ref.size_bytes:
            try:
                if problem := self._append(ref, part, digest.update):
                    return problem
            except RetryableError as exc:
                failures = 1 if part.tell() > before else failures + 1
                if failures >= self._patience.attempts:
                    raise
                if self.stopped.wait(self._patience.pause_s(failures, exc)):
                    raise _StoppedError from exc
        if digest.hexdigest() != ref.sha256:
            return f"their hash is {digest.hexdigest()}"
        return None

    def _append(self, ref: BlobRef, part: BinaryIO, update: Callable[[bytes], None]) -> str | None:
        """One attempt to get the rest."""
        position = part.tell()
        with self._source.stream(ref, position) as stream:
            if stream.total_bytes is not None and stream.total_bytes != ref.size_bytes:
                return f"{stream.total_bytes} bytes instead of {ref.size_bytes}"
            # A server that ignores Range begins at 0: pass over what is here already.
            surplus = position - stream.start
            if surplus < 0:
                raise UnreachableError(f"asked for the blob from byte {position}, got it from {stream.start}")
            for arrived in stream.chunks:
                if self.stopped.is_set():
                    raise _StoppedError
                chunk = arrived[surplus:]
                surplus -= len(arrived) - len(chunk)
                if position + len(chunk) > ref.size_bytes:
                    return f"more than {ref.size_bytes} bytes"
                _write_all(part, chunk)
                update(chunk)
                position += len(chunk)
                self._report(len(chunk))
                # What was passed over came through the wire too.
                self._pace(len(arrived))
        if position < ref.size_bytes:
            raise UnreachableError(f"the blob {ref.sha256[:16]}… broke off after {position} of {ref.size_bytes} bytes")
        return None

    def _pace(self, count: int) -> None:
        """Wait as the limit asks, in slices: it may change, or end it all."""
        wait_s = self._limit.take(count) if self._limit is not None else 0.0
        while wait_s > 0 and self._limit is not None:
            if self.stopped.wait(min(wait_s, SLICE_S)):
                raise _StoppedError
            wait_s = self._limit.take(0)

    def _report(self, more_bytes: int) -> None:
        with self._lock:
            self._done_bytes += more_bytes
            if self._progress is not None and more_bytes:
                self._progress(PullProgress("downloading", self._done_bytes, self._total_bytes))


def _write_all(part: BinaryIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[part.write(rest) :]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
