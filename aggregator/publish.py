"""Publishing: the files of a version's folder, its cards, its sealed manifest and the pointer, in that order.

What always holds:
- blobs first, then the manifest, which is written once and never replaced, then the pointer by compare-and-swap: a
  reader sees the old version or the new one, never a part;
- the pointer moves one version at a time, from parent to child, and never back;
- doing it again after a crash anywhere ends in the same place; two different rounds cannot both become version n.

It does not decide whether a version is good enough (the round's release gate does) and does not compute tensors. What
the cards say is for `aggregator.cards` and `aggregator.openness`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from pydantic import ValidationError

from aggregator.basemodel import INDEX
from aggregator.cards import Chapter, model_card, openness_card
from aggregator.openness import OPENNESS, OPENNESS_JSON, assess
from rankup.dtypes import STORED_AS
from rankup.errors import ConflictError, IntegrityError, NotFoundError
from rankup.lineage import CONTRIBUTIONS_NAME
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.records import ContributionList, DatasetCard, FileEntry, KeyChange, Manifest
from rankup.signing import Ed25519PrivateKey, public_key_hex
from rankup.store import Store, put_blob
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    MAX_POINTER_BYTES,
    dataset_key,
    manifest_digest,
    manifest_key,
    open_envelope,
    parse_pointer,
    pointer_key,
    require_asked,
    seal,
)
from rankup.vision import has_processor

README = "README.md"
MADE_ANEW = (README, INDEX, OPENNESS, OPENNESS_JSON, CONTRIBUTIONS_NAME)
"""Files of a folder that each version has of its own; it takes over all others from its parent."""
MAX_CHAPTERS = 100
"""Earlier versions that a model card tells of."""
MAX_DATASET_CARD_BYTES = 256 * 1024 * 1024


# -- the folder --------------------------------------------------------------------------------------------------------


def carried_files(files: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """What a version takes over from its parent as it is: config and tokenizer, but nothing of `MADE_ANEW`."""
    return tuple(sorted((f for f in files if f.path not in MADE_ANEW), key=lambda f: f.path))


def loadable_files(store: Store, manifest: Manifest, carried: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """What `from_pretrained` needs beside the tensors: the carried files, and an index where there are several groups.

    Stores the index as a blob; sorted by path. Raises what the store raises.
    """
    files = carried_files(carried)
    if len(manifest.groups) > 1:
        files = (*files, _put_file(store, INDEX, tensor_index(manifest)))
    return tuple(sorted(files, key=lambda file: file.path))


def version_files(
    store: Store,
    manifest: Manifest,
    carried: Sequence[FileEntry],
    *,
    history: Sequence[Chapter] = (),
    datasets: Sequence[DatasetCard] = (),
    contributions: ContributionList | None = None,
) -> tuple[FileEntry, ...]:
    """Everything in a version's folder but the tensors, sorted by path: `loadable_files`, the cards and the log.

    `carried` may be the parent's files or an earlier result of this function: what is in `MADE_ANEW` is made anew.

    Args:
        history: of the versions before this one, oldest first (`load_history`).
        datasets: cards of the manifest's datasets (`load_datasets`).
        contributions: the leaves of the manifest's log; None: the folder gets no list of them.
    """
    record = assess(manifest, datasets)
    made = {
        README: model_card(manifest, history, sees=has_processor(file.path for file in carried)).encode(),
        OPENNESS: openness_card(record).encode(),
        OPENNESS_JSON: json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n",
    }
    if contributions is not None:
        made[CONTRIBUTIONS_NAME] = canonical_json(contributions)
    new = [_put_file(store, path, data) for path, data in made.items()]
    return tuple(sorted((*loadable_files(store, manifest, carried), *new), key=lambda file: file.path))


def load_history(store: Store, manifest: Manifest, *, publisher_key: str) -> tuple[Chapter, ...]:
    """Chapters of the published versions before `manifest`, oldest first, at most `MAX_CHAPTERS`.

    The chain of parents is followed as far as the store has it. Raises IntegrityError, and what the store raises.
    """
    chapters: list[Chapter] = []
    version, digest = manifest.version - 1, manifest.parent
    while digest is not None and len(chapters) < MAX_CHAPTERS:
        try:
            parent = load_version(
                store, manifest.model, version, digest, publisher_key=publisher_key, known_changes=manifest.keys
            )
        except NotFoundError:
            break
        chapters.append(Chapter.of(parent))
        version, digest = version - 1, parent.parent
    return tuple(reversed(chapters))


def load_datasets(store: Store, manifest: Manifest) -> tuple[DatasetCard, ...]:
    """The cards of the manifest's datasets that there are. Raises IntegrityError, and what the store raises."""
    cards: list[DatasetCard] = []
    for name in manifest.datasets:
        try:
            data = store.get(dataset_key(name), max_bytes=MAX_DATASET_CARD_BYTES)
            cards.append(DatasetCard.model_validate_json(data))
        except NotFoundError:
            continue
        except ValidationError as exc:
            raise IntegrityError(f"the card of dataset {name} is not readable") from exc
    return tuple(cards)


