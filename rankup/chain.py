"""A chain of versions, from version 0 on: the rules that each version keeps towards those before it.

Rules of trust within one manifest are `rankup.versions`; these are between manifests, in the order in which they are
checked. The first that fails raises IntegrityError.

 1. Versions come one after the other, and the parent that a manifest names is the version before it.
 2. Every manifest repeats all changes of the publisher's key before it; only a key rotation adds one, by the key that
    signed the version before. Each is signed by the key of its time.
 3. Names, shapes, dtypes and roles of tensors never change.
 4. A version after version 0 is made by a round or by one change. A round adds no contribution that is in the sum
    already or was ever revoked, and a base that a term names is a version of this chain. A rollback goes to an older
    version that holds nothing revoked, and has its very tensors and files; a key rotation has those of its parent. A
    revocation names contributions that are in its parent's sum.
 5. The log has the size and the root of the contributions in the sum, and `contributions.json`, where the folder has
    it, is their list.

What always holds: memory is the names of all contributions and one table of tensors, not those of all versions.

It does no I/O and looks at no tensor: that a round's tensors are its sum is what `rankup.replay` proves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from rankup.errors import InputError, IntegrityError
from rankup.lineage import (
    CONTRIBUTIONS_NAME,
    Lineage,
    contribution_file,
    leaves_of,
    leaves_of_round,
    next_lineage,
    require_possible,
)
from rankup.merkle import Peaks, leaf_hash
from rankup.message import canonical_json
from rankup.records import BlobRef, KeyRotation, Leaf, Log, Manifest, Revocation, Rollback
from rankup.versions import require_same_tensors


class Chain:
    """The versions 0, 1, … of one model that have been admitted, without their tables of tensors and files."""

    def __init__(self) -> None:
        self.manifests: list[Manifest] = []
        """`manifests[n]` is version n without tensors, groups and files (`slim`)."""
        self.digests: list[str] = []
        self._signer: str | None = None
        self._lineages: dict[int, Lineage] = {}
        self._parent: Manifest | None = None
        self._sum = GrowingLog("")
        self._revoked: set[str] = set()

    @property
    def leaves(self) -> int:
        """How many contributions are in the sum of the last version."""
        return self._sum.log().size

    def admit(self, manifest: Manifest, digest: str, signer: str, *, table_of: Callable[[int], Manifest]) -> None:
        """Add the next version, whose manifest was opened by rules 1 to 6 of `rankup.versions`.

        `digest` is its identity and `signer` the key (hex) that signed it. `table_of` gives the whole manifest of a
        version before it; it is asked for the one that a rollback names, and what it gives need not be trusted.

        Raises IntegrityError: one of the rules fails.
        """
        parent = self._parent
        if manifest.version != len(self.manifests) or manifest.parent != (self.digests[-1] if parent else None):
            raise IntegrityError(
                f"version {manifest.version} does not follow version {len(self.manifests) - 1}: the chain is broken",
                remedy="Do not use it; ask the publisher why a published version changed.",
            )
        self._require_keys(manifest, signer)
        if parent is not None:
            require_same_tensors(manifest, parent)
            self._require_made(manifest, parent, table_of)
        self._lineages[manifest.version] = next_lineage(manifest, self._lineages)
        self.manifests.append(slim(manifest))
        self.digests.append(digest)
        self._signer = signer
        self._count(manifest)
        self._parent = manifest

    def _require_keys(self, manifest: Manifest, signer: str) -> None:
        number, before = manifest.version, self.manifests[-1].keys if self.manifests else ()
        if manifest.keys[: len(before)] != before or len(manifest.keys) != len(before) + isinstance(
            manifest.change, KeyRotation
        ):
            raise IntegrityError(f"version {number} does not repeat the changes of the publisher's key before it")
        if isinstance(manifest.change, KeyRotation):
            if manifest.keys[-1].statement.old != self._signer:
                raise IntegrityError(f"the change of key in version {number} is not by the key that signed before")
        elif self._signer is not None and signer != self._signer:
            raise IntegrityError(f"version {number} is signed by {signer[:16]}…, which is not the key of its time")

    def _require_made(self, manifest: Manifest, parent: Manifest, table_of: Callable[[int], Manifest]) -> None:
        number, change = manifest.version, manifest.change
        if isinstance(change, Rollback):
            try:
                require_possible(self.manifests, change.to)
            except InputError as exc:
                raise IntegrityError(f"version {number} cannot be a rollback: {exc.cause}") from exc
            require_equal_tables(manifest, table_of(change.to), self.digests[change.to])
        elif isinstance(change, Revocation):
            if absent := [one for one in change.contributions if one not in self._sum]:
                raise IntegrityError(f"version {number} revokes {absent[0][:16]}…, which is not in its parent's sum")
            self._revoked.update(change.contributions)
        elif isinstance(change, KeyRotation):
            require_equal_tables(manifest, parent, self.digests[-1])
        else:
            self._require_round(manifest)

    def _require_round(self, manifest: Manifest) -> None:
        number = manifest.version
        if manifest.round_id is None or manifest.recipe is None:
            raise IntegrityError(f"version {number} is made by no round and by no change")
        for leaf in leaves_of_round(manifest):
            if leaf.contribution in self._sum:
                raise IntegrityError(f"version {number} adds {leaf.contribution[:16]}…, which is in the sum already")
            if leaf.contribution in self._revoked:
                raise IntegrityError(f"version {number} adds {leaf.contribution[:16]}…, which was revoked")
        published = set(self.digests) if any(term.base_manifest for term in manifest.terms) else set()
        for term in manifest.terms:
            if term.base_manifest is not None and term.base_manifest not in published:
                raise IntegrityError(
                    f"{term.contribution[:16]}… in version {number} is based on {term.base_manifest[:16]}…, "
                    "which is no version before it"
                )

    def _count(self, manifest: Manifest) -> None:
        """Rule 5; the manifest is the last of `manifests`."""
        if manifest.version == 0:
            self._sum = GrowingLog(manifest.model)
        elif manifest.change is None:
            self._sum.extend(leaves_of_round(manifest))
        elif not isinstance(manifest.change, KeyRotation):
            self._sum = GrowingLog(manifest.model)
            self._sum.extend(leaves_of(self.manifests, manifest.version))
        if manifest.log != self._sum.log():
            raise IntegrityError(
                f"the log of version {manifest.version} has {manifest.log.size} contributions and the root "
                f"{manifest.log.root[:16]}…; those in the sum are {self._sum.log().size} with "
                f"{self._sum.log().root[:16]}…"
            )
        for file in manifest.files:
            listed = BlobRef(sha256=file.sha256, size_bytes=file.size_bytes)
            if file.path == CONTRIBUTIONS_NAME and listed != self._sum.file():
                raise IntegrityError(f"{file.path} of version {manifest.version} does not list what is in its sum")


class GrowingLog:
    """The log of a sum that contributions are added to, and the list of them: each leaf is encoded and hashed once."""

    def __init__(self, model: str) -> None:
        # What stands before and after the leaves: cut out of a list without any.
        empty = contribution_file(model or "none", ())
        cut = empty.index(b"[") + 1
        self._tail = empty[cut:]
        self._file = hashlib.sha256(empty[:cut])
        self._size_bytes = cut
        self._peaks = Peaks()
        self._contributions: set[str] = set()

    def __contains__(self, contribution: object) -> bool:
        return contribution in self._contributions

    def extend(self, leaves: Iterable[Leaf]) -> None:
        """Add leaves at the end, in their order."""
        for leaf in leaves:
            data = canonical_json(leaf)
            piece = b"," + data if self._peaks.size else data
            self._file.update(piece)
            self._size_bytes += len(piece)
            self._peaks = self._peaks.with_leaf(leaf_hash(data))
            self._contributions.add(leaf.contribution)

    def log(self) -> Log:
        """Law: `rankup.lineage.log_of` of all leaves."""
        return Log(size=self._peaks.size, root=self._peaks.root().hex())

    def file(self) -> BlobRef:
        """Law: hash and size of `rankup.lineage.contribution_file` of all leaves."""
        digest = self._file.copy()
        digest.update(self._tail)
        return BlobRef(sha256=digest.hexdigest(), size_bytes=self._size_bytes + len(self._tail))


def slim(manifest: Manifest) -> Manifest:
    """What lineages follow from: a manifest without its tables of tensors and files. With these a long chain of a large
    model would not fit into memory."""
    return manifest.model_copy(update={"tensors": {}, "groups": (), "files": ()})


def require_equal_tables(manifest: Manifest, other: Manifest, digest: str) -> None:
    """`manifest` has the very tensors and files of `other`, a version before it, whose identity is `digest`.

    Raises:
        IntegrityError: it has not, or `other` is not that version.
    """
    if hashlib.sha256(canonical_json(other)).hexdigest() != digest:
        raise IntegrityError(f"version {other.version} has another digest than before: the history was rewritten")
    if odd := [name for name, entry in sorted(manifest.tensors.items()) if entry != other.tensors.get(name)]:
        raise IntegrityError(
            f"version {manifest.version} must have the tensors of version {other.version}, but {odd[0]!r} differs"
        )
    mine, theirs = (
        [(g.tensors, g.master.sha256, g.export.sha256, g.momentum and g.momentum.sha256) for g in one.groups]
        for one in (manifest, other)
    )
    if mine != theirs:
        raise IntegrityError(f"version {manifest.version} must have the files of version {other.version}")
