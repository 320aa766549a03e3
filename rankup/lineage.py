"""What a version is the sum of, when versions have been taken back, and the log that says so.

    version 0                         nothing
    version of a round                its parent's rounds and its own
    rollback to t                     the rounds of t
    revocation of contributions       its parent's rounds, without these contributions
    key rotation                      its parent's rounds

The tensors of a version follow from its lineage alone: version 0, then every round in order with its own recipe and
the coefficients that its manifest states, without the revoked contributions. So a revocation has, bit for bit, the
tensors of a history in which those contributions had never been in the sums.

What always holds: a contribution that was revoked is in no later version's sum, neither by a rollback
(`require_possible`) nor by another round, and none is in a sum twice; leaves stand in the order of version and
contribution, each contribution with its coefficient other than 0 exactly once.

Everything here is computed from manifests; no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankup.errors import InputError, IntegrityError
from rankup.merkle import leaf_hash, tree_root
from rankup.message import canonical_json
from rankup.records import (
    BlobRef,
    Change,
    ContributionList,
    KeyRotation,
    Leaf,
    Log,
    Manifest,
    Revocation,
    Rollback,
    Term,
)

CONTRIBUTIONS_NAME = "contributions.json"


@dataclass(frozen=True)
class Lineage:
    """The rounds (by the version that they made) whose sums a version holds, and what was taken out of them."""

    rounds: tuple[int, ...] = ()
    revoked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """How a version's tensors are made again: from those of `start`, by the rounds of `rounds` without `revoked`."""

    start: int
    rounds: tuple[int, ...]
    revoked: frozenset[str]


def next_lineage(manifest: Manifest, before: Mapping[int, Lineage]) -> Lineage:
    """The lineage of a version, given those of the versions before it."""
    if manifest.version == 0:
        return Lineage()
    if isinstance(manifest.change, Rollback):
        return before[manifest.change.to]
    parent = before[manifest.version - 1]
    if isinstance(manifest.change, Revocation):
        return Lineage(parent.rounds, parent.revoked | set(manifest.change.contributions))
    if isinstance(manifest.change, KeyRotation):
        return parent
    return Lineage((*parent.rounds, manifest.version), parent.revoked)


def lineages(chain: Sequence[Manifest]) -> dict[int, Lineage]:
    """Version -> lineage, for the manifests of versions 0, 1, … in order.

    Raises IntegrityError: a version revokes what is not in the sum, or adds what is in it or was revoked before.
    """
    found: dict[int, Lineage] = {}
    homes: dict[str, list[int]] = {}
    gone: set[str] = set()
    for manifest in chain:
        lineage = found[manifest.version] = next_lineage(manifest, found)
        if manifest.version == 0:
            continue
        parent = found[manifest.version - 1]
        if isinstance(manifest.change, Rollback):
            for one in gone - lineage.revoked:
                _require(not _holds(lineage, homes, one), manifest, "brings back", one, "was revoked")
        elif isinstance(manifest.change, Revocation):
            for one in manifest.change.contributions:
                _require(_holds(parent, homes, one), manifest, "revokes", one, "is not in the sum before it")
            gone.update(manifest.change.contributions)
        elif manifest.change is None:
            for term in kept_terms(manifest, frozenset()):
                one = term.contribution
                _require(one not in gone, manifest, "adds", one, "was revoked")
                _require(not _holds(parent, homes, one), manifest, "adds", one, "is in the sum before it")
                homes.setdefault(one, []).append(manifest.version)
    return found


def _holds(lineage: Lineage, homes: Mapping[str, Sequence[int]], contribution: str) -> bool:
    """The contribution is in the sum; `homes` names the rounds that it was in."""
    return contribution not in lineage.revoked and any(
        number in lineage.rounds for number in homes.get(contribution, ())
    )


def _require(holds: bool, manifest: Manifest, does: str, contribution: str, which: str) -> None:
    if not holds:
        raise IntegrityError(f"version {manifest.version} {does} the contribution {contribution[:16]}…, which {which}")


def kept_terms(manifest: Manifest, revoked: frozenset[str]) -> tuple[Term, ...]:
    """The terms of a round's manifest that have a part in its sum and are not revoked."""
    return tuple(term for term in manifest.terms if term.coefficient and term.contribution not in revoked)


def contributions_of(manifest: Manifest, revoked: frozenset[str] = frozenset()) -> tuple[BlobRef, ...]:
    """The contributions with a part in the sum of a round."""
    terms = kept_terms(manifest, revoked)
    return tuple(BlobRef(sha256=term.contribution, size_bytes=term.size_bytes) for term in terms)


