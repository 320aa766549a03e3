"""One round made again: masters and momenta before it, its contributions, and the masters and momenta after it.

The deltas, each checked by hash before, are folded tensor by tensor with the coefficients and the outer step of the
round's manifest, by the same loop that the fold uses (`rankup.foldrows`). What comes before may be a published version
(`published_state`) or a round that was made again itself; what comes after is only hashed, or also written down for
the next round.

What always holds:
- every byte of the state before is hashed on the way and must be what its table says, whoever wrote it;
- memory is a few tiles and the factors of one tensor, not the model, nor its largest tensor, nor how many tensors a
  delta changes;
- contributions with coefficient 0, and those that are left out, are neither opened nor needed.

It fetches nothing, and compares nothing: `rankup.replay` does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rankup.checkfiles import Tally, require_members
from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.dtypes import master_dtype, raw_bytes
from rankup.errors import DeltaError, InputError, IntegrityError
from rankup.folder import disk_errors
from rankup.foldrows import Law, ReadAt, TensorTerm, Tile, TileHashes, fold_tiles
from rankup.lineage import kept_terms
from rankup.recipe import PLAIN_SUM
from rankup.records import BlobRef, Manifest, TensorEntry, Term
from rankup.targets import Target, select_targets
from rankup.tensorfile import TensorFile, TensorFileWriter


@dataclass(frozen=True)
class GroupState:
    """The masters and momenta of some tensors, in files."""

    tensors: tuple[str, ...]
    master: Path
    momentum: Path | None
    size_bytes: int
    """Of the masters."""


@dataclass(frozen=True)
class State:
    """The masters and momenta of a model, published or made again."""

    tensors: Mapping[str, TensorEntry]
    groups: tuple[GroupState, ...]
    """Empty where a round was made again without writing it down."""
    own: bool = False
    """The files were made here and may be removed."""

    def remove(self) -> None:
        """Delete the files of a state that was made here."""
        for group in self.groups if self.own else ():
            _remove_group(group)


def published_state(manifest: Manifest, cache: Path) -> State:
    """A version's state, whose files (`state_refs`) lie in `cache` as `<sha256>`."""
    groups = [
        GroupState(
            group.tensors,
            cache / group.master.sha256,
            cache / group.momentum.sha256 if group.momentum is not None else None,
            group.master.size_bytes,
        )
        for group in manifest.groups
    ]
    return State(manifest.tensors, tuple(groups))


def state_refs(manifest: Manifest, *, momenta: bool) -> list[BlobRef]:
    """The files of a version's state: masters, and momenta where they are needed and there."""
    kept = [group.momentum for group in manifest.groups if momenta and group.momentum is not None]
    return [*(group.master for group in manifest.groups), *kept]


class Round:
    """One round: its manifest, what is left out of it, and in `cache` its deltas as `<sha256>`."""

    def __init__(self, manifest: Manifest, cache: Path, *, without: frozenset[str] = frozenset()) -> None:
        self._manifest = manifest
        self._cache = cache
        self._law = Law(
            manifest.denominator_log2, PLAIN_SUM if manifest.recipe is None else manifest.recipe.aggregation.outer
        )
        self.terms = kept_terms(manifest, without)
        """Those with a part in the sum."""
        self.deltas = [BlobRef(sha256=term.contribution, size_bytes=term.size_bytes) for term in self.terms]

    @property
    def keeps_state(self) -> bool:
        """It needs the momenta before it."""
        return self._law.outer.keeps_state

    @property
    def delta_bytes(self) -> int:
        return sum(ref.size_bytes for ref in self.deltas)

    def replay(self, before: State, tally: Tally, *, into: Path | None = None, consume: bool = False) -> State:
        """The state after the round, in files in the folder `into` where that is given.

        With `consume` the files of a state that was made here are removed as soon as they were read.

        Raises IntegrityError where something is not what a manifest says.
        """
        readers = {term.contribution: self._open_delta(term) for term in self.terms}
        tally.add_bytes(self.delta_bytes)
        entries: dict[str, TensorEntry] = {}
        groups: list[GroupState] = []
        for number, group in enumerate(before.groups):
            with ExitStack() as files:
                work = GroupWork(self._law, before.tensors, group, files)
                target = None
                if into is not None:
                    target = GroupTarget(into / str(number), group, work.outline(self._touched(readers)), files)
                    groups.append(target.state)
                for name in group.tensors if target is None else target.order:
                    entries[name] = work.make(name, self._terms_of(name, readers), target)
                if target is not None:
                    target.finish()
            tally.add_bytes(group.size_bytes)
            if consume and before.own:
                _remove_group(group)
        return State(entries, tuple(groups), own=True)

    def _touched(self, readers: Mapping[str, DeltaReader]) -> set[str]:
        return {name for reader in readers.values() for name in reader.layouts}

    def _terms_of(self, name: str, readers: Mapping[str, DeltaReader]) -> list[TensorTerm]:
        touching = [(term.coefficient, readers[term.contribution]) for term in self.terms]
        return [
            TensorTerm(coefficient, partial(reader.factors, name), reader.slices(name))
            for coefficient, reader in touching
            if name in reader.layouts
        ]

    def _open_delta(self, term: Term) -> DeltaReader:
        """A contribution whose every value was checked; its file is opened for each read: there may be thousands."""
        path = self._cache / term.contribution

        def read_at(start: int, length: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)

        manifest = self._manifest
        if manifest.round_id is None or manifest.parent is None:
            raise IntegrityError(f"version {manifest.version} has terms but names no round or no parent")
        try:
            reader = DeltaReader(read_at, path.stat().st_size)
            expected = DeltaHeader(
                model=manifest.model,
                round_id=manifest.round_id,
                lease_id=reader.header.lease_id,  # the lease is not in the manifest
                base_manifest=term.base_manifest or manifest.parent,
            )
            recipe = manifest.recipe
            check_structure(
                reader,
                targets=_targets(manifest),
                header=expected,
                partial=recipe is not None and recipe.partial,
            )
        except InputError as exc:
            raise IntegrityError(f"the contribution {path.name[:16]}… is not one of this round: {exc.cause}") from exc
        return reader


