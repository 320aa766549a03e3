"""Versions of a model: where their records lie, how a manifest is sealed, and every rule by which one is trusted.

A sealed manifest is a DSSE envelope (github.com/secure-systems-lab/dsse, envelope.md). The sha256 of its payload, the
manifest's canonical bytes, is the version's identity; the signature is not part of it. `keyid` is the public key in
hex: a hint for whoever has pinned none yet, never a reason to trust.

Rules of trust, in the order in which they are checked; the first that fails raises (TooLargeError for the first,
IntegrityError for the others) and nothing after it is looked at:

 1. An envelope or a pointer is no larger than its limit before any of it is parsed.
 2. It has the form of an envelope with the payload type of a manifest and exactly one signature.
 3. The signature is good, and by the pinned publisher key or one that `rankup.keychain` leads to or from it. Who has
    pinned none takes the key that the envelope names, once, and pins it ("trust on first use").
 4. The payload is a manifest, and encoding that again gives the same bytes: no duplicate or unknown field, no second
    spelling of a number, so a digest names one meaning.
 5. The manifest is consistent in itself: every tensor lies in exactly one group, file names of a folder are unique
    (also where upper and lower case are the same), one digest has one size, terms stand sorted without repetition,
    only version 0 has no parent, a version is made by a round or by one change.
 6. Its model is the one asked for, its version number is the one asked for, its digest is the one the pointer names.
 7. Versions form one chain: what this reader has seen as version n keeps its digest for ever, and the parent of n is
    the digest of n - 1, each where known.
 8. `latest` never goes back behind a version that this reader has seen as latest. A version asked for by number may
    be older: that is the reader's own decision.

Rules 1 to 5 are `open_envelope` and `parse_pointer`, 6 is `require_asked`, 7 and 8 are `History`. Nothing here does
I/O or looks at the bytes of tensors; `rankup.pull` and `rankup.replay` do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from rankup.errors import InputError, IntegrityError, TooLargeError
from rankup.keychain import require_chain, require_trusted
from rankup.message import Digest, Identifier, Message, canonical_json
from rankup.protocol import Pointer, payload_type
from rankup.records import BlobRef, FileEntry, KeyChange, KeyRotation, Manifest, Revocation, Rollback
from rankup.signing import Ed25519PrivateKey, public_key_hex, sign_bytes, verify_bytes
from rankup.targets import fits_role

MANIFEST_KIND = "manifest"
MAX_ENVELOPE_BYTES = 64 * 1024 * 1024
MAX_POINTER_BYTES = 4096
MAX_KNOWN_VERSIONS = 1024

_identifier: TypeAdapter[str] = TypeAdapter(Identifier)
_digest: TypeAdapter[str] = TypeAdapter(Digest)


# -- keys in object storage --------------------------------------------------------------------------------------------


def pointer_key(model: str) -> str:
    """The one object per model that is ever overwritten."""
    return f"models/{_name(model)}/latest"


def manifest_prefix(model: str) -> str:
    """All versions of a model lie under it, in order of their numbers up to 999,999."""
    return f"models/{_name(model)}/versions/"


def manifest_key(model: str, version: int) -> str:
    """The sealed manifest of one version."""
    if version < 0:
        raise InputError(f"there is no version {version}")
    return f"{manifest_prefix(model)}{version:06d}.json"


def retained_key(model: str) -> str:
    """What is no longer kept of a model's versions (`rankup.records.Retained`); absent: everything is."""
    return f"models/{_name(model)}/retained.json"


def round_key(round_id: str) -> str:
    """The record of an opened round."""
    return f"rounds/{_name(round_id)}/round.json"


def draft_key(round_id: str) -> str:
    """The folded manifest of a round that waits for its evaluation."""
    return f"rounds/{_name(round_id)}/folded.json"


def cohort_key(round_id: str) -> str:
    """What was decided about a round's contributions together."""
    return f"rounds/{_name(round_id)}/cohort.json"


