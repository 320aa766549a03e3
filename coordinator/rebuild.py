"""The ledger made again from object storage: everything that was accepted, into an empty Valkey.

    plan(store, publisher_key)        what there is: rounds, verdicts, workers (`coordinator.traces`)
    restore(ledger, store, plan)      rounds with their leases and verdicts, workers, invites, scores
    rebuild_if_lost(ledger, store)    both, where a server starts on an empty ledger and a bucket with rounds

Verdicts go through `leases.step` and `ledger_keys.lease_writes` as they did the first time, so counters, scores and
indexes are what those make of them. Of several accepted deltas of one shard the one counts that the cohort or the
manifest names, else the one that was judged first.

What always holds:
- a ledger with rounds in it is refused; one in which a restore was cut off is begun anew;
- nothing is granted and nothing driven before all of it is there: rounds are drafts until the last step, and whoever
  restores at the same time loses as soon as somebody else begins;
- fences are far above all that were ever granted. Leases without a delta are gone until their workers bring the
  vouchers (`coordinator.adopting`);
- what was handed in and not judged is queued again. Tokens are gone: workers enrol again by themselves;
- in memory is one round at a time, and Valkey holds more of it than this process.

Not restored: progress of trainings, deadlines that had moved, counters of metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from coordinator import actions
from coordinator import ledger_keys as keys
from coordinator.ledger import Ledger
from coordinator.people_settling import Bookkeeper
from coordinator.restoring import PARALLEL, REBUILDING, Plan, Progress, Restore, Restored
from coordinator.traces import survey
from rankup.errors import StateError
from rankup.store import Store

__all__ = ["Plan", "Progress", "Restored", "is_empty", "plan", "rebuild_if_lost", "restore"]


def plan(store: Store, publisher_key: str | None, *, progress: Progress | None = None) -> Plan:
    """Look at the bucket; nothing is written.

    Raises:
        IntegrityError: a record cannot be read, or a version is not signed by the publisher.
        What the store raises.
    """
    tell = progress or (lambda _what, _done, _total: None)
    traces = survey(store, publisher_key, progress=lambda what, count: tell(f"reading {what}", count, 0))
    membership = actions.replay(actions.read(store), actions.read_enrolments(store))
    return Plan(tuple(traces), membership, publisher_key)


async def rebuild_if_lost(
    ledger: Ledger, store: Store, publisher_key: str, now: float, *, say: Callable[[str], None]
) -> Restored | None:
    """Where the ledger has no rounds and object storage has some: restore them. None where nothing was to be done.

    Raises what `plan` and `restore` raise.
    """
    if not await is_empty(ledger) or not await asyncio.to_thread(_has_rounds, store):
        return None
    say("the ledger is empty, object storage is not: restoring it")
    found = await asyncio.to_thread(plan, store, publisher_key)
    return await restore(ledger, store, found, now)


async def is_empty(ledger: Ledger) -> bool:
    """The ledger knows no round, or a restore of it was cut off."""
    known, begun = await ledger.valkey.read(["ZCARD", keys.ROUNDS], ["EXISTS", REBUILDING])
    return not known or bool(begun)


async def restore(
    ledger: Ledger, store: Store, found: Plan, now: float, *, progress: Progress | None = None
) -> Restored:
    """Bring everything back. `now` is Unix seconds.

    Raises:
        StateError: the ledger is not empty.
        ConflictError: somebody else has begun to restore it.
        IntegrityError: a receipt or a submission cannot be read.
        What the ledger and the store raise. Call again: it begins anew.
    """
    if not await is_empty(ledger):
        raise StateError(
            "the ledger is not empty: it has rounds in it",
            remedy="Stop the server and move Valkey's data aside (its folder with the append-only file), or name "
            "another server in RANKUP_LEDGER_URL; then try again.",
        )
    tell = progress or (lambda _what, _done, _total: None)
    with ThreadPoolExecutor(PARALLEL) as pool:
        done = await Restore(ledger, store, found, now, tell, pool).run()
    if found.publisher_key is not None:
        await Bookkeeper(ledger, store, found.publisher_key).look(max(1, len(found.rounds)))
    return done


def _has_rounds(store: Store) -> bool:
    return any(key.endswith("/round.json") for key in store.list("rounds/"))