class GroupWork:
    """One group's state before the round, opened and checked against its table."""

    def __init__(self, law: Law, before: Mapping[str, TensorEntry], group: GroupState, files: ExitStack) -> None:
        self._law = law
        self._before = {name: before[name] for name in group.tensors}
        self._masters = files.enter_context(TensorFile.open(group.master))
        require_members(self._masters, group.tensors, group.master.name)
        self._momenta: TensorFile | None = None
        stateful = [name for name, entry in self._before.items() if entry.momentum is not None]
        if law.outer.keeps_state and group.momentum is not None:
            self._momenta = files.enter_context(TensorFile.open(group.momentum))
            require_members(self._momenta, stateful, group.momentum.name)

    def outline(self, touched: Collection[str]) -> dict[str, tuple[TensorEntry, bool]]:
        """Tensor -> its entry before the round, and whether it has a momentum after it."""
        keeps = self._law.outer.keeps_state
        return {
            name: (entry, keeps and (name in touched or entry.momentum is not None))
            for name, entry in self._before.items()
        }

    def make(self, name: str, terms: Sequence[TensorTerm], target: GroupTarget | None) -> TensorEntry:
        """The entry of one tensor after the round; its bytes go to `target`."""
        before = self._before[name]
        require_stored(self._masters, name, master_dtype(before.export_dtype), before.shape)
        momentum: ReadAt | None = None
        if self._law.outer.keeps_state and before.momentum is not None:
            if self._momenta is None:
                raise IntegrityError(f"tensor {name!r} has a momentum, but its group has no file of them")
            require_stored(self._momenta, name, "F32", before.shape)
            momentum = partial(self._momenta.read_part, name)
        hashes = TileHashes()
        try:
            for tile in fold_tiles(
                name, before, terms, self._law, master=partial(self._masters.read_part, name), momentum=momentum
            ):
                hashes.update(tile)
                if target is not None:
                    target.append(name, tile)
        except DeltaError as exc:
            raise IntegrityError(f"the contributions cannot be folded: {exc.cause}") from exc
        return hashes.entry(before.shape, before.export_dtype, before.role)


class GroupTarget:
    """Files for one group's state after a round."""

    def __init__(
        self, path: Path, group: GroupState, outline: Mapping[str, tuple[TensorEntry, bool]], files: ExitStack
    ) -> None:
        masters = {name: (master_dtype(entry.export_dtype), entry.shape) for name, (entry, _) in outline.items()}
        momenta = {name: ("F32", entry.shape) for name, (entry, stateful) in outline.items() if stateful}
        beside = path.with_suffix(".momentum")
        self._path = path
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            self._files = [files.enter_context(one.open("w+b")) for one in ((path, beside) if momenta else (path,))]
            self._masters = TensorFileWriter(self._files[0], masters)
            self._momenta = TensorFileWriter(self._files[1], momenta) if momenta else None
        self.order = self._masters.order
        """Names, so that both files are written from the first to the last byte."""
        self.state = GroupState(group.tensors, path, beside if momenta else None, group.size_bytes)

    def append(self, name: str, tile: Tile) -> None:
        with disk_errors(self._path):
            self._masters.append(name, raw_bytes(tile.master))
            if tile.momentum is not None and self._momenta is not None:
                self._momenta.append(name, raw_bytes(tile.momentum))

    def finish(self) -> None:
        with disk_errors(self._path):
            self._masters.finish()
            if self._momenta is not None:
                self._momenta.finish()
            for file in self._files:
                file.flush()


def require_stored(file: TensorFile, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise IntegrityError unless the file holds a tensor of that name, dtype and shape."""
    extent = file.entries.get(name)
    if extent is None or (extent.dtype, extent.shape) != (dtype, shape):
        raise IntegrityError(f"the stored file does not hold tensor {name!r} as {dtype} {list(shape)}")


def _remove_group(group: GroupState) -> None:
    group.master.unlink(missing_ok=True)
    if group.momentum is not None:
        group.momentum.unlink(missing_ok=True)


def _targets(manifest: Manifest) -> Mapping[str, Target]:
    """What a contribution of this round may change."""
    return manifest.targets() if manifest.recipe is None else select_targets(manifest.targets(), manifest.recipe)
