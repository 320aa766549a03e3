"""Proofs that a contribution is in a version's sum: made and checked without a network.

A pulled folder has the sealed manifest, whose `log` is the root of a Merkle tree, and `contributions.json`, its leaves.
From these a proof can be cut out that is a few hundred bytes long: the leaf and its siblings up to the root. With it,
the sealed manifest alone is enough for whoever wants to know.

What always holds: "in the sum" is said only if the leaf leads to the root that the publisher signed, and the leaf is
that of the contribution asked for. "Not in the sum" is said only if the whole list of leaves gives that root.

It does not prove that the sum was made of what the log says: `rankup.replay` does. Nothing here uses a network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from rankup.checkfiles import open_folder
from rankup.errors import InputError, IntegrityError, NotFoundError, StateError, TooLargeError
from rankup.folder import sha256_of
from rankup.lineage import CONTRIBUTIONS_NAME, leaf_hashes, log_of
from rankup.merkle import inclusion_proof, leaf_hash, root_of_proof
from rankup.message import Digest, Identifier, Message, canonical_json
from rankup.records import ContributionList, Leaf, Manifest, Revocation
from rankup.versions import MAX_ENVELOPE_BYTES, open_envelope

MAX_LIST_BYTES = 256 * 1024 * 1024
"""Of `contributions.json`: more than a million contributions."""
MAX_PROOF_BYTES = 16 * 1024


class InclusionProof(Message):
    """A leaf and the way from it to the root of a version's log (RFC 9162, section 2.1.3)."""

    format: Literal["rankup.proof/1"] = "rankup.proof/1"
    model: Identifier
    version: Annotated[int, Field(ge=1)]
    manifest: Digest
    leaf: Leaf
    index: Annotated[int, Field(ge=0)]
    size: Annotated[int, Field(ge=1)]
    path: Annotated[tuple[Digest, ...], Field(max_length=64)]
    """The siblings, from the leaf's own up to the root's children."""


def contribution_digest(name: str) -> str:
    """The sha256 of the file `name`, or `name` itself where it is one.

    Raises:
        NotFoundError: it is neither.
    """
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return name
    path = Path(name)
    if not path.is_file():
        raise NotFoundError(
            f"{name} is neither a file nor a sha256", remedy="Name the delta file, or its sha256 in lower-case hex."
        )
    return sha256_of(path)


def prove_contribution(
    folder: Path, contribution: str, *, publisher_key: str | None = None
) -> tuple[InclusionProof, str]:
    """The proof that `contribution` (hex digest) is in the sum of the version pulled into `folder`, and the key (hex)
    that signed the version: `publisher_key`, the one that the folder has pinned, or one that it vouches for.

    Raises:
        NotFoundError: it is not in the sum, or the folder lacks a file.
        StateError: it is not in the sum any more: the version is the revocation that took it out.
        IntegrityError: the manifest or the list is not what the publisher signed.
    """
    _, manifest, digest, key = open_folder(folder, publisher_key=publisher_key)
    leaves = _leaves(folder, manifest)
    index = next((place for place, leaf in enumerate(leaves) if leaf.contribution == contribution), None)
    if index is None:
        raise _absent(contribution, manifest)
    proof = InclusionProof(
        model=manifest.model,
        version=manifest.version,
        manifest=digest,
        leaf=leaves[index],
        index=index,
        size=len(leaves),
        path=tuple(node.hex() for node in inclusion_proof(leaf_hashes(leaves), index)),
    )
    require_proof(proof, contribution, manifest, digest)
    return proof, key


def check_proof(proof: InclusionProof, contribution: str, place: Path, *, publisher_key: str | None = None) -> str:
    """Check a proof with the sealed manifest alone: `place` is that file, or a pulled folder. Returns the key (hex)
    that signed the manifest; without `publisher_key` and a folder that has pinned one, the caller must know it.

    Raises:
        IntegrityError: it does not prove that `contribution` is in the sum of that version.
        NotFoundError: there is no sealed manifest.
    """
    if place.is_dir():
        _, manifest, digest, key = open_folder(place, publisher_key=publisher_key)
    else:
        manifest, digest, key = open_envelope(
            _read(place, MAX_ENVELOPE_BYTES, "sealed manifest"), publisher_key=publisher_key
        )
    require_proof(proof, contribution, manifest, digest)
    return key