def fold_key(round_id: str, fold: str, number: int) -> str:
    """One finished group of the fold with the digest `fold` of its inputs; `number` counts from 1."""
    return f"rounds/{_name(round_id)}/fold/{_hex(fold)}/{number:05d}.json"


def receipt_prefix(round_id: str) -> str:
    """All receipts of a round lie under it."""
    return f"rounds/{_name(round_id)}/receipts/"


def receipt_key(round_id: str, contribution: str) -> str:
    """The verdict on one contribution."""
    return f"{receipt_prefix(round_id)}{_hex(contribution)}.json"


def submission_prefix(round_id: str) -> str:
    """The submissions of a round that have no verdict yet."""
    return f"rounds/{_name(round_id)}/submissions/"


def submission_key(round_id: str, lease_id: str) -> str:
    """What was handed in with a lease, until it is judged: canonical JSON of a Submission."""
    return f"{submission_prefix(round_id)}{_name(lease_id)}.json"


def round_end_key(round_id: str) -> str:
    """How a round ended: canonical JSON of a RoundEnd."""
    return f"rounds/{_name(round_id)}/end.json"


def dataset_key(dataset: str) -> str:
    """The card of a dataset."""
    return f"datasets/{_name(dataset)}/card.json"


def heldout_key(dataset: str, sha256: str) -> str:
    """Held-out rows: outside `blobs/`, so the gateway never hands out a link to them."""
    return f"datasets/{_name(dataset)}/heldout/{_hex(sha256)}.jsonl"


def upload_key(lease_id: str, sha256: str) -> str:
    """Where a worker puts its delta before it is admitted."""
    return f"uploads/{_name(lease_id)}/{_hex(sha256)}.delta"


def version_of_key(key: str) -> int | None:
    """The version number in a key made by `manifest_key`; None for any other key."""
    stem = key.rpartition("/")[2].removesuffix(".json")
    if "/versions/" not in key or not key.endswith(".json") or not (stem.isascii() and stem.isdigit()):
        return None
    return int(stem)


def _name(value: str) -> str:
    try:
        return _identifier.validate_python(value)
    except ValidationError as exc:
        raise InputError(
            f"{value!r} is not a valid name", remedy="Use a-z, 0-9, '.', '_' and '-', at most 64 of them."
        ) from exc


def _hex(value: str) -> str:
    try:
        return _digest.validate_python(value)
    except ValidationError as exc:
        raise InputError(f"{value!r} is not a sha256 digest in lower-case hex") from exc


# -- the sealed manifest -----------------------------------------------------------------------------------------------


class EnvelopeSignature(Message):
    """One signature of a DSSE envelope. `sig` is base64 of 64 bytes."""

    keyid: str
    sig: str


class Envelope(Message):
    """DSSE: base64 of the payload with its media type and its signatures; the names are the specification's."""

    payloadType: str  # noqa: N815
    payload: str
    signatures: tuple[EnvelopeSignature, ...]


def seal(manifest: Manifest, private_key: Ed25519PrivateKey) -> bytes:
    """The manifest as a signed envelope: the same manifest and key give the same bytes.

    Raises:
        IntegrityError: the manifest is not consistent (rule 5) or another key signs this version: no reader would
            take it.
        TooLargeError: the envelope would exceed the limit that readers hold.
    """
    require_consistent(manifest)
    public_key = public_key_hex(private_key)
    require_chain(manifest.keys, model=manifest.model, version=manifest.version, signer=public_key)
    payload = canonical_json(manifest)
    signature = bytes.fromhex(sign_bytes(private_key, MANIFEST_KIND, payload))
    data = canonical_json(
        Envelope(
            payloadType=payload_type(MANIFEST_KIND),
            payload=base64.b64encode(payload).decode(),
            signatures=(EnvelopeSignature(keyid=public_key, sig=base64.b64encode(signature).decode()),),
        )
    )
    _require_size(data, MAX_ENVELOPE_BYTES, "envelope")
    return data


