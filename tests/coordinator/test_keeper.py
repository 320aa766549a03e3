"""The keeper drives rounds to their end on a real ledger, whatever dies on the way; tensors play no part here."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from aggregator.publish import publish_manifest
from coordinator.catalogue import read_manifest
from coordinator.keeper import Keeper
from coordinator.leases import Lease
from coordinator.ledger import Ledger, NoWork, Worker
from coordinator.opening import open_round
from coordinator.rounds import EndCampaign, Pause, Resume
from rankup.errors import RankupError, UnreachableError
from rankup.message import canonical_json
from rankup.protocol import DeviceProfile, Pointer, RoundRequest, RoundState, SubmitStatement
from rankup.records import (
    BlobRef,
    DatasetCard,
    Evaluation,
    FileEntry,
    Group,
    Manifest,
    Receipt,
    RoundRecord,
    Submission,
    TensorEntry,
    Term,
)
from rankup.signing import generate_private_key, parse_private_key
from rankup.store import MemoryStore, Store
from rankup.versions import dataset_key, parse_pointer, pointer_key

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

NOW = 1_800_000_000.0
KEY = parse_private_key(generate_private_key())
ROUNDS = 2
SHARDS = 2


class FaultError(Exception):
    """What a test puts in the keeper's way."""


class ToyAggregator:
    """Judges by a list, "folds" by hashing what goes in, publishes for real. `fault_at`: the effect that fails."""

    def __init__(self, store: Store, *, fault_at: tuple[str, int] | None = None, loss: float = 2.0) -> None:
        self.store = store
        self.calls: list[str] = []
        self.loss = loss
        self._fault_at = fault_at

    def _fail(self, when: str) -> None:
        if self._fault_at == (when, len(self.calls)):
            self._fault_at = None
            raise FaultError

    async def _call(self, name: str) -> None:
        self._fail("before")
        self.calls.append(name)

    async def admit(self, record: RoundRecord, submission: Submission, now: float, valid_in_a_row: int) -> Receipt:
        await self._call("admit")
        accepted = submission.statement.last_loss < 10
        receipt = Receipt(
            submission=submission,
            accepted=accepted,
            reason="accepted" if accepted else "no",
            checks=(),
            norm=1.0,
            judged_at=NOW,
        )
        self._fail("after")
        return receipt

    async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
        await self._call("fold")
        digests = [receipt.submission.statement.sha256 for receipt in receipts]
        terms = tuple(
            Term(
                contribution=digest,
                size_bytes=1,
                worker_id="w-1",
                worker_name="Ada",
                shard=receipt.submission.shard,
                tokens=1,
                coefficient=1,
            )
            for digest, receipt in zip(digests, receipts, strict=True)
        )
        manifest = version(record.base_version + 1, parent=record.base_manifest, round_id=record.round_id, terms=terms)
        self._fail("after")
        return manifest

    async def evaluate(self, record: RoundRecord, manifest: Manifest) -> Evaluation:
        await self._call("evaluate")
        self._fail("after")
        return Evaluation(heldout_loss=self.loss, parent_heldout_loss=2.5, examples=1, tokens=1)

    async def publish(self, manifest: Manifest) -> Pointer:
        await self._call("publish")
        pointer = publish_manifest(self.store, KEY, manifest)
        self._fail("after")
        return pointer


def version(number: int, **about: Any) -> Manifest:
    digest = hashlib.sha256(f"{number} {about}".encode()).hexdigest()
    entry = TensorEntry(shape=(4, 4), export_dtype="BF16", master=digest, export=digest, role="linear")
    files = [FileEntry(path=f"{name}.safetensors", sha256=digest, size_bytes=1) for name in ("master", "model")]
    return Manifest(
        model="tiny",
        version=number,
        parent=about.get("parent"),
        round_id=about.get("round_id"),
        recipe=RoundRequest(model="tiny", dataset="docs").recipe if number else None,
        terms=about.get("terms", ()),
        tensors={"q.weight": entry},
        groups=(Group(tensors=("q.weight",), master=files[0], export=files[1]),),
        files=(),
        base_model="toy",
        licence="Apache-2.0",
        created_at=NOW,
    )


