"""A delta whose round has ended: which round takes it, and that it counts once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from ledger_world import NOW, audit, claim, hand_in, open_connections, play, receipt, record, submission

from coordinator import ledger_keys as keys
from coordinator.late import opens_soon, taker_of
from coordinator.leases import Lease
from coordinator.ledger import Ledger, RoundStatus
from coordinator.rounds import Cancel, Counts, Evaluated, Folded, Published, RoundFacts, Tick, draft
from rankup.errors import BusyError, DeniedError, StateError
from rankup.protocol import Heartbeat, LeaseState, RoundState
from rankup.records import Evaluation, RoundRecord

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

STEPS = 25


def chain(index: int, *, staleness: int = 1, repeat: int = 4, **request: Any) -> RoundRecord:
    """Round r1, r2, … of a campaign; round n is on version n - 1, whose manifest is n - 1 repeated."""
    recipe = {"aggregation": {"max_staleness": staleness}}
    made = record(f"r{index + 1}", shards=2, index=index, repeat=repeat, recipe=recipe, quorum=1, **request)
    before = range(index - 1, max(-1, index - 1 - staleness), -1)
    about = {
        "base_version": index,
        "base_manifest": f"{index}" * 64,
        "older_bases": tuple(f"{older}" * 64 for older in before),
        "earlier_rounds": tuple(f"r{older + 1}" for older in before),
    }
    return made.model_copy(update=about)


def status(index: int, state: RoundState, *, repeat: int = 4, staleness: int = 1) -> RoundStatus:
    made = chain(index, staleness=staleness, repeat=repeat)
    facts: RoundFacts = draft(made)
    return RoundStatus(made, RoundFacts(**(vars(facts) | {"state": state, "counts": Counts()})), 1)


OPEN, CLOSING, AGGREGATING = RoundState.OPEN, RoundState.CLOSING, RoundState.AGGREGATING
PUBLISHED, REJECTED, CANCELLED = RoundState.PUBLISHED, RoundState.REJECTED, RoundState.CANCELLED

# Of a late delta of r1 on version 0: the rounds that owe something, the one that takes it, whether there will be one.
CASES: dict[str, tuple[list[RoundStatus], str | None, bool]] = {
    "nothing goes on": ([], None, False),
    "its own round is summed": ([status(0, AGGREGATING)], None, True),
    "its own round was the last one": ([status(0, AGGREGATING, repeat=1)], None, False),
    "its own round has published and the next one is not open": ([status(0, PUBLISHED)], None, True),
    "its own round was refused and the next one is not open": ([status(0, REJECTED)], None, True),
    "its own round was cancelled": ([status(0, CANCELLED)], None, False),
    "the next one is open": ([status(1, OPEN)], "r2", False),
    "the next one is closing": ([status(1, CLOSING)], "r2", False),
    "the next one is summed, and the one after it goes so far back": (
        [status(1, AGGREGATING, staleness=2)],
        None,
        True,
    ),
    "the next one is summed, and the one after it does not": ([status(1, AGGREGATING)], None, False),
    "too many versions later": ([status(2, OPEN)], None, False),
    "two versions later, where the round goes so far back": ([status(2, OPEN, staleness=2)], "r3", False),
    "the campaign takes none": ([status(0, AGGREGATING, staleness=0)], None, False),
}


@pytest.mark.parametrize(("unfinished", "taker", "soon"), CASES.values(), ids=CASES)
def test_which_round_takes_a_late_delta(unfinished: list[RoundStatus], taker: str | None, soon: bool) -> None:
    found = taker_of("r1", "0" * 64, unfinished)
    assert (found.record.round_id if found else None) == taker
    assert opens_soon("r1", unfinished) is soon


def test_a_base_that_the_later_round_does_not_know_is_not_taken() -> None:
    assert taker_of("r1", "f" * 64, [status(1, OPEN)]) is None


async def end_first_round(ledger: Ledger, *, open_next: bool = True, **about: Any) -> Lease:
    """Round r1 publishes version 1 from w-1's shard while w-late is still at work on the other; round r2 opens."""
    await ledger.create_round(chain(0, **about), NOW)
    late = await claim(ledger, "w-late")
    await hand_in(ledger, "w-1")
    await ledger.apply("r1", Tick(), NOW)
    if open_next:
        await publish_and_go_on(ledger, **about)
    return late


