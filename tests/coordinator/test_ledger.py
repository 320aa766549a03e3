from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from ledger_world import (
    LEASE_S,
    NOW,
    claim,
    connected,
    counts,
    hand_in,
    open_connections,
    play,
    receipt,
    record,
    submission,
    worker,
)
from pydantic import SecretStr

from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger import Ledger, NoWork
from coordinator.rounds import (
    Admit,
    Aggregate,
    Cancel,
    Close,
    Evaluated,
    Folded,
    OpenNext,
    Published,
    ReapLeases,
    Recorded,
    Tick,
)
from rankup.errors import BusyError, DeniedError, InputError, NotFoundError, SetupError, StateError, UnreachableError
from rankup.protocol import Heartbeat, LeaseState, RoundState
from rankup.records import Evaluation
from rankup.settings import LedgerSettings

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer


# -- workers -----------------------------------------------------------------------------------------------------------


def test_a_worker_is_found_by_its_token_until_it_enrols_again(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.people.enrol(worker(), "a" * 64)
        assert await ledger.people.by_token("a" * 64, NOW) == worker()
        await ledger.people.enrol(worker(name="Ada L."), "b" * 64)
        assert await ledger.people.by_token("a" * 64, NOW) is None
        assert await ledger.people.by_token("b" * 64, NOW) == worker(name="Ada L.")
        await ledger.people.enrol(worker(name="Ada L."), "b" * 64)
        assert await ledger.people.by_token("b" * 64, NOW) is not None
        assert await ledger.people.worker("w-1") == worker(name="Ada L.")
        with pytest.raises(NotFoundError):
            await ledger.people.worker("w-9")
        with pytest.raises(InputError, match="sha256"):
            await ledger.people.enrol(worker(), "the token itself")

    play(valkey, scenario)


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_a_round_is_created_once_and_listed_newest_first(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        first = await ledger.create_round(record("r1"), NOW)
        assert await ledger.create_round(record("r1", shards=2), NOW + 9) == first
        await ledger.create_round(record("r2"), NOW + 1)
        assert [status.record.round_id for status in await ledger.rounds()] == ["r2", "r1"]
        assert [status.record.round_id for status in await ledger.rounds(limit=1)] == ["r2"]
        assert await ledger.record("r1") == record("r1")
        view = first.view()
        assert (view.state, view.opened_at, view.deadline_at, view.quorum) == (RoundState.OPEN, NOW, NOW + 3600, 3)
        assert counts(first) == (3, 0, 0, 0, 0)
        with pytest.raises(NotFoundError):
            await ledger.round("r3")

    play(valkey, scenario)


def test_a_campaign_goes_from_claim_to_version_to_the_next_round(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        for number in range(3):
            await ledger.people.enrol(worker(number), f"{number:064x}")
            lease = await claim(ledger, f"w-{number}")
            await ledger.submit(lease.lease_id, lease.worker_id, submission(lease), NOW)
            _, commands = await ledger.apply("r1", Tick(), NOW + 1)
            assert commands == (ReapLeases(), Admit())
            await ledger.judge(lease.lease_id, receipt(lease), NOW)
        status, commands = await ledger.apply("r1", Tick(), NOW + 2)
        assert commands == (ReapLeases(), Aggregate())
        assert status.facts.reason == "quorum of 3 reached"
        assert isinstance(await ledger.claim("w-7", NOW + 2), NoWork)
        digests = [each.submission.statement.sha256 for each in await ledger.receipts("r1")]
        assert len(digests) == 3
        assert digests == sorted(digests)
        await ledger.apply("r1", Folded("d" * 64), NOW + 3)
        losses = Evaluation(heldout_loss=2.0, parent_heldout_loss=3.0, examples=8, tokens=80)
        await ledger.apply("r1", Evaluated(losses), NOW + 4)
        status, commands = await ledger.apply("r1", Published(1), NOW + 5)
        assert OpenNext(1, 1) in commands
        assert (status.view().published_version, status.view().heldout_loss) == (1, 2.0)
        assert await ledger.round("r1") == status
        with pytest.raises(StateError):
            await ledger.apply("r1", Tick(), NOW + 6)
        assert [each.record.round_id for each in await ledger.unfinished()] == ["r1"]
        await ledger.create_round(record("r2", index=1), NOW + 7, after="r1")
        assert [each.record.round_id for each in await ledger.unfinished()] == ["r2"]
        rows = await ledger.people.scores.leaderboard()
        assert {(row.worker_id, row.name, row.accepted, row.tokens) for row in rows} == {
            (f"w-{number}", "Ada", 1, 50) for number in range(3)
        }

    play(valkey, scenario)


def test_steps_of_one_round_at_the_same_time_happen_once(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        await hand_in(ledger, "w-1")
        await open_connections(ledger)
        outcomes = await asyncio.gather(
            *(ledger.apply("r1", Close(), NOW + 1) for _ in range(8)), return_exceptions=True
        )
        done = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
        assert len(done) == 1
        assert done[0][0].facts.state is RoundState.AGGREGATING
        assert all(isinstance(outcome, StateError) for outcome in outcomes if not isinstance(outcome, tuple))

    play(valkey, scenario)


def test_cancelling_ends_every_lease_and_refuses_what_was_not_judged(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        waiting, working = await claim(ledger, "w-1"), await claim(ledger, "w-2")
        await ledger.submit(waiting.lease_id, "w-1", submission(waiting), NOW)
        _, commands = await ledger.apply("r1", Cancel("wrong dataset"), NOW + 1)
        assert ReapLeases() in commands
        pulse = await ledger.heartbeat(working.lease_id, "w-2", Heartbeat(fence=working.fence), NOW + 1)
        assert not pulse.go_on
        assert "cancelled" in pulse.reason
        assert await ledger.reap("r1", NOW + 1) == [working.lease_id]
        refused = await ledger.lease(waiting.lease_id)
        assert (refused.state, refused.verdict) == (LeaseState.REJECTED, "the round is cancelled: wrong dataset")
        await ledger.apply("r1", Recorded(), NOW + 1)
        assert await ledger.unfinished() == []
        assert (await ledger.judge(waiting.lease_id, receipt(waiting), NOW + 2)).state is LeaseState.REJECTED

    play(valkey, scenario)


def test_a_round_does_not_go_on_past_a_submission_that_came_in_between(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(quorum=1, min_contributions=1), NOW)
        late = await claim(ledger, "w-2")
        await hand_in(ledger, "w-1")
        seen = await ledger.round("r1")
        await ledger.submit(late.lease_id, "w-2", submission(late), NOW)
        folding = replace(seen.facts, state=RoundState.AGGREGATING)
        stale = keys.round_conditions("r1", seen.rev, seen.facts, folding)
        assert not await ledger.valkey.commit(stale, [["SET", "rk1:never", "1"]])
        status, _ = await ledger.apply("r1", Tick(), NOW)
        assert status.facts.state is RoundState.CLOSING

    play(valkey, scenario)


# -- leases ------------------------------------------------------------------------------------------------------------


def test_64_claimers_on_300_shards_never_hold_one_shard_twice(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=300, lease_target_s=4), NOW)
        held: set[int] = set()
        fences: dict[int, int] = {}
        accepted: list[int] = []
        widths: set[int] = set()

        async def volunteer(number: int) -> None:
            name, turn = f"w-{number}", 0
            while isinstance(lease := await ledger.claim(name, NOW), Lease):
                assert held.isdisjoint(lease.numbers)
                assert all(lease.fence > fences.get(shard, 0) for shard in lease.numbers)
                held.update(lease.numbers)
                fences.update(dict.fromkeys(lease.numbers, lease.fence))
                widths.add(lease.shards)
                await asyncio.sleep(0)
                held.difference_update(lease.numbers)
                if (number + turn) % 5 == 0:
                    await ledger.give_back(lease.lease_id, name, lease.fence, "the owner plays a game", NOW)
                else:
                    told = submission(lease, tokens=50 * lease.shards, seconds=float(lease.shards))
                    await ledger.submit(lease.lease_id, name, told, NOW)
                    await ledger.judge(lease.lease_id, receipt(lease), NOW)
                    accepted.extend(lease.numbers)
                turn += 1

        await open_connections(ledger)
        await asyncio.gather(*(volunteer(number) for number in range(64)))
        assert sorted(accepted) == list(range(300))
        assert {1, 4} <= widths <= {1, 2, 3, 4}
        status = await ledger.round("r1")
        assert counts(status) == (0, 0, 0, 300, 0)
        assert 75 < status.facts.counts.contributions < 300

    play(valkey, scenario)


def test_there_is_no_work_without_a_round_and_none_when_all_shards_are_out(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        nothing = await ledger.claim("w-1", NOW)
        assert isinstance(nothing, NoWork)
        assert (nothing.why, nothing.reason) == ("no_round", "No round is open.")
        await ledger.create_round(record(shards=1), NOW)
        await claim(ledger, "w-1")
        nothing = await ledger.claim("w-2", NOW)
        assert isinstance(nothing, NoWork)
        assert (nothing.why, nothing.idle) == ("all_handed_out", 0)
        assert "expected back in about 20 min" in nothing.reason

    play(valkey, scenario)


def test_the_lowest_free_shard_comes_first(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=12), NOW)
        got = [await claim(ledger, f"w-{number}") for number in range(11)]
        assert [lease.shard for lease in got] == list(range(11))
        for number in (10, 2):
            await ledger.give_back(got[number].lease_id, f"w-{number}", 1, "", NOW)
        again = [await claim(ledger, f"v-{number}") for number in range(3)]
        assert [(lease.shard, lease.fence) for lease in again] == [(2, 2), (10, 2), (11, 1)]

    play(valkey, scenario)


def test_a_worker_that_lost_the_answer_gets_the_same_lease_again(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        first = await claim(ledger)
        again = await claim(ledger, now=NOW + 30)
        assert (again.lease_id, again.fence, again.shard) == (first.lease_id, first.fence, first.shard)
        assert again.expires_at == NOW + 30 + LEASE_S
        assert counts(await ledger.round("r1")) == (2, 1, 0, 0, 0)
        await ledger.submit(again.lease_id, "w-1", submission(again), NOW)
        assert (await claim(ledger)).lease_id != first.lease_id

    play(valkey, scenario)


def test_a_heartbeat_keeps_a_lease_alive(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        lease = await claim(ledger)
        beat = Heartbeat(fence=lease.fence, step=7, loss=2.5, tokens_per_s=11.5)
        pulse = await ledger.heartbeat(lease.lease_id, "w-1", beat, NOW + 50)
        assert pulse.go_on
        assert await ledger.reap("r1", NOW + 100) == []
        stored = await ledger.lease(lease.lease_id)
        assert stored == pulse.lease
        assert (stored.step, stored.loss, stored.tokens_per_s, stored.expires_at) == (7, 2.5, 11.5, NOW + 110)

    play(valkey, scenario)


def test_an_expired_lease_goes_to_the_next_worker_with_a_higher_fence(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1), NOW)
        first = await claim(ledger, "w-1")
        assert await ledger.reap("r1", NOW + LEASE_S - 1) == []
        assert await ledger.reap("r1", NOW + LEASE_S) == [first.lease_id]
        assert (await ledger.lease(first.lease_id)).state is LeaseState.EXPIRED
        second = await claim(ledger, "w-2", NOW + 61)
        assert (second.shard, second.fence) == (first.shard, first.fence + 1)
        pulse = await ledger.heartbeat(first.lease_id, "w-1", Heartbeat(fence=first.fence), NOW + 62)
        assert not pulse.go_on
        assert "another worker" in pulse.reason

    play(valkey, scenario)


def test_a_late_submission_is_welcome_and_the_first_accepted_delta_wins(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1), NOW)
        late = await claim(ledger, "w-1")
        await ledger.reap("r1", NOW + 61)
        current = await claim(ledger, "w-2", NOW + 61)
        await ledger.submit(late.lease_id, "w-1", submission(late), NOW + 62)
        await ledger.submit(current.lease_id, "w-2", submission(current), NOW + 63)
        assert len(await ledger.pending("r1")) == 2
        assert (await ledger.judge(late.lease_id, receipt(late), NOW + 64)).state is LeaseState.ACCEPTED
        beaten = await ledger.judge(current.lease_id, receipt(current), NOW + 65)
        assert beaten.state is LeaseState.REJECTED
        assert "already accepted" in beaten.verdict
        assert [each.submission.statement.lease_id for each in await ledger.receipts("r1")] == [late.lease_id]
        assert counts(await ledger.round("r1")) == (0, 0, 0, 1, 1)

    play(valkey, scenario)


def test_a_refused_late_delta_does_not_free_a_shard_that_somebody_works_on(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1), NOW)
        late = await claim(ledger, "w-1")
        await ledger.reap("r1", NOW + 61)
        current = await claim(ledger, "w-2", NOW + 61)
        await ledger.submit(late.lease_id, "w-1", submission(late), NOW + 62)
        await ledger.judge(late.lease_id, receipt(late, accepted=False, reason="norm is zero"), NOW + 63)
        assert isinstance(await ledger.claim("w-3", NOW + 64), NoWork)
        await ledger.give_back(current.lease_id, "w-2", current.fence, "", NOW + 65)
        assert (await claim(ledger, "w-3", NOW + 66)).fence == 3

    play(valkey, scenario)


def test_a_late_delta_takes_its_free_shard_back_until_the_verdict(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1), NOW)
        late = await claim(ledger, "w-1")
        await ledger.give_back(late.lease_id, "w-1", late.fence, "", NOW)
        await ledger.submit(late.lease_id, "w-1", submission(late), NOW + 1)
        assert isinstance(await ledger.claim("w-2", NOW + 2), NoWork)

    play(valkey, scenario)


def test_two_verdicts_on_one_shard_at_the_same_time_accept_one(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1), NOW)
        rivals = []
        for number in range(6):
            rivals.append(await claim(ledger, f"w-{number}"))
            await ledger.reap("r1", NOW + 61)
        for lease in rivals:
            await ledger.submit(lease.lease_id, lease.worker_id, submission(lease), NOW + 62)
        await open_connections(ledger)
        judged = await asyncio.gather(*(ledger.judge(lease.lease_id, receipt(lease), NOW + 63) for lease in rivals))
        assert [lease.state for lease in judged].count(LeaseState.ACCEPTED) == 1
        assert counts(await ledger.round("r1")) == (0, 0, 0, 1, 5)

    play(valkey, scenario)


@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "rejected"])
def test_one_verdict_told_many_times_at_once_counts_once(valkey: ValkeyServer, accepted: bool) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        lease = await claim(ledger)
        await open_connections(ledger)
        submits = (ledger.submit(lease.lease_id, "w-1", submission(lease), NOW) for _ in range(8))
        assert len(set(await asyncio.gather(*submits))) == 1
        verdict = receipt(lease, accepted=accepted)
        verdicts = (ledger.judge(lease.lease_id, verdict, NOW) for _ in range(8))
        assert len(set(await asyncio.gather(*verdicts))) == 1
        [row] = await ledger.people.scores.leaderboard()
        assert (row.accepted, row.rejected, row.tokens) == ((1, 0, 50) if accepted else (0, 1, 0))

    play(valkey, scenario)