def require_proof(proof: InclusionProof, contribution: str, manifest: Manifest, digest: str) -> None:
    """The proof is of this contribution and this version, and leads to the root of its log.

    Raises:
        IntegrityError: it is not, or does not.
    """
    if proof.leaf.contribution != contribution:
        raise IntegrityError(
            f"the proof is of the contribution {proof.leaf.contribution[:16]}…, not of {contribution[:16]}…"
        )
    if (proof.model, proof.version, proof.manifest) != (manifest.model, manifest.version, digest):
        raise IntegrityError(
            f"the proof is of {proof.model} version {proof.version} ({proof.manifest[:16]}…), but the manifest is of "
            f"{manifest.model} version {manifest.version} ({digest[:16]}…)"
        )
    root = root_of_proof(
        leaf_hash(canonical_json(proof.leaf)), proof.index, proof.size, [bytes.fromhex(node) for node in proof.path]
    )
    if root is None or (proof.size, root.hex()) != (manifest.log.size, manifest.log.root):
        raise IntegrityError(f"the proof does not lead to the log that version {manifest.version} was signed with")


def read_proof(path: Path) -> InclusionProof:
    """A proof that was written as canonical JSON.

    Raises:
        NotFoundError, TooLargeError: there is no file, or one above `MAX_PROOF_BYTES`.
        IntegrityError: it is not a proof.
    """
    try:
        return InclusionProof.model_validate_json(_read(path, MAX_PROOF_BYTES, "proof"))
    except ValidationError as exc:
        raise IntegrityError(f"{path} is not a proof", remedy="Write it again with --write-proof.") from exc


def parse_contributions(data: bytes, manifest: Manifest) -> tuple[Leaf, ...]:
    """The leaves in a version's `contributions.json`, of which no more than `MAX_LIST_BYTES` were read.

    Raises:
        IntegrityError: it is no such list, or not the one whose log the manifest has.
    """
    try:
        found = ContributionList.model_validate_json(data)
    except ValidationError as exc:
        raise IntegrityError(f"{CONTRIBUTIONS_NAME} of version {manifest.version} cannot be read") from exc
    if found.model != manifest.model or log_of(found.leaves) != manifest.log:
        raise IntegrityError(
            f"{CONTRIBUTIONS_NAME} is not the list that version {manifest.version} was signed with",
            remedy="Fetch the version again.",
        )
    return found.leaves


def _leaves(folder: Path, manifest: Manifest) -> tuple[Leaf, ...]:
    """The leaves of the manifest's log, from the folder."""
    listed = [file for file in manifest.files if file.path == CONTRIBUTIONS_NAME]
    if not listed:
        if manifest.log.size:
            raise NotFoundError(f"version {manifest.version} comes without {CONTRIBUTIONS_NAME}")
        return ()
    data = _read(folder / CONTRIBUTIONS_NAME, MAX_LIST_BYTES, "list of contributions")
    return parse_contributions(data, manifest)


def _absent(contribution: str, manifest: Manifest) -> InputError:
    name, where = f"the contribution {contribution[:16]}…", f"{manifest.model} version {manifest.version}"
    if isinstance(manifest.change, Revocation) and contribution in manifest.change.contributions:
        reason = f": {manifest.change.reason}" if manifest.change.reason else ""
        return StateError(
            f"{name} was revoked: {where} took it out of the sum{reason}",
            remedy="It is in no later version either. Ask the publisher for the reasons.",
        )
    if any(term.contribution == contribution for term in manifest.terms):
        return NotFoundError(
            f"{name} is not in the sum of {where}: its round gave it the coefficient 0",
            remedy="Its receipt says why.",
        )
    return NotFoundError(
        f"{name} is not in the sum of {where}",
        remedy="It belongs to a later version or another model, was not accepted, or was taken out before.",
    )


def _read(path: Path, limit: int, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as exc:
        raise NotFoundError(f"cannot read the {what} {path}: {exc.strerror}", remedy="Check the path.") from exc
    if len(data) > limit:
        raise TooLargeError(f"the {what} {path} has more than {limit} bytes")
    return data
