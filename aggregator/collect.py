"""Collecting what object storage may forget: reads what is there, says what will be gone, then deletes.

What always holds:
- `retained.json` says what is gone before the first object of it goes, and again after the last;
- records are looked at again after that was written and before every batch: what a record that appeared meanwhile asks
  for stays, so rounds may run at the same time;
- drafts go before the blobs that they name. A run that was killed anywhere leaves nothing that the next one does not
  take up, and one after a run that finished finds nothing to do;
- a record that cannot be read, a manifest that is missing or not signed: then nothing is deleted at all.

What no record names yet cannot be protected but by its age. So nobody should roll back, revoke or build a dataset while
this runs: they may find bytes in the bucket that are just being taken away. Should that happen, it is said at the end.
What goes is for `aggregator.retention` to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from aggregator.keeprules import Rules
from aggregator.retention import Plan, Removal, plan_retention
from aggregator.stocktaking import digest_of_blob, is_retained, read_inventory
from rankup.errors import IntegrityError, NotFoundError
from rankup.message import canonical_json
from rankup.records import Retained
from rankup.retained import MAX_RETAINED_BYTES
from rankup.store import Store, StoredObject
from rankup.versions import retained_key

BATCH: Final = 1000
"""Deletions between two looks at the records."""
PARALLEL: Final = 8
UPLOADS: Final = "uploads/"

Progress = Callable[[int, int], None]
"""Called with the objects done, and how many there are."""


@dataclass(frozen=True)
class Collected:
    """What was planned, and what was done of it: nothing in a dry run."""

    plan: Plan
    removed: int = 0
    removed_bytes: int = 0
    spared: int = 0
    """Planned, but asked for by a record that appeared meanwhile."""
    unfinished: int = 0
    """Uploads in parts that were begun longer ago than the grace period and never put together: they are ended. Who
    goes on with one after all begins again."""


def collect(
    store: Store,
    rules: Rules,
    *,
    clock: Callable[[], float],
    publisher_key: str | None = None,
    dry_run: bool = False,
    approve: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Delete what `rules` let go. `clock` gives Unix seconds; `publisher_key` (hex) must have signed every version, or
    a key that led to it. `approve` is shown what would go, and raises where it shall stay.

    Raises:
        IntegrityError: a record cannot be read or does not fit the others; nothing was deleted. Or, at the very end,
            that a new record asks for something that was deleted.
        ConflictError: another one collects at the same time.
    """
    plan = plan_retention(read_inventory(store, publisher_key=publisher_key), rules, now=clock())
    old = clock() - rules.grace_s
    unfinished = [upload for upload in store.open_uploads(UPLOADS) if upload.begun_at < old]
    if dry_run:
        return Collected(plan, unfinished=len(unfinished))
    if approve is not None and plan.removals:
        approve(plan)
    for upload in unfinished:
        store.abort_upload(upload.key, upload.upload_id)
    _announce(store, plan.retained.values())
    allowed = {removal.key for removal in plan.removals}
    removed: list[Removal] = []
    seen: frozenset[StoredObject] | None = None
    with ThreadPoolExecutor(PARALLEL) as pool:
        for start in range(0, len(plan.removals), BATCH):
            present = _records(store)
            if present != seen:
                seen = present
                again = plan_retention(read_inventory(store, publisher_key=publisher_key), rules, now=clock())
                allowed &= {removal.key for removal in again.removals}
            batch = [removal for removal in plan.removals[start : start + BATCH] if removal.key in allowed]
            # Drafts, uploads, blobs: each kind after the one before.
            for _, alike in itertools.groupby(batch, key=lambda removal: removal.key.partition("/")[0]):
                done = list(alike)
                list(pool.map(store.delete, [removal.key for removal in done]))
                removed += done
            if progress is not None:
                progress(min(start + BATCH, len(plan.removals)), len(plan.removals))
    if plan.removals:
        _check(store, rules, removed, publisher_key, clock())
    removed_bytes = sum(one.size_bytes for one in removed)
    return Collected(plan, len(removed), removed_bytes, len(plan.removals) - len(removed), len(unfinished))


def _check(store: Store, rules: Rules, removed: Iterable[Removal], publisher_key: str | None, now: float) -> None:
    after = plan_retention(read_inventory(store, publisher_key=publisher_key), rules, now=now)
    _announce(store, after.retained.values())
    digests = {digest for one in removed if (digest := digest_of_blob(one.key)) is not None}
    if lost := sorted(digests & after.needed):
        raise IntegrityError(
            f"{len(lost)} blobs were deleted that a record asks for since: {', '.join(lost[:8])}",
            remedy="Do again what was done meanwhile: cancel that round and open it again, or roll back.",
        )


def _announce(store: Store, records: Iterable[Retained]) -> None:
    """Write what is gone, where it is not said already."""
    for retained in records:
        key, etag, before = retained_key(retained.model), None, canonical_json(Retained(model=retained.model))
        with suppress(NotFoundError):
            before, etag = store.get_with_etag(key, max_bytes=MAX_RETAINED_BYTES)
        if (data := canonical_json(retained)) != before:
            store.swap(key, data, etag=etag)


def _records(store: Store) -> frozenset[StoredObject]:
    """Everything that may name a blob, as a listing shows it."""
    prefixes = ("models/", "rounds/", "datasets/")
    return frozenset(each for prefix in prefixes for each in store.scan(prefix) if not is_retained(each.key))