def manifest_digest(manifest: Manifest) -> str:
    """The version's identity: sha256 of the canonical bytes."""
    return hashlib.sha256(canonical_json(manifest)).hexdigest()


def open_envelope(
    data: bytes, *, publisher_key: str | None, known_changes: Sequence[KeyChange] = ()
) -> tuple[Manifest, str, str]:
    """Check an envelope by rules 1 to 5; returns the manifest, its digest and the key (hex) that signed it.

    With `publisher_key` None the key that the envelope names is taken: only for the first contact with a publisher.
    `known_changes` are those in the newest manifest that this reader has trusted: with them, versions that an earlier
    key signed stay readable.

    Raises:
        TooLargeError: above `MAX_ENVELOPE_BYTES`.
        IntegrityError: any of rules 2 to 5 fails.
    """
    _require_size(data, MAX_ENVELOPE_BYTES, "envelope")
    try:
        envelope = Envelope.model_validate_json(data)
    except ValidationError as exc:
        raise IntegrityError("the sealed manifest is not an envelope") from exc
    if envelope.payloadType != payload_type(MANIFEST_KIND):
        raise IntegrityError(f"the envelope holds {envelope.payloadType!r}, not a manifest")
    if len(envelope.signatures) != 1:
        raise IntegrityError(f"the envelope has {len(envelope.signatures)} signatures; one is needed")
    payload = _unbase64(envelope.payload, "payload")
    [named] = envelope.signatures
    try:
        verify_bytes(named.keyid, MANIFEST_KIND, payload, _unbase64(named.sig, "signature").hex())
    except InputError as exc:
        raise IntegrityError(f"the envelope's signature is malformed: {exc}") from exc
    try:
        manifest = Manifest.model_validate_json(payload)
        again = canonical_json(manifest)
    except ValueError as exc:
        raise IntegrityError(
            f"the signed payload is not a manifest that this version of Rankup can read: {_first_line(exc)}",
            remedy="Update Rankup; if that does not help, tell the publisher.",
        ) from exc
    if again != payload:
        raise IntegrityError("the signed payload is not in canonical form")
    require_chain(manifest.keys, model=manifest.model, version=manifest.version, signer=named.keyid)
    if publisher_key is not None:
        require_trusted(publisher_key, named.keyid, manifest.keys, known_changes, version=manifest.version)
    require_consistent(manifest)
    return manifest, hashlib.sha256(payload).hexdigest(), named.keyid


def parse_pointer(data: bytes, *, model: str) -> Pointer:
    """The pointer of `model`. It is not signed: it only says which signed version to look at.

    Raises:
        TooLargeError: above `MAX_POINTER_BYTES`.
        IntegrityError: it is not a pointer, or one of another model.
    """
    _require_size(data, MAX_POINTER_BYTES, "pointer")
    try:
        pointer = Pointer.model_validate_json(data)
    except ValidationError as exc:
        raise IntegrityError(f"the pointer of {model} is not readable: {_first_line(exc)}") from exc
    if pointer.model != model:
        raise IntegrityError(f"the pointer of {model} names the model {pointer.model}")
    return pointer


# -- rules of trust ----------------------------------------------------------------------------------------------------


