"""Checkout: a version's Hugging Face folder on the aggregator's own disk, from blobs, for evaluation.

What always holds:
- every file has the hash of its manifest when the folder is handed out;
- files are kept once, by their hash, and linked into folders: two versions that share a file download it once;
- a cached file that has rotted is fetched again, and pruning the cache never breaks a folder that is in use.

It checks no signatures: the caller has a manifest that it trusts. Readers outside use `rankup.pull`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rankup.errors import DiskFullError
from rankup.folder import sha256_of
from rankup.records import BlobRef, Manifest
from rankup.store import Store, get_blob_file


def checkout(store: Store, manifest: Manifest, cache: Path, folder: Path) -> None:
    """Put the export files of `manifest` into `folder`, which exists, through the blobs kept in `cache`.

    Raises IntegrityError where a blob has another hash, DiskFullError, and what the store raises.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for file in manifest.export_files():
        with _disk_errors(folder):
            _link(store, file, cache, folder / file.path)


def prune(cache: Path, keep: Collection[str]) -> None:
    """Drop every kept blob whose digest is not in `keep`."""
    for path in cache.iterdir():
        if path.name not in keep:
            path.unlink(missing_ok=True)


def _link(store: Store, ref: BlobRef, cache: Path, target: Path) -> None:
    kept = cache / ref.sha256
    with contextlib.suppress(FileNotFoundError):
        os.link(kept, target)
        if sha256_of(target) == ref.sha256:
            return
        target.unlink()
    # The folder gets its link before the cache does, so a cache that is pruned meanwhile takes nothing away.
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix="fetch-") as scratch:
        fetched = Path(scratch) / "blob"
        get_blob_file(store, ref.sha256, fetched)
        os.link(fetched, target)
        fetched.replace(kept)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no room left for a version in {folder}") from exc
        raise
