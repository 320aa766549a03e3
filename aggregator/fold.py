"""The fold: the parent's masters, the sum of c·B·A / 2^p and the outer step, one group of tensors a call.

What always holds:
- the same parent, terms, coefficients and outer step give the same bytes, whatever the order of the terms, the grouping
  of the tensors, the tiles of rows, the kernels, the number of tasks or the machine (`rankup.foldrows` is the law);
- what is read from the parent is hashed against its manifest before anything is shown;
- memory is a few tiles and the factors of two tensors, or of neighbours of up to 16 MiB, however large a tensor is; a
  group waits on disk, in the files that are stored, until it is complete;
- nothing is visible before all files of a group are blobs. Then a record says that the group is finished, under the
  digest of everything that it follows from: a fold that was killed goes on with the groups that it lacks, to the same
  bits.

It does not choose coefficients and does not hash whole deltas again: admission did before they became blobs, and
`rankup verify` does for whoever does not trust the bucket. It needs no Ray: `aggregator.tasks` makes it a task.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Final, Literal

import structlog
from pydantic import Field, ValidationError

from aggregator.groups import GroupReader, GroupWriter, Layout, ReadAhead, Stretches, open_group_writer
from rankup.delta import DeltaReader
from rankup.errors import ConflictError, IntegrityError, NotFoundError
from rankup.foldrows import TILE_BYTES, Law, TensorTerm, Tile, fold_tiles
from rankup.message import Digest, Message, canonical_json
from rankup.products import KERNELS, Kernel
from rankup.recipe import PLAIN_SUM, OuterStep
from rankup.records import FoldedGroup, Group, Manifest, TensorEntry, Term
from rankup.store import Store, has_blob

PARALLEL_READS: Final = 8
"""Range reads at once in one task: a fold of many contributions waits for object storage more than it computes."""

READ_AHEAD_BYTES: Final = 16 * 1024**2
"""Masters and factors of neighbouring tensors up to this many bytes are read at once, with one request for each blob: a
request costs as much as half a megabyte, and the factors of a small tensor are a few kilobytes."""

MAX_RECORD_BYTES: Final = 64 * 1024**2

log = structlog.get_logger(__name__)


class FoldInputs(Message):
    """Everything that the bits of a fold follow from."""

    format: Literal["rankup.fold/1"] = "rankup.fold/1"
    parent: Digest
    terms: tuple[tuple[Digest, int], ...]
    """(contribution, coefficient), sorted, without those of coefficient 0."""
    denominator_log2: Annotated[int, Field(ge=0, le=30)]
    outer: OuterStep


def fold_digest(parent_manifest: str, terms: Sequence[Term], denominator_log2: int, outer: OuterStep) -> str:
    """Names a fold by its inputs, for `rankup.versions.fold_key`.

    `parent_manifest` is the parent's digest. The order of the terms does not matter, nor do those of coefficient 0.
    """
    pairs = sorted((term.contribution, term.coefficient) for term in terms if term.coefficient)
    inputs = FoldInputs(parent=parent_manifest, terms=tuple(pairs), denominator_log2=denominator_log2, outer=outer)
    return hashlib.sha256(canonical_json(inputs)).hexdigest()


def fold_group(
    store: Store,
    parent: Manifest,
    number: int,
    terms: Sequence[Term],
    denominator_log2: int,
    *,
    outer: OuterStep = PLAIN_SUM,
    record_key: str | None = None,
    kernels: Sequence[Kernel] = KERNELS,
    tile_bytes: int = TILE_BYTES,
    patch: bool = True,
) -> FoldedGroup:
    """Group `number` (from 1) of the next version: that of `parent`, with all terms added and the outer step done.

    A tensor that neither a term nor a momentum changes keeps its entry; a group of such tensors keeps its files as they
    are. Where `record_key` (`rankup.versions.fold_key` of `fold_digest`) names a finished
    group whose blobs are there, that is returned; a group that is made is remembered under it. `kernels` and
    `tile_bytes` (bytes of master in one tile) change time and memory, never a bit; without `patch` none is made.

    Raises IntegrityError (a tensor of the parent is not what its manifest says; two folds of the same inputs differ),
    DeltaError (factors that do not fit, sums beyond float32), DiskFullError and what the store raises.
    """
    group = parent.groups[number - 1]
    if record_key is not None and (known := _finished(store, record_key, group)) is not None:
        log.info("group_found", model=parent.model, version=parent.version + 1, group=number)
        return known
    started = time.perf_counter()
    law = Law(denominator_log2, outer, tuple(kernels), tile_bytes)
    weighted = [term for term in sorted(terms, key=lambda term: term.contribution) if term.coefficient]
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        folding = _Folding(store, parent, group, list(pool.map(partial(_open_delta, store), weighted)), law, pool)
        if not folding.moving:
            kept = group.model_copy(update={"momentum": None, "patch": None})
            return FoldedGroup(group=kept, tensors=folding.stateless())
        with open_group_writer(
            number, len(parent.groups), folding.layouts, folding.stateful, base=group.export if patch else None
        ) as writer:
            folding.run(writer)
            made, entries = writer.finish(store)
    folded = FoldedGroup(group=made, tensors=entries)
    if record_key is not None:
        _remember(store, record_key, folded)
    log.info(
        "group_folded",
        model=parent.model,
        version=parent.version + 1,
        group=number,
        tensors=len(folding.moving),
        contributions=len(weighted),
        seconds=round(time.perf_counter() - started, 3),
    )
    return folded


def next_tensors(folded: Sequence[FoldedGroup]) -> tuple[tuple[Group, ...], Mapping[str, TensorEntry]]:
    """The groups in order and the table of all tensors, sorted by name."""
    entries = {name: entry for part in folded for name, entry in part.tensors.items()}
    return tuple(part.group for part in folded), dict(sorted(entries.items()))


# -- one group ---------------------------------------------------------------------------------------------------------


class _Folding:
    """One group on its way from the parent's files to a writer."""

    def __init__(
        self,
        store: Store,
        parent: Manifest,
        group: Group,
        deltas: Sequence[_Delta],
        law: Law,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._parent = parent
        self._before = {name: parent.tensors[name] for name in group.tensors}
        self._deltas = deltas
        self._law = law
        self._pool = pool
        touched = {name for name in self._before if any(name in delta.reader.layouts for delta in deltas)}
        if forbidden := sorted(name for name in touched if self._before[name].role is None):
            raise IntegrityError(f"a contribution changes {forbidden[0]}, which its parent does not let a delta change")
        kept = {name for name, entry in self._before.items() if law.outer.keeps_state and entry.momentum is not None}
        self.moving = touched | kept
        """Tensors that get new bits."""
        self.stateful = self.moving if law.outer.keeps_state else set()
        self.layouts = {name: Layout(e.shape, e.export_dtype, e.role) for name, e in self._before.items()}
        if self.moving:
            self._masters = GroupReader(store, group.master)
            self._momenta = GroupReader(store, group.momentum) if kept and group.momentum is not None else None
            for name, layout in self.layouts.items():
                self._masters.require(name, layout.master_dtype, layout.shape)
            for name in kept:
                if self._momenta is None:
                    raise IntegrityError(f"tensor {name} has a momentum, but its group has no file of them")
                self._momenta.require(name, "F32", self._before[name].shape)

    def stateless(self) -> dict[str, TensorEntry]:
        """The parent's entries without momentum."""
        return {name: entry.model_copy(update={"momentum": None}) for name, entry in self._before.items()}

    def run(self, writer: GroupWriter) -> None:
        """Fold every tensor; what the next ones need is read meanwhile."""
        stretches = list(self._stretches(writer.order))
        coming = self._load(stretches[0])
        for number, names in enumerate(stretches, start=1):
            for reader, loading in coming:
                reader.use(loading.result())
            coming = self._load(stretches[number]) if number < len(stretches) else []
            for name in names:
                self._tensor(writer, name)

    def _load(self, names: Sequence[str]) -> list[tuple[_Delta | GroupReader, Future[Stretches]]]:
        loads = [(delta, self._pool.submit(delta.load, names)) for delta in self._deltas]
        ahead = names if self._small(names[0]) else ()
        groups = [reader for reader in (self._masters, self._momenta) if reader is not None]
        return [*loads, *((reader, self._pool.submit(reader.load, ahead)) for reader in groups)]

    def _tensor(self, writer: GroupWriter, name: str) -> None:
        started = time.perf_counter()
        terms = [delta.term(name) for delta in self._deltas if name in delta.reader.layouts]
        paths: set[str] = set()

        def watched(tiles: Iterator[Tile]) -> Iterator[Tile]:
            for tile in tiles:
                paths.add(tile.path)
                yield tile

        momentum = self._reader(self._momenta, name) if name in self.stateful and self._momenta is not None else None
        tiles = fold_tiles(
            name, self._before[name], terms, self._law, master=self._reader(self._masters, name), momentum=momentum
        )
        writer.write(name, watched(tiles))
        if name in self.moving:
            log.debug(
                "tensor_folded",
                model=self._parent.model,
                version=self._parent.version + 1,
                tensor=name,
                path="+".join(sorted(paths - {""})) or "none",
                contributions=len(terms),
                seconds=round(time.perf_counter() - started, 4),
            )

    def _reader(self, group: GroupReader, name: str) -> Callable[[int, int], bytes]:
        read = partial(group.read_part, name)
        return read if self._small(name) else _Ahead(read, group.size_bytes(name), self._pool)

    def _size_bytes(self, name: str) -> int:
        """What is read for one tensor."""
        momentum = 0 if self._momenta is None else self._momenta.size_bytes(name)
        return self._masters.size_bytes(name) + momentum + sum(delta.size_bytes(name) for delta in self._deltas)

    def _small(self, name: str) -> bool:
        return self._size_bytes(name) <= READ_AHEAD_BYTES

    def _stretches(self, order: Sequence[str]) -> Iterator[list[str]]:
        """Neighbours that are read at once; a tensor that is not small is alone."""
        stretch: list[str] = []
        filled = 0
        for name in order:
            size = self._size_bytes(name)
            if stretch and filled + size > READ_AHEAD_BYTES:
                yield stretch
                stretch, filled = [], 0
            stretch.append(name)
            filled += size
        if stretch:
            yield stretch


@dataclass(frozen=True)
class _Delta:
    """One contribution of the sum, read by ranges."""

    weight: int
    blob: ReadAhead
    reader: DeltaReader

    def size_bytes(self, name: str) -> int:
        return self.reader.layouts[name].size_bytes if name in self.reader.layouts else 0

    def load(self, names: Sequence[str]) -> Stretches:
        """Read the factors of `names`, which are neighbours in the file, in a request or two."""
        layouts = [self.reader.layouts[name] for name in names if name in self.reader.layouts]
        return self.blob.load(extent for layout in layouts for extent in layout.extents)

    def use(self, stretches: Stretches) -> None:
        self.blob.use(stretches)

    def term(self, name: str) -> TensorTerm:
        return TensorTerm(self.weight, partial(self.reader.factors, name), self.reader.slices(name))


def _open_delta(store: Store, term: Term) -> _Delta:
    blob = ReadAhead(store, term.contribution)
    return _Delta(term.coefficient, blob, DeltaReader(blob, term.size_bytes))


class _Ahead:
    """Reads one tensor in order and has the next piece fetched meanwhile."""

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int, pool: ThreadPoolExecutor) -> None:
        self._read = read
        self._size_bytes = size_bytes
        self._pool = pool
        self._wanted = (0, 0)
        self._pending: Future[bytes] | None = None

    def __call__(self, start: int, length: int) -> bytes:
        pending, self._pending = self._pending, None
        data = (
            pending.result() if pending is not None and self._wanted == (start, length) else self._read(start, length)
        )
        self._wanted = (start + length, min(length, self._size_bytes - start - length))
        if self._wanted[1] > 0:
            self._pending = self._pool.submit(self._read, *self._wanted)
        return data


