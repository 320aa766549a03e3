"""Patches of a version that no fold made: from the parent's export files to the version's own.

What always holds: a group has a patch exactly where its export file differs from the parent's and the patch is smaller
than the file; files lie on disk, two at a time, and are hashed before they count. `rankup.patch` is the format.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from rankup.errors import IntegrityError
from rankup.patch import write_patch
from rankup.records import BlobRef, Group, Manifest, Patch
from rankup.store import Store, blob_key, put_blob_file


def with_patches(store: Store, parent: Manifest, child: Manifest) -> Manifest:
    """`child` with the patches that lead from `parent`'s export files to its own, stored as blobs.

    Raises NotFoundError (an export file is gone), IntegrityError, DiskFullError and what the store raises.
    """
    before = {group.tensors: group.export for group in parent.groups}
    groups = tuple(_patched(store, before.get(group.tensors), group) for group in child.groups)
    return child.model_copy(update={"groups": groups})


def _patched(store: Store, before: BlobRef | None, group: Group) -> Group:
    bare = group.model_copy(update={"patch": None})
    if before is None or before.sha256 == group.export.sha256:
        return bare
    with tempfile.TemporaryDirectory(prefix="rankup-patch-") as folder:
        base = _fetch(store, before, Path(folder) / "base")
        child = _fetch(store, group.export, Path(folder) / "child")
        out = Path(folder) / "patch"
        ref = write_patch(base, child, out)
        if ref.size_bytes >= group.export.size_bytes:
            return bare
        put_blob_file(store, out, ref=ref)
    return group.model_copy(update={"patch": Patch(base=before.sha256, sha256=ref.sha256, size_bytes=ref.size_bytes)})


def _fetch(store: Store, ref: BlobRef, path: Path) -> Path:
    store.get_file(blob_key(ref.sha256), path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != ref.sha256:
            raise IntegrityError(f"the bytes stored under blob {ref.sha256} have another hash")
    return path
