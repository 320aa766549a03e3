"""The fold: master + sum of c·B·A / 2^p, one group of tensors a task, from the parent's files to the new version's.

What always holds:
- the same parent, terms and coefficients give the same bytes, whatever the order of the terms, the grouping of the
  tensors, the tiles of rows, the number of tasks or the machine (`rankup.fixedpoint` has the proof);
- a tensor read from the parent is hashed against its manifest before it is used;
- memory is that of one tensor and its factors, plus 64 MiB read ahead and one tile; a group waits on disk until it is
  complete;
- nothing is visible before both files of a group are blobs, so a crash is repaired by doing it again.

It does not choose coefficients and does not hash whole deltas again: admission did before they became blobs, and
`rankup verify` does for whoever does not trust the bucket. Ray is imported here and in `aggregator.pipeline` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import ray

from aggregator.groups import Array, GroupReader, Layout, ReadAhead, check_tensor, open_group_writer, plan_groups
from rankup.delta import DeltaReader
from rankup.errors import IntegrityError
from rankup.exactsum import fold_tensor
from rankup.records import Group, Manifest, TensorEntry, Term
from rankup.settings import StoreSettings
from rankup.store import Store, open_store

PARALLEL_READS = 8
"""Range reads at once in one task: a fold of many contributions waits for object storage more than it computes."""

READ_AHEAD_BYTES = 64 * 1024**2
"""Masters and factors of neighbouring tensors up to this many bytes are read at once, with one request for each blob: a
request costs as much as half a megabyte, and the factors of a small tensor are a few kilobytes."""

Folded = tuple[Group, dict[str, TensorEntry]]


def fold_group(
    store: Store,
    parent: Manifest,
    group: Group,
    number: int,
    total: int,
    terms: Sequence[Term],
    denominator_log2: int,
    *,
    row_tile: int | None = None,
) -> Folded:
    """One group of the next version: `group` of `parent` (number `number` from 1, of `total`) with all terms added.

    Tensors that no term changes keep their entry; a group without any other keeps its files as they are. `row_tile`
    bounds the rows that are summed at once and never changes a result.

    Raises IntegrityError (a tensor of the parent is not what its manifest says), DeltaError (factors that do not fit)
    and what the store raises.
    """
    before = {name: parent.tensors[name] for name in group.tensors}
    weighted = [term for term in sorted(terms, key=lambda term: term.contribution) if term.coefficient]
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        deltas = list(pool.map(partial(_open_delta, store), weighted))
        changed = {name for name in before if any(name in delta.reader.layouts for delta in deltas)}
        forbidden = sorted(name for name in changed if not before[name].lora)
        if forbidden:
            raise IntegrityError(f"a contribution changes {forbidden[0]}, which its parent does not let a delta change")
        if not changed:
            return group, before
        masters = GroupReader(store, group.master)
        layouts = {name: Layout(entry.shape, entry.export_dtype, entry.lora) for name, entry in before.items()}
        sizes = {name: masters.size_bytes(name) + sum(delta.size_bytes(name) for delta in deltas) for name in before}
        with open_group_writer(number, total, layouts) as writer:
            for names in plan_groups(sizes, READ_AHEAD_BYTES):
                fetches = [partial(masters.fetch, names), *(partial(delta.fetch, names) for delta in deltas)]
                list(pool.map(lambda fetch: fetch(), fetches))
                for name in names:
                    master: Array = masters.read(name)
                    check_tensor(master, before[name].master, name)
                    if name in changed:
                        touching = [delta for delta in deltas if name in delta.reader.layouts]
                        factors = pool.map(lambda delta, name=name: delta.reader.factors(name), touching)
                        parts = [(delta.weight, part) for delta, part in zip(touching, factors, strict=True)]
                        master = fold_tensor(master, parts, denominator_log2, row_tile=row_tile)
                    writer.add(name, master)
            return writer.finish(store)


@dataclass(frozen=True)
class _Delta:
    """One contribution of the sum, read by ranges."""

    weight: int
    blob: ReadAhead
    reader: DeltaReader

    def size_bytes(self, name: str) -> int:
        return self.reader.layouts[name].size_bytes if name in self.reader.layouts else 0

    def fetch(self, names: Sequence[str]) -> None:
        """Fetch the factors of `names`, which stand next to each other in the file, in one request."""
        layouts = [self.reader.layouts[name] for name in names if name in self.reader.layouts]
        self.blob.fetch((layout.start, layout.start + layout.size_bytes) for layout in layouts)


def _open_delta(store: Store, term: Term) -> _Delta:
    blob = ReadAhead(store, term.contribution)
    return _Delta(term.coefficient, blob, DeltaReader(blob, term.size_bytes))


@lru_cache(maxsize=2)
def store_from_wire(wire: str) -> Store:
    """The store of `StoreSettings.to_wire`; one client for all tasks of a worker process."""
    return open_store(StoreSettings.from_wire(wire))


def _fold_group(
    store_wire: str,
    parent: Manifest,
    number: int,
    terms: Sequence[Term],
    denominator_log2: int,
) -> Folded:
    group = parent.groups[number - 1]
    return fold_group(store_from_wire(store_wire), parent, group, number, len(parent.groups), terms, denominator_log2)


fold_group_task = ray.remote(num_cpus=1)(_fold_group)
"""`fold_group` as a Ray task over S3: (store settings on the wire, parent, number, terms, denominator_log2)."""


def next_tensors(folded: Sequence[Folded]) -> tuple[tuple[Group, ...], Mapping[str, TensorEntry]]:
    """The groups in order and the table of all tensors, sorted by name."""
    entries = {name: entry for _, part in folded for name, entry in part.items()}
    return tuple(group for group, _ in folded), dict(sorted(entries.items()))
