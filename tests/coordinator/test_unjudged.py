"""What was handed in stands in object storage from its acknowledgement to its verdict."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from coordinator import rebuild
from coordinator.keeper import Keeper
from coordinator.ledger import Ledger
from coordinator.opening import open_round
from coordinator.unjudged import forget_submission, keep_submission, read_submission
from rankup.errors import IntegrityError, UnreachableError
from rankup.protocol import LeaseState, RoundRequest
from rankup.records import Submission
from rankup.signing import verify
from rankup.store import MemoryStore
from rankup.versions import submission_key, submission_prefix
from tests.coordinator.gateway_world import World, furnished_gateway
from tests.coordinator.test_keeper import NOW, ToyAggregator, connect, enrol, stocked_store, submission

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings) as made:
        yield made


def test_what_the_gateway_acknowledges_can_be_checked_and_queued_again_from_object_storage(
    world: World, valkey: ValkeyServer
) -> None:
    round_id = world.open_round(shards=1)["round_id"]
    ada = world.join()
    lease = world.claim(ada)
    assert world.hand_in(ada, lease)["state"] == "submitted"
    kept = read_submission(world.store, round_id, submission_key(round_id, lease.lease_id))
    verify(kept.public_key, "submit", kept.statement, kept.signature)
    assert (kept.worker_id, kept.shard, kept.shards) == (ada.worker_id, lease.shard, lease.shards)

    valkey.client().flushall()

    async def restore(ledger: Ledger) -> list[Submission]:
        found = rebuild.plan(world.store, None)
        await rebuild.restore(ledger, world.store, found, kept.submitted_at)
        return await ledger.pending(round_id)

    assert world.with_ledger(restore) == [kept]
    again = world.http.post("/v1/workers", json=ada.enrolment(time.time()))
    assert again.status_code == 201, again.text
    assert again.json()["worker_id"] == ada.worker_id
    ada.token = again.json()["token"]
    view = world.http.get(f"/v1/leases/{lease.lease_id}", headers=ada.auth).json()
    assert view["state"] == "submitted"
    # Nobody else gets the shard: its delta awaits a verdict.
    bob = world.join()
    assert world.http.post("/v1/leases", json={}, headers=bob.auth).json()["lease"] is None


def test_a_submission_that_object_storage_does_not_take_is_not_acknowledged(world: World) -> None:
    round_id = world.open_round(shards=1)["round_id"]
    ada = world.join()
    lease = world.claim(ada)
    delta = b"a good delta"
    world.upload(lease, delta)
    put = world.store.put

    def refuse(key: str, *args: object, **kwargs: object) -> str:
        if key.startswith(submission_prefix(round_id)):
            raise UnreachableError("object storage does not answer")
        return put(key, *args, **kwargs)  # type: ignore[arg-type]

    world.store.put = refuse  # type: ignore[method-assign]
    said = ada.submission(lease, delta)
    url = f"/v1/leases/{lease.lease_id}/submit"
    assert world.http.post(url, json=said, headers=ada.auth).status_code == 503
    world.store.put = put  # type: ignore[method-assign]
    assert world.http.post(url, json=said, headers=ada.auth).status_code == 202
    assert list(world.store.list(submission_prefix(round_id))) == [submission_key(round_id, lease.lease_id)]


def test_a_submission_is_forgotten_with_its_verdict(valkey: ValkeyServer) -> None:
    async def scenario() -> None:
        store, ledger = stocked_store(), await connect(valkey)
        await enrol(ledger, "w-1", "w-2")
        request = RoundRequest(model="tiny", dataset="docs", shards=2, deadline_s=3600)
        record = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        for worker_id, good in (("w-1", True), ("w-2", False)):
            lease = await ledger.claim(worker_id, NOW)
            handed_in = submission(lease, good=good)  # type: ignore[arg-type]
            lease = await ledger.submit(handed_in.statement.lease_id, worker_id, handed_in, NOW)
            assert lease.state is LeaseState.SUBMITTED
            keep_submission(store, record.round_id, handed_in)
        keeper = Keeper(ledger, store, ToyAggregator(store), clock=lambda: NOW)
        await keeper.tick()
        await keeper.settle()
        assert list(store.list(submission_prefix(record.round_id))) == []
        await ledger.close()

    asyncio.run(scenario())


def test_the_first_submission_of_a_lease_stays_and_forgetting_twice_is_fine(memory_store: MemoryStore) -> None:
    from tests.coordinator.ledger_world import submission as made
    from tests.coordinator.test_schema import SUBMITTED

    first = made(SUBMITTED)
    keep_submission(memory_store, "r1", first)
    keep_submission(memory_store, "r1", first.model_copy(update={"submitted_at": NOW + 9}))
    key = submission_key("r1", first.statement.lease_id)
    assert read_submission(memory_store, "r1", key) == first
    memory_store.put(submission_key("r1", "l-9"), memory_store.get(key, max_bytes=10**6))
    with pytest.raises(IntegrityError, match="l-9"):
        read_submission(memory_store, "r1", submission_key("r1", "l-9"))
    memory_store.put(key, b"{")
    with pytest.raises(IntegrityError, match=first.statement.lease_id):
        read_submission(memory_store, "r1", key)
    for _ in range(2):
        forget_submission(memory_store, "r1", first)
    assert memory_store.head(key) is None
