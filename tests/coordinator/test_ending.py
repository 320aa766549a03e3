"""The ending of a round: owed until it is written, written once, and contradicted by nobody."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coordinator import rounds
from coordinator.ending import end_of, keep_end, stored_end
from coordinator.keeper import Keeper
from coordinator.opening import open_round
from coordinator.rounds import Cancel, OpenNext, Recorded, RecordEnd, RoundFacts
from rankup.errors import IntegrityError, StateError
from rankup.protocol import RoundRequest, RoundState
from rankup.store import MemoryStore
from rankup.versions import round_end_key
from tests.coordinator.ledger_world import record
from tests.coordinator.test_keeper import NOW, ToyAggregator, connect, stocked_store

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

ENDED = [state for state in RoundState if state.ended]


def facts_in(state: RoundState) -> RoundFacts:
    return replace(rounds.draft(record()), state=state, reason="so it is", closed_at=NOW)


@pytest.mark.parametrize("state", ENDED)
def test_an_ended_round_owes_its_ending_until_it_is_recorded(state: RoundState) -> None:
    facts = facts_in(state)
    owed = rounds.owed(facts)
    assert owed[0] == RecordEnd()
    recorded, left = rounds.step(facts, Recorded(), NOW)
    assert recorded == replace(facts, recorded=True)
    assert left == owed[1:]
    assert all(isinstance(command, OpenNext) for command in left)
    assert rounds.step(recorded, Recorded(), NOW) == (recorded, left)


@pytest.mark.parametrize("state", [state for state in RoundState if not state.ended])
def test_a_round_that_goes_on_has_no_ending(state: RoundState) -> None:
    with pytest.raises(StateError):
        end_of("r1", facts_in(state), NOW)
    with pytest.raises(StateError):
        rounds.step(facts_in(state), Recorded(), NOW)


def test_an_ending_is_written_once_and_the_first_one_stands(memory_store: MemoryStore) -> None:
    end = end_of("r1", facts_in(RoundState.REJECTED), NOW)
    assert stored_end(memory_store, "r1") is None
    assert keep_end(memory_store, end) == end
    later = end.model_copy(update={"ended_at": NOW + 60, "reason": "in other words"})
    assert keep_end(memory_store, later) == end
    assert stored_end(memory_store, "r1") == end


def test_an_ending_that_contradicts_the_one_that_is_there_is_refused(memory_store: MemoryStore) -> None:
    end = keep_end(memory_store, end_of("r1", facts_in(RoundState.REJECTED), NOW))
    with pytest.raises(IntegrityError, match="cancelled"):
        keep_end(memory_store, end_of("r1", facts_in(RoundState.CANCELLED), NOW))
    assert stored_end(memory_store, "r1") == end


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"round_id": "r2"}'])
def test_an_ending_that_cannot_be_read_is_an_error(memory_store: MemoryStore, data: bytes) -> None:
    memory_store.put(round_end_key("r1"), data)
    with pytest.raises(IntegrityError):
        stored_end(memory_store, "r1")
    memory_store.put(round_end_key("r1"), end_of("r2", facts_in(RoundState.REJECTED), NOW).model_dump_json().encode())
    with pytest.raises(IntegrityError, match="names r2"):
        stored_end(memory_store, "r1")


def test_the_keeper_writes_the_ending_of_a_round_that_leaves_no_version(valkey: ValkeyServer) -> None:
    async def scenario() -> None:
        store, ledger = stocked_store(), await connect(valkey)
        request = RoundRequest(model="tiny", dataset="docs", shards=2, deadline_s=3600)
        opened = await open_round(ledger, store, request, index=0, previous=None, now=NOW)
        await ledger.apply(opened.round_id, Cancel("a wrong recipe"), NOW)
        keeper = Keeper(ledger, store, ToyAggregator(store), clock=lambda: NOW)
        await keeper.tick()
        await keeper.settle()
        end = stored_end(store, opened.round_id)
        assert end is not None
        assert (end.state, end.reason) == (RoundState.CANCELLED, "a wrong recipe")
        assert await ledger.unfinished() == []
        await ledger.close()

    asyncio.run(scenario())
