"""Verifying files: a pulled folder against the signed manifest in it, and the reports of every verification.

What always holds:
- a report that is `ok` means that every file and every tensor looked at had the hash that the manifest names; a broken
  signature raises instead;
- memory is a few megabytes: files and tensors are hashed in pieces.

It proves that the bytes are those that the publisher signed, not how they were made: `rankup.replay` does that. Nothing
here uses a network.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from rankup.download import OnProgress, PullProgress
from rankup.dtypes import master_dtype
from rankup.errors import IntegrityError, NotFoundError
from rankup.folder import ENVELOPE_NAME, FolderState, Want, read_folder_state, sha256_of, wanted_files
from rankup.records import Group, Manifest, TensorEntry
from rankup.tensorfile import TensorFile
from rankup.versions import MAX_ENVELOPE_BYTES, open_envelope

_PIECE_BYTES = 4 * 1024**2

Level = Literal["files", "chain", "round", "all"]
"""How much is proved: what lies in a folder; manifests back to version 0; one version's tensors; every version's."""

QUALITY: Final = "the held-out losses that manifests state, or that the model is good"
PEOPLE: Final = "who the contributors are and what data they trained on"


@dataclass(frozen=True)
class Report:
    """What was verified. `mismatches` names files and tensors whose bytes are not those of the manifest."""

    model: str
    version: int
    manifest: str
    publisher_key: str
    level: Level
    versions: int
    """How many had their manifests checked."""
    tensors: int
    """How many had their hashes checked, of all versions that were replayed."""
    changed: int
    """Tensors whose master differs from the parent's; 0 where nothing was replayed."""
    contributions: int
    """Those with a part in the sum."""
    mismatches: tuple[str, ...]
    bytes: int
    """Of the files, masters and contributions that were looked at."""
    seconds: float
    note: str
    proved: tuple[str, ...] = ()
    """What follows from a report that is `ok`, a sentence each."""
    unproved: tuple[str, ...] = ()
    """What does not."""

    @property
    def ok(self) -> bool:
        return not self.mismatches


@dataclass
class Tally:
    """Counts of one verification; `clock` is a monotonic one."""

    clock: Callable[[], float]
    progress: OnProgress | None
    stage: str
    total_bytes: int
    started: float = 0.0
    versions: int = 1
    tensors: int = 0
    changed: int = 0
    done_bytes: int = 0
    mismatches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def add_bytes(self, count: int) -> None:
        """Count bytes as done and tell the progress."""
        self.done_bytes += count
        if self.progress is not None:
            self.progress(PullProgress(self.stage, self.done_bytes, max(self.done_bytes, self.total_bytes)))

    def compare(self, label: str, made: Mapping[str, TensorEntry], manifest: Manifest, parent: Manifest) -> None:
        """Count the tensors of a version that was made again; those that differ become mismatches, named after
        `label`."""
        for name, entry in manifest.tensors.items():
            if made.get(name) != entry:
                self.mismatches.append(label + name)
            self.tensors += 1
            self.changed += entry.master != parent.tensors[name].master

    def report(
        self,
        manifest: Manifest,
        digest: str,
        key: str,
        level: Level,
        *,
        contributions: int,
        note: str,
        proved: Sequence[str],
        unproved: Sequence[str] = (),
    ) -> Report:
        """The report as of now; what no level proves is added."""
        return Report(
            model=manifest.model,
            version=manifest.version,
            manifest=digest,
            publisher_key=key,
            level=level,
            versions=self.versions,
            tensors=self.tensors,
            changed=self.changed,
            contributions=contributions,
            mismatches=tuple(self.mismatches),
            bytes=self.done_bytes,
            seconds=self.clock() - self.started,
            note=note,
            proved=tuple(proved),
            unproved=(*unproved, PEOPLE, QUALITY),
        )


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
    state, manifest, digest, key = open_folder(folder, publisher_key=publisher_key)
    files = wanted_files(manifest, state.want)
    tally = Tally(clock, progress, "checking", sum(file.size_bytes for file in files))
    groups = {(group.export if state.want == "export" else group.master).path: group for group in manifest.groups}
    for file in files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
            tally.mismatches.append(file.path)
        elif file.path in groups:
            check_group(tally, manifest, groups[file.path], state.want, path)
        tally.add_bytes(file.size_bytes)
    return tally.report(
        manifest,
        digest,
        key,
        "files",
        contributions=manifest.log.size,
        note=f"every file of the {state.want} was hashed; nothing was replayed",
        proved=(
            f"every file of version {manifest.version} is here with the bytes that its manifest names",
            f"the manifest is signed by {key[:16]}…",
        ),
        unproved=("how the version was made: --level round, or all, of its source",),
    )


