"""Pulling a version into a folder that `from_pretrained` can read.

What always holds:
- nothing in the folder is replaced before every new file has arrived and has the hash that the signed manifest names;
- what is trusted is decided by `rankup.versions` alone; the folder remembers in `.rankup.json` the publisher's key from
  the first contact on, the digests of the versions seen and the highest version that was latest;
- a killed pull goes on where it stopped: parts lie in `.partial/`, and `.rankup.json` says `complete: false` while
  files are being moved into place. Only files that a pull put there are ever removed;
- one process at a time writes to a folder.

The sealed manifest stays beside the files as `.rankup.manifest.json`, so that they can be verified without a network.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankup.download import OnProgress, PullProgress, fetch
from rankup.errors import StateError
from rankup.folder import (
    ENVELOPE_NAME,
    PARTIAL_NAME,
    FolderState,
    Want,
    disk_errors,
    folder_lock,
    read_folder_state,
    sha256_of,
    wanted_files,
    write_durably,
    write_folder_state,
)
from rankup.records import BlobRef, FileEntry, Manifest
from rankup.sources import GatewaySource, Patience, Source, StoreSource, patiently
from rankup.versions import History, open_envelope, require_asked

__all__ = ["GatewaySource", "PullProgress", "Pulled", "Source", "StoreSource", "Want", "pull"]


@dataclass(frozen=True)
class Pulled:
    """A version that lies in `folder`, complete and checked. `publisher_key` (hex) signed it."""

    manifest: Manifest
    digest: str
    folder: Path
    publisher_key: str


def pull(
    source: Source,
    model: str,
    version: int | None,
    to: Path,
    *,
    publisher_key: str | None = None,
    want: Want = "export",
    progress: OnProgress | None = None,
    parallel: int = 4,
    patience: Patience | None = None,
) -> Pulled:
    """Have version `version` of `model` (None: the latest) in the folder `to`.

    `publisher_key` (hex) replaces the key that the folder has pinned, and then forgets the history seen under the old
    one; without either, the key of the first manifest is pinned.

    Raises:
        IntegrityError: a signature, hash, chain or pointer is not what it must be; the old files are untouched.
        NotFoundError: there is no such model or version.
        DiskFullError: no room; what has arrived is kept.
        StateError: another process pulls into this folder, or it holds another model.
        RetryableError: the source cannot be reached for longer than `patience`.
    """
    patience = patience or Patience()
    with folder_lock(to):
        before = read_folder_state(to)
        if before is not None and before.model != model:
            raise StateError(f"{to} holds the model {before.model}, not {model}", remedy="Choose another folder.")
        pinned = publisher_key or (before.publisher_key if before else None)
        history = History()
        if before is not None and before.publisher_key == pinned:
            history = History(known=before.known, latest=before.latest)
        pointed = None
        number = version
        if number is None:
            pointer = patiently(lambda: source.latest(model), patience)
            history.require_pointer(pointer)
            number, pointed = pointer.version, pointer.manifest
        asked = number
        envelope = patiently(lambda: source.envelope(model, asked), patience)
        manifest, digest, key = open_envelope(envelope, publisher_key=pinned)
        require_asked(manifest, digest, model=model, version=asked, pointed=pointed)
        history = history.admit(manifest, digest, as_latest=version is None)
        state = before or FolderState(model=model, publisher_key=key)
        state = state.model_copy(update={"publisher_key": key, "known": dict(history.known), "latest": history.latest})
        write_folder_state(to, state)

        files = wanted_files(manifest, want)
        missing = _missing(to, files, progress)
        _forget_parts(to, missing)
        if missing:
            fetch(source, missing, to / PARTIAL_NAME, parallel=parallel, patience=patience, progress=progress)
        if progress is not None:
            total_bytes = sum(file.size_bytes for file in files)
            progress(PullProgress("installing", total_bytes, total_bytes))
        state = state.model_copy(update={"version": asked, "manifest": digest, "want": want})
        _install(to, state, files, missing, envelope)
    return Pulled(manifest=manifest, digest=digest, folder=to, publisher_key=key)


def _missing(folder: Path, files: Sequence[FileEntry], progress: OnProgress | None) -> tuple[FileEntry, ...]:
    """The files that are not in the folder with the right bytes."""
    missing = []
    total_bytes = sum(file.size_bytes for file in files)
    done_bytes = 0
    for file in files:
        path = folder / file.path
        with disk_errors(path):
            if path.is_dir():
                raise StateError(f"{path} is a folder, but the version has a file of that name")
            if not path.is_file() or path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
                missing.append(file)
        done_bytes += file.size_bytes
        if progress is not None:
            progress(PullProgress("checking", done_bytes, total_bytes))
    return tuple(missing)


def _forget_parts(folder: Path, missing: Sequence[BlobRef]) -> None:
    """Parts of versions that are no longer asked for only take room."""
    wanted = {ref.sha256 for ref in missing}
    partial = folder / PARTIAL_NAME
    with disk_errors(partial):
        for part in partial.iterdir() if partial.is_dir() else ():
            if part.name not in wanted:
                part.unlink()


def _install(
    folder: Path, state: FolderState, files: Sequence[FileEntry], missing: Sequence[FileEntry], envelope: bytes
) -> None:
    """Move what has arrived into place. Killed anywhere in here, the next pull finds every byte again."""
    partial = folder / PARTIAL_NAME
    names = {file.path for file in files}
    obsolete = tuple(file for file in state.files if file.path not in names)
    with disk_errors(folder):
        moves: list[tuple[Path, Path]] = []
        taken: set[str] = set()
        for file in missing:
            arrived = partial / file.sha256
            if file.sha256 in taken:
                # Two files with the same bytes: the second gets its own copy, before anything is moved.
                arrived = partial / f"{file.sha256}.{len(moves)}"
                shutil.copyfile(partial / file.sha256, arrived)
            taken.add(file.sha256)
            moves.append((arrived, folder / file.path))
        if moves or obsolete:
            write_folder_state(folder, state.model_copy(update={"complete": False, "files": (*files, *obsolete)}))
        for arrived, place in moves:
            arrived.replace(place)
        for file in obsolete:
            (folder / file.path).unlink(missing_ok=True)
        write_durably(folder / ENVELOPE_NAME, envelope)
        write_folder_state(folder, state.model_copy(update={"complete": True, "files": tuple(files)}))
        shutil.rmtree(partial, ignore_errors=True)