def stocked_store() -> MemoryStore:
    """Version 0 of `tiny` and a dataset of four shards."""
    store = MemoryStore()
    publish_manifest(store, KEY, version(0))
    shards = tuple(BlobRef(sha256=f"{n:064x}", size_bytes=10) for n in range(4))
    card = DatasetCard(
        dataset="docs",
        source="toy",
        licence="CC0-1.0",
        rows=4,
        heldout_rows=1,
        shards=shards,
        heldout=BlobRef(sha256="f" * 64, size_bytes=10),
        created_at=NOW,
    )
    store.put(dataset_key("docs"), canonical_json(card))
    return store


def submission(lease: Lease, *, good: bool = True) -> Submission:
    return Submission(
        statement=SubmitStatement(
            round_id=lease.round_id,
            lease_id=lease.lease_id,
            fence=lease.fence,
            base_manifest="0" * 64,
            # The same shard of the same round gives the same delta in every run.
            sha256=hashlib.sha256(f"{lease.shard} {good}".encode() + lease.round_id[:10].encode()).hexdigest(),
            size_bytes=1,
            tokens=1,
            steps=1,
            first_loss=3.0,
            last_loss=2.0 if good else 99.0,
            seconds=1.0,
        ),
        signature="e" * 128,
        public_key="f" * 64,
        worker_id=lease.worker_id,
        worker_name="Ada",
        shard=lease.shard,
        submitted_at=NOW,
    )


async def connect(valkey: ValkeyServer) -> Ledger:
    """Without waiting for the disk: durability is the ledger's own test."""
    return await Ledger.connect(valkey.ledger_settings.model_copy(update={"require_fsync": False}))


class Clock:
    """Time that the test moves."""

    now = NOW

    def __call__(self) -> float:
        return self.now


async def volunteer(ledger: Ledger, worker_id: str, *, good: bool = True) -> bool:
    """Claim and hand in one shard; False when there is none."""
    lease = await ledger.claim(worker_id, NOW)
    if isinstance(lease, NoWork):
        return False
    await ledger.submit(lease.lease_id, worker_id, submission(lease, good=good), NOW)
    return True


async def enrol(ledger: Ledger, *names: str) -> None:
    for number, name in enumerate(names):
        person = Worker(name, name, f"{number:064x}", DeviceProfile(), NOW)
        await ledger.people.enrol(person, hashlib.sha256(name.encode()).hexdigest())


async def campaign(valkey: ValkeyServer, aggregator: ToyAggregator, *, restart_each_tick: bool = False) -> list[str]:
    """Two rounds to their end; the states that the rounds ended in."""
    store = aggregator.store
    ledger = await connect(valkey)
    clock = Clock()
    try:
        await enrol(ledger, "w-1", "w-2")
        request = RoundRequest(model="tiny", dataset="docs", shards=SHARDS, repeat=ROUNDS, deadline_s=3600)
        await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        keeper = Keeper(ledger, store, aggregator, clock=clock)
        for _ in range(60):
            for worker_id in ("w-1", "w-2"):
                await volunteer(ledger, worker_id)
            await keeper.tick()
            await keeper.settle()
            clock.now += 1.0
            if restart_each_tick:
                keeper = Keeper(ledger, store, aggregator, clock=clock)
            if not await ledger.unfinished():
                break
        return [status.facts.state.value for status in await ledger.rounds()]
    finally:
        await ledger.close()


def latest(store: Store) -> Pointer:
    return parse_pointer(store.get(pointer_key("tiny"), max_bytes=4096), model="tiny")


def test_a_campaign_publishes_one_version_a_round_and_then_owes_nothing(valkey: ValkeyServer) -> None:
    aggregator = ToyAggregator(stocked_store())
    assert asyncio.run(campaign(valkey, aggregator)) == ["published", "published"]
    assert latest(aggregator.store).version == ROUNDS
    assert aggregator.calls.count("fold") == ROUNDS
    assert aggregator.calls.count("admit") == ROUNDS * SHARDS


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", range(10))
def test_a_keeper_that_dies_at_any_effect_is_replaced_and_ends_at_the_same_version(
    valkey: ValkeyServer, call: int, when: str
) -> None:
    aggregator = ToyAggregator(stocked_store(), fault_at=(when, call))
    assert asyncio.run(campaign(valkey, aggregator, restart_each_tick=True)) == ["published", "published"]
    assert latest(aggregator.store).version == ROUNDS


