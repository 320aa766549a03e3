"""Versions made again, group by group, from masters that are kept and the contributions of the rounds since then.

    plan_of     the shortest way (`rankup.lineage.ways`) whose files are there
    sum_again   do it; the files of the version are in the store then

What always holds:
- every round is summed with its own coefficients and its own outer step, also one of which nothing is left: it still
  moves what has a momentum;
- each group of each round is remembered under the digest of everything that it follows from, so work that was killed
  goes on with the groups that it lacks; what lay between is left to `rankup admin gc`;
- memory is that of a fold for each of the groups that are under way.

It publishes nothing, and does not judge whether a version ought to be made.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from aggregator.fold import fold_digest, fold_group
from aggregator.groups import GroupReader, Layout, open_group_writer
from aggregator.published import Published, version_behind
from rankup.dtypes import STORED_AS, export_of
from rankup.errors import IntegrityError, NotFoundError
from rankup.foldrows import TILE_BYTES, Tile
from rankup.lineage import Plan, kept_terms, lineages, ways
from rankup.message import canonical_json
from rankup.recipe import OuterStep, Recipe
from rankup.records import BlobRef, FoldedGroup, Manifest, Term
from rankup.refold import law_of
from rankup.routes import state_of
from rankup.store import Store, has_blob
from rankup.versions import fold_key

Progress = Callable[[int, int], None]
"""Called with the bytes of masters summed again, and of all that must be."""


@dataclass(frozen=True)
class Step:
    """One round that is summed again, without the terms that are taken out."""

    version: int
    round_id: str
    terms: tuple[Term, ...]
    denominator_log2: int
    outer: OuterStep


@dataclass(frozen=True)
class Work:
    """How a version is made: from the masters and momenta of `start`, every step in order."""

    start: Manifest
    steps: tuple[Step, ...]
    recipe: Recipe | None
    """Of the last round in the sum; None where there is none."""

    @property
    def total_bytes(self) -> int:
        """Of masters that are read."""
        return len(self.steps) * sum(group.master.size_bytes for group in self.start.groups)


def plan_of(store: Store, latest: Published, chain: Sequence[Manifest], version: int, *, publisher_key: str) -> Work:
    """How a version of the chain, the drafted one after `latest` among them, is made out of what is kept.

    Raises NotFoundError (masters or contributions that every way needs are gone), IntegrityError and what the store
    raises.
    """
    missing = ""
    for way in ways(chain, version):
        if way.start > latest.manifest.version:
            continue
        start = version_behind(store, latest, chain, way.start, publisher_key=publisher_key)
        work = _work(chain, version, way, start)
        gone = next((ref for ref in _needed(work) if not has_blob(store, ref)), None)
        if gone is None:
            return work
        missing = missing or f"{gone.sha256[:16]}… of version {way.start} or of a round after it"
    raise NotFoundError(
        f"version {version} of {latest.manifest.model} cannot be made any more: {missing} is no longer kept",
        remedy="Roll back to a version whose files are kept.",
    )


def _work(chain: Sequence[Manifest], version: int, way: Plan, start: Manifest) -> Work:
    rounds = lineages(chain[: version + 1])[version].rounds
    recipe = chain[rounds[-1]].recipe if rounds else None
    return Work(start, tuple(_step(chain[number], way.revoked) for number in way.rounds), recipe)


def _needed(work: Work) -> Iterable[BlobRef]:
    for group in work.start.groups:
        yield from state_of(group)
    for step in work.steps:
        yield from (BlobRef(sha256=term.contribution, size_bytes=term.size_bytes) for term in step.terms)


def _step(manifest: Manifest, revoked: frozenset[str]) -> Step:
    if manifest.round_id is None:
        raise IntegrityError(f"version {manifest.version} names no round")
    law = law_of(manifest)
    return Step(manifest.version, manifest.round_id, kept_terms(manifest, revoked), law.denominator_log2, law.outer)


def sum_again(
    store: Store, work: Work, *, progress: Progress | None = None, parallel: int | None = None
) -> list[FoldedGroup]:
    """Every group of the version, without patches, its files in the store. `parallel`: groups at a time; None: by the
    number of cores.

    Raises IntegrityError, DeltaError, DiskFullError and what the store raises.
    """
    done_bytes, lock = 0, threading.Lock()

    def advance(size_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += size_bytes
            if progress is not None:
                progress(done_bytes, work.total_bytes)

    # A group is independent of the others, so few are under way, whatever the model's size.
    with ThreadPoolExecutor(parallel or min(4, os.cpu_count() or 1)) as pool:
        waiting = [pool.submit(_group, store, work, number + 1, advance) for number in range(len(work.start.groups))]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _group(store: Store, work: Work, number: int, advance: Callable[[int], None]) -> FoldedGroup:
    """Group `number` (from 1) after all steps."""
    start = work.start
    group = start.groups[number - 1].model_copy(update={"patch": None})
    made = FoldedGroup(group=group, tensors={name: start.tensors[name] for name in group.tensors})
    for step in work.steps:
        before = hashlib.sha256(canonical_json(made)).hexdigest()
        digest = fold_digest(before, step.terms, step.denominator_log2, step.outer)
        groups = (*start.groups[: number - 1], made.group, *start.groups[number:])
        folded = fold_group(
            store,
            start.model_copy(update={"version": step.version - 1, "groups": groups, "tensors": made.tensors}),
            number,
            step.terms,
            step.denominator_log2,
            outer=step.outer,
            record_key=fold_key(step.round_id, digest, number),
            patch=False,
        )
        made = folded.model_copy(update={"group": folded.group.model_copy(update={"patch": None})})
        advance(group.master.size_bytes)
    if not has_blob(store, made.group.export):
        _export_again(store, made, number, len(start.groups))
    return made


def _export_again(store: Store, made: FoldedGroup, number: int, total: int) -> None:
    """The export file of a group out of its master, for a version that nobody was expected to fetch again."""
    layouts = {name: Layout(entry.shape, entry.export_dtype, entry.role) for name, entry in made.tensors.items()}
    masters = GroupReader(store, made.group.master)
    with open_group_writer(number, total, layouts) as writer:
        for name in writer.order:
            writer.write(name, _tiles(masters, name, layouts[name]))
        group, entries = writer.finish(store)
    if group.export != made.group.export or any(entries[one].export != made.tensors[one].export for one in entries):
        raise IntegrityError(f"{made.group.export.path} does not follow from its master")


def _tiles(masters: GroupReader, name: str, layout: Layout) -> Iterator[Tile]:
    size_bytes = masters.size_bytes(name)
    for start in range(0, size_bytes, TILE_BYTES):
        data = masters.read_part(name, start, min(TILE_BYTES, size_bytes - start))
        piece = np.frombuffer(data, dtype=STORED_AS[layout.master_dtype])
        yield Tile(piece, export_of(piece, layout.export_dtype), None)
