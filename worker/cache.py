"""Base versions on the volunteer's disk: one folder per manifest digest, the least recently used go first.

What always holds: a folder named by a digest was left there by a pull that checked every hash; `make_room` never
removes the versions that are in use; a version was last used at its folder's modification time. Folders may share files
(hard links): such a file counts once, and is gone with the last folder that has it. No network here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from rankup.errors import StateError
from rankup.folder import read_folder_state


def version_folder(cache: Path, manifest: str) -> Path:
    """Where the version with this manifest digest lies, or will lie."""
    return cache / manifest


def mark_used(folder: Path) -> None:
    """Note that the version is in use now."""
    os.utime(folder)


def nearest_version(cache: Path, model: str, version: int, *, without: Path) -> list[Path]:
    """The folder of the newest complete version of a model that is not newer than `version`, where there is one: what a
    pull of `version` can start from. `without` is the folder of that pull."""
    found: list[tuple[int, Path]] = []
    for folder in cache.iterdir() if cache.is_dir() else ():
        if folder == without or not folder.is_dir():
            continue
        try:
            state = read_folder_state(folder)
        except StateError:
            continue
        if state is not None and state.complete and state.model == model and state.version is not None:
            found.append((state.version, folder))
    older = [(number, folder) for number, folder in found if number <= version]
    return [max(older)[1]] if older else []


def _files(folder: Path) -> dict[tuple[int, int], int]:
    """(device, inode) -> bytes, of every file below the folder."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}


def make_room(cache: Path, limit_bytes: int, *, keep: Collection[Path]) -> list[Path]:
    """Remove versions, least recently used first, until all together take at most `limit_bytes`; `keep` always stays.

    Returns the removed folders.
    """
    folders = [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []
    files = {path: _files(path) for path in folders}
    kept = sorted(folders, key=lambda path: path.stat().st_mtime)
    removed = []
    for folder in list(kept):
        if sum({inode: size for path in kept for inode, size in files[path].items()}.values()) <= limit_bytes:
            break
        if folder in keep:
            continue
        shutil.rmtree(folder)
        kept.remove(folder)
        removed.append(folder)
    return removed
