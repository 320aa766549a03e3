"""Opening rounds on a real ledger: which shards and targets they get, and that opening twice opens once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from gateway_world import add_dataset, make_manifest, publish

from coordinator import opening
from coordinator.ledger import Ledger
from coordinator.ledger_keys import OPEN_ROUNDS
from coordinator.opening import next_round_id, open_round, pick_shards, require_no_campaign
from coordinator.rounds import Cancel, Evaluated, Pause, Published, Resume
from rankup.errors import InputError, IntegrityError, NotFoundError, StateError
from rankup.message import canonical_json
from rankup.protocol import RoundRequest, RoundState
from rankup.recipe import Recipe
from rankup.records import Evaluation, Rollback, RoundRecord
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore
from rankup.targets import select_targets
from rankup.versions import manifest_digest, round_key

if TYPE_CHECKING:
    from conftest import ValkeyServer

T = TypeVar("T")
NOW = 1_000_000.0
KEY = parse_private_key(generate_private_key())


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    publish(made, KEY, make_manifest(0, None))
    add_dataset(made, shards=5)
    return made


@pytest.fixture
def with_ledger(valkey: ValkeyServer) -> Callable[[Callable[[Ledger], Coroutine[Any, Any, T]]], T]:
    def run(act: Callable[[Ledger], Coroutine[Any, Any, T]]) -> T:
        async def connected() -> T:
            ledger = await Ledger.connect(valkey.ledger_settings)
            try:
                return await act(ledger)
            finally:
                await ledger.close()

        return asyncio.run(connected())

    return run


def request(**changes: Any) -> RoundRequest:
    return RoundRequest.model_validate({"model": "tiny", "dataset": "pydocs", "shards": 2, "repeat": 9} | changes)


def test_a_campaign_walks_through_the_dataset_and_wraps_around(store: MemoryStore, with_ledger: Any) -> None:
    async def act(ledger: Ledger) -> list[RoundRecord]:
        records: list[RoundRecord] = []
        for index in range(3):
            previous = records[-1] if records else None
            records.append(await open_round(ledger, store, request(), index=index, previous=previous, now=NOW))
        return records

    records = with_ledger(act)
    card = add_dataset(store, shards=5)
    assert [[card.shards.index(shard) for shard in record.shards] for record in records] == [[0, 1], [2, 3], [4, 0]]
    names = [record.round_id for record in records]
    assert names == sorted(names)
    assert len({name.rpartition("-")[2] for name in names}) == 1


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_round_names_the_earlier_rounds_whose_late_deltas_it_takes(
    store: MemoryStore, with_ledger: Any, staleness: int
) -> None:
    recipe = {"aggregation": {"max_staleness": staleness}}

    async def act(ledger: Ledger) -> list[RoundRecord]:
        records: list[RoundRecord] = []
        for index in range(4):
            previous = records[-1] if records else None
            asked = request(recipe=recipe)
            records.append(await open_round(ledger, store, asked, index=index, previous=previous, now=NOW))
        return records

    records = with_ledger(act)
    names = [record.round_id for record in records]
    for index, record in enumerate(records):
        assert record.earlier_rounds == tuple(reversed(names[:index]))[:staleness]


def test_the_round_after_a_paused_one_opens_paused_and_grants_nothing(store: MemoryStore, with_ledger: Any) -> None:
    async def act(ledger: Ledger) -> None:
        first = await open_round(ledger, store, request(), index=0, previous=None, now=NOW)
        second = await open_round(ledger, store, request(), index=1, previous=first, now=NOW + 1, paused=True)
        status = await ledger.round(second.round_id)
        assert (status.facts.state, status.facts.paused) == (RoundState.OPEN, True)
        assert await ledger.valkey.call("ZRANGE", OPEN_ROUNDS, 0, -1) == [first.round_id]
        status, _ = await ledger.apply(second.round_id, Resume(), NOW + 11)
        assert status.facts.deadline_at == NOW + 11 + request().deadline_s
        assert await ledger.valkey.call("ZRANGE", OPEN_ROUNDS, 0, -1) == [first.round_id, second.round_id]
        await ledger.apply(first.round_id, Pause(), NOW + 12)
        assert await ledger.valkey.call("ZRANGE", OPEN_ROUNDS, 0, -1) == [second.round_id]

    with_ledger(act)


def test_a_campaign_is_over_when_its_last_round_has_ended_and_not_before(store: MemoryStore, with_ledger: Any) -> None:
    evaluation = Evaluation(heldout_loss=2.0, examples=1, tokens=1)

    async def act(ledger: Ledger) -> None:
        await require_no_campaign(ledger, "tiny")
        record = await open_round(ledger, store, request(repeat=2), index=0, previous=None, now=NOW)
        with pytest.raises(StateError, match="is open; a model has one campaign at a time"):
            await require_no_campaign(ledger, "tiny")
        await require_no_campaign(ledger, "another")
        # As if it had been trained and folded.
        status = await ledger.round(record.round_id)
        folded = replace(status.facts, state=RoundState.EVALUATING)
        assert await ledger._store_facts(status, folded)
        await ledger.apply(record.round_id, Evaluated(evaluation), NOW)
        await ledger.apply(record.round_id, Published(1), NOW)
        with pytest.raises(StateError, match="the next one of its campaign opens in a moment"):
            await require_no_campaign(ledger, "tiny")
        following = await open_round(ledger, store, request(repeat=2), index=1, previous=record, now=NOW)
        await ledger.apply(following.round_id, Cancel("enough"), NOW)
        await require_no_campaign(ledger, "tiny")

    with_ledger(act)


def test_a_keeper_that_was_killed_between_the_two_writes_opens_the_round_once(
    store: MemoryStore, with_ledger: Any
) -> None:
    async def act(ledger: Ledger) -> None:
        first = await open_round(ledger, store, request(), index=0, previous=None, now=NOW)
        # The first keeper wrote the record on version 0 and died; meanwhile version 1 was published.
        written = first.model_copy(update={"round_id": next_round_id(first, 1), "index": 1, "opened_at": NOW + 1})
        store.put(round_key(written.round_id), canonical_json(written), if_absent=True)
        publish(store, KEY, make_manifest(1, first.base_manifest))
        for later in (NOW + 2, NOW + 3):
            opened = await open_round(ledger, store, request(), index=1, previous=first, now=later)
            assert opened == written
        assert [status.record.round_id for status in await ledger.rounds()] == [written.round_id, first.round_id]
        assert (await ledger.round(written.round_id)).facts.state is RoundState.OPEN

    with_ledger(act)


def test_two_keepers_at_once_open_one_round(store: MemoryStore, with_ledger: Any) -> None:
    async def act(ledger: Ledger) -> None:
        first = await open_round(ledger, store, request(), index=0, previous=None, now=NOW)
        opened = await asyncio.gather(
            *(open_round(ledger, store, request(), index=1, previous=first, now=NOW + n) for n in range(6))
        )
        assert len({record.round_id for record in opened}) == 1
        assert len({record.opened_at for record in opened}) == 1
        assert len(await ledger.rounds()) == 2

    with_ledger(act)


def test_the_record_lies_in_object_storage_and_the_base_is_the_latest_version(
    store: MemoryStore, with_ledger: Any
) -> None:
    first = manifest_digest(make_manifest(0, None))
    digest = publish(store, KEY, make_manifest(1, first))

    async def act(ledger: Ledger) -> RoundRecord:
        return await open_round(ledger, store, request(), index=0, previous=None, now=NOW)

    record = with_ledger(act)
    assert (record.base_version, record.base_manifest, record.older_bases) == (1, digest, (first,))
    assert RoundRecord.model_validate_json(store.get(round_key(record.round_id), max_bytes=10**6)) == record


def test_a_lease_is_never_larger_than_a_volunteer_takes(
    store: MemoryStore, with_ledger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(ledger: Ledger) -> RoundRecord:
        return await open_round(ledger, store, request(), index=0, previous=None, now=NOW)

    assert with_ledger(act).request.max_shards_per_lease == request().max_shards_per_lease
    largest = max(shard.size_bytes for shard in add_dataset(MemoryStore(), shards=5).shards)
    monkeypatch.setattr(opening, "MAX_LEASE_BYTES", 3 * largest + 1)
    assert with_ledger(act).request.max_shards_per_lease == 3
    monkeypatch.setattr(opening, "MAX_LEASE_BYTES", largest - 1)
    assert with_ledger(act).request.max_shards_per_lease == 1


def test_nothing_trained_on_a_version_that_was_taken_back_is_welcome(store: MemoryStore, with_ledger: Any) -> None:
    worse = publish(store, KEY, make_manifest(1, manifest_digest(make_manifest(0, None))))
    publish(store, KEY, make_manifest(2, worse).model_copy(update={"round_id": None, "change": Rollback(to=0)}))

    async def act(ledger: Ledger) -> RoundRecord:
        return await open_round(ledger, store, request(), index=0, previous=None, now=NOW)

    record = with_ledger(act)
    assert (record.base_version, record.older_bases) == (2, ())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "none"}, NotFoundError),
        ({"dataset": "none"}, NotFoundError),
        ({"shards": 6}, InputError),
        ({"recipe": {"target_modules": ["q_prj"]}}, InputError),
    ],
    ids=["unknown model", "unknown dataset", "too many shards", "unknown layer"],
)
def test_what_cannot_be_opened_leaves_nothing_behind(
    store: MemoryStore, with_ledger: Any, changes: dict[str, Any], error: type[Exception]
) -> None:
    async def act(ledger: Ledger) -> None:
        with pytest.raises(error):
            await open_round(ledger, store, request(**changes), index=0, previous=None, now=NOW)
        assert await ledger.rounds() == []

    with_ledger(act)
    assert list(store.list("rounds/")) == []


def test_a_round_whose_deltas_the_server_would_refuse_is_not_opened(store: MemoryStore, with_ledger: Any) -> None:
    async def act(ledger: Ledger) -> None:
        with pytest.raises(InputError, match="this server takes 1000"):
            await open_round(ledger, store, request(), index=0, previous=None, now=NOW, max_delta_bytes=1000)

    with_ledger(act)


def test_a_manifest_of_another_publisher_opens_nothing(store: MemoryStore, with_ledger: Any) -> None:
    stranger = public_key_hex(parse_private_key(generate_private_key()))

    async def act(ledger: Ledger) -> None:
        with pytest.raises(IntegrityError):
            await open_round(ledger, store, request(), index=0, previous=None, now=NOW, publisher_key=stranger)

    with_ledger(act)


def test_a_name_that_is_taken_gives_way_to_another_one(
    store: MemoryStore, with_ledger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(round_key("tiny-r0001-aaaaaa"), b"an older campaign")
    names = iter(["aaaaaa", "bbbbbb"])
    monkeypatch.setattr("coordinator.opening.secrets.token_hex", lambda _: next(names))

    async def act(ledger: Ledger) -> RoundRecord:
        return await open_round(ledger, store, request(), index=0, previous=None, now=NOW)

    assert with_ledger(act).round_id == "tiny-r0001-bbbbbb"


@pytest.mark.parametrize(
    ("modules", "chosen"),
    [
        ("all-linear", {"layers.0.q_proj.weight", "layers.0.up_proj.weight"}),
        (("q_proj",), {"layers.0.q_proj.weight"}),
        (("0.up_proj",), {"layers.0.up_proj.weight"}),
        (("layers.0.q_proj", "up_proj"), {"layers.0.q_proj.weight", "layers.0.up_proj.weight"}),
    ],
)
def test_target_modules_select_by_the_end_of_the_name(modules: Any, chosen: set[str]) -> None:
    assert set(select_targets(make_manifest(0, None).targets(), Recipe(target_modules=modules))) == chosen


@pytest.mark.parametrize("modules", [("norm",), ("proj",), ("q_proj", "nothing")])
def test_an_entry_that_selects_nothing_is_named(modules: Any) -> None:
    with pytest.raises(InputError, match="fits no layer"):
        select_targets(make_manifest(0, None).targets(), Recipe(target_modules=modules))


def test_all_shards_can_be_asked_for_but_not_one_more(store: MemoryStore) -> None:
    card = add_dataset(store, shards=5)
    assert set(pick_shards(card, count=5, index=3)) == set(card.shards)
    with pytest.raises(InputError, match="has 5"):
        pick_shards(card, count=6, index=0)
