"""Replaying a round: a version made again from its parent and its contributions, without trusting the organiser.

The parent's masters (and momenta, where the outer step keeps them) and the round's deltas, each checked by hash, are
folded again tensor by tensor with the coefficients and the outer step of the manifest, by the same loop that the fold
uses (`rankup.foldrows`). Every resulting master, export and momentum must have the manifest's hash. Version 0 has no
round: there every export must be what its master gives, and the report says that this was all.

What always holds:
- a report that is `ok` means that every tensor had the right hashes; a broken signature, chain, blob or delta raises
  instead;
- memory is a few tiles and the factors of one tensor, not the model, nor its largest tensor, nor how many tensors a
  delta changes;
- contributions with coefficient 0 are neither fetched nor needed.

It proves that the version is the stated sum, not that the contributions are good, nor that an older version which a
term names as its base was ever published. It needs neither ray nor torch. `rankup.checkfiles` verifies a pulled folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rankup.checkfiles import Report, Tally, check_group, require_members
from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.download import OnProgress, fetch
from rankup.dtypes import master_dtype
from rankup.errors import DeltaError, InputError, IntegrityError
from rankup.folder import folder_lock
from rankup.foldrows import Law, ReadAt, TensorTerm, TileHashes, fold_tiles
from rankup.recipe import PLAIN_SUM
from rankup.records import BlobRef, Group, Manifest, TensorEntry, Term
from rankup.sources import Patience, Source, patiently
from rankup.targets import Target, select_targets
from rankup.tensorfile import TensorFile
from rankup.versions import History, open_envelope, require_asked, require_same_tensors


def verify_version(
    source: Source,
    model: str,
    version: int | None,
    *,
    cache: Path,
    publisher_key: str | None = None,
    progress: OnProgress | None = None,
    parallel: int = 4,
    patience: Patience | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Fetch what a version (None: the latest) was made of into `cache` (kept as `<sha256>`) and make it again.

    With `publisher_key` None the key that signed the version is taken, and stands in the report; its parent must be
    signed by the same.

    Raises:
        IntegrityError: a signature, the chain, a blob or a delta is not what the manifest says.
        NotFoundError, DiskFullError, StateError, RetryableError: as `rankup.pull.pull`.
    """
    patience = patience or Patience()
    pointed = None
    if version is None:
        pointer = patiently(lambda: source.latest(model), patience)
        version, pointed = pointer.version, pointer.manifest
    manifest, digest, key = _open(source, model, version, publisher_key, patience, pointed)

    def have(refs: list[BlobRef]) -> None:
        fetch(source, refs, cache, parallel=parallel, patience=patience, progress=progress)

    with folder_lock(cache):
        masters = [group.master for group in manifest.groups]
        if version == 0:
            have([*masters, *(group.export for group in manifest.groups)])
            tally = Tally(clock, progress, "checking", sum(ref.size_bytes for ref in masters))
            _check_genesis(tally, manifest, cache)
            note = "version 0 has no round to replay: its masters and exports were hashed and agree with each other"
            return tally.report(manifest, digest, key, "files", 0, note)

        parent, parent_digest, _ = _open(source, model, version - 1, key, patience)
        History().admit(parent, parent_digest, as_latest=False).admit(manifest, digest, as_latest=False)
        require_same_tensors(manifest, parent)
        round_ = _Round(manifest, parent, cache)
        have([*round_.deltas, *round_.states])
        tally = Tally(clock, progress, "replaying", sum(ref.size_bytes for ref in (*round_.deltas, *round_.states)))
        round_.replay(tally)
    note = f"replayed from version {version - 1} and {len(round_.terms)} contributions"
    return tally.report(manifest, digest, key, "replay", len(round_.terms), note)


def _open(
    source: Source, model: str, version: int, publisher_key: str | None, patience: Patience, pointed: str | None = None
) -> tuple[Manifest, str, str]:
    envelope = patiently(lambda: source.envelope(model, version), patience)
    manifest, digest, key = open_envelope(envelope, publisher_key=publisher_key)
    require_asked(manifest, digest, model=model, version=version, pointed=pointed)
    return manifest, digest, key


def _check_genesis(tally: Tally, manifest: Manifest, cache: Path) -> None:
    for group in manifest.groups:
        check_group(tally, manifest, group, "export", cache / group.export.sha256)
        with TensorFile.open(cache / group.master.sha256) as file:
            require_members(file, group.tensors, group.master.path)
            for name in group.tensors:
                entry = manifest.tensors[name]
                try:
                    _require_stored(file, name, master_dtype(entry.export_dtype), entry.shape)
                    made = _make(name, entry, [], Law(manifest.denominator_log2), file, None)
                except IntegrityError:
                    made = None
                if made != entry and name not in tally.mismatches:
                    tally.mismatches.append(name)
        tally.add_bytes(group.master.size_bytes)