def tensor_index(manifest: Manifest) -> bytes:
    """`model.safetensors.index.json`: which export file holds which tensor, as transformers reads it."""
    total = sum(math.prod(t.shape) * STORED_AS[t.export_dtype].itemsize for t in manifest.tensors.values())
    places = {name: group.export.path for group in manifest.groups for name in group.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"


def _put_file(store: Store, path: str, data: bytes) -> FileEntry:
    ref = put_blob(store, data)
    return FileEntry(sha256=ref.sha256, size_bytes=ref.size_bytes, path=path)


# -- the manifest and the pointer --------------------------------------------------------------------------------------


def publish_manifest(store: Store, private_key: Ed25519PrivateKey, manifest: Manifest) -> Pointer:
    """Seal `manifest`, write it, move the pointer to it; returns the pointer to this version.

    Redo-safe: a manifest that is there already is adopted when it has the same round or change, parent and tensors (a
    crash came between the two steps, or after them), and a pointer that is at this version or beyond stays where it is.

    Raises ConflictError (the version belongs to another round, or the pointer is not at the parent), IntegrityError
    (what is stored is not readable or not signed by this key), and what the store raises.
    """
    latest, etag = _latest(store, manifest.model)
    _require_room(latest, manifest)
    digest = _write_once(store, private_key, manifest)
    mine = Pointer(model=manifest.model, version=manifest.version, manifest=digest, updated_at=manifest.created_at)
    if latest is not None and latest.version > manifest.version:
        return mine
    if latest is not None and latest.version == manifest.version:
        if latest.manifest != digest:
            raise ConflictError(f"version {manifest.version} of {manifest.model} is published with other contents")
        return latest
    store.swap(pointer_key(manifest.model), canonical_json(mine), etag=etag)
    return mine


def _require_room(latest: Pointer | None, manifest: Manifest) -> None:
    """Before anything is written: the pointer is at the parent, at this version or beyond."""
    if latest is None:
        if manifest.version > 0:
            raise ConflictError(
                f"{manifest.model} has no pointer, so version {manifest.version} cannot follow its parent",
                remedy="Restore the pointer of the model from its newest manifest, then let the round publish again.",
            )
    elif latest.version < manifest.version and (latest.version + 1, latest.manifest) != (
        manifest.version,
        manifest.parent,
    ):
        raise ConflictError(
            f"version {manifest.version} of {manifest.model} does not follow version {latest.version}, the latest one",
            remedy="Open a round on the latest version; the contributions of this one are kept.",
        )


def _write_once(store: Store, private_key: Ed25519PrivateKey, manifest: Manifest) -> str:
    """Digest of the manifest that now stands under this version's key."""
    key = manifest_key(manifest.model, manifest.version)
    try:
        store.put(key, seal(manifest, private_key), if_absent=True, content_type="application/json")
    except ConflictError:
        data = store.get(key, max_bytes=MAX_ENVELOPE_BYTES)
        there, digest, _ = open_envelope(data, publisher_key=public_key_hex(private_key))
        if _identity(there) != _identity(manifest):
            made_by = there.round_id or ("the base" if there.change is None else f"a {there.change.kind}")
            raise ConflictError(
                f"version {manifest.version} of {manifest.model} exists already, from {made_by}",
                remedy="Open a round on the latest version; the contributions of this one are kept.",
            ) from None
        return digest
    return manifest_digest(manifest)


def _identity(manifest: Manifest) -> object:
    """What two manifests of one version must agree in to be the same step; times and cards may differ."""
    return manifest.round_id, manifest.change, manifest.parent, manifest.tensors


def _latest(store: Store, model: str) -> tuple[Pointer | None, str | None]:
    try:
        data, etag = store.get_with_etag(pointer_key(model), max_bytes=MAX_POINTER_BYTES)
    except NotFoundError:
        return None, None
    return parse_pointer(data, model=model), etag


def load_version(
    store: Store, model: str, version: int, digest: str, *, publisher_key: str, known_changes: Sequence[KeyChange] = ()
) -> Manifest:
    """The published manifest of one version, with the digest that a round or a child names.

    `known_changes`: of the publisher's key, as a later version has them. Raises NotFoundError, and IntegrityError where
    signature, model, version or digest differ.
    """
    data = store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)
    manifest, found, _ = open_envelope(data, publisher_key=publisher_key, known_changes=known_changes)
    require_asked(manifest, found, model=model, version=version, pointed=digest)
    return manifest