async def publish_and_go_on(ledger: Ledger, **about: Any) -> None:
    await ledger.reap("r1", NOW)
    await ledger.apply("r1", Folded("d" * 64), NOW)
    await ledger.apply("r1", Evaluated(Evaluation(heldout_loss=2.0, examples=8, tokens=80)), NOW)
    await ledger.apply("r1", Published(1), NOW)
    await ledger.create_round(chain(1, **about), NOW, after="r1")


def test_a_late_delta_is_queued_judged_and_counted_in_the_next_round_and_covers_none_of_its_shards(
    valkey: ValkeyServer,
) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger)
        assert (await ledger.lease(late.lease_id)).state is LeaseState.EXPIRED
        assert await ledger.takes_late(late)
        moved = await ledger.submit(late.lease_id, "w-late", submission(late), NOW)
        assert (moved.round_id, moved.trained_for, moved.home) == ("r2", "r1", "r1")
        assert await ledger.submit(late.lease_id, "w-late", submission(late), NOW) == moved, "repeating changes nothing"
        assert await ledger.pending("r1") == []
        [waiting] = await ledger.pending("r2")
        assert (waiting.statement.round_id, waiting.shard) == ("r1", late.shard)
        view = (await ledger.round("r2")).view()
        assert (view.free, view.submitted) == (2, 1)
        judged = await ledger.judge(late.lease_id, receipt(late), NOW)
        assert judged.state is LeaseState.ACCEPTED
        view = (await ledger.round("r2")).view()
        assert (view.free, view.submitted, view.accepted, view.contributions) == (2, 0, 0, 1)
        assert len(await ledger.receipts("r1")) == len(await ledger.receipts("r2")) == 1
        assert (await ledger.round("r1")).view().accepted == 1
        audit(valkey, "r2")

    play(valkey, scenario)


def test_a_late_delta_that_is_refused_frees_nothing(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger)
        await ledger.submit(late.lease_id, "w-late", submission(late), NOW)
        judged = await ledger.judge(late.lease_id, receipt(late, accepted=False), NOW)
        assert judged.state is LeaseState.REJECTED
        view = (await ledger.round("r2")).view()
        assert (view.free, view.submitted, view.contributions, view.rejected) == (2, 0, 0, 1)
        audit(valkey, "r2")

    play(valkey, scenario)


