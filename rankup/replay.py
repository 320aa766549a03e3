"""Verifying versions without trusting the organiser: files against the signed manifest, and a round by doing it again.

Two levels:
- files: every file and every tensor in it has the hash that the manifest names;
- replay: the parent's masters and the round's deltas, each checked by hash, are folded again tensor by tensor with the
  coefficients of the manifest (`rankup.fixedpoint`), and every resulting master and export has the manifest's hash.
Version 0 has no round: there every export must be what its master gives, and the report says that this was all.

What always holds:
- a report that is `ok` means that every tensor had the right hashes; a broken signature, chain,
  blob or delta raises instead;
- memory is bounded by the largest tensor and its factors, not by the model or by how many tensors a delta changes.

It proves that the version is the stated sum, not that the contributions are good. It needs neither ray nor torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from rankup.bfloat16 import to_bfloat16
from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.download import OnProgress, PullProgress, fetch
from rankup.errors import DeltaError, InputError, IntegrityError, NotFoundError
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors
from rankup.folder import ENVELOPE_NAME, folder_lock, read_folder_state, sha256_of, wanted_files
from rankup.protocol import MAX_RANK, Target
from rankup.records import BlobRef, Group, Manifest, TensorEntry
from rankup.sources import Patience, Source, patiently
from rankup.tensorfile import Content, TensorExtent, TensorFile
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    History,
    open_envelope,
    require_asked,
    require_same_tensors,
)

Side = Literal["master", "export"]


@dataclass(frozen=True)
class Report:
    """What was verified. `mismatches` names files and tensors whose bytes are not those of the manifest."""

    model: str
    version: int
    manifest: str
    publisher_key: str
    level: Literal["files", "replay"]
    tensors: int
    """How many had their hashes checked."""
    changed: int
    """Tensors whose master differs from the parent's; 0 where nothing was replayed."""
    contributions: int
    mismatches: tuple[str, ...]
    bytes: int
    seconds: float
    note: str

    @property
    def ok(self) -> bool:
        return not self.mismatches


@dataclass
class _Tally:
    """Counts of one run; `clock` is a monotonic one."""

    clock: Callable[[], float]
    progress: OnProgress | None
    stage: str
    total_bytes: int
    started: float = 0.0
    tensors: int = 0
    changed: int = 0
    done_bytes: int = 0
    mismatches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def add_bytes(self, count: int) -> None:
        self.done_bytes += count
        if self.progress is not None:
            self.progress(PullProgress(self.stage, self.done_bytes, self.total_bytes))

    def report(
        self, manifest: Manifest, digest: str, key: str, level: Literal["files", "replay"], terms: int, note: str
    ) -> Report:
        return Report(
            model=manifest.model,
            version=manifest.version,
            manifest=digest,
            publisher_key=key,
            level=level,
            tensors=self.tensors,
            changed=self.changed,
            contributions=terms,
            mismatches=tuple(self.mismatches),
            bytes=self.done_bytes,
            seconds=self.clock() - self.started,
            note=note,
        )


# -- files -------------------------------------------------------------------------------------------------------------