def test_a_shard_whose_delta_was_accepted_is_not_worked_on_any_more(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=2), NOW)
        late = await claim(ledger, "w-1")
        await ledger.reap("r1", NOW + 61)
        current = await claim(ledger, "w-2", NOW + 61)
        await ledger.submit(late.lease_id, "w-1", submission(late), NOW + 62)
        await ledger.judge(late.lease_id, receipt(late), NOW + 63)
        pulse = await ledger.heartbeat(current.lease_id, "w-2", Heartbeat(fence=current.fence), NOW + 64)
        assert not pulse.go_on
        with pytest.raises(StateError, match="was accepted"):
            await ledger.submit(current.lease_id, "w-2", submission(current), NOW + 65)
        assert (await claim(ledger, "w-2", NOW + 66)).shard == 1
        await ledger.give_back(current.lease_id, "w-2", current.fence, "", NOW + 67)
        assert isinstance(await ledger.claim("w-3", NOW + 68), NoWork)
        assert (await claim(ledger, "w-2", NOW + 69)).shard == 1

    play(valkey, scenario)


def test_a_rejected_delta_frees_its_shard(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1), NOW)
        lease = await claim(ledger, "w-1")
        await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)
        assert isinstance(await ledger.claim("w-2", NOW), NoWork)
        no = receipt(lease, accepted=False, reason="norm is zero")
        assert (await ledger.judge(lease.lease_id, no, NOW)).view().verdict == "norm is zero"
        assert (await ledger.judge(lease.lease_id, no, NOW)).state is LeaseState.REJECTED
        assert (await claim(ledger, "w-2")).fence == 2
        assert counts(await ledger.round("r1")) == (0, 1, 0, 0, 1)
        assert [(row.accepted, row.rejected, row.tokens) for row in await ledger.people.scores.leaderboard()] == [
            (0, 1, 0)
        ]

    play(valkey, scenario)


