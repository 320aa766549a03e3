"""The publisher's own versions: the latest, those behind it, and the log of contributions that each carries.

What always holds:
- every manifest is checked (signature, form, number, digest) before it is used; the chain is followed from the pointer
  by the parents' digests, so it is the one that readers see;
- a manifest that was written but not pointed to yet is a publication that stopped half-way. Nothing else can become
  that version, so it is finished before anything is built on the version before it;
- leaves come from `contributions.json` where a version has one, checked against its log; from the chain elsewhere.

It computes no tensors and seals nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rankup
from aggregator.publish import load_datasets, load_history, load_version, version_files
from rankup.chain import slim
from rankup.errors import BusyError, ConflictError, InputError, IntegrityError, NotFoundError
from rankup.keychain import require_chain
from rankup.lineage import CONTRIBUTIONS_NAME, contribution_file, leaves_of, log_of
from rankup.message import canonical_json
from rankup.proofs import MAX_LIST_BYTES, parse_contributions
from rankup.protocol import Pointer
from rankup.records import ContributionList, FileEntry, KeyChange, Leaf, Log, Manifest, RoundRecord, Term
from rankup.store import Store, get_blob, put_blob
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    MAX_POINTER_BYTES,
    manifest_key,
    open_envelope,
    parse_pointer,
    pointer_key,
)

SOFTWARE = f"rankup {rankup.__version__}"
ATTEMPTS = 8


@dataclass(frozen=True)
class Published:
    """A version as it stands in object storage."""

    manifest: Manifest
    digest: str


# -- versions ----------------------------------------------------------------------------------------------------------


def latest_version(store: Store, model: str, *, publisher_key: str) -> Published:
    """The latest version; a publication that stopped before it moved the pointer is finished.

    `publisher_key` is the public half (hex) of the publisher's key here.
    Raises NotFoundError (no such model), IntegrityError, ConflictError (the pointer does not come to rest).
    """
    for _ in range(ATTEMPTS):
        try:
            data, etag = store.get_with_etag(pointer_key(model), max_bytes=MAX_POINTER_BYTES)
        except NotFoundError as exc:
            raise NotFoundError(f"there is no model {model}", remedy="`rankup versions` lists the models.") from exc
        pointer = parse_pointer(data, model=model)
        following = _following(store, pointer, publisher_key)
        if following is None:
            manifest = load_version(store, model, pointer.version, pointer.manifest, publisher_key=publisher_key)
            return Published(manifest, pointer.manifest)
        try:
            store.swap(pointer_key(model), canonical_json(following), etag=etag)
        except ConflictError:
            continue  # Whoever published it has moved the pointer.
    raise ConflictError(f"versions of {model} follow each other faster than they can be read")


def _following(store: Store, pointer: Pointer, publisher_key: str) -> Pointer | None:
    """Where the pointer should be already."""
    version = pointer.version + 1
    if store.head(manifest_key(pointer.model, version)) is None:
        return None
    data = store.get(manifest_key(pointer.model, version), max_bytes=MAX_ENVELOPE_BYTES)
    manifest, digest, _ = open_envelope(data, publisher_key=publisher_key)
    if (manifest.model, manifest.version, manifest.parent) != (pointer.model, version, pointer.manifest):
        return None
    return Pointer(model=pointer.model, version=version, manifest=digest, updated_at=manifest.created_at)


def outline(
    store: Store, newest: Manifest, *, publisher_key: str, known_changes: Sequence[KeyChange] = ()
) -> list[Manifest]:
    """Versions 0 … `newest`, made `slim`. `known_changes` as in `load_version`, where `newest` is not the latest."""
    chain, known = [slim(newest)], known_changes or newest.keys
    while (digest := chain[-1].parent) is not None:
        version = chain[-1].version - 1
        chain.append(
            slim(load_version(store, newest.model, version, digest, publisher_key=publisher_key, known_changes=known))
        )
    return chain[::-1]


def version_behind(
    store: Store, latest: Published, chain: Sequence[Manifest], version: int, *, publisher_key: str
) -> Manifest:
    """The whole manifest of a version of the chain that ends with `latest`. Raises NotFoundError, IntegrityError."""
    newest = latest.manifest
    digest = latest.digest if version == newest.version else chain[version + 1].parent or ""
    return load_version(store, newest.model, version, digest, publisher_key=publisher_key, known_changes=newest.keys)


def published_already(store: Store, manifest: Manifest, *, publisher_key: str) -> Pointer | None:
    """Where the version of this round stands, if it was published; later versions may follow it.

    Raises ConflictError (it was not, and cannot follow the latest version), NotFoundError, IntegrityError.
    """
    latest = latest_version(store, manifest.model, publisher_key=publisher_key)
    if latest.digest == manifest.parent:
        return None
    if latest.manifest.version >= manifest.version:
        data = store.get(manifest_key(manifest.model, manifest.version), max_bytes=MAX_ENVELOPE_BYTES)
        there, digest, _ = open_envelope(data, publisher_key=publisher_key, known_changes=latest.manifest.keys)
        if (there.model, there.round_id, there.parent) == (manifest.model, manifest.round_id, manifest.parent):
            return Pointer(model=there.model, version=there.version, manifest=digest, updated_at=there.created_at)
    raise ConflictError(
        f"version {manifest.version} of {manifest.model} does not follow version {latest.manifest.version}, the latest",
        remedy="It is folded again on the latest version.",
    )


def require_signer(manifest: Manifest, public_key: str) -> None:
    """Raise BusyError where `public_key` (hex) may not sign this version: a rotation has not come to its end."""
    try:
        require_chain(manifest.keys, model=manifest.model, version=manifest.version, signer=public_key)
    except IntegrityError as exc:
        raise BusyError(
            f"the publisher's key is not the one that signs version {manifest.version} of {manifest.model}",
            remedy="Run `rankup admin rotate-key` again: it goes on where it stopped.",
        ) from exc


# -- the parent of a round's version -----------------------------------------------------------------------------------


def parent_of_round(store: Store, record: RoundRecord, *, publisher_key: str) -> Published:
    """The version that a round's sum is added to: the latest one, as long as no other round made a version after the
    round's base. Undone and re-signed versions may stand between; of a round that published already, it is the parent
    that it had.

    Raises InputError (another round was faster), NotFoundError, IntegrityError.
    """
    model = record.request.model
    latest = latest_version(store, model, publisher_key=publisher_key)
    keys = latest.manifest.keys
    found = latest
    while found.manifest.version > record.base_version and found.manifest.parent is not None:
        digest, version = found.manifest.parent, found.manifest.version - 1
        parent = Published(
            load_version(store, model, version, digest, publisher_key=publisher_key, known_changes=keys), digest
        )
        if found.manifest.round_id == record.round_id:
            latest = parent
        elif found.manifest.change is None:
            raise InputError(
                f"version {version + 1} of {model} was made by {found.manifest.round_id} while this round was open",
                remedy="Cancel the round and open one on the latest version; its contributions are kept.",
            )
        found = parent
    if (found.manifest.version, found.digest) != (record.base_version, record.base_manifest):
        raise IntegrityError(f"version {record.base_version} of {model} is not the base of {record.round_id}")
    return latest


def on_parent(record: RoundRecord, parent: str, terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms of a round as its version states them: each names its base where that is not the parent (a digest)."""
    bases = [term.base_manifest or record.base_manifest for term in terms]
    return tuple(
        term.model_copy(update={"base_manifest": None if base == parent else base})
        for term, base in zip(terms, bases, strict=True)
    )


