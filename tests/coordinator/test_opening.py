"""Opening rounds on a real ledger: which shards and targets they get, and that opening twice opens once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from gateway_world import add_dataset, make_manifest, publish

from coordinator.ledger import Ledger
from coordinator.opening import next_round_id, open_round, pick_shards
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.message import canonical_json
from rankup.protocol import RoundRequest, RoundState
from rankup.recipe import Recipe
from rankup.records import RoundRecord
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore
from rankup.targets import select_targets
from rankup.versions import round_key

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
    digest = publish(store, KEY, make_manifest(1, "0" * 64))

    async def act(ledger: Ledger) -> RoundRecord:
        return await open_round(ledger, store, request(), index=0, previous=None, now=NOW)

    record = with_ledger(act)
    assert (record.base_version, record.base_manifest) == (1, digest)
    assert RoundRecord.model_validate_json(store.get(round_key(record.round_id), max_bytes=10**6)) == record


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