def test_submitting_twice_is_one_submission_also_after_the_verdict(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        lease = await claim(ledger)
        first = await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)
        assert first.state is LeaseState.SUBMITTED
        calls: list[Awaitable[Lease]] = [
            ledger.submit(lease.lease_id, "w-1", submission(lease, at=NOW + n), NOW + n) for n in range(5)
        ]
        assert set(await asyncio.gather(*calls)) == {first}
        assert await ledger.pending("r1") == [submission(lease)]
        await ledger.judge(lease.lease_id, receipt(lease), NOW)
        await ledger.judge(lease.lease_id, receipt(lease), NOW)
        again = await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)
        assert again.state is LeaseState.ACCEPTED
        assert await ledger.people.contributions("w-1") == [again]
        assert [row.accepted for row in await ledger.people.scores.leaderboard()] == [1]

    play(valkey, scenario, require_fsync=True)


def test_calls_about_somebody_elses_lease_are_denied(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        lease = await claim(ledger, "w-1")
        with pytest.raises(DeniedError, match="another worker"):
            await ledger.submit(lease.lease_id, "w-2", submission(lease), NOW)
        with pytest.raises(DeniedError, match="another worker"):
            await ledger.heartbeat(lease.lease_id, "w-2", Heartbeat(fence=1), NOW)
        with pytest.raises(DeniedError, match="another worker"):
            await ledger.give_back(lease.lease_id, "w-2", 1, "", NOW)
        with pytest.raises(NotFoundError):
            await ledger.heartbeat("l-none", "w-2", Heartbeat(fence=1), NOW)

    play(valkey, scenario)


def test_an_old_fence_is_denied(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1), NOW)
        first = await claim(ledger, "w-1")
        await ledger.give_back(first.lease_id, "w-1", first.fence, "", NOW)
        second = await claim(ledger, "w-1")
        with pytest.raises(DeniedError, match="fence"):
            await ledger.heartbeat(second.lease_id, "w-1", Heartbeat(fence=first.fence), NOW)
        with pytest.raises(DeniedError, match="fence"):
            await ledger.submit(second.lease_id, "w-1", submission(second, fence=first.fence), NOW)

    play(valkey, scenario)


