"""Data of an older layout is brought up to date, once; newer data is left alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from coordinator import ledger_keys as keys
from coordinator import schema
from coordinator.keeper import Keeper
from coordinator.leases import Lease
from coordinator.ledger import Ledger
from coordinator.rounds import RoundFacts
from coordinator.schema import CURRENT, SCHEMA, bring_up_to_date, stored_version
from rankup.errors import SetupError
from rankup.message import canonical_json
from rankup.protocol import Heartbeat, LeaseState, RoundState
from rankup.records import Receipt
from tests.coordinator.ledger_world import NOW, audit, record, submission, worker
from tests.coordinator.test_keeper import ToyAggregator, connect, stocked_store

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

OPEN, OVER = "r1", "r0"
LATER_FACTS = {"grace_s", "paused_at", "recorded"}
LATER_FIELDS = {"shards", "rank", "expected_s", "trained_for"}


def lease(number: int, shard: int, state: LeaseState, **about: Any) -> Lease:
    return Lease(f"l-{number}", 1, OPEN, shard, f"w-{number}", state, NOW, NOW + 60, **about)


GRANTED = lease(1, 0, LeaseState.GRANTED)
SUBMITTED = lease(2, 1, LeaseState.SUBMITTED, contribution=f"{2:064x}")
ACCEPTED = lease(3, 2, LeaseState.ACCEPTED, contribution=f"{3:064x}", verdict="all checks passed")
RECEIPT = Receipt(submission=submission(ACCEPTED), accepted=True, reason="good", checks=(), norm=1.0, judged_at=NOW)


def commands_of_version_1() -> Iterator[list[str]]:
    """An open round with a granted, a submitted and an accepted lease, and one that was cancelled, as layout 1 had
    them."""
    for name, state, index in ((OVER, RoundState.CANCELLED, 0), (OPEN, RoundState.OPEN, 0)):
        facts = RoundFacts(state, 4, 4, 1, 3600.0, index, 2, 0.02, opened_at=NOW, deadline_at=NOW + 3600)
        kept = {field: value for field, value in asdict(facts).items() if field not in LATER_FACTS}
        kept["counts"] = dict.fromkeys(("free", "leased", "submitted", "accepted", "rejected"), 0)
        key = keys.round_key(name)
        about = {"shards": "4", "lease_s": "60.0", "next": "3" if name == OPEN else "0", "rejected": "0", "rev": "3"}
        fields = about | {"facts": json.dumps(kept), "state": state.value, "created_at": repr(NOW)}
        yield ["HSET", key, *(word for pair in fields.items() for word in pair)]
        yield ["SET", f"{key}:record", canonical_json(record(name, shards=4)).decode()]
        yield ["ZADD", keys.ROUNDS, repr(NOW), name]
    yield ["ZADD", keys.OPEN_ROUNDS, repr(NOW), OPEN]
    yield ["ZADD", keys.UNFINISHED_ROUNDS, repr(NOW), OPEN]
    key = keys.round_key(OPEN)
    yield ["HSET", f"{key}:fences", "0", "1", "1", "1", "2", "1"]
    yield ["HSET", f"{key}:holders", "0", "1", "1", "1"]
    yield ["ZADD", f"{key}:expiry", repr(NOW + 60), "l-1"]
    yield ["HSET", f"{key}:live", "w-1", "l-1"]
    yield ["ZADD", f"{key}:pending", repr(NOW), "l-2"]
    yield ["HSET", f"{key}:submissions", "l-2", canonical_json(submission(SUBMITTED)).decode()]
    yield ["HSET", f"{key}:accepted", "2", "l-3"]
    yield ["HSET", f"{key}:receipts", "2", canonical_json(RECEIPT).decode()]
    for one in (GRANTED, SUBMITTED, ACCEPTED):
        row = keys.lease_fields(one)
        pairs = zip(row[::2], row[1::2], strict=True)
        yield ["HSET", keys.lease_key(one.lease_id), *(w for p in pairs if p[0] not in LATER_FIELDS for w in p)]
        if one.contribution:
            yield ["HSET", keys.DIGESTS, one.contribution, one.lease_id]
            yield ["ZADD", keys.worker_key(one.worker_id, "contributions"), repr(NOW), one.lease_id]
    for number in (1, 2, 3):
        person = {"worker_id": f"w-{number}", "name": "Ada", "public_key": f"{number:064x}", "device": {}}
        doc = json.dumps(person | {"enrolled_at": NOW})
        yield ["HSET", keys.worker_key(f"w-{number}"), "doc", doc, "token", f"{number:064x}"]
        yield ["HSET", keys.TOKENS, f"{number:064x}", f"w-{number}"]
    yield ["HSET", keys.worker_key("w-3", "score"), "accepted", "1", "valid_in_a_row", "1", "tokens", "50"]
    yield ["ZADD", keys.BOARD, "50", "w-3"]


def fill(valkey: ValkeyServer) -> None:
    for command in commands_of_version_1():
        valkey.client().execute_command(*command)


def contents(valkey: ValkeyServer) -> dict[str, Any]:
    client: Any = valkey.client()
    read = {
        "hash": client.hgetall,
        "string": client.get,
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
    }
    return {key: read[client.type(key)](key) for key in client.scan_iter("*")}


def play(valkey: ValkeyServer, scenario: Any) -> None:
    async def run() -> None:
        ledger = await connect(valkey)
        try:
            await scenario(ledger)
        finally:
            await ledger.close()

    asyncio.run(run())


def test_an_empty_ledger_gets_the_present_layout(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        assert await bring_up_to_date(ledger) == 0
        assert await bring_up_to_date(ledger) == CURRENT
        assert await stored_version(ledger.valkey) == CURRENT

    play(valkey, scenario)


def test_a_round_of_layout_1_goes_on_in_the_present_one(valkey: ValkeyServer) -> None:
    fill(valkey)

    async def scenario(ledger: Ledger) -> None:
        assert await bring_up_to_date(ledger) == 1
        audit(valkey, OPEN, forgotten=True)
        assert await ledger.receipts(OPEN) == [RECEIPT]
        assert await ledger.lease("l-1") == GRANTED
        pulse = await ledger.heartbeat("l-1", "w-1", Heartbeat(fence=1, step=2), NOW + 1)
        assert pulse.go_on
        again = await ledger.claim("w-1", NOW + 2)
        assert isinstance(again, Lease)
        assert again.lease_id == "l-1"
        other = await ledger.claim("w-9", NOW + 2)
        assert isinstance(other, Lease)
        assert other.shard == 3
        refused = RECEIPT.model_copy(update={"submission": submission(SUBMITTED), "accepted": False})
        assert (await ledger.judge("l-2", refused, NOW)).state is LeaseState.REJECTED
        assert (await ledger.people.worker("w-1")).name == worker().name

    play(valkey, scenario)


def test_how_an_ended_round_of_layout_1_ended_is_written_down(valkey: ValkeyServer) -> None:
    fill(valkey)

    async def scenario(ledger: Ledger) -> None:
        await bring_up_to_date(ledger)
        store = stocked_store()
        keeper = Keeper(ledger, store, ToyAggregator(store), clock=lambda: NOW)
        for _ in range(2):
            await keeper.tick()
            await keeper.settle()
        assert f"rounds/{OVER}/end.json" in list(store.list("rounds/"))
        assert [status.record.round_id for status in await ledger.unfinished()] == [OPEN]

    play(valkey, scenario)


def test_a_migration_that_is_repeated_or_carried_out_twice_at_once_changes_nothing(valkey: ValkeyServer) -> None:
    fill(valkey)

    async def scenario(ledger: Ledger) -> None:
        await schema._leases_of_several_shards(ledger.valkey)
        once = contents(valkey)
        await asyncio.gather(*(schema._leases_of_several_shards(ledger.valkey) for _ in range(3)))
        assert contents(valkey) == once
        assert await stored_version(ledger.valkey) == 1, "the version moves when all of it is done"
        found = await asyncio.gather(*(bring_up_to_date(ledger) for _ in range(3)))
        assert set(found) <= {1, CURRENT}
        assert await stored_version(ledger.valkey) == CURRENT

    play(valkey, scenario)


@pytest.mark.parametrize("found", [str(CURRENT + 1), "two", ""])
def test_a_ledger_of_another_release_is_left_alone(valkey: ValkeyServer, found: str) -> None:
    fill(valkey)
    valkey.client().set(SCHEMA, found)
    before = contents(valkey)

    async def scenario(ledger: Ledger) -> None:
        with pytest.raises(SetupError):
            await bring_up_to_date(ledger)

    play(valkey, scenario)
    assert contents(valkey) == before