def test_a_version_that_the_gate_refuses_moves_no_pointer_and_the_next_round_has_the_same_base(
    valkey: ValkeyServer,
) -> None:
    aggregator = ToyAggregator(stocked_store(), loss=3.0)
    assert asyncio.run(campaign(valkey, aggregator)) == ["rejected", "rejected"]
    assert latest(aggregator.store).version == 0
    assert "publish" not in aggregator.calls


async def run_keeper(keeper: Keeper, ticks: int) -> None:
    for _ in range(ticks):
        await keeper.tick()
        await keeper.settle()


def test_a_pause_outlives_its_round_and_grants_go_on_after_it(valkey: ValkeyServer) -> None:
    async def scenario() -> None:
        store = stocked_store()
        ledger = await connect(valkey)
        await enrol(ledger, "w-1", "w-2")
        request = RoundRequest(model="tiny", dataset="docs", shards=1, repeat=2, deadline_s=3600)
        record = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        keeper = Keeper(ledger, store, ToyAggregator(store), clock=lambda: NOW)
        lease = await ledger.claim("w-1", NOW)
        assert isinstance(lease, Lease)
        await ledger.apply(record.round_id, Pause(), NOW)
        assert isinstance(await ledger.claim("w-2", NOW), NoWork)
        await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)
        await run_keeper(keeper, 8)
        second, first = await ledger.rounds()
        assert (first.facts.state, second.facts.state) == (RoundState.PUBLISHED, RoundState.OPEN)
        assert second.facts.paused
        assert not await volunteer(ledger, "w-2")
        await ledger.apply(second.record.round_id, Resume(), NOW)
        assert await volunteer(ledger, "w-2")
        await run_keeper(keeper, 8)
        assert latest(store).version == 2
        await ledger.close()

    asyncio.run(scenario())


def test_a_delta_that_comes_within_the_grace_is_in_the_version(valkey: ValkeyServer) -> None:
    async def scenario(hands_in: bool) -> int:
        store = stocked_store()
        ledger = await connect(valkey)
        await enrol(ledger, "w-1", "w-2")
        request = RoundRequest(model="tiny", dataset="docs", shards=2, quorum=1, grace_s=60, repeat=9)
        record = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        clock = Clock()
        keeper = Keeper(ledger, store, ToyAggregator(store), clock=clock)
        slow = await ledger.claim("w-2", NOW)
        assert isinstance(slow, Lease)
        assert await volunteer(ledger, "w-1")
        await run_keeper(keeper, 4)
        assert (await ledger.round(record.round_id)).facts.state is RoundState.CLOSING
        await ledger.apply(record.round_id, EndCampaign(), NOW)
        if hands_in:
            await ledger.submit(slow.lease_id, "w-2", submission(slow), NOW)
        else:
            clock.now += 61
        await run_keeper(keeper, 8)
        (status,) = await ledger.rounds()  # No further one was opened.
        assert status.facts.state is RoundState.PUBLISHED
        assert await ledger.unfinished() == []
        await ledger.close()
        return len(read_manifest(store, latest(store)).terms)

    assert asyncio.run(scenario(True)) == 2
    valkey.client().flushall()
    assert asyncio.run(scenario(False)) == 1


