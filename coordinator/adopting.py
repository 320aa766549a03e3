"""Leases that the ledger has forgotten and that are taken up again: their workers brought the vouchers.

What always holds:
- a lease that the ledger knows stays as it is, so the same voucher may come any number of times;
- what becomes of the others is `leases.adopt`, stored by compare-and-set with all that it looked at among the
  conditions: a shard is in no more hands than its round allows, and gets no second accepted delta by this;
- shards below the highest of an adopted lease count as granted once, and later grants of its shards have higher fences;
- nothing is adopted into a round that is being restored: it is a draft until all of it is there.

That a voucher is genuine was seen before (`coordinator.vouchers`). Raises what `coordinator.valkey` raises.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from coordinator import leases
from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger import Ledger
from coordinator.valkey import ATTEMPTS, back_off, lost_every_race
from rankup.errors import NotFoundError, NotYetError
from rankup.protocol import LeaseState, RoundState

RESTORING_RETRY_S: Final = 15.0


async def adopt(ledger: Ledger, lease: Lease, now: float) -> Lease:
    """The lease as the ledger has it from now on. `lease` is what its voucher says.

    Raises:
        NotFoundError: no such round.
        StateError: its round takes no more deltas and no other one takes its late ones, or another delta of its shards
            was accepted.
        NotYetError: its round is being restored.
    """
    lease_key, home = keys.lease_key(lease.lease_id), keys.round_key(lease.round_id)
    shards = [str(number) for number in lease.numbers]
    for attempt in range(ATTEMPTS):
        known, state, accepted, late, holders, fences, next_one, live, delivering = await ledger.valkey.read(
            ["HGETALL", lease_key],
            ["HGET", home, "state"],
            ["HMGET", f"{home}:accepted", *shards],
            ["HMGET", f"{home}:late", *shards],
            ["HMGET", f"{home}:holders", *shards],
            ["HMGET", f"{home}:fences", *shards],
            ["HGET", home, "next"],
            ["HGET", keys.LIVE, lease.worker_id],
            ["HGET", keys.DELIVERING, lease.worker_id],
        )
        if known:
            return keys.parse_lease(known)
        if state is None:
            raise NotFoundError(f"no round {lease.round_id}")
        if state == RoundState.DRAFT:
            raise being_restored(lease.round_id)
        request = (await ledger.record(lease.round_id)).request
        taken = RoundState(state) in leases.TAKES_SUBMISSIONS
        adopted, commands = leases.adopt(
            lease,
            round_state=RoundState(state),
            accepted_by=next((found for found in (*accepted, *late) if found is not None), None),
            hands=max(int(count or 0) for count in holders),
            copies=request.copies,
            busy=live is not None and delivering is not None,
            late_is_welcome=not taken and await ledger.may_take_late(lease),
            lease_s=request.lease_s,
            now=now,
        )
        writes = _named(home, lease, fences, int(next_one)) if taken else []
        writes += keys.lease_writes(adopted, commands)
        if adopted.state is LeaseState.GRANTED:
            # Of two, which one is being delivered is not known, and does not matter: there is no third.
            place = keys.LIVE if live is None else keys.DELIVERING
            writes.append(["HSET", place, lease.worker_id, lease.lease_id])
        conditions: list[keys.Condition] = [
            ["EXISTS", lease_key, "0"],
            ["HGET", home, "state", state],
            ["HMGET", f"{home}:accepted", *shards, accepted],
            ["HMGET", f"{home}:late", *shards, late],
            ["HMGET", f"{home}:holders", *shards, holders],
            ["HMGET", f"{home}:fences", *shards, fences],
            ["HGET", home, "next", next_one],
            ["HGET", keys.LIVE, lease.worker_id, live],
            ["HGET", keys.DELIVERING, lease.worker_id, delivering],
        ]
        if await ledger.valkey.commit(conditions, writes):
            return replace(adopted, rev=adopted.rev + 1)
        await back_off(attempt)
    raise lost_every_race(f"lease {lease.lease_id}")


def being_restored(round_id: str) -> NotYetError:
    """Nothing can be said of its leases yet."""
    return NotYetError(
        f"round {round_id} is being restored",
        remedy="Keep what was trained and bring the voucher again in a moment.",
        retry_after_s=RESTORING_RETRY_S,
    )


def _named(home: str, lease: Lease, fences: list[str | None], next_one: int) -> list[keys.Row]:
    """Writes that make its shards ones that were granted before; a ledger that lost a moment may not know that."""
    writes = []
    if next_one < lease.numbers.stop:
        forgotten = (str(number) for number in range(next_one, lease.numbers.stop))
        writes.append(["ZADD", f"{home}:free", *(word for number in forgotten for word in (number, number))])
        writes.append(["HSET", home, "next", str(lease.numbers.stop)])
    higher = [str(n) for n, fence in zip(lease.numbers, fences, strict=True) if int(fence or 0) < lease.fence]
    if higher:
        writes.append(["HSET", f"{home}:fences", *(word for n in higher for word in (n, str(lease.fence)))])
    return writes
