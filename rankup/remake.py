"""Files made out of others: patches applied to a base, and the rounds since an older version made again.

What always holds:
- nothing under its final name is incomplete: a file is made under another name, hashed, put on disk, then renamed;
- several files are made at once, at most `Bench.workers`, and the failure of one does not keep the others;
- memory is a few blocks or tiles for each worker; patches are removed as soon as no file needs them any more.

What must be there before is fetched by `rankup.assemble`; which way is taken is decided by `rankup.routes`.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rankup.download import OnProgress, PullProgress
from rankup.durable import sync_file
from rankup.errors import IntegrityError, NotFoundError, RankupError
from rankup.folder import disk_errors
from rankup.holdings import Holdings
from rankup.patch import apply_patches
from rankup.records import Group, KeyRotation, Manifest
from rankup.refold import RoundSum, refold_group
from rankup.routes import Plan, Route, same_group, state_of

MAKING: Final = ".making"
"""Ends the name of a file that is not complete yet."""


@dataclass(frozen=True)
class Setback:
    """Why a plan could not be carried out as it is, and what the next one must do without."""

    cause: RankupError
    avoid: frozenset[str] = frozenset()
    """Blobs that are missing or wrong at the source."""
    whole: frozenset[str] = frozenset()
    """Files to which another way than the whole file failed."""
    lost: frozenset[str] = frozenset()
    """Files at hand that have changed or gone."""


@dataclass(frozen=True)
class Bench:
    """Where files are made: what is at hand, and the folder for what is new."""

    at_hand: Holdings
    partial: Path
    workers: int
    progress: OnProgress | None

    def path(self, digest: str) -> Path:
        """Where a file lies that is at hand, or was fetched or made."""
        return self.at_hand.files.get(digest, self.partial / digest)


def remake(plan: Plan, routes: Sequence[Route], bench: Bench) -> Setback | None:
    """Make the files of those routes that are patches or rounds, as `partial/<sha256>`; None when they are there.

    Raises DiskFullError, SetupError: the disk.
    """
    routes = [route for route in routes if route.kind in ("patches", "rounds")]
    if not routes:
        return None
    total = sum(route.file.size_bytes for route in {route.file.sha256: route for route in routes}.values())
    report = _Report(total, bench.progress)
    patched = {route.file.sha256: route for route in routes if route.kind == "patches"}
    uses = Counter(patch.sha256 for route in patched.values() for patch in route.patches)
    setbacks: list[Setback] = []
    pool = ThreadPoolExecutor(bench.workers, thread_name_prefix="rankup-apply")
    try:
        waiting: dict[Future[Setback | None], Route | None] = {
            pool.submit(_patch, route, bench, report): route for route in patched.values()
        }
        if remade := {route.file.sha256 for route in routes if route.kind == "rounds"}:
            try:
                makers = _group_makers(plan, remade, bench, report)
            except IntegrityError as exc:
                return Setback(exc, whole=frozenset(remade))
            waiting |= dict.fromkeys([pool.submit(make) for make in makers])
        for future in as_completed(waiting):
            setback, route = future.result(), waiting[future]
            if setback is not None:
                setbacks.append(setback)
            elif route is not None:
                uses.subtract(patch.sha256 for patch in route.patches)
                with disk_errors(bench.partial):
                    for patch in route.patches:
                        if not uses[patch.sha256]:
                            (bench.partial / patch.sha256).unlink(missing_ok=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if not setbacks:
        return None
    return Setback(setbacks[0].cause, whole=frozenset().union(*(setback.whole for setback in setbacks)))


class _Report:
    """Bytes made so far; called from several threads."""

    def __init__(self, total_bytes: int, progress: OnProgress | None) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done_bytes = min(self._total_bytes, self._done_bytes + count)
            if self._progress is not None:
                self._progress(PullProgress("applying", self._done_bytes, self._total_bytes))


def _patch(route: Route, bench: Bench, report: _Report) -> Setback | None:
    if route.base is None:
        raise ValueError("a chain of patches starts somewhere")
    place = bench.partial / route.file.sha256
    making = place.with_name(place.name + MAKING)
    try:
        apply_patches(
            bench.path(route.base),
            [bench.partial / patch.sha256 for patch in route.patches],
            making,
            base_sha256=route.base,
            expected=route.file,
            progress=report.add,
        )
    except (IntegrityError, NotFoundError) as exc:
        return Setback(exc, whole=frozenset({route.file.sha256}))
    with disk_errors(place):
        making.replace(place)
    return None


def _group_makers(plan: Plan, remade: set[str], bench: Bench, report: _Report) -> list[Callable[[], Setback | None]]:
    """One call for each group whose masters and momenta are made again.

    Raises IntegrityError: a contribution is not one of its round.
    """
    sums = {
        manifest.version: RoundSum(manifest, bench.path)
        for manifest in plan.chain[1:]
        if not isinstance(manifest.change, KeyRotation)
    }
    groups = [g for g in plan.manifest.groups if any(file.sha256 in remade for file in state_of(g))]

    def maker(group: Group) -> Callable[[], Setback | None]:
        return lambda: _remake(plan.chain, group, sums, bench, report, keep=remade)

    return [maker(group) for group in groups]


def _remake(
    chain: Sequence[Manifest],
    group: Group,
    sums: dict[int, RoundSum],
    bench: Bench,
    report: _Report,
    *,
    keep: set[str],
) -> Setback | None:
    """One group from version to version; what no version after it needs is removed on the way."""
    made: list[str] = []
    try:
        for before, after in itertools.pairwise(chain):
            old, new = same_group(group, before), same_group(group, after)
            if old is None or new is None:
                raise IntegrityError(f"version {after.version} has other groups than version {before.version}")
            present = {file.sha256 for file in state_of(old)}
            fresh = [file for file in state_of(new) if file.sha256 not in present]
            if not fresh:
                continue
            if after.version not in sums:
                raise IntegrityError(f"version {after.version} has other tensors than its parent, but no round made it")
            _step(sums[after.version], before, old, new, bench)
            for digest in made:
                if digest not in keep and digest not in {file.sha256 for file in state_of(new)}:
                    (bench.partial / digest).unlink(missing_ok=True)
            made = [file.sha256 for file in fresh]
    except (IntegrityError, NotFoundError) as exc:
        return Setback(exc, whole=frozenset(file.sha256 for file in state_of(group)))
    report.add(sum(file.size_bytes for file in state_of(group) if file.sha256 in keep))
    return None


def _step(round_: RoundSum, before: Manifest, old: Group, new: Group, bench: Bench) -> None:
    """Make one group's files of a round's version from those of its parent. Raises IntegrityError."""
    partial = bench.partial
    making = [partial / f"{new.master.sha256}{MAKING}", partial / f"{new.master.sha256}.state{MAKING}"]
    try:
        with disk_errors(partial):
            found = refold_group(
                round_,
                {name: before.tensors[name] for name in old.tensors},
                bench.path(old.master.sha256),
                None if old.momentum is None else bench.path(old.momentum.sha256),
                new_master=making[0],
                new_momentum=making[1],
            )
            for ref, file, written in zip(found, (new.master, new.momentum), making, strict=True):
                if (None if ref is None else ref.sha256) != (None if file is None else file.sha256):
                    raise IntegrityError(f"the replay of version {before.version + 1} gives another {new.master.path}")
                if file is not None:
                    sync_file(written)
                    written.replace(partial / file.sha256)
    finally:
        for written in making:
            written.unlink(missing_ok=True)
