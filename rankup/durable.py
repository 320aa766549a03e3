"""Local files: small ones written so that a crash leaves the old bytes or the new ones, large ones read by ranges.

What always holds of a written file: its data are on disk before the name points to them, the name is on disk when the
call returns, and nobody but its owner can read it unless `mode` says so. Files that arrive piece by piece have their
own ways (`rankup.delta`, `rankup.download`). Errors are OSError, as the operating system says them: the caller knows
what the file is for.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Put `data` under `path` in place of whatever is there; the file has `mode` from its first moment on."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Put a file's data on disk, whoever wrote it."""
    _sync(path)


def sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_range(descriptor: int, start: int, length: int) -> bytes:
    """`length` bytes from `start` on, fewer at the end of the file. One pread gives at most about 2 GiB on Linux."""
    pieces: list[bytes] = []
    while length > 0 and (piece := os.pread(descriptor, length, start)):
        pieces.append(piece)
        start += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
