"""The contributions of one round, checked and opened; and the files of a group made again from its parent's.

The bits are those of the fold (`rankup.foldrows`): this module only says where the bytes come from and where they go.

What always holds:
- a contribution is one of the round, or of the earlier one that its term names, in full: its header, every shape and
  every value are checked before it counts;
- with `revoked`, the sum is that of a round in which those contributions had coefficient 0;
- the parent's tensors are hashed on the way, and a wrong one raises before a file is complete;
- memory is a few tiles and the factors of one tensor; contributions are opened for each read: there may be thousands.

Whether the files have the hashes of a manifest is for the caller to compare. No network, no ray, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.dtypes import master_dtype, raw_bytes
from rankup.errors import DeltaError, InputError, IntegrityError
from rankup.foldrows import Law, TensorTerm, Tile, fold_tiles
from rankup.lineage import kept_terms
from rankup.recipe import PLAIN_SUM
from rankup.records import BlobRef, Manifest, TensorEntry, Term
from rankup.targets import select_targets
from rankup.tensorfile import TensorFile, TensorFileWriter

MOMENTUM_METADATA: Final = {"format": "rankup.momentum/1"}

BlobPath = Callable[[str], Path]
"""Digest of a contribution -> the file that holds it, checked against its hash."""


def law_of(manifest: Manifest) -> Law:
    """How the sum of a round's version becomes its tensors."""
    outer = PLAIN_SUM if manifest.recipe is None else manifest.recipe.aggregation.outer
    return Law(manifest.denominator_log2, outer)


class RoundSum:
    """What the version `manifest` adds to its parent; making one reads every contribution.

    Raises IntegrityError: a contribution is not one of the round.
    """

    def __init__(self, manifest: Manifest, blob: BlobPath, *, revoked: frozenset[str] = frozenset()) -> None:
        self._manifest = manifest
        self.law = law_of(manifest)
        terms = kept_terms(manifest, revoked)
        self._deltas = [(term.coefficient, self._open(term, blob(term.contribution))) for term in terms]

    def tensor_terms(self, name: str) -> list[TensorTerm]:
        """The parts of the sum in one tensor; empty where no contribution changes it."""
        return [
            TensorTerm(coefficient, partial(reader.factors, name), reader.slices(name))
            for coefficient, reader in self._deltas
            if name in reader.layouts
        ]

    def moves(self, name: str, before: TensorEntry) -> bool:
        """Whether the tensor gets new bits, and a momentum where the outer step keeps one."""
        stateful = self.law.outer.keeps_state and before.momentum is not None
        return stateful or any(name in reader.layouts for _, reader in self._deltas)

    def tiles(self, name: str, before: TensorEntry, masters: TensorFile, momenta: TensorFile | None) -> Iterator[Tile]:
        """The new rows of one tensor, whose entry in the parent is `before`, from the parent's files.

        Raises IntegrityError: the parent's bytes or the contributions are not what they must be.
        """
        require_stored(masters, name, master_dtype(before.export_dtype), before.shape)
        momentum = None
        if self.law.outer.keeps_state and before.momentum is not None:
            if momenta is None:
                raise IntegrityError(f"tensor {name!r} has a momentum, but its group has no file of them")
            require_stored(momenta, name, "F32", before.shape)
            momentum = partial(momenta.read_part, name)
        master = partial(masters.read_part, name)
        try:
            yield from fold_tiles(name, before, self.tensor_terms(name), self.law, master=master, momentum=momentum)
        except DeltaError as exc:
            raise IntegrityError(f"the contributions cannot be folded: {exc.cause}") from exc

    def _open(self, term: Term, path: Path) -> DeltaReader:
        manifest = self._manifest
        if manifest.round_id is None or manifest.parent is None:
            raise IntegrityError(f"version {manifest.version} has terms but names no round or no parent")

        def read_at(start: int, length: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)

        recipe = manifest.recipe
        targets = manifest.targets() if recipe is None else select_targets(manifest.targets(), recipe)
        try:
            reader = DeltaReader(read_at, path.stat().st_size)
            expected = DeltaHeader(
                model=manifest.model,
                round_id=term.round_id or manifest.round_id,
                lease_id=reader.header.lease_id,  # the lease is not in the manifest
                base_manifest=term.base_manifest or manifest.parent,
            )
            check_structure(reader, targets=targets, header=expected, partial=recipe is not None and recipe.partial)
        except InputError as exc:
            raise IntegrityError(
                f"the contribution {term.contribution[:16]}… is not one of this round: {exc.cause}"
            ) from exc
        return reader


def refold_group(
    round_: RoundSum,
    before: Mapping[str, TensorEntry],
    master: Path,
    momentum: Path | None,
    *,
    new_master: Path,
    new_momentum: Path,
) -> tuple[BlobRef, BlobRef | None]:
    """Make a group's master file (and momentum file, where the round leaves one) from the parent's.

    `before`: the entries of the group's tensors in the parent. The files are new and complete when this returns, but
    not yet on disk; `new_momentum` is written only where there is a momentum. The parent's files stay as they are.

    Raises:
        IntegrityError: as `RoundSum.tiles`, or the files do not hold the group's tensors.
        OSError: they cannot be read or written.
    """
    with ExitStack() as files:
        masters = files.enter_context(TensorFile.open(master))
        momenta = None if momentum is None else files.enter_context(TensorFile.open(momentum))
        if odd := sorted(masters.entries.keys() ^ before.keys()):
            raise IntegrityError(f"tensor {odd[0]!r} is in the master file or in its group, not in both")
        layouts = {name: (extent.dtype, extent.shape) for name, extent in masters.entries.items()}
        moving = [name for name in before if round_.moves(name, before[name])]
        stateful = moving if round_.law.outer.keeps_state else []
        out = files.enter_context(new_master.open("w+b"))
        writer = TensorFileWriter(out, layouts, masters.metadata)
        states: TensorFileWriter | None = None
        if stateful:
            state_file = files.enter_context(new_momentum.open("w+b"))
            states = TensorFileWriter(
                state_file, {name: ("F32", before[name].shape) for name in stateful}, MOMENTUM_METADATA
            )
        for name in writer.order:
            for tile in round_.tiles(name, before[name], masters, momenta):
                writer.append(name, raw_bytes(tile.master))
                if states is not None and tile.momentum is not None:
                    states.append(name, raw_bytes(tile.momentum))
        return writer.finish(), None if states is None else states.finish()


def require_stored(file: TensorFile, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise IntegrityError unless the file holds a tensor of that name, dtype and shape."""
    extent = file.entries.get(name)
    if extent is None or (extent.dtype, extent.shape) != (dtype, shape):
        raise IntegrityError(f"the stored file does not hold tensor {name!r} as {dtype} {list(shape)}")
