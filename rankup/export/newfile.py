"""Large files that appear under their name when they are complete: written beside it first, then synced and renamed.

Whatever stops the writing, an error or Ctrl-C, leaves nothing of the new file and everything of the old one. (A process
that is killed leaves a file `.NAME.*.partial`, which can be removed.)
"""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rankup.durable import sync_file, sync_folder
from rankup.errors import DiskFullError, SetupError, StateError


@contextmanager
def new_file(to: Path, *, force: bool, size_bytes: int = 0) -> Iterator[Path]:
    """The path of a fresh file beside `to`; it takes the name `to` when the block ends well, and is removed otherwise.

    Raises:
        StateError: `to` exists and `force` was not given, or it is no file.
        DiskFullError: fewer than `size_bytes` are free, or the disk filled up.
        SetupError: the folder cannot be written to.
    """
    require_absent(to, force=force)
    fresh = to.with_name(f".{to.name}.{secrets.token_hex(4)}.partial")
    room = DiskFullError(f"no room for {to}", remedy="Free some space and run the same command again.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(to.parent).free < size_bytes:
            raise room
        yield fresh
        sync_file(fresh)
        fresh.replace(to)
        sync_folder(to.parent)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise room from exc
        raise SetupError(f"cannot write {to}: {exc}", remedy="Check the folder and its permissions.") from exc
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def require_absent(to: Path, *, force: bool) -> None:
    """Raise StateError where `to` exists and may not be replaced."""
    if to.is_dir():
        raise StateError(f"{to} is a folder", remedy="Give the name of a file.")
    if to.exists() and not force:
        raise StateError(f"{to} exists already", remedy="Choose another name, or replace it with --force.")