def test_a_copied_delta_and_a_second_delta_are_refused(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        mine, other = await claim(ledger, "w-1"), await claim(ledger, "w-2")
        await ledger.submit(mine.lease_id, "w-1", submission(mine, digest="a" * 64), NOW)
        with pytest.raises(DeniedError, match="handed in with lease"):
            await ledger.submit(other.lease_id, "w-2", submission(other, digest="a" * 64), NOW)
        with pytest.raises(StateError, match="already handed in"):
            await ledger.submit(mine.lease_id, "w-1", submission(mine, digest="b" * 64), NOW)
        with pytest.raises(InputError, match="not about"):
            await ledger.submit(other.lease_id, "w-2", submission(other, round_id="r9"), NOW)

    play(valkey, scenario)


def test_one_delta_raced_in_with_two_leases_counts_once(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=8), NOW)
        held = [await claim(ledger, f"w-{number}") for number in range(8)]
        await open_connections(ledger)
        outcomes = await asyncio.gather(
            *(
                ledger.submit(lease.lease_id, lease.worker_id, submission(lease, digest="a" * 64), NOW)
                for lease in held
            ),
            return_exceptions=True,
        )
        assert [isinstance(outcome, Lease) for outcome in outcomes].count(True) == 1
        assert [isinstance(outcome, DeniedError) for outcome in outcomes].count(True) == 7

    play(valkey, scenario)


