"""Versions that no round makes: how they are drafted and published, and the rollback to an earlier version.

What always holds:
- history stays: undoing publishes a new version, and the pointer moves to it as it does to any other;
- a version is drafted on the latest one and published by compare-and-swap; where a round or somebody else was faster,
  it is drafted again on theirs, a bounded number of times;
- doing the same again right after it was done changes nothing, also after a crash anywhere.

Revocations are `aggregator.revoke`'s, changes of the key `aggregator.rotate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from aggregator.patches import with_patches
from aggregator.publish import carried_files, load_version, publish_manifest
from aggregator.published import (
    ATTEMPTS,
    SOFTWARE,
    Published,
    latest_version,
    leaves_in,
    outline,
    require_signer,
    version_behind,
    with_cards,
    with_log,
)
from aggregator.resum import Progress, plan_of, sum_again
from rankup.errors import ConflictError, IntegrityError
from rankup.lineage import require_possible
from rankup.records import Change, Evaluation, Leaf, Manifest, Rollback
from rankup.signing import Ed25519PrivateKey, public_key_hex
from rankup.store import Store

log = structlog.get_logger(__name__)

Draft = Callable[[Published], Manifest | None]
"""The next version, given the latest one; None where the latest one is what is wanted."""


def roll_back(
    store: Store,
    private_key: Ed25519PrivateKey,
    *,
    model: str,
    to: int,
    reason: str = "",
    now: float,
    progress: Progress | None = None,
) -> Manifest:
    """Publish version `to` of `model` again, as its next version. `now` is Unix seconds.

    Masters that are no longer kept are made again from older ones; `progress` is told of that.
    Raises InputError (not an older version, or one that holds what was revoked), NotFoundError (no such model; files
    that this needs are gone), ConflictError, IntegrityError and what the store raises.
    """
    key = public_key_hex(private_key)

    def draft(latest: Published) -> Manifest | None:
        change = latest.manifest.change
        if isinstance(change, Rollback) and change.to == to:
            return None
        chain = outline(store, latest.manifest, publisher_key=key)
        require_possible(chain, to)
        target = version_behind(store, latest, chain, to, publisher_key=key)
        _require_there(store, latest, chain, target, progress, key)
        leaves = leaves_in(store, target, publisher_key=key, known_changes=latest.manifest.keys)
        made = change_draft(store, latest, target, Rollback(to=to, reason=reason), leaves, now)
        return with_patches(store, latest.manifest, made)

    return publish_change(store, private_key, model, draft)


def _require_there(
    store: Store,
    latest: Published,
    chain: Sequence[Manifest],
    target: Manifest,
    progress: Progress | None,
    publisher_key: str,
) -> None:
    """See to it that the files of `target` are in the store: what was dropped is made again, to the bit."""
    work = plan_of(store, latest, chain, target.version, publisher_key=publisher_key)
    made = sum_again(store, work, progress=progress)
    for folded, group in zip(made, target.groups, strict=True):
        if folded.group != group.model_copy(update={"patch": None}):
            raise IntegrityError(
                f"version {target.version} of {target.model}, made again, has other files: {group.master.path}",
                remedy="Roll back to another version, and test the memory of this machine.",
            )


def change_draft(
    store: Store, latest: Published, like: Manifest, change: Change, leaves: Sequence[Leaf], now: float
) -> Manifest:
    """The version after `latest` with the tensors, recipe, data and held-out loss of `like`, without patches."""
    files, log_ = with_log(store, like.model, carried_files(like.files), leaves)
    loss = like.evaluation
    return Manifest(
        model=like.model,
        version=latest.manifest.version + 1,
        parent=latest.digest,
        round_id=None,
        recipe=like.recipe,
        tensors=like.tensors,
        groups=tuple(group.model_copy(update={"patch": None}) for group in like.groups),
        files=files,
        evaluation=None if loss is None else _without_parent(loss),
        change=change,
        keys=latest.manifest.keys,
        log=log_,
        software=SOFTWARE,
        base_model=like.base_model,
        licence=like.licence,
        datasets=like.datasets,
        created_at=now,
    )


def _without_parent(evaluation: Evaluation) -> Evaluation:
    """The same tensors have the same loss, but another version stands before them now."""
    return evaluation.model_copy(update={"parent_heldout_loss": None})


def publish_change(
    store: Store,
    private_key: Ed25519PrivateKey,
    model: str,
    draft: Draft,
    *,
    check: Callable[[Manifest], None] | None = None,
    known_key: str | None = None,
) -> Manifest:
    """Draft the next version of `model` on its latest one and publish it, again where somebody else was faster.

    `check` looks at the whole version before anybody can see it, and raises where it is not as it must be. `known_key`
    (public, hex) is trusted instead of the signing key, which nobody knows yet when it is new.
    Raises ConflictError (somebody else was faster each time), and what the drafting, `check` and the store raise.
    """
    public, cause = public_key_hex(private_key), "somebody else was faster"
    for attempt in range(ATTEMPTS):
        latest = latest_version(store, model, publisher_key=known_key or public)
        made = draft(latest)
        if made is None:
            return latest.manifest
        require_signer(made, public)
        complete = with_cards(store, made, publisher_key=public)
        if check is not None:
            check(complete)
        try:
            pointer = publish_manifest(store, private_key, complete)
        except ConflictError as exc:
            cause = exc.cause
            log.info("overtaken", model=model, version=complete.version, attempt=attempt, cause=cause)
            continue
        published = load_version(store, model, pointer.version, pointer.manifest, publisher_key=public)
        if published.change == complete.change:
            return published
    raise ConflictError(f"the next version of {model} could not be published in {ATTEMPTS} tries: {cause}")
