"""One round made again: masters and momenta before it, its contributions, and the masters and momenta after it.

The sum is `rankup.refold`'s, of deltas whose hashes were checked before. What comes before may be a published version
(`published_state`) or a round that was made again itself; what comes after is only hashed, or also written down for
the next round. `rankup.refold.refold_group` makes the very files that a manifest names; the files here are for the next
round alone, and what is compared is each tensor.

What always holds:
- every byte of the state before is hashed on the way and must be what its table says, whoever wrote it;
- memory is a few tiles and the factors of one tensor, not the model, nor its largest tensor, nor how many tensors a
  delta changes;
- contributions with coefficient 0, and those that are left out, are neither opened nor needed.

It fetches nothing, and compares nothing: `rankup.replay` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rankup.checkfiles import Tally, require_members
from rankup.dtypes import master_dtype, raw_bytes
from rankup.folder import disk_errors
from rankup.foldrows import Tile, TileHashes
from rankup.lineage import contributions_of
from rankup.records import BlobRef, Manifest, TensorEntry
from rankup.refold import RoundSum, law_of
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
    """One round: its manifest, what is left out of it, and in `cache` its deltas as `<sha256>`, once it is replayed."""

    def __init__(self, manifest: Manifest, cache: Path, *, without: frozenset[str] = frozenset()) -> None:
        self._manifest = manifest
        self._cache = cache
        self._without = without
        self.deltas = contributions_of(manifest, without)
        """Those with a part in the sum."""

    @property
    def keeps_state(self) -> bool:
        """It needs the momenta before it."""
        return law_of(self._manifest).outer.keeps_state

    @property
    def delta_bytes(self) -> int:
        return sum(ref.size_bytes for ref in self.deltas)

    def replay(self, before: State, tally: Tally, *, into: Path | None = None, consume: bool = False) -> State:
        """The state after the round, in files in the folder `into` where that is given.

        With `consume` the files of a state that was made here are removed as soon as they were read.

        Raises IntegrityError where something is not what a manifest says.
        """
        round_ = RoundSum(self._manifest, lambda digest: self._cache / digest, revoked=self._without)
        tally.add_bytes(self.delta_bytes)
        entries: dict[str, TensorEntry] = {}
        groups: list[GroupState] = []
        for number, group in enumerate(before.groups):
            with ExitStack() as files:
                work = GroupWork(round_, before.tensors, group, files)
                target = None
                if into is not None:
                    target = GroupTarget(into / str(number), group, work.outline(), files)
                    groups.append(target.state)
                for name in group.tensors if target is None else target.order:
                    entries[name] = work.make(name, target)
                if target is not None:
                    target.finish()
            tally.add_bytes(group.size_bytes)
            if consume and before.own:
                _remove_group(group)
        return State(entries, tuple(groups), own=True)


class GroupWork:
    """One group's state before the round, opened and checked against its table."""

    def __init__(
        self, round_: RoundSum, before: Mapping[str, TensorEntry], group: GroupState, files: ExitStack
    ) -> None:
        self._round = round_
        self._before = {name: before[name] for name in group.tensors}
        self._masters = files.enter_context(TensorFile.open(group.master))
        require_members(self._masters, group.tensors, group.master.name)
        self._momenta: TensorFile | None = None
        stateful = [name for name, entry in self._before.items() if entry.momentum is not None]
        if round_.law.outer.keeps_state and group.momentum is not None:
            self._momenta = files.enter_context(TensorFile.open(group.momentum))
            require_members(self._momenta, stateful, group.momentum.name)

    def outline(self) -> dict[str, tuple[TensorEntry, bool]]:
        """Tensor -> its entry before the round, and whether it has a momentum after it."""
        keeps = self._round.law.outer.keeps_state
        return {name: (entry, keeps and self._round.moves(name, entry)) for name, entry in self._before.items()}

    def make(self, name: str, target: GroupTarget | None) -> TensorEntry:
        """The entry of one tensor after the round; its bytes go to `target`."""
        before = self._before[name]
        hashes = TileHashes()
        for tile in self._round.tiles(name, before, self._masters, self._momenta):
            hashes.update(tile)
            if target is not None:
                target.append(name, tile)
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


def _remove_group(group: GroupState) -> None:
    group.master.unlink(missing_ok=True)
    if group.momentum is not None:
        group.momentum.unlink(missing_ok=True)