# -- the log -----------------------------------------------------------------------------------------------------------


def leaves_in(
    store: Store, manifest: Manifest, *, publisher_key: str, known_changes: Sequence[KeyChange] = ()
) -> list[Leaf]:
    """The leaves of a version's log. Raises IntegrityError where they are not those that its manifest names."""
    file = next((file for file in manifest.files if file.path == CONTRIBUTIONS_NAME), None)
    if file is not None:
        data = get_blob(store, file.sha256, max_bytes=min(file.size_bytes, MAX_LIST_BYTES))
        return list(parse_contributions(data, manifest))
    if manifest.version == 0:
        return []
    chain = outline(store, manifest, publisher_key=publisher_key, known_changes=known_changes)
    return list(leaves_of(chain, manifest.version))


def with_log(
    store: Store, model: str, files: Sequence[FileEntry], leaves: Sequence[Leaf]
) -> tuple[tuple[FileEntry, ...], Log]:
    """The files of a folder with `contributions.json` in the place of an older one, and the log of these leaves."""
    ref = put_blob(store, contribution_file(model, leaves))
    entry = FileEntry(path=CONTRIBUTIONS_NAME, sha256=ref.sha256, size_bytes=ref.size_bytes)
    others = [file for file in files if file.path != CONTRIBUTIONS_NAME]
    return tuple(sorted((*others, entry), key=lambda file: file.path)), log_of(leaves)


def with_cards(store: Store, manifest: Manifest, *, publisher_key: str) -> Manifest:
    """A draft with the cards of its folder; `contributions.json` is among its files already."""
    leaves = leaves_in(store, manifest, publisher_key=publisher_key)
    files = version_files(
        store,
        manifest,
        manifest.files,
        history=load_history(store, manifest, publisher_key=publisher_key),
        datasets=load_datasets(store, manifest),
        contributions=ContributionList(model=manifest.model, leaves=tuple(leaves)),
    )
    return manifest.model_copy(update={"files": files})