def test_of_two_late_deltas_of_one_shard_the_first_accepted_one_counts(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(chain(0), NOW)
        first = await claim(ledger, "w-late")
        await ledger.give_back(first.lease_id, "w-late", first.fence, "", NOW)
        second = await claim(ledger, "w-later")
        assert second.shard == first.shard
        await hand_in(ledger, "w-1")
        await ledger.apply("r1", Tick(), NOW)
        await publish_and_go_on(ledger)
        for lease in (first, second):
            await ledger.submit(lease.lease_id, lease.worker_id, submission(lease), NOW)
        assert (await ledger.judge(second.lease_id, receipt(second), NOW)).state is LeaseState.ACCEPTED
        beaten = await ledger.judge(first.lease_id, receipt(first), NOW)
        assert (beaten.state, "already accepted: shard 0 of round r1" in beaten.verdict) == (LeaseState.REJECTED, True)
        assert (await ledger.round("r2")).view().contributions == 1

    play(valkey, scenario)


def test_verdicts_on_late_deltas_of_one_shard_at_the_same_time_accept_one(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(chain(0), NOW)
        rivals = []
        for number in range(6):
            rivals.append(await claim(ledger, f"w-late{number}"))
            await ledger.give_back(rivals[-1].lease_id, f"w-late{number}", rivals[-1].fence, "", NOW)
        busy = await claim(ledger, "w-busy")
        await hand_in(ledger, "w-1")
        await ledger.apply("r1", Tick(), NOW)
        await publish_and_go_on(ledger)
        rivals.append(busy)
        for lease in rivals:
            await ledger.submit(lease.lease_id, lease.worker_id, submission(lease), NOW)
        await open_connections(ledger)
        judged = await asyncio.gather(*(ledger.judge(lease.lease_id, receipt(lease), NOW) for lease in rivals))
        assert [lease.state for lease in judged].count(LeaseState.ACCEPTED) == 1
        view = (await ledger.round("r2")).view()
        assert (view.contributions, view.rejected) == (1, 6)

    play(valkey, scenario)


def test_a_shard_whose_delta_was_summed_is_not_taken_once_more(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(chain(0), NOW)
        late = await claim(ledger, "w-late")
        await ledger.give_back(late.lease_id, "w-late", late.fence, "", NOW)
        done = await hand_in(ledger, "w-1")
        assert done.shard == late.shard
        await ledger.apply("r1", Tick(), NOW)
        await publish_and_go_on(ledger)
        with pytest.raises(StateError, match="another delta of shard 0 of round r1 was accepted"):
            await ledger.submit(late.lease_id, "w-late", submission(late), NOW)

    play(valkey, scenario)


def test_a_delta_is_not_handed_in_twice_by_being_late(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger)
        other = await claim(ledger, "w-2")
        await ledger.submit(other.lease_id, "w-2", submission(other, digest="a" * 64), NOW)
        with pytest.raises(DeniedError, match="handed in with lease"):
            await ledger.submit(late.lease_id, "w-late", submission(late, digest="a" * 64), NOW)

    play(valkey, scenario)


def test_between_two_rounds_a_late_delta_is_asked_to_come_again(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger, open_next=False)
        for _ in range(2):
            with pytest.raises(BusyError, match="the round after it takes late ones") as caught:
                await ledger.submit(late.lease_id, "w-late", submission(late), NOW)
            assert caught.value.retry_after_s > 0
            with pytest.raises(BusyError):
                await ledger.takes_late(late)
        await publish_and_go_on(ledger)
        assert (await ledger.submit(late.lease_id, "w-late", submission(late), NOW)).round_id == "r2"

    play(valkey, scenario)


def test_where_no_round_takes_late_deltas_they_are_refused(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger, staleness=0)
        assert not await ledger.takes_late(late)
        with pytest.raises(StateError, match="takes no more deltas") as caught:
            await ledger.submit(late.lease_id, "w-late", submission(late), NOW)
        assert "no later round" in caught.value.remedy

    play(valkey, scenario)


def test_a_training_that_is_half_done_when_its_round_ends_goes_on(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger)
        for step, useful in ((STEPS // 2, False), (STEPS // 2 + 1, True)):
            beat = Heartbeat(fence=late.fence, step=step)
            assert (await ledger.heartbeat(late.lease_id, "w-late", beat, NOW)).go_on is useful

    play(valkey, scenario)


def test_a_late_delta_falls_with_the_round_that_took_it(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger)
        await ledger.submit(late.lease_id, "w-late", submission(late), NOW)
        await ledger.apply("r2", Cancel("wrong dataset"), NOW)
        await ledger.reap("r2", NOW)
        refused = await ledger.lease(late.lease_id)
        assert (refused.state, refused.verdict) == (LeaseState.REJECTED, "the round is cancelled: wrong dataset")
        audit(valkey, "r2")

    play(valkey, scenario)
    assert valkey.client().zcard(keys.round_key("r2", "free")) == 0
