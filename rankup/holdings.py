"""What of a version's bytes is at hand before anything is fetched: in the folder, in its parts, in other folders.

What always holds:
- a digest names a file here only after every byte of that was hashed; of other folders (`bases`) only what they
  remember is read, and `verified` hashes a file of theirs before it is used;
- nothing is changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rankup.download import OnProgress, PullProgress
from rankup.errors import StateError
from rankup.folder import PARTIAL_NAME, FolderState, disk_errors, read_folder_state, sha256_of
from rankup.records import FileEntry

Hashed = dict[tuple[Path, int, int, int], str]
"""Path, inode, size and time of change -> digest, of what was hashed before."""

_DIGEST: Final = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Holdings:
    """What is at hand."""

    missing: tuple[FileEntry, ...]
    """Wanted files whose place does not have their bytes."""
    files: Mapping[str, Path]
    """Digest -> a complete file."""
    claimed: frozenset[str]
    """Those of `files` that lie in another folder and were not hashed."""
    arrived: Mapping[str, int]
    """Digest -> bytes of an unfinished download."""
    floor: int
    """No file at hand is of a version before this one, as far as is known; else 0."""

    def verified(self, digest: str) -> Path | None:
        """The file with this digest; None where it has changed or gone since."""
        path = self.files.get(digest)
        if path is None or digest not in self.claimed:
            return path
        try:
            return path if sha256_of(path) == digest else None
        except OSError:
            return None


def look(
    folder: Path,
    wanted: Sequence[FileEntry],
    state: FolderState | None,
    *,
    bases: Sequence[Path] = (),
    hashed: Hashed | None = None,
    progress: OnProgress | None = None,
) -> Holdings:
    """Hash what lies in the folder under the names of the wanted files and of those from before, and as parts.

    What one pull looks at twice is hashed once, where it passes the same `hashed`.

    Raises:
        StateError: a folder lies where a file belongs.
        SetupError: a file cannot be read.
    """
    before = () if state is None else tuple(file.path for file in state.files)
    paths = [folder / name for name in dict.fromkeys([*(file.path for file in wanted), *before])]
    partial = folder / PARTIAL_NAME
    with disk_errors(folder):
        for file in wanted:
            if (folder / file.path).is_dir():
                raise StateError(f"{folder / file.path} is a folder, but the version has a file of that name")
        present = [path for path in paths if path.is_file()]
        parts = sorted(partial.iterdir()) if partial.is_dir() else []
        parts = [part for part in parts if _DIGEST.match(part.name) and part.is_file()]
        total_bytes = sum(path.stat().st_size for path in (*present, *parts))
        done_bytes = 0
        digests: dict[Path, str] = {}
        hashed = {} if hashed is None else hashed
        for path in (*present, *parts):
            stat = path.stat()
            key = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            digests[path] = hashed[key] = hashed.get(key) or sha256_of(path)
            done_bytes = min(total_bytes, done_bytes + stat.st_size)
            if progress is not None:
                progress(PullProgress("checking", done_bytes, total_bytes))
        files = {digests[path]: path for path in reversed(present)}
        arrived: dict[str, int] = {}
        for part in parts:
            if digests[part] == part.name:
                files.setdefault(part.name, part)
            elif part.stat().st_nlink == 1:
                # One that another folder has too is not gone on with: a download would write into that file.
                arrived[part.name] = part.stat().st_size
    versions = [_version_of(state, partly=bool(parts))] if files else []
    claimed: dict[str, Path] = {}
    for base in bases:
        try:
            other = read_folder_state(base)
        except StateError:
            continue
        if other is not None and other.complete:
            claimed |= {file.sha256: base / file.path for file in other.files if file.sha256 not in files}
            versions.append(other.version or 0)
    return Holdings(
        missing=tuple(file for file in wanted if digests.get(folder / file.path) != file.sha256),
        files={**claimed, **files},
        claimed=frozenset(claimed),
        arrived=arrived,
        floor=min(versions, default=0),
    )


def _version_of(state: FolderState | None, *, partly: bool) -> int:
    """The version that the files in a folder are of; 0 where they may be of more than one."""
    if state is None or not state.complete or state.version is None or partly:
        return 0
    return state.version
