"""Patches of a version that no fold made: from the parent's export files to the version's own.

What always holds: a group has a patch exactly where its export file differs from the parent's and the patch is smaller
than the file; files lie on disk, two at a time, and are hashed before they count. `rankup.patch` is the format.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rankup.patch import write_patch
from rankup.records import BlobRef, Group, Manifest, Patch
from rankup.store import Store, get_blob_file, put_blob_file


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
        base, child, out = (Path(folder) / name for name in ("base", "child", "patch"))
        get_blob_file(store, before.sha256, base)
        get_blob_file(store, group.export.sha256, child)
        ref = write_patch(base, child, out)
        if ref.size_bytes >= group.export.size_bytes:
            return bare
        put_blob_file(store, out, ref=ref)
    return group.model_copy(update={"patch": Patch(base=before.sha256, sha256=ref.sha256, size_bytes=ref.size_bytes)})