def open_folder(folder: Path, *, publisher_key: str | None) -> tuple[FolderState, Manifest, str, str]:
    """What a pulled folder remembers, and its manifest with its identity and the key (hex) that signed it.

    The signature must be by `publisher_key`, or by the key that the folder has pinned. A folder that was not pulled but
    came with its sealed manifest, as from a hub, has pinned none: the key must be named.

    Raises:
        NotFoundError: no pull has finished in this folder.
        IntegrityError: the manifest is not signed by that key or not the one that was pulled.
    """
    state = read_folder_state(folder)
    if state is None and publisher_key is not None:
        manifest, digest, key = open_envelope(sealed_manifest(folder), publisher_key=publisher_key)
        state = FolderState(model=manifest.model, publisher_key=key, keys=manifest.keys, manifest=digest)
        return state, manifest, digest, key
    if state is None or not state.complete:
        remedy = "Run `rankup pull` into it first."
        if state is None and (folder / ENVELOPE_NAME).is_file():
            remedy = "It was not pulled, so it has pinned no key: name the publisher's with --key."
        raise NotFoundError(f"no complete version lies in {folder}", remedy=remedy)
    manifest, digest, key = open_envelope(
        sealed_manifest(folder), publisher_key=publisher_key or state.publisher_key, known_changes=state.keys
    )
    if digest != state.manifest:
        raise IntegrityError(f"the manifest in {folder} is {digest[:16]}…, but {str(state.manifest)[:16]}… was pulled")
    return state, manifest, digest, key


def sealed_manifest(folder: Path) -> bytes:
    """The envelope that a version's folder holds, not opened yet; one byte more than its limit where it is too large.

    Raises:
        NotFoundError: the folder has none.
    """
    try:
        with (folder / ENVELOPE_NAME).open("rb") as sealed:
            return sealed.read(MAX_ENVELOPE_BYTES + 1)
    except FileNotFoundError as exc:
        raise NotFoundError(f"{folder} lacks {ENVELOPE_NAME}", remedy="Pull the version again.") from exc


def check_group(tally: Tally, manifest: Manifest, group: Group, side: Want, path: Path) -> None:
    """Hash every tensor of a group's file; those that differ become mismatches.

    Raises:
        IntegrityError: the file breaks its format, or holds other tensors than the group.
    """
    with TensorFile.open(path) as file:
        require_members(file, group.tensors, path.name)
        for name in group.tensors:
            entry = manifest.tensors[name]
            extent = file.entries[name]
            hashed = _tensor_sha256(file, name)
            dtype = master_dtype(entry.export_dtype) if side == "master" else entry.export_dtype
            fits = (extent.dtype, extent.shape) == (dtype, entry.shape)
            if not fits or hashed != getattr(entry, side):
                tally.mismatches.append(name)
            tally.tensors += 1


def _tensor_sha256(file: TensorFile, name: str) -> str:
    digest = hashlib.sha256()
    extent = file.entries[name]
    size_bytes = extent.stop - extent.start
    for start in range(0, size_bytes, _PIECE_BYTES):
        digest.update(file.read_part(name, start, min(_PIECE_BYTES, size_bytes - start)))
    return digest.hexdigest()


def require_members(file: TensorFile, names: Collection[str], label: str) -> None:
    """Raise IntegrityError unless the file holds exactly these tensors."""
    if odd := sorted(file.entries.keys() ^ set(names)):
        raise IntegrityError(f"{label}: tensor {odd[0]!r} is in the file or in the manifest's group, not in both")
