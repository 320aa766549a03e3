"""Base versions on the volunteer's disk: one folder per manifest digest, the least recently used go first.

What always holds: a folder named by a digest was left there by a pull that checked every hash; `make_room` never
removes the version that is in use; a version was last used at its folder's modification time. No network here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def version_folder(cache: Path, manifest: str) -> Path:
    """Where the version with this manifest digest lies, or will lie."""
    return cache / manifest


def mark_used(folder: Path) -> None:
    """Note that the version is in use now."""
    os.utime(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def make_room(cache: Path, limit_bytes: int, *, keep: Path) -> list[Path]:
    """Remove versions, least recently used first, until all together take at most `limit_bytes`; `keep` always stays.

    Returns the removed folders.
    """
    folders = [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []
    sizes = {path: folder_bytes(path) for path in folders}
    total = sum(sizes.values())
    removed = []
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        if total <= limit_bytes:
            break
        if folder == keep:
            continue
        shutil.rmtree(folder)
        total -= sizes[folder]
        removed.append(folder)
    return removed