def test_a_rejected_contribution_frees_its_shard_for_the_next_volunteer(valkey: ValkeyServer) -> None:
    async def scenario() -> None:
        store = stocked_store()
        ledger = await connect(valkey)
        await enrol(ledger, "w-1", "w-2")
        request = RoundRequest(model="tiny", dataset="docs", shards=1, deadline_s=3600)
        record = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        keeper = Keeper(ledger, store, ToyAggregator(store), clock=lambda: NOW)
        for good in (False, True):
            assert await volunteer(ledger, "w-1" if good else "w-2", good=good)
            for _ in range(5):
                await keeper.tick()
                await keeper.settle()
        status = await ledger.round(record.round_id)
        assert status.facts.state is RoundState.PUBLISHED
        assert (status.facts.counts.accepted, status.facts.counts.rejected) == (1, 1)
        await ledger.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UnreachableError("http://10.0.0.7:8333 does not answer"), "does not answer"),
        (RankupError("the parent is damaged"), "the parent is damaged"),
        (MemoryError("secret"), "MemoryError"),
    ],
)
def test_a_fold_that_fails_is_shown_as_the_reason_and_tried_again_later(
    valkey: ValkeyServer, error: Exception, shown: str
) -> None:
    class Stumbling(ToyAggregator):
        async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
            if "stumbled" not in self.calls:
                self.calls.append("stumbled")
                raise error
            return await super().fold(record, receipts, now)

    async def scenario() -> None:
        store = stocked_store()
        ledger = await connect(valkey)
        await enrol(ledger, "w-1")
        request = RoundRequest(model="tiny", dataset="docs", shards=1, deadline_s=3600)
        record = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        clock = Clock()
        keeper = Keeper(ledger, store, Stumbling(store), clock=clock)
        assert await volunteer(ledger, "w-1")
        for _ in range(4):
            await keeper.tick()
            await keeper.settle()
        status = await ledger.round(record.round_id)
        assert status.facts.state is RoundState.AGGREGATING
        reason = status.view().reason
        assert shown in reason
        assert "10.0.0.7" not in reason
        assert "secret" not in reason
        clock.now += 60
        for _ in range(4):
            await keeper.tick()
            await keeper.settle()
        assert (await ledger.round(record.round_id)).facts.state is RoundState.PUBLISHED
        await ledger.close()

    asyncio.run(scenario())


def test_a_round_that_another_version_overtakes_is_folded_again_on_that_one(valkey: ValkeyServer) -> None:
    class Overtaken(ToyAggregator):
        """Folds on the latest version; before the first publication somebody undoes something."""

        async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
            manifest = await super().fold(record, receipts, now)
            parent = latest(self.store)
            return manifest.model_copy(update={"version": parent.version + 1, "parent": parent.manifest})

        async def publish(self, manifest: Manifest) -> Pointer:
            if "publish" not in self.calls:
                publish_manifest(self.store, KEY, version(1, parent=latest(self.store).manifest))
            return await super().publish(manifest)

    async def scenario() -> None:
        store = stocked_store()
        ledger = await connect(valkey)
        await enrol(ledger, "w-1")
        request = RoundRequest(model="tiny", dataset="docs", shards=1, deadline_s=3600)
        record = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        aggregator = Overtaken(store)
        keeper = Keeper(ledger, store, aggregator, clock=lambda: NOW)
        assert await volunteer(ledger, "w-1")
        for _ in range(9):
            await keeper.tick()
            await keeper.settle()
        status = await ledger.round(record.round_id)
        assert (status.facts.state, status.facts.published_version) == (RoundState.PUBLISHED, 2)
        assert status.facts.failures == 0
        assert aggregator.calls == ["admit", *["fold", "evaluate", "publish"] * 2]
        assert latest(store).version == 2
        await ledger.close()

    asyncio.run(scenario())


def test_a_keeper_that_is_stopped_ends_what_it_does_and_begins_nothing_else(valkey: ValkeyServer) -> None:
    class Waiting(ToyAggregator):
        def __init__(self, store: Store) -> None:
            super().__init__(store)
            self.begun, self.go_on = asyncio.Event(), asyncio.Event()

        async def admit(self, record: RoundRecord, submission: Submission, now: float, valid_in_a_row: int) -> Receipt:
            self.begun.set()
            await self.go_on.wait()
            return await super().admit(record, submission, now, valid_in_a_row)

    async def scenario() -> None:
        store = stocked_store()
        ledger = await connect(valkey)
        await enrol(ledger, "w-1")
        request = RoundRequest(model="tiny", dataset="docs", shards=1, deadline_s=3600)
        record = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        aggregator = Waiting(store)
        keeper = Keeper(ledger, store, aggregator, clock=lambda: NOW)
        await volunteer(ledger, "w-1")
        await keeper.tick()
        await aggregator.begun.wait()
        assert not await keeper.stop(0.05)
        aggregator.go_on.set()
        assert await keeper.stop(5.0)
        for _ in range(3):
            await keeper.tick()
        assert await keeper.stop(5.0)
        assert aggregator.calls == ["admit"]
        assert (await ledger.round(record.round_id)).facts.counts.accepted == 1
        following = Keeper(ledger, store, ToyAggregator(store), clock=lambda: NOW)
        for _ in range(5):
            await following.tick()
            await following.settle()
        assert (await ledger.round(record.round_id)).facts.state is RoundState.PUBLISHED
        await ledger.close()

    asyncio.run(scenario())
