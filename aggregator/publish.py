"""Publishing: the files of a version's folder, its model card, its sealed manifest and the pointer, in that order.

What always holds:
- blobs first, then the manifest, which is written once and never replaced, then the pointer by compare-and-swap: a
  reader sees the old version or the new one, never a part;
- the pointer moves one version at a time, from parent to child, and never back;
- doing it again after a crash anywhere ends in the same place; two different rounds cannot both become version n;
- text from outside (names of contributors, the base model's name) cannot add markup, links, table cells or YAML keys.

It does not decide whether a version is good enough (the round's release gate does) and does not compute tensors.
Model card format: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

import yaml

from aggregator.basemodel import INDEX
from rankup.dtypes import STORED_AS
from rankup.errors import ConflictError, NotFoundError
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.records import FileEntry, Manifest
from rankup.signing import Ed25519PrivateKey, public_key_hex
from rankup.store import Store, put_blob
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    MAX_POINTER_BYTES,
    manifest_digest,
    manifest_key,
    open_envelope,
    parse_pointer,
    pointer_key,
    require_asked,
    seal,
)

README = "README.md"
MAX_CARD_ROWS = 1000
"""Contributors in the card's table; the manifest lists all of them."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


# -- the folder --------------------------------------------------------------------------------------------------------


def carried_files(files: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """What a version takes over from its parent as it is: config and tokenizer, but neither card nor index."""
    return tuple(sorted((f for f in files if f.path not in (README, INDEX)), key=lambda f: f.path))


def loadable_files(store: Store, manifest: Manifest, carried: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """What `from_pretrained` needs beside the tensors: the carried files, and an index where there are several groups.

    Stores the index as a blob; sorted by path. Raises what the store raises.
    """
    files = carried_files(carried)
    if len(manifest.groups) > 1:
        files = (*files, _put_file(store, INDEX, tensor_index(manifest)))
    return tuple(sorted(files, key=lambda file: file.path))


def version_files(store: Store, manifest: Manifest, carried: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """Everything in a version's folder but the tensors, sorted by path: `loadable_files` and the model card.

    `carried` may be the parent's files or an earlier result of this function: card and index are always made anew.
    """
    card = _put_file(store, README, model_card(manifest).encode())
    return tuple(sorted((*loadable_files(store, manifest, carried), card), key=lambda file: file.path))


def tensor_index(manifest: Manifest) -> bytes:
    """`model.safetensors.index.json`: which export file holds which tensor, as transformers reads it."""
    total = sum(math.prod(t.shape) * STORED_AS[t.export_dtype].itemsize for t in manifest.tensors.values())
    places = {name: group.export.path for group in manifest.groups for name in group.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"


def _put_file(store: Store, path: str, data: bytes) -> FileEntry:
    ref = put_blob(store, data)
    return FileEntry(sha256=ref.sha256, size_bytes=ref.size_bytes, path=path)


# -- the model card ----------------------------------------------------------------------------------------------------


def model_card(manifest: Manifest) -> str:
    """README.md of a version: YAML front matter for the hub, then where it comes from and how to check it.

    Depends on the manifest alone, but for its list of files.
    """
    blocks = [
        _front_matter(manifest),
        f"# {manifest.model}, version {manifest.version}",
        _origin(manifest),
        *_measured(manifest),
        *_contributions(manifest),
        _how_to(manifest),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(manifest: Manifest) -> str:
    licence = manifest.licence.lower()
    known = _LICENCE_ID.fullmatch(licence) is not None
    fields: dict[str, object] = {"library_name": "transformers", "license": licence if known else "other"}
    if not known:
        fields["license_name"] = _plain(manifest.licence)
    # The hub refuses a card whose base_model is not a name on the hub, such as a folder or a file.
    if _HUB_NAME.fullmatch(manifest.base_model):
        fields["base_model"] = manifest.base_model
    if manifest.datasets:
        fields["datasets"] = list(manifest.datasets)
    fields["tags"] = ["rankup", "lora", "community-trained"]
    return "---\n" + yaml.safe_dump(fields, sort_keys=True, width=10_000) + "---"


def _origin(manifest: Manifest) -> str:
    base = f"Base model: {_code(manifest.base_model)}. Licence: {_code(manifest.licence)}."
    if manifest.parent is None:
        return f"The base model as it is, before the first round.\n\n{base}"
    datasets = ", ".join(_code(name) for name in manifest.datasets) or "none"
    return (
        f"Made in round {_code(manifest.round_id or '')} from version {manifest.version - 1} by {len(manifest.terms)} "
        "contributions: volunteers trained low-rank deltas B·A, and their exact weighted sum was added to the full "
        f"weights.\n\n{base} Datasets: {datasets}.\n\nParent manifest: {_code(manifest.parent)}"
    )


def _measured(manifest: Manifest) -> list[str]:
    evaluation = manifest.evaluation
    if evaluation is None:
        return []
    before = evaluation.parent_heldout_loss
    rows = ["| | held-out loss, nats per token |", "|---|---|"]
    if before is not None:
        rows.append(f"| version {manifest.version - 1} | {before:.4f} |")
    rows.append(f"| version {manifest.version} | {evaluation.heldout_loss:.4f} |")
    size = f"Measured on {evaluation.examples} examples ({evaluation.tokens} tokens) that no volunteer can fetch."
    return ["## Held-out loss", "\n".join(rows), size]


def _contributions(manifest: Manifest) -> list[str]:
    if not manifest.terms:
        return []
    denominator = 2**manifest.denominator_log2
    rows = ["| contributor | shard | tokens | weight | contribution |", "|---|---|---|---|---|"]
    for term in manifest.terms[:MAX_CARD_ROWS]:
        weight = f"{term.coefficient}/{denominator}"
        cells = (_code(term.worker_name), str(term.shard), f"{term.tokens:,}", weight, _code(term.contribution[:16]))
        rows.append(f"| {' | '.join(cells)} |")
    more = len(manifest.terms) - MAX_CARD_ROWS
    rest = [f"And {more} more, listed in the manifest."] if more > 0 else []
    return ["## Contributors", "\n".join(rows), *rest]


def _how_to(manifest: Manifest) -> str:
    name = f"{manifest.model}@{manifest.version}"
    return (
        "## Pull and verify\n\n"
        "With the address of the server that published this version as `URL`:\n\n"
        f"```sh\nrankup pull URL {name} --to {manifest.model}\nrankup verify URL {name}\n```\n\n"
        "`pull` checks the publisher's signature and every hash. `verify` adds the contributions to the parent again "
        "and compares every tensor, bit for bit."
    )


def _plain(text: str) -> str:
    """One line: characters that do not print, among them line breaks and bidirectional marks, are replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _code(text: str) -> str:
    """Text from outside as a code span, in which neither markdown nor HTML nor links mean anything.

    Only a backtick could end the span and only a pipe the table's cell: both are replaced by their look-alikes.
    """
    return "`" + _plain(text).replace("`", "'").replace("|", "¦") + "`"


# -- the manifest and the pointer --------------------------------------------------------------------------------------


def publish_manifest(store: Store, private_key: Ed25519PrivateKey, manifest: Manifest) -> Pointer:
    """Seal `manifest`, write it, move the pointer to it; returns the pointer to this version.

    Redo-safe: a manifest that is there already is adopted when it has the same round, parent and tensors (a crash came
    between the two steps, or after them), and a pointer that is at this version or beyond stays where it is.

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
        if (there.round_id, there.parent, there.tensors) != (manifest.round_id, manifest.parent, manifest.tensors):
            raise ConflictError(
                f"version {manifest.version} of {manifest.model} exists already, from {there.round_id or 'the base'}",
                remedy="Open a round on the latest version; the contributions of this one are kept.",
            ) from None
        return digest
    return manifest_digest(manifest)


def _latest(store: Store, model: str) -> tuple[Pointer | None, str | None]:
    try:
        data, etag = store.get_with_etag(pointer_key(model), max_bytes=MAX_POINTER_BYTES)
    except NotFoundError:
        return None, None
    return parse_pointer(data, model=model), etag


def load_version(store: Store, model: str, version: int, digest: str, *, publisher_key: str) -> Manifest:
    """The published manifest of one version, with the digest that a round names as its base.

    Raises NotFoundError, and IntegrityError where signature, model, version or digest differ.
    """
    data = store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)
    manifest, found, _ = open_envelope(data, publisher_key=publisher_key)
    require_asked(manifest, found, model=model, version=version, pointed=digest)
    return manifest