def require_consistent(manifest: Manifest) -> None:
    """Rule 5.

    Raises:
        IntegrityError: what contradicts what.
    """
    grouped = Counter(name for group in manifest.groups for name in group.tensors)
    if repeated := sorted(name for name, count in grouped.items() if count > 1):
        raise IntegrityError(f"tensor {repeated[0]!r} lies in more than one group")
    if odd := sorted(grouped.keys() ^ manifest.tensors.keys()):
        raise IntegrityError(f"tensor {odd[0]!r} stands in the groups or in the table of tensors, not in both")
    for name, entry in manifest.tensors.items():
        if any(length < 0 for length in entry.shape):
            raise IntegrityError(f"tensor {name!r} has the shape {entry.shape}")
        if entry.role is not None and not fits_role(entry.role, entry.shape):
            raise IntegrityError(f"tensor {name!r} of shape {entry.shape} cannot be what it is called: {entry.role}")
    masters = tuple(group.master for group in manifest.groups)
    momenta = tuple(group.momentum for group in manifest.groups if group.momentum is not None)
    for files in (manifest.export_files(), masters, momenta):
        _require_unique_paths(files)
    patches = tuple(group.patch for group in manifest.groups if group.patch is not None)
    _require_one_size((*manifest.export_files(), *masters, *momenta, *patches))
    _require_consistent_momentum(manifest)
    contributions = [term.contribution for term in manifest.terms]
    if any(first >= second for first, second in itertools.pairwise(contributions)):
        raise IntegrityError("the terms are not sorted by contribution, or one stands there twice")
    if (manifest.version == 0) != (manifest.parent is None):
        raise IntegrityError(f"version {manifest.version} with parent {manifest.parent}: only version 0 has none")
    if manifest.version == 0 and manifest.terms:
        raise IntegrityError("version 0 has terms, but nothing that they could be added to")
    _require_consistent_patches(manifest)
    _require_consistent_change(manifest)


def _require_consistent_momentum(manifest: Manifest) -> None:
    """A momentum is there only where the recipe's outer step keeps one, its file where a tensor of the group has it."""
    for group in manifest.groups:
        if any(manifest.tensors[name].momentum for name in group.tensors) != (group.momentum is not None):
            raise IntegrityError(f"the group of {group.tensors[0]!r} has a momentum without its file, or the reverse")
    stateful = sorted(name for name, entry in manifest.tensors.items() if entry.momentum is not None)
    if stateful and (manifest.recipe is None or not manifest.recipe.aggregation.outer.keeps_state):
        raise IntegrityError(f"tensor {stateful[0]!r} has a momentum, but the recipe keeps none")
    if fixed := [name for name in stateful if manifest.tensors[name].role is None]:
        raise IntegrityError(f"tensor {fixed[0]!r} has a momentum, but no delta may change it")


def _require_consistent_patches(manifest: Manifest) -> None:
    """A patch leads from another file to the group's own, and is smaller than that."""
    for group in manifest.groups:
        patch = group.patch
        if patch is None:
            continue
        if manifest.version == 0:
            raise IntegrityError("version 0 has a patch, but no parent that it could be applied to")
        if patch.base == group.export.sha256 or patch.size_bytes >= group.export.size_bytes:
            raise IntegrityError(f"the patch of {group.export.path} leads nowhere, or is no smaller than the file")


def _require_consistent_change(manifest: Manifest) -> None:
    """A version is made by a round or by one change; only a key rotation brings a new key."""
    change = manifest.change
    if change is not None and (manifest.version == 0 or manifest.round_id is not None or manifest.terms):
        raise IntegrityError(f"version {manifest.version} is made by a {change.kind} and by a round, or is the first")
    if isinstance(change, Rollback) and change.to >= manifest.version:
        raise IntegrityError(f"version {manifest.version} rolls back to version {change.to}")
    if isinstance(change, Revocation) and any(
        first >= second for first, second in itertools.pairwise(change.contributions)
    ):
        raise IntegrityError("the revoked contributions are not sorted, or one stands there twice")
    fresh = bool(manifest.keys) and manifest.keys[-1].statement.from_version == manifest.version
    if fresh != isinstance(change, KeyRotation):
        raise IntegrityError(f"version {manifest.version} has a new key without a key rotation, or the reverse")


def require_asked(manifest: Manifest, digest: str, *, model: str, version: int, pointed: str | None = None) -> None:
    """Rule 6: this is the model, the version and (where a pointer named it) the digest that was asked for.

    Raises:
        IntegrityError: it is another one.
    """
    if manifest.model != model:
        raise IntegrityError(f"asked for the model {model}, got {manifest.model}")
    if manifest.version != version:
        raise IntegrityError(f"asked for version {version} of {model}, got version {manifest.version}")
    if pointed is not None and digest != pointed:
        raise IntegrityError(f"version {version} of {model} is {digest[:16]}…, but the pointer names {pointed[:16]}…")


