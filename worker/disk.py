"""One question about disks: does this failure mean that there is no room left?

What always holds: `full_disk_means_disk_full` turns exactly the errors of a full disk, a full quota or a file-size
limit into `DiskFullError` and lets every other error pass untouched.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from rankup.errors import DiskFullError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SQLITE_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE})
"""SQLite says FULL for ENOSPC only; a quota or a file-size limit comes as a failed write."""


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` or one of its causes says that the disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFullError):
            return True
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if isinstance(seen, sqlite3.Error) and getattr(seen, "sqlite_errorcode", None) in _SQLITE_FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextlib.contextmanager
def full_disk_means_disk_full(where: Path) -> Iterator[None]:
    """Raise `DiskFullError` naming `where` in place of the foreign errors of a full disk."""
    try:
        yield
    except (OSError, sqlite3.Error) as exc:
        if is_disk_full(exc):
            raise DiskFullError(
                f"no room left on the disk of {where}",
                remedy="Free some space or lower RANKUP_WORKER_CACHE_BYTES, then run the same command again: "
                "finished deltas are kept and delivered first.",
            ) from exc
        raise