def test_a_round_that_is_being_folded_takes_no_more_deltas(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(quorum=1, min_contributions=1, repeat=1), NOW)
        late = await claim(ledger, "w-2")
        await hand_in(ledger, "w-1")
        await ledger.apply("r1", Tick(), NOW)
        with pytest.raises(StateError, match="takes no more deltas"):
            await ledger.submit(late.lease_id, "w-2", submission(late), NOW)
        assert await ledger.reap("r1", NOW) == [late.lease_id]

    play(valkey, scenario)


def test_names_keep_every_letter(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.people.enrol(worker(name='Žofie "Ω" \\ 李'), "a" * 64)
        assert (await ledger.people.worker("w-1")).name == 'Žofie "Ω" \\ 李'

    play(valkey, scenario)


# -- compare and set --------------------------------------------------------------------------------------------------

FOUND = {
    "as it is": (["HMGET", "h", "a", "b", ["1", None]], True),
    "another value": (["HMGET", "h", "a", "b", ["2", None]], False),
    "a value where none is": (["HMGET", "h", "a", "b", ["1", "1"]], False),
    "none where a value is": (["HMGET", "h", "a", "b", [None, None]], False),
    "one value": (["HGET", "h", "a", "1"], True),
    "a number": (["HLEN", "h", "1"], True),
    "nothing": (["HGET", "h", "b", None], True),
    "not nothing": (["HGET", "h", "a", None], False),
}


@pytest.mark.parametrize(("condition", "holds"), FOUND.values(), ids=FOUND)
def test_writes_are_made_exactly_if_what_was_seen_is_still_so(
    valkey: ValkeyServer, condition: keys.Condition, holds: bool
) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.valkey.commit([], [["HSET", "h", "a", "1"]])
        assert await ledger.valkey.commit([condition], [["SET", "made", "1"]]) is holds
        assert bool(valkey.client().exists("made")) is holds

    play(valkey, scenario)


# -- the server --------------------------------------------------------------------------------------------------------


def test_what_was_acknowledged_is_there_after_a_kill_and_a_restart(own_valkey: ValkeyServer) -> None:
    async def before() -> Lease:
        async with connected(own_valkey.ledger_settings) as ledger:
            await ledger.create_round(record(), NOW)
            lease = await claim(ledger)
            await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)
            own_valkey.kill()
            with pytest.raises(UnreachableError) as caught:
                await ledger.pending("r1")
            assert "RANKUP_LEDGER_URL" in caught.value.remedy
            with pytest.raises(UnreachableError):
                await ledger.judge(lease.lease_id, receipt(lease), NOW)
            own_valkey.start()
            assert await ledger.pending("r1") == [submission(lease)]  # The same ledger goes on.
            assert (await ledger.judge(lease.lease_id, receipt(lease), NOW)).state is LeaseState.ACCEPTED
            own_valkey.kill()
            own_valkey.start()
            assert (await ledger.lease(lease.lease_id)).state is LeaseState.ACCEPTED
            return lease

    asyncio.run(before())