def require_same_tensors(manifest: Manifest, parent: Manifest) -> None:
    """A round changes values only: names, shapes, dtypes and roles are the parent's.

    Raises:
        IntegrityError: they are not.
    """
    if odd := sorted(manifest.tensors.keys() ^ parent.tensors.keys()):
        raise IntegrityError(f"tensor {odd[0]!r} is in only one of version {manifest.version} and its parent")
    for name, entry in manifest.tensors.items():
        before = parent.tensors[name]
        if (entry.shape, entry.export_dtype, entry.role) != (before.shape, before.export_dtype, before.role):
            raise IntegrityError(f"tensor {name!r} has another shape, dtype or role than in the parent")


@dataclass(frozen=True)
class History:
    """What one reader has already trusted: version -> digest, and the highest version seen as latest."""

    known: Mapping[int, str] = field(default_factory=dict)
    latest: int | None = None

    def require_pointer(self, pointer: Pointer) -> None:
        """Rule 8, and rule 7 for the version that the pointer names: before anything else is fetched.

        Raises:
            IntegrityError: the pointer went back, or names another digest for a version already seen.
        """
        if self.latest is not None and pointer.version < self.latest:
            raise IntegrityError(
                f"the latest version of {pointer.model} was {self.latest}; the server now says {pointer.version}",
                remedy=f"If the publisher announced that, ask for it by number: --version {pointer.version}.",
            )
        self._require_digest(pointer.version, pointer.manifest)

    def admit(self, manifest: Manifest, digest: str, *, as_latest: bool) -> History:
        """The history with this version in it, if rules 7 and 8 hold. Law: admitting the same twice changes nothing.

        Raises:
            IntegrityError: the version has another digest or parent than the one seen before, or goes back.
        """
        if as_latest and self.latest is not None and manifest.version < self.latest:
            raise IntegrityError(f"version {manifest.version} is behind version {self.latest}, which was latest before")
        self._require_digest(manifest.version, digest)
        known = {**self.known, manifest.version: digest}
        if manifest.parent is not None:
            self._require_digest(manifest.version - 1, manifest.parent)
            known[manifest.version - 1] = manifest.parent
        newest = sorted(known)[-MAX_KNOWN_VERSIONS:]
        latest = manifest.version if as_latest else self.latest
        return replace(self, known={version: known[version] for version in newest}, latest=latest)

    def _require_digest(self, version: int, digest: str) -> None:
        known = self.known.get(version)
        if known is not None and known != digest:
            raise IntegrityError(
                f"version {version} was {known[:16]}… and is now {digest[:16]}…: the history was rewritten",
                remedy="Do not use it; ask the publisher why a published version changed.",
            )


def _require_unique_paths(files: Iterable[FileEntry]) -> None:
    seen: set[str] = set()
    for file in files:
        if file.path.casefold() in seen:
            raise IntegrityError(f"two files of the version have the name {file.path!r}")
        seen.add(file.path.casefold())


def _require_one_size(refs: Iterable[BlobRef]) -> None:
    sizes: dict[str, int] = {}
    for ref in refs:
        if sizes.setdefault(ref.sha256, ref.size_bytes) != ref.size_bytes:
            raise IntegrityError(f"the blob {ref.sha256[:16]}… has two sizes")


def _require_size(data: bytes, limit: int, what: str) -> None:
    if len(data) > limit:
        raise TooLargeError(f"the {what} has {len(data)} bytes; the limit is {limit}")


def _unbase64(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise IntegrityError(f"the envelope's {what} is not base64") from exc
    if base64.b64encode(raw).decode() != text:
        # The last character has bits that decode to nothing.
        raise IntegrityError(f"the envelope's {what} is not base64 in its one canonical spelling")
    return raw


def _first_line(exc: Exception) -> str:
    return " ".join(str(exc).split("\n")[:3])[:300]