def replay_plan(chain: Sequence[Manifest], version: int) -> Plan:
    """The shortest way to make a version's tensors again out of an earlier version.

    A version of a round is its parent and one sum; a rollback or a key rotation has the tensors of another version;
    a revocation begins at the version that holds the longest beginning of its rounds and the same parts of them.

    Raises IntegrityError: see `lineages`.
    """
    manifest = chain[version]
    if version == 0:
        return Plan(0, (), frozenset())
    if isinstance(manifest.change, Rollback):
        return Plan(manifest.change.to, (), frozenset())
    if isinstance(manifest.change, KeyRotation):
        return Plan(version - 1, (), frozenset())
    if manifest.change is None:
        # The parent's tensors lack what was revoked before, and so does the round's own sum.
        return Plan(version - 1, (version,), frozenset())
    return next(way for way in ways(chain, version) if way.start < version)


def ways(chain: Sequence[Manifest], version: int) -> list[Plan]:
    """Every way to make a version's tensors, from each version that holds a beginning of its rounds, and the same parts
    of them; the shortest first, which is to have them, the last from version 0.

    Raises IntegrityError: see `lineages`.
    """
    found = lineages(chain[: version + 1])
    lineage = found[version]
    places = {
        term.contribution: place
        for place, number in enumerate(lineage.rounds)
        for term in kept_terms(chain[number], frozenset())
    }
    starts: list[tuple[int, int]] = []
    for earlier in range(version + 1):
        count = len(found[earlier].rounds)
        differing = found[earlier].revoked ^ lineage.revoked
        if lineage.rounds[:count] == found[earlier].rounds and all(
            places.get(one, count) >= count for one in differing
        ):
            starts.append((count, earlier))
    return [Plan(start, lineage.rounds[count:], lineage.revoked) for count, start in sorted(starts, reverse=True)]


# -- the log -----------------------------------------------------------------------------------------------------------


def leaves_of_round(manifest: Manifest) -> tuple[Leaf, ...]:
    """The leaves that a round adds."""
    return tuple(
        Leaf(
            contribution=term.contribution,
            version=manifest.version,
            coefficient=term.coefficient,
            denominator_log2=manifest.denominator_log2,
        )
        for term in kept_terms(manifest, frozenset())
    )


def leaves_of(chain: Sequence[Manifest], version: int) -> tuple[Leaf, ...]:
    """Every contribution in the sum of a version, from the manifests of versions 0 … `version`."""
    lineage = lineages(chain[: version + 1])[version]
    return tuple(
        leaf
        for number in lineage.rounds
        for leaf in leaves_of_round(chain[number])
        if leaf.contribution not in lineage.revoked
    )


def without(leaves: Sequence[Leaf], revoked: Sequence[str]) -> tuple[Leaf, ...]:
    """The leaves of a revocation's version, given its parent's.

    Raises InputError: one of the contributions is not in the sum.
    """
    present = {leaf.contribution for leaf in leaves}
    if absent := sorted(set(revoked) - present):
        raise InputError(
            f"the contribution {absent[0][:16]}… is not in the sum of this version",
            remedy="`rankup admin contributions MODEL` lists those that are.",
        )
    return tuple(leaf for leaf in leaves if leaf.contribution not in set(revoked))


def leaf_hashes(leaves: Sequence[Leaf]) -> list[bytes]:
    """What `rankup.merkle` takes."""
    return [leaf_hash(canonical_json(leaf)) for leaf in leaves]


def log_of(leaves: Sequence[Leaf]) -> Log:
    """Size and root of the log with these leaves."""
    return Log(size=len(leaves), root=tree_root(leaf_hashes(leaves)).hex())


def contribution_file(model: str, leaves: Sequence[Leaf]) -> bytes:
    """`contributions.json`."""
    return canonical_json(ContributionList(model=model, leaves=tuple(leaves)))


def change_in_words(change: Change) -> str:
    """A few words for tables and pages; the reason is not in them."""
    if isinstance(change, Rollback):
        return f"rollback to {change.to}"
    if isinstance(change, Revocation):
        count = len(change.contributions)
        return f"revocation of {count} contribution{'' if count == 1 else 's'}"
    return "key rotation"


# -- rules -------------------------------------------------------------------------------------------------------------


def require_possible(chain: Sequence[Manifest], to: int) -> None:
    """A rollback to version `to` of a chain is possible: it is older, and brings back nothing that was revoked.

    Raises InputError.
    """
    latest = chain[-1].version
    if not 0 <= to < latest:
        raise InputError(f"cannot roll back to version {to}: the latest is {latest}", remedy="Name an older version.")
    revoked = {
        one for manifest in chain if isinstance(manifest.change, Revocation) for one in manifest.change.contributions
    }
    back = [leaf.contribution for leaf in leaves_of(chain, to) if leaf.contribution in revoked]
    if back:
        raise InputError(
            f"version {to} holds the contribution {back[0][:16]}…, which was revoked",
            remedy="Roll back to a version without it.",
        )
