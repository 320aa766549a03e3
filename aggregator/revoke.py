"""Revocation: the next version is the latest one without some contributions, to the bit (`rankup.lineage`).

    find, choose    what a person names  ->  contributions in the latest version's sum
    plan            which rounds are summed again, and from which version on
    revoke          sum them again (`aggregator.resum`), check the result, publish it

What always holds: the coefficients of all others stay as they were; nothing is visible before the last group is done
and the check has passed. A contribution that is in no published sum cannot be revoked: of an open round nothing is
decided yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from aggregator.fold import next_tensors
from aggregator.patches import with_patches
from aggregator.published import Published, latest_version, leaves_in, outline
from aggregator.resum import Progress, Work, plan_of, sum_again
from aggregator.undo import change_draft, publish_change
from rankup.errors import InputError, NotFoundError
from rankup.lineage import kept_terms, lineages, without
from rankup.records import Manifest, Revocation, Term
from rankup.signing import Ed25519PrivateKey, public_key_hex
from rankup.store import Store

MIN_PREFIX = 12
"""Hex digits of a contribution that name it, where no other begins with them."""
_HEX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},64}}")


@dataclass(frozen=True)
class Chosen:
    """One contribution in the sum, and the version whose round it was in."""

    version: int
    term: Term


# -- what is meant -----------------------------------------------------------------------------------------------------


def contributions_of(store: Store, model: str, version: int | None = None, *, publisher_key: str) -> list[Chosen]:
    """Every contribution in the sum of a version (None: the latest), in the order of the log.

    Raises NotFoundError, IntegrityError.
    """
    latest = latest_version(store, model, publisher_key=publisher_key).manifest
    if version is not None and not 0 <= version <= latest.version:
        raise NotFoundError(f"there is no version {version} of {model}: the latest is {latest.version}")
    return _present(outline(store, latest, publisher_key=publisher_key), latest.version if version is None else version)


def find(store: Store, model: str, names: Sequence[str], *, publisher_key: str) -> list[Chosen]:
    """What `choose` takes out of the latest version; where that has just revoked the very same, these again.

    Raises InputError, NotFoundError, IntegrityError.
    """
    latest = latest_version(store, model, publisher_key=publisher_key).manifest
    chain = outline(store, latest, publisher_key=publisher_key)
    if isinstance(latest.change, Revocation):
        with suppress(InputError):
            done = choose(_present(chain, latest.version - 1), names)
            if {one.term.contribution for one in done} == set(latest.change.contributions):
                return done
    return choose(_present(chain, latest.version), names)


def _present(chain: Sequence[Manifest], version: int) -> list[Chosen]:
    lineage = lineages(chain[: version + 1])[version]
    return [Chosen(number, term) for number in lineage.rounds for term in kept_terms(chain[number], lineage.revoked)]


def choose(present: Sequence[Chosen], names: Sequence[str]) -> list[Chosen]:
    """Those of `present` that `names` name, in order: by contribution (all 64 hex digits, or the first ones where they
    are enough), by worker id, or by a contributor's exact display name.

    Raises InputError: a name is nobody's here, or that of several.
    """
    wanted = {found.term.contribution for name in names for found in _named(present, name)}
    return [one for one in present if one.term.contribution in wanted]


def _named(present: Sequence[Chosen], name: str) -> list[Chosen]:
    if _HEX.fullmatch(name):
        begun = [one for one in present if one.term.contribution.startswith(name)]
        if len(begun) > 1:
            raise InputError(f"{len(begun)} contributions begin with {name}", remedy="Write more of the digits.")
        if begun:
            return begun
    by_id = [one for one in present if one.term.worker_id == name]
    if by_id:
        return by_id
    by_name = [one for one in present if one.term.worker_name == name]
    workers = sorted({one.term.worker_id for one in by_name})
    if len(workers) > 1:
        raise InputError(
            f"{len(workers)} contributors have the name {name!r}: {', '.join(workers)}",
            remedy="Name the one that you mean by its id.",
        )
    if not by_name:
        raise InputError(
            f"nothing in the sum of this version is {name!r}, or by a contributor of this name or id",
            remedy="`rankup admin contributions MODEL` lists what is in the sum. What an open round has accepted can "
            "be revoked once its version is published; or cancel the round.",
        )
    return by_name


# -- what follows from it ----------------------------------------------------------------------------------------------


def plan(store: Store, latest: Published, contributions: Sequence[str], *, publisher_key: str) -> Work:
    """The rounds that are summed again when `contributions`, which are in its sum, are taken out of the latest version.

    Raises NotFoundError (files that this needs are no longer kept), IntegrityError and what the store raises.
    """
    chain = outline(store, latest.manifest, publisher_key=publisher_key)
    change = Revocation(contributions=tuple(sorted(contributions)))
    about = {"version": len(chain), "parent": latest.digest, "round_id": None, "terms": (), "change": change}
    chain.append(chain[-1].model_copy(update=about))
    return plan_of(store, latest, chain, len(chain) - 1, publisher_key=publisher_key)


def revoke(
    store: Store,
    private_key: Ed25519PrivateKey,
    *,
    model: str,
    contributions: Sequence[str],
    reason: str = "",
    now: float,
    check: Callable[[Manifest], None] | None = None,
    progress: Progress | None = None,
    parallel: int | None = None,
) -> Manifest:
    """Publish the latest version of `model` without `contributions` (digests) as its next version.

    Args:
        now: Unix seconds, becomes `created_at`.
        check: looks at the whole version before it is published, and raises where it is wrong
            (`aggregator.rehearsal`).
        parallel: groups at a time; None: by the number of cores.

    Raises:
        InputError: a contribution is not in the sum of the latest version.
        NotFoundError: no such model, or masters or contributions that this needs are no longer kept.
        ConflictError, IntegrityError, DiskFullError and what `check` and the store raise.
    """
    key = public_key_hex(private_key)
    change = Revocation(contributions=tuple(sorted(set(contributions))), reason=reason)

    def draft(latest: Published) -> Manifest | None:
        before = latest.manifest
        if isinstance(before.change, Revocation) and before.change.contributions == change.contributions:
            return None
        leaves = without(leaves_in(store, before, publisher_key=key), change.contributions)
        work = plan(store, latest, change.contributions, publisher_key=key)
        groups, tensors = next_tensors(sum_again(store, work, progress=progress, parallel=parallel))
        about = {"groups": groups, "tensors": dict(tensors), "recipe": work.recipe, "evaluation": None}
        made = change_draft(store, latest, before.model_copy(update=about), change, leaves, now)
        return with_patches(store, before, made)

    return publish_change(store, private_key, model, draft, check=check)