def _require_stored(file: TensorFile, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    extent = file.entries.get(name)
    if extent is None or (extent.dtype, extent.shape) != (dtype, shape):
        raise IntegrityError(f"the stored file does not hold tensor {name!r} as {dtype} {list(shape)}")


def _make(
    name: str,
    before: TensorEntry,
    terms: Sequence[TensorTerm],
    law: Law,
    masters: TensorFile,
    momenta: TensorFile | None,
) -> TensorEntry:
    """The entry of the tensor that follows from these."""
    momentum: ReadAt | None = None if momenta is None else partial(momenta.read_part, name)
    hashes = TileHashes()
    for tile in fold_tiles(name, before, terms, law, master=partial(masters.read_part, name), momentum=momentum):
        hashes.update(tile)
    return hashes.entry(before.shape, before.export_dtype, before.role)


class _Round:
    """One round: the manifest that it made, the parent, and in `cache` what it was made of."""

    def __init__(self, manifest: Manifest, parent: Manifest, cache: Path) -> None:
        outer = PLAIN_SUM if manifest.recipe is None else manifest.recipe.aggregation.outer
        self._manifest = manifest
        self._parent = parent
        self._cache = cache
        self._law = Law(manifest.denominator_log2, outer)
        self._readers: dict[str, DeltaReader] = {}
        self.terms = tuple(term for term in manifest.terms if term.coefficient)
        """Those with a part in the sum."""
        self.deltas = [BlobRef(sha256=term.contribution, size_bytes=term.size_bytes) for term in self.terms]
        self.states: list[BlobRef] = [group.master for group in parent.groups]
        """The parent's files that are needed."""
        if outer.keeps_state:
            self.states += [group.momentum for group in parent.groups if group.momentum is not None]

    def replay(self, tally: Tally) -> None:
        """Make every tensor again. Raises IntegrityError where something is not what a manifest says."""
        self._readers = {term.contribution: self._open_delta(term) for term in self.terms}
        tally.add_bytes(sum(ref.size_bytes for ref in self.deltas))
        for group in self._parent.groups:
            self._group(tally, group)

    def _group(self, tally: Tally, group: Group) -> None:
        with ExitStack() as files:
            masters = files.enter_context(TensorFile.open(self._cache / group.master.sha256))
            require_members(masters, group.tensors, group.master.path)
            momenta = None
            if self._law.outer.keeps_state and group.momentum is not None:
                momenta = files.enter_context(TensorFile.open(self._cache / group.momentum.sha256))
                stateful = [name for name in group.tensors if self._parent.tensors[name].momentum is not None]
                require_members(momenta, stateful, group.momentum.path)
            for name in group.tensors:
                self._tensor(tally, name, masters, momenta)
        tally.add_bytes(group.master.size_bytes)
        if momenta is not None:
            tally.add_bytes(momenta.size_bytes)

    def _tensor(self, tally: Tally, name: str, masters: TensorFile, momenta: TensorFile | None) -> None:
        before, entry = self._parent.tensors[name], self._manifest.tensors[name]
        _require_stored(masters, name, master_dtype(before.export_dtype), before.shape)
        if self._law.outer.keeps_state and before.momentum is not None:
            if momenta is None:
                raise IntegrityError(f"tensor {name!r} has a momentum, but its group has no file of them")
            _require_stored(momenta, name, "F32", before.shape)
        touching = [(term.coefficient, self._readers[term.contribution]) for term in self.terms]
        terms = [
            TensorTerm(coefficient, partial(reader.factors, name), reader.slices(name))
            for coefficient, reader in touching
            if name in reader.layouts
        ]
        try:
            made = _make(name, before, terms, self._law, masters, momenta)
        except DeltaError as exc:
            raise IntegrityError(f"the contributions cannot be folded: {exc.cause}") from exc
        if made != entry:
            tally.mismatches.append(name)
        tally.tensors += 1
        tally.changed += entry.master != before.master

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


def _targets(manifest: Manifest) -> Mapping[str, Target]:
    """What a contribution of this round may change."""
    return manifest.targets() if manifest.recipe is None else select_targets(manifest.targets(), manifest.recipe)