def verify_files(
    folder: Path,
    *,
    publisher_key: str | None = None,
    progress: OnProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Check a pulled folder against the sealed manifest in it, without a network.

    The signature must be by `publisher_key`, or by the key that the folder has pinned.

    Raises:
        NotFoundError: no pull has finished in this folder.
        IntegrityError: the manifest is not signed by that key or not the one that was pulled.
    """
    state = read_folder_state(folder)
    if state is None or not state.complete:
        raise NotFoundError(f"no complete version lies in {folder}", remedy="Run `rankup pull` into it first.")
    try:
        with (folder / ENVELOPE_NAME).open("rb") as sealed:
            envelope = sealed.read(MAX_ENVELOPE_BYTES + 1)
    except FileNotFoundError as exc:
        raise NotFoundError(f"{folder} lacks {ENVELOPE_NAME}", remedy="Pull the version again.") from exc
    manifest, digest, key = open_envelope(envelope, publisher_key=publisher_key or state.publisher_key)
    if digest != state.manifest:
        raise IntegrityError(f"the manifest in {folder} is {digest[:16]}…, but {str(state.manifest)[:16]}… was pulled")
    files = wanted_files(manifest, state.want)
    tally = _Tally(clock, progress, "checking", sum(file.size_bytes for file in files))
    groups = {(group.export if state.want == "export" else group.master).path: group for group in manifest.groups}
    for file in files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
            tally.mismatches.append(file.path)
        elif file.path in groups:
            _check_group(tally, manifest, groups[file.path], state.want, path)
        tally.add_bytes(file.size_bytes)
    note = f"every file of the {state.want} was hashed; nothing was replayed"
    return tally.report(manifest, digest, key, "files", len(manifest.terms), note)


def _check_group(tally: _Tally, manifest: Manifest, group: Group, side: Side, path: Path) -> None:
    """Hash every tensor of a group's file."""
    with TensorFile.open(path) as file:
        _require_members(file, group, path.name)
        for name in group.tensors:
            entry = manifest.tensors[name]
            extent = file.entries[name]
            hashed = hashlib.sha256(file.read(name)).hexdigest()
            fits = extent.shape == entry.shape and (side == "master" or extent.dtype == entry.export_dtype)
            if not fits or hashed != getattr(entry, side):
                tally.mismatches.append(name)
            tally.tensors += 1


def _require_members(file: TensorFile, group: Group, label: str) -> None:
    if odd := sorted(file.entries.keys() ^ set(group.tensors)):
        raise IntegrityError(f"{label}: tensor {odd[0]!r} is in the file or in the manifest's group, not in both")


# -- replay ------------------------------------------------------------------------------------------------------------


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
            tally = _Tally(clock, progress, "checking", sum(ref.size_bytes for ref in masters))
            _check_genesis(tally, manifest, cache)
            note = "version 0 has no round to replay: its masters and exports were hashed and agree with each other"
            return tally.report(manifest, digest, key, "files", 0, note)

        parent, parent_digest, _ = _open(source, model, version - 1, key, patience)
        History().admit(parent, parent_digest, as_latest=False).admit(manifest, digest, as_latest=False)
        require_same_tensors(manifest, parent)
        masters = [group.master for group in parent.groups]
        deltas = [BlobRef(sha256=term.contribution, size_bytes=term.size_bytes) for term in manifest.terms]
        have([*masters, *deltas])
        tally = _Tally(clock, progress, "replaying", sum(ref.size_bytes for ref in (*masters, *deltas)))
        readers = {ref.sha256: _open_delta(cache / ref.sha256, manifest) for ref in deltas}
        tally.add_bytes(sum(ref.size_bytes for ref in deltas))
        for group in parent.groups:
            _replay_group(tally, manifest, parent, group, cache / group.master.sha256, readers)
            tally.add_bytes(group.master.size_bytes)
    note = f"replayed from version {version - 1} and {len(deltas)} contributions"
    return tally.report(manifest, digest, key, "replay", len(deltas), note)


def _open(
    source: Source, model: str, version: int, publisher_key: str | None, patience: Patience, pointed: str | None = None
) -> tuple[Manifest, str, str]:
    envelope = patiently(lambda: source.envelope(model, version), patience)
    manifest, digest, key = open_envelope(envelope, publisher_key=publisher_key)
    require_asked(manifest, digest, model=model, version=version, pointed=pointed)
    return manifest, digest, key


def _check_genesis(tally: _Tally, manifest: Manifest, cache: Path) -> None:
    for group in manifest.groups:
        _check_group(tally, manifest, group, "export", cache / group.export.sha256)
        with TensorFile.open(cache / group.master.sha256) as file:
            _require_members(file, group, group.master.path)
            for name in group.tensors:
                extent = file.entries[name]
                _compare(tally, name, manifest.tensors[name], file.read(name), extent)
        tally.add_bytes(group.master.size_bytes)


def _open_delta(path: Path, manifest: Manifest) -> DeltaReader:
    """A contribution whose every value was checked; its file is opened for each read, since there may be thousands."""

    def read_at(start: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    if manifest.round_id is None or manifest.parent is None:
        raise IntegrityError(f"version {manifest.version} has terms but names no round or no parent")
    try:
        reader = DeltaReader(read_at, path.stat().st_size)
        expected = DeltaHeader(
            model=manifest.model,
            round_id=manifest.round_id,
            lease_id=reader.header.lease_id,  # the lease is not in the manifest
            base_manifest=manifest.parent,
        )
        max_rank = manifest.recipe.rank if manifest.recipe is not None else MAX_RANK
        check_structure(reader, targets=_targets(manifest, reader), max_rank=max_rank, header=expected)
    except InputError as exc:
        raise IntegrityError(f"the contribution {path.name[:16]}… is not one of this round: {exc.cause}") from exc
    return reader


def _targets(manifest: Manifest, reader: DeltaReader) -> Mapping[str, Target]:
    """All targets, or where the recipe trains only some layers those that the delta names (and no others)."""
    targets = manifest.targets()
    if manifest.recipe is None or manifest.recipe.target_modules == "all-linear":
        return targets
    return {name: target for name, target in targets.items() if name in reader.layouts}


def _replay_group(
    tally: _Tally,
    manifest: Manifest,
    parent: Manifest,
    group: Group,
    path: Path,
    readers: Mapping[str, DeltaReader],
) -> None:
    with TensorFile.open(path) as file:
        _require_members(file, group, group.master.path)
        for name in group.tensors:
            extent = file.entries[name]
            raw = file.read(name)
            if (
                hashlib.sha256(raw).hexdigest() != parent.tensors[name].master
                or extent.shape != parent.tensors[name].shape
            ):
                raise IntegrityError(
                    f"tensor {name!r} of version {parent.version} is not the one that its manifest names"
                )
            entry = manifest.tensors[name]
            terms = list(_terms(manifest, name, readers)) if entry.lora else []
            result: Content = raw
            if terms:
                if extent.dtype != "F32":
                    raise IntegrityError(f"tensor {name!r} takes deltas, but its master is {extent.dtype}")
                result = _fold(raw, extent.shape, terms, manifest.denominator_log2)
            _compare(tally, name, entry, result, extent)
            tally.tensors += 1
            if entry.master != parent.tensors[name].master:
                tally.changed += 1


def _terms(manifest: Manifest, name: str, readers: Mapping[str, DeltaReader]) -> Iterator[tuple[int, Factors]]:
    for term in manifest.terms:
        reader = readers[term.contribution]
        if name in reader.layouts:
            yield term.coefficient, reader.factors(name)


def _fold(raw: Content, shape: tuple[int, ...], terms: list[tuple[int, Factors]], denominator_log2: int) -> Content:
    master = np.frombuffer(raw, dtype="<f4").astype(np.float32, copy=False).reshape(shape)
    try:
        folded = fold_tensor(master, terms, denominator_log2)
    except DeltaError as exc:
        raise IntegrityError(f"the contributions cannot be folded: {exc.cause}") from exc
    return folded.astype("<f4", copy=False).data.cast("B")


def _compare(tally: _Tally, name: str, entry: TensorEntry, raw: Content, extent: TensorExtent) -> None:
    """Compare a master (raw bytes) and the export that follows from it with the manifest's hashes."""
    export: Content | None = None
    if extent.dtype == entry.export_dtype:
        export = raw
    elif extent.dtype == "F32" and entry.export_dtype == "BF16":
        master = np.frombuffer(raw, dtype="<f4").astype(np.float32, copy=False)
        export = to_bfloat16(master).astype("<u2", copy=False).tobytes()
    good = (
        export is not None
        and extent.shape == entry.shape
        and hashlib.sha256(raw).hexdigest() == entry.master
        and hashlib.sha256(export).hexdigest() == entry.export
    )
    if not good and name not in tally.mismatches:
        tally.mismatches.append(name)
