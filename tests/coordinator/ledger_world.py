"""A ledger on a real Valkey: records, submissions and receipts to play with, and an audit of what the lists say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger import Ledger, RoundStatus, Worker
from rankup.protocol import DeviceProfile, LeaseState, RoundRequest, SubmitStatement
from rankup.records import BlobRef, Receipt, RoundRecord, Submission
from rankup.settings import LedgerSettings
from rankup.targets import Target

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

NOW = 1_800_000_000.0
LEASE_S = 60.0


def record(round_id: str = "r1", *, shards: int = 3, index: int = 0, **request: Any) -> RoundRecord:
    wanted = {
        "model": "tiny",
        "quorum": shards,
        "lease_s": LEASE_S,
        "deadline_s": 3600.0,
        "repeat": 2,
        "copies": 1,
        "grace_s": 0,
    } | request
    return RoundRecord(
        round_id=round_id,
        request=RoundRequest(dataset="docs", shards=shards, **wanted),
        index=index,
        base_version=0,
        base_manifest="0" * 64,
        shards=tuple(BlobRef(sha256=f"{shard:064x}", size_bytes=10) for shard in range(shards)),
        targets={"q.weight": Target(d_out=4, d_in=4)},
        opened_at=NOW,
    )


def worker(number: int = 1, name: str = "Ada") -> Worker:
    return Worker(f"w-{number}", name, f"{number:064x}", DeviceProfile(kind="cpu", threads=2), NOW)


def submission(lease: Lease, *, digest: str | None = None, at: float = NOW, **changes: Any) -> Submission:
    sha256 = digest if digest is not None else f"{int(lease.lease_id[2:], 16):064x}"
    about = {"round_id": lease.home, "lease_id": lease.lease_id, "fence": lease.fence, "sha256": sha256}
    told = {"base_manifest": "0" * 64, "tokens": 50, "seconds": 1.0}
    return Submission(
        statement=SubmitStatement(
            size_bytes=100,
            steps=5,
            first_loss=3.0,
            last_loss=2.5,
            **(about | told | changes),
        ),
        signature="e" * 128,
        public_key="f" * 64,
        worker_id=lease.worker_id,
        worker_name="Ada",
        shard=lease.shard,
        shards=lease.shards,
        rank=lease.rank,
        submitted_at=at,
    )


def receipt(lease: Lease, *, accepted: bool = True, reason: str = "all checks passed") -> Receipt:
    return Receipt(submission=submission(lease), accepted=accepted, reason=reason, checks=(), norm=1.0, judged_at=NOW)


@asynccontextmanager
async def connected(settings: LedgerSettings) -> AsyncIterator[Ledger]:
    ledger = await Ledger.connect(settings)
    try:
        yield ledger
    finally:
        await ledger.close()


Scenario = Callable[[Ledger], Coroutine[Any, Any, None]]


def play(valkey: ValkeyServer, scenario: Scenario, *, require_fsync: bool = False) -> None:
    """Run `scenario` with a connected ledger; without waiting for fsync where durability is not the subject."""

    async def run() -> None:
        async with connected(valkey.ledger_settings.model_copy(update={"require_fsync": require_fsync})) as ledger:
            await scenario(ledger)

    asyncio.run(run())
    if valkey.client().exists(keys.round_key("r1")):
        audit(valkey)


async def open_connections(ledger: Ledger) -> None:
    """So that calls made at the same time really interleave, and do not wait for each other's connection."""
    await asyncio.gather(*(ledger.ping() for _ in range(64)))


async def claim(ledger: Ledger, worker_id: str = "w-1", now: float = NOW) -> Lease:
    lease = await ledger.claim(worker_id, now)
    assert isinstance(lease, Lease), lease
    return lease


async def hand_in(ledger: Ledger, worker_id: str, now: float = NOW) -> Lease:
    lease = await claim(ledger, worker_id, now)
    await ledger.submit(lease.lease_id, worker_id, submission(lease), now)
    return await ledger.judge(lease.lease_id, receipt(lease), now)


def counts(status: RoundStatus) -> tuple[int, int, int, int, int]:
    view = status.view()
    return view.free, view.leased, view.submitted, view.accepted, view.rejected


def audit(valkey: ValkeyServer, round_id: str = "r1", *, forgotten: bool = False) -> None:
    """The lists of a round must say what its leases say; `forgotten`: leases without a delta are not known any more."""
    client = valkey.client()
    states: dict[str, list[LeaseState]] = {}
    by_state: dict[LeaseState, set[str]] = {state: set() for state in LeaseState}
    covered: dict[str, str] = {}
    digests: set[str | None] = set()
    for key in client.scan_iter(f"{keys.PREFIX}lease:*", count=1000):
        lease = keys.parse_lease(client.hgetall(key))
        if lease.home == round_id:
            for shard in map(str, lease.numbers):
                moved = lease.trained_for is not None
                states.setdefault(shard, []).append(LeaseState.EXPIRED if moved else lease.state)
                if lease.state is LeaseState.ACCEPTED and not moved:
                    assert shard not in covered
                    covered[shard] = lease.lease_id
        if lease.round_id == round_id:
            by_state[lease.state].add(lease.lease_id)
            if lease.state is LeaseState.ACCEPTED:
                digests.add(lease.contribution)
    about = client.hgetall(keys.round_key(round_id))

    def part(name: str) -> str:
        return keys.round_key(round_id, name)

    holding = {
        shard: sum(state in (LeaseState.GRANTED, LeaseState.SUBMITTED) for state in all_states)
        for shard, all_states in states.items()
    }
    accepted = client.hgetall(part("accepted"))
    assert {shard: int(n) for shard, n in client.hgetall(part("holders")).items()} == {
        shard: n for shard, n in holding.items() if n
    }
    assert set(client.zrange(part("free"), 0, -1)) == {
        shard for shard in map(str, range(int(about["next"]))) if not holding.get(shard) and shard not in accepted
    }
    assert accepted == covered
    assert set(client.hkeys(part("receipts"))) == digests
    assert set(client.zrange(part("expiry"), 0, -1)) == by_state[LeaseState.GRANTED]
    assert set(client.zrange(part("eta"), 0, -1)) == by_state[LeaseState.GRANTED]
    live = {
        lease_id
        for lease_id in client.hvals(keys.LIVE) + client.hvals(keys.DELIVERING)
        if client.hget(keys.lease_key(lease_id), "round_id") == round_id
    }
    assert live <= by_state[LeaseState.GRANTED]
    assert set(client.zrange(part("pending"), 0, -1)) == by_state[LeaseState.SUBMITTED]
    assert set(client.hkeys(part("submissions"))) == by_state[LeaseState.SUBMITTED]
    assert int(about["rejected"]) == len(by_state[LeaseState.REJECTED])
    assert forgotten or int(about["next"]) == len(states)
