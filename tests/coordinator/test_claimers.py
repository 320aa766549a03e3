"""Sixty-four volunteers on a thousand shards: some die with a lease in hand, some lose answers, some hand in rubbish or
come late; the reaper and admission work beside them. In the end every shard has its delta, and the history shows no
moment at which two of them had the same shard."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger import Ledger
from rankup.errors import StateError
from rankup.protocol import Heartbeat, LeaseState, RoundRequest, SubmitStatement
from rankup.records import BlobRef, Receipt, RoundRecord, Submission
from rankup.settings import LedgerSettings
from rankup.targets import Target

if TYPE_CHECKING:
    from conftest import ValkeyServer

SHARDS = 1000
CLAIMERS = 64
REPLICAS = 8
LEASE_S = 30.0
SPEED_UP = 60
"""The clock of the test runs this much faster: a lease lives for half a second."""
BASE = "0" * 64
ROUND = RoundRecord(
    round_id="r1",
    request=RoundRequest(
        model="tiny",
        dataset="docs",
        shards=SHARDS,
        copies=1,
        max_shards_per_lease=4,
        lease_s=LEASE_S,
        lease_target_s=600.0,
        deadline_s=31_536_000.0,
    ),
    index=0,
    base_version=0,
    base_manifest=BASE,
    shards=tuple(BlobRef(sha256=f"{shard:064x}", size_bytes=10) for shard in range(SHARDS)),
    targets={"q.weight": Target(d_out=4, d_in=4)},
    opened_at=0.0,
)
T = TypeVar("T")


@dataclass
class Crowd:
    replicas: list[Ledger]
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    started: float = field(default_factory=time.monotonic)
    acknowledged: dict[str, str] = field(default_factory=dict)
    """Lease -> the delta that the ledger says it has."""
    let_go: dict[str, float] = field(default_factory=dict)
    """Lease -> when somebody began to return or to refuse it."""
    slowest_s: float = 0.0
    """The longest time between a call and its answer; a lease says when it was asked for, not when it was granted."""
    born: int = 0
    deaths: int = 0
    lost_answers: int = 0
    late: int = 0
    done: bool = False

    def now(self) -> float:
        return (time.monotonic() - self.started) * SPEED_UP

    async def ask(self, call: Callable[[Ledger], Coroutine[Any, Any, T]]) -> T:
        """The answer of some replica; now and then it is lost on its way, and asked for again."""
        began = self.now()
        try:
            if self.rng.random() < 0.1:
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(call(self.rng.choice(self.replicas)), self.rng.uniform(0, 0.01))
                self.lost_answers += 1
            return await call(self.rng.choice(self.replicas))
        finally:
            self.slowest_s = max(self.slowest_s, self.now() - began)

    async def volunteer(self) -> None:
        """One place in the crowd: whoever dies is followed by somebody new."""
        while not self.done:
            self.born += 1
            with contextlib.suppress(Died):
                await self.work(f"w-{self.born}")

    async def work(self, worker: str) -> None:
        while not self.done:
            lease = await self.ask(lambda ledger: ledger.claim(worker, self.now()))
            if not isinstance(lease, Lease):
                await asyncio.sleep(0.1)
                continue
            fate = self.rng.random()
            if fate < 0.04:
                self.deaths += 1
                raise Died
            if fate < 0.08:
                await self.give_back(lease)
                continue
            if fate < 0.12:
                self.late += 1
                await asyncio.sleep(1.5 * LEASE_S / SPEED_UP)
            await self.hand_in(lease)

    async def give_back(self, lease: Lease) -> None:
        self.let_go[lease.lease_id] = self.now()
        fence = lease.fence
        await self.ask(lambda ledger: ledger.give_back(lease.lease_id, lease.worker_id, fence, "", self.now()))

    async def hand_in(self, lease: Lease) -> None:
        beat, submission = Heartbeat(fence=lease.fence, step=1), submission_of(lease, self.now())
        await self.ask(lambda ledger: ledger.heartbeat(lease.lease_id, lease.worker_id, beat, self.now()))
        try:
            taken = await self.ask(
                lambda ledger: ledger.submit(lease.lease_id, lease.worker_id, submission, self.now())
            )
        except StateError:
            return  # Late, and somebody else was accepted meanwhile.
        assert taken.contribution == submission.statement.sha256
        self.acknowledged[lease.lease_id] = submission.statement.sha256

    async def reaper(self) -> None:
        while not self.done:
            await self.replicas[0].reap("r1", self.now())
            await asyncio.sleep(0.05)

    async def admission(self) -> None:
        ledger = self.replicas[-1]
        while (await ledger.round("r1")).facts.counts.accepted < SHARDS:
            for submission in await ledger.pending("r1"):
                good = self.rng.random() > 0.03
                receipt = Receipt(
                    submission=submission, accepted=good, reason="drawn", checks=(), norm=1.0, judged_at=self.now()
                )
                self.let_go[submission.statement.lease_id] = self.now()
                await ledger.judge(submission.statement.lease_id, receipt, self.now())
            await asyncio.sleep(0.02)
        self.done = True


class Died(Exception):
    """A volunteer is gone, and its lease is still there."""


def submission_of(lease: Lease, now: float) -> Submission:
    statement = SubmitStatement(
        round_id="r1",
        lease_id=lease.lease_id,
        fence=lease.fence,
        base_manifest=BASE,
        sha256=f"{int(lease.lease_id[2:], 16):064x}",
        size_bytes=100,
        tokens=1000 * lease.shards,
        steps=1,
        first_loss=3.0,
        last_loss=2.5,
        seconds=100.0 * lease.shards,
    )
    return Submission(
        statement=statement,
        signature="e" * 128,
        public_key="f" * 64,
        worker_id=lease.worker_id,
        worker_name="Ada",
        shard=lease.shard,
        shards=lease.shards,
        rank=lease.rank,
        submitted_at=now,
    )


async def play(settings: LedgerSettings) -> tuple[Crowd, list[Receipt]]:
    replicas = [await Ledger.connect(settings) for _ in range(REPLICAS)]
    try:
        await replicas[0].create_round(ROUND, 0.0)
        crowd = Crowd(replicas)
        async with asyncio.timeout(200), asyncio.TaskGroup() as group:
            for _ in range(CLAIMERS):
                group.create_task(crowd.volunteer())
            group.create_task(crowd.reaper())
            group.create_task(crowd.admission())
        return crowd, await replicas[0].receipts("r1")
    finally:
        for ledger in replicas:
            await ledger.close()


def test_sixty_four_claimers_on_a_thousand_shards_share_none_and_leave_none(valkey: ValkeyServer) -> None:
    settings = valkey.ledger_settings.model_copy(update={"require_fsync": False})
    crowd, receipts = asyncio.run(play(settings))
    assert min(crowd.deaths, crowd.late, crowd.lost_answers) > 5, "the crowd was too well-behaved"

    client = valkey.client()
    leases = [keys.parse_lease(client.hgetall(key)) for key in client.scan_iter(f"{keys.PREFIX}lease:*", count=1000)]
    assert crowd.acknowledged == {lease.lease_id: lease.contribution for lease in leases if lease.contribution}
    accepted = [lease for lease in leases if lease.state is LeaseState.ACCEPTED]
    assert sorted(shard for lease in accepted for shard in lease.numbers) == list(range(SHARDS))
    assert sorted(lease.contribution or "" for lease in accepted) == [r.submission.statement.sha256 for r in receipts]
    assert any(lease.shards > 1 for lease in accepted)

    for shard in range(SHARDS):
        history = sorted((lease for lease in leases if shard in lease.numbers), key=lambda lease: lease.fence)
        for earlier, later in pairwise(history):
            assert earlier.fence < later.fence
            assert later.granted_at + crowd.slowest_s >= freed_at(crowd, earlier), (earlier, later)


def freed_at(crowd: Crowd, lease: Lease) -> float:
    """The earliest moment at which somebody else may have got the shards of this lease, which had them first."""
    assert lease.state is not LeaseState.GRANTED, "it lives, and its shards were granted again"
    if lease.state in (LeaseState.RETURNED, LeaseState.REJECTED):
        return min(lease.expires_at, crowd.let_go[lease.lease_id])
    return lease.expires_at