# -- finished groups ---------------------------------------------------------------------------------------------------


def _finished(store: Store, key: str, group: Group) -> FoldedGroup | None:
    """What the record says, if it can be read and its blobs are there."""
    record = _read_record(store, key)
    if record is None or record.group.tensors != group.tensors or record.tensors.keys() != set(group.tensors):
        return None
    files = (record.group.master, record.group.export, record.group.momentum, record.group.patch)
    return record if all(file is None or has_blob(store, file) for file in files) else None


def _read_record(store: Store, key: str) -> FoldedGroup | None:
    try:
        return FoldedGroup.model_validate_json(store.get(key, max_bytes=MAX_RECORD_BYTES))
    except NotFoundError:
        return None
    except ValidationError:
        log.warning("fold_record_unreadable", key=key)
        return None


def _exact(folded: FoldedGroup) -> FoldedGroup:
    """Without the patch: another version of its library may find a shorter one for the same files."""
    return folded.model_copy(update={"group": folded.group.model_copy(update={"patch": None})})


def _remember(store: Store, key: str, folded: FoldedGroup) -> None:
    data = canonical_json(folded)
    try:
        store.put(key, data, if_absent=True, content_type="application/json")
    except ConflictError:
        # Another task folded the same inputs, or this one did before its blobs were lost.
        known = _read_record(store, key)
        if known is None:
            store.put(key, data, content_type="application/json")
        elif _exact(known) != _exact(folded):
            raise IntegrityError(
                f"two folds of the same inputs differ: {key}",
                remedy="One machine does not compute as it must: fold on another, and test the memory of both.",
            ) from None
