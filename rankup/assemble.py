"""Carrying out a plan: every file of it comes to lie in `.partial`, complete and checked; nothing else is changed.

What always holds:
- `partial/<sha256>` is written by downloads and complete otherwise: what comes from elsewhere is written under another
  name, hashed, put on disk and then renamed;
- a file of another folder is read or linked to, never written: before a download goes on in a part, it is made sure
  that no other folder has that file;
- free space for all of it is looked at before the first byte is fetched;
- a blob that is missing or wrong, or a way that gives other bytes than the manifest says, is no error but a `Setback`:
  the caller plans again without it. Trouble of the network or of the disk is an error.

Files that are made out of others are the subject of `rankup.remake`.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rankup.download import Limit, OnProgress, fetch
from rankup.durable import sync_file
from rankup.errors import DiskFullError, IntegrityError, NotFoundError
from rankup.folder import disk_errors, sha256_of
from rankup.holdings import Holdings
from rankup.protocol import Pointer
from rankup.records import BlobRef, FileEntry, Retained
from rankup.remake import MAKING, Bench, Setback, remake
from rankup.routes import Plan, Route, state_of
from rankup.sources import BlobStream, Patience, Source


@dataclass(frozen=True)
class Means:
    """By what a plan is carried out. `at_hand` says where files lie; `partial` is the folder for all that is new."""

    source: CountedSource
    at_hand: Holdings
    partial: Path
    parallel: int = 4
    patience: Patience | None = None
    limit: Limit | None = None
    progress: OnProgress | None = None


class CountedSource:
    """A source that counts the bytes of blobs that came from it, and notes which blobs it does not have."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self.fetched_bytes = 0
        self.asked: set[str] = set()
        self.missing: set[str] = set()

    def begin(self) -> None:
        """Forget which blobs were asked for; the bytes stay counted."""
        self.asked.clear()
        self.missing.clear()

    def latest(self, model: str) -> Pointer:
        return self._source.latest(model)

    def envelope(self, model: str, version: int) -> bytes:
        return self._source.envelope(model, version)

    def retained(self, model: str) -> Retained:
        return self._source.retained(model)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        with self._lock:
            self.asked.add(ref.sha256)
        try:
            with self._source.stream(ref, start) as stream:
                yield replace(stream, chunks=self._counted(stream.chunks))
        except NotFoundError:
            with self._lock:
                self.missing.add(ref.sha256)
            raise

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            with self._lock:
                self.fetched_bytes += len(chunk)
            yield chunk


def assemble(plan: Plan, missing: Sequence[FileEntry], means: Means) -> Setback | None:
    """Have every file of `missing`, which the plan has routes to, as `partial/<sha256>`; None when they are there.

    Raises:
        DiskFullError: too little space.
        RetryableError: the source kept failing.
        SetupError: the folder cannot be written.
    """
    wanted = {file.sha256 for file in missing}
    routes = [route for route in plan.routes if route.file.sha256 in wanted]
    partial = means.partial
    with disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        _require_room(plan, routes, means)
        for ref in plan.refs:
            part = partial / ref.sha256
            if part.exists() and part.stat().st_nlink > 1:
                part.unlink()
    means.source.begin()
    try:
        fetch(
            means.source,
            plan.refs,
            partial,
            parallel=means.parallel,
            patience=means.patience,
            progress=means.progress,
            limit=means.limit,
        )
    except (IntegrityError, NotFoundError) as exc:
        refs = {ref.sha256 for ref in plan.refs}
        wrong = {digest for digest in means.source.asked & refs if not (partial / digest).exists()}
        avoid = frozenset(wrong | (means.source.missing & refs))
        if not avoid:
            raise
        return Setback(exc, avoid=avoid)
    for route in routes:
        if route.kind == "here" and (setback := _take(route, means)) is not None:
            return setback
    return remake(plan, routes, _bench(means))


def _require_room(plan: Plan, routes: Sequence[Route], means: Means) -> None:
    """Raises DiskFullError. What another folder of the same disk has needs no room: it is linked to."""
    at_hand, partial = means.at_hand, means.partial
    needed = 0
    for ref in plan.refs:
        part = partial / ref.sha256
        needed += ref.size_bytes - min(ref.size_bytes, part.stat().st_size if part.exists() else 0)
    for route in routes:
        path = at_hand.files.get(route.file.sha256)
        linked = path is not None and (
            path.parent == partial or (route.file.sha256 in at_hand.claimed and _same_disk(path, partial))
        )
        if not (route.kind == "full" or (route.kind == "here" and linked)):
            needed += route.file.size_bytes
    if len(plan.chain) > 2:
        made = {route.file.sha256 for route in routes if route.kind == "rounds"}
        groups = [sum(f.size_bytes for f in state_of(g) if f.sha256 in made) for g in plan.manifest.groups]
        needed += max(groups, default=0) * _bench(means).workers
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise DiskFullError(f"{needed} bytes are needed in {partial.parent}, {free} are free")


def _take(route: Route, means: Means) -> Setback | None:
    """Bring a file that is at hand under another name into `.partial`."""
    digest = route.file.sha256
    place = means.partial / digest
    making = place.with_name(digest + MAKING)
    held = means.at_hand.verified(digest)
    if held == place:
        return None
    with disk_errors(place):
        making.unlink(missing_ok=True)
        try:
            if held is not None and digest in means.at_hand.claimed and _linked(held, making):
                making.replace(place)
                return None
            if held is not None:
                shutil.copyfile(held, making)
                if sha256_of(making) == digest:
                    sync_file(making)
                    making.replace(place)
                    return None
        except FileNotFoundError:
            pass  # another process has removed the folder
        making.unlink(missing_ok=True)
    return Setback(NotFoundError(f"{means.at_hand.files[digest]} has changed or gone"), lost=frozenset({digest}))


def _linked(file: Path, name: Path) -> bool:
    try:
        os.link(file, name)
    except OSError:
        return False
    return True


def _same_disk(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:
        return False


def _bench(means: Means) -> Bench:
    workers = max(1, min(means.parallel, os.cpu_count() or 1))
    return Bench(means.at_hand, means.partial, workers, means.progress)