def test_a_server_that_is_not_there_is_unreachable(tmp_path_factory: pytest.TempPathFactory) -> None:
    nowhere = LedgerSettings(url=SecretStr("unix:///tmp/rankup-nobody-here.sock"), timeout_s=1.0)
    started = time.monotonic()
    with pytest.raises(UnreachableError):
        asyncio.run(Ledger.connect(nowhere))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("url", ["", "valkey.example:6379"])
def test_an_address_that_makes_no_sense_is_a_setup_error(url: str) -> None:
    with pytest.raises(SetupError, match="RANKUP_LEDGER_URL"):
        asyncio.run(Ledger.connect(LedgerSettings(url=SecretStr(url))))


def test_without_an_append_only_file_a_submission_is_not_acknowledged(own_valkey: ValkeyServer) -> None:
    own_valkey.kill()
    own_valkey.append_only = False
    own_valkey.start()

    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        lease = await claim(ledger)
        with pytest.raises(SetupError, match="appendonly"):
            await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)

    play(own_valkey, scenario, require_fsync=True)


def test_a_submission_is_acknowledged_only_when_it_is_on_disk_and_a_repeat_waits_for_that_too(
    own_valkey: ValkeyServer,
) -> None:
    async def scenario() -> None:
        impatient = own_valkey.ledger_settings.model_copy(update={"timeout_s": 0.5})
        async with connected(impatient) as hasty, connected(own_valkey.ledger_settings) as patient:
            await hasty.create_round(record(), NOW)
            lease = await claim(hasty)
            own_valkey.client().config_set("appendfsync", "no")
            for _ in range(2):
                with pytest.raises(BusyError, match="disk"):
                    await hasty.submit(lease.lease_id, "w-1", submission(lease), NOW)
            own_valkey.client().config_set("appendfsync", "everysec")
            again = await patient.submit(lease.lease_id, "w-1", submission(lease), NOW)
            assert again.state is LeaseState.SUBMITTED

    asyncio.run(scenario())


def test_a_server_without_memory_is_busy_and_writes_nothing(own_valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        lease = await claim(ledger)
        own_valkey.client().config_set("maxmemory", "1")
        with pytest.raises(BusyError):
            await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)
        assert await ledger.lease(lease.lease_id) == lease
        own_valkey.client().config_set("maxmemory", "0")
        await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)

    play(own_valkey, scenario, require_fsync=True)


@pytest.mark.parametrize("login", ["", ":guess@"], ids=["no password", "a wrong one"])
def test_a_refused_login_is_a_setup_error_that_keeps_the_password_to_itself(
    own_valkey: ValkeyServer, login: str
) -> None:
    own_valkey.client().config_set("requirepass", "something else")
    url = SecretStr(f"unix://{login}{own_valkey.folder}/v.sock")
    with pytest.raises(SetupError, match="login") as caught:
        asyncio.run(Ledger.connect(LedgerSettings(url=url)))
    assert "guess" not in caught.value.cause


def test_a_server_that_lost_everything_has_no_round(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        valkey.client().flushall()
        with pytest.raises(NotFoundError):
            await ledger.round("r1")
        await ledger.create_round(record(), NOW)
        assert (await claim(ledger)).fence == 1

    play(valkey, scenario)
