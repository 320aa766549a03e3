"""The folder that a version is pulled into: what it remembers, who may write to it, and how.

What always holds:
- `.rankup.json` (`FolderState`) and the sealed manifest `.rankup.manifest.json` are replaced whole and durably, never
  written in place;
- one process at a time holds the folder's lock; the kernel takes it back from a process that dies.

It fetches nothing and trusts nothing: `rankup.pull` and `rankup.replay` decide what stands in these files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from rankup.durable import write_file
from rankup.errors import DiskFullError, IntegrityError, SetupError, StateError
from rankup.message import Digest, Identifier, Message, PublicKey, canonical_json
from rankup.records import FileEntry, KeyChange, Manifest
from rankup.routes import state_files

STATE_NAME = ".rankup.json"
ENVELOPE_NAME = ".rankup.manifest.json"
PARTIAL_NAME = ".partial"
LOCK_NAME = ".rankup.lock"

Want = Literal["export", "master"]


class FolderState(Message):
    """What a folder remembers between pulls: `.rankup.json`."""

    format: Literal["rankup.folder/1"] = "rankup.folder/1"
    model: Identifier
    publisher_key: PublicKey
    """Pinned at the first contact or named by the user; it follows the publisher's changes of key, and never back."""
    keys: tuple[KeyChange, ...] = ()
    """The changes of key in the newest manifest that was trusted: older versions open with them."""
    latest: int | None = None
    """The highest version that was seen as latest."""
    known: dict[int, Digest] = Field(default_factory=dict)
    """Version -> digest, of every version (and parent) whose manifest was checked."""
    version: int | None = None
    """The version whose files lie here, or are being moved here."""
    manifest: Digest | None = None
    want: Want = "export"
    files: tuple[FileEntry, ...] = ()
    """Every file that a pull put here."""
    complete: bool = False
    """False: no pull has finished yet, or one was killed while it moved files. Pull again."""


def wanted_files(manifest: Manifest, want: Want) -> tuple[FileEntry, ...]:
    """The files of a pull: "export" is what `from_pretrained` reads; "master" what the fold goes on from, the float32
    masters and, where the outer step keeps a state, the momenta.

    Raises IntegrityError: a master and a momentum have one name.
    """
    if want == "export":
        return manifest.export_files()
    files = state_files(manifest)
    names = [file.path.casefold() for file in files]
    if len(set(names)) != len(names):
        raise IntegrityError("a master and a momentum of the version have the same name")
    return files


def read_folder_state(folder: Path) -> FolderState | None:
    """What an earlier pull left in the folder; None where there was none.

    Raises:
        StateError: the file is not readable.
    """
    path = folder / STATE_NAME
    try:
        return FolderState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        raise StateError(
            f"{path} is not readable: it holds the pinned key and the versions seen",
            remedy=f"Restore it, or delete it and name the publisher's key with --key. ({type(exc).__name__})",
        ) from exc


def write_folder_state(folder: Path, state: FolderState) -> None:
    """Replace the folder's memory at once and durably."""
    write_durably(folder / STATE_NAME, canonical_json(state))


def write_durably(path: Path, data: bytes) -> None:
    """After a crash the old or the new bytes are there; readable for everybody, as the model beside it is."""
    with disk_errors(path):
        write_file(path, data, mode=0o644)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the local disk into DiskFullError or SetupError; a source has translated its own before."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(f"no room to write {path}: {exc.strerror}") from exc
        raise SetupError(f"cannot write {path}: {exc}", remedy="Check the folder and its permissions.") from exc


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; a process that dies lets go of it.

    Raises:
        StateError: another process (or another call in this one) holds it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StateError(
                f"another process is writing to {folder}",
                remedy="Wait until it has finished, or choose another folder.",
            ) from exc
        except OSError as exc:
            raise SetupError(f"{folder} cannot be locked: {exc.strerror}", remedy="Choose a local folder.") from exc
        yield
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hash of a local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
