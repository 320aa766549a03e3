"""Who gets which shards, on a real Valkey: neighbouring ones, copies of stragglers, reasons, and what always holds."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_world import LEASE_S, NOW, audit, claim, connected, counts, hand_in, play, receipt, record, submission

from coordinator import claims, leases
from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger import Ledger, NoWork
from coordinator.matching import Seeker
from coordinator.rounds import Close, Pause, Resume
from rankup.errors import RankupError, StateError
from rankup.protocol import Heartbeat, LeaseState, RoundState, Standing

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

STEPS = 25
"""Of one shard, by the default recipe."""


async def show_speed(ledger: Ledger, worker_id: str, *, seconds: float = 1.0, now: float = NOW) -> None:
    """Have the worker hand in one lease of 50 tokens in so many seconds, so that its next one is sized; the shard is
    then free again."""
    lease = await claim(ledger, worker_id, now)
    assert lease.shards == 1
    await ledger.submit(lease.lease_id, worker_id, submission(lease, seconds=seconds), now)
    await ledger.judge(lease.lease_id, receipt(lease, accepted=False), now)


def test_the_script_grants_what_the_rules_say(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        tiers = ({"min_memory_gib": 0, "rank": 4},)
        await ledger.create_round(record(shards=9, lease_target_s=3, tiers=tiers), NOW)
        await show_speed(ledger, "w-1")
        got = await claim(ledger, "w-1")
        said, _ = leases.grant(
            lease_id=got.lease_id,
            fence=2,
            round_id="r1",
            shard=0,
            worker_id="w-1",
            now=NOW,
            lease_s=LEASE_S,
            shards=3,
            rank=4,
            expected_s=3.0,
        )
        assert got == said
        assert valkey.client().zscore(keys.round_key("r1", "eta"), got.lease_id) == NOW + 3

    play(valkey, scenario)


def test_a_lease_takes_neighbours_and_stops_at_the_first_gap(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=40, lease_target_s=4), NOW)
        for number in range(3):
            await show_speed(ledger, f"w-{number}")
        held = [await claim(ledger, f"w-{number}") for number in range(3)]
        assert [list(lease.numbers) for lease in held] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        for lease in (held[0], held[2]):
            await ledger.give_back(lease.lease_id, lease.worker_id, lease.fence, "", NOW)
        single = await claim(ledger, "w-9")
        assert list(single.numbers) == [0]
        # 1 to 3 are free, 4 to 7 are held: the lease ends at the gap although its worker could take four.
        assert list((await claim(ledger, "w-0")).numbers) == [1, 2, 3]
        await show_speed(ledger, "w-5")
        await ledger.give_back(single.lease_id, "w-9", single.fence, "", NOW)
        assert list((await claim(ledger, "w-5")).numbers) == [0]

    play(valkey, scenario)


def test_freed_shards_and_untouched_ones_are_neighbours_too(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=40, lease_target_s=3), NOW)
        await show_speed(ledger, "w-1")
        first = await claim(ledger, "w-2")
        last = await claim(ledger, "w-3")
        await ledger.give_back(last.lease_id, "w-3", last.fence, "", NOW)
        got = await claim(ledger, "w-1")
        assert ([*first.numbers], [*got.numbers], got.fence) == ([0], [1, 2, 3], 2)
        assert counts(await ledger.round("r1")) == (36, 2, 0, 0, 1)

    play(valkey, scenario)


def test_the_fence_is_above_that_of_every_shard_and_counts_for_all(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=40, lease_target_s=3), NOW)
        await show_speed(ledger, "w-1")
        for _ in range(3):
            only = await claim(ledger, "w-2")
            await ledger.give_back(only.lease_id, "w-2", only.fence, "", NOW)
        wide = await claim(ledger, "w-1")
        assert (list(wide.numbers), wide.fence) == ([0, 1, 2], 5)
        await ledger.give_back(wide.lease_id, "w-1", wide.fence, "", NOW)
        narrow = [await claim(ledger, f"v-{number}") for number in range(4)]
        assert [(lease.shard, lease.fence) for lease in narrow] == [(0, 6), (1, 6), (2, 6), (3, 1)]

    play(valkey, scenario)


def test_a_delta_is_accepted_for_all_shards_of_its_lease_and_one_receipt_says_so(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=40, lease_target_s=3), NOW)
        await show_speed(ledger, "w-1")
        wide = await hand_in(ledger, "w-1")
        view = (await ledger.round("r1")).view()
        assert (view.accepted, view.contributions, view.free) == (3, 1, 37)
        [kept] = await ledger.receipts("r1")
        assert (kept.submission.shard, kept.submission.shards) == (0, 3)
        assert wide.view().shards == 3
        assert (await claim(ledger, "w-1")).shard == 3

    play(valkey, scenario)


def test_a_delta_whose_shards_are_not_all_open_any_more_is_refused_whole(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=40, lease_target_s=3), NOW)
        await show_speed(ledger, "w-1")
        wide, later = await claim(ledger, "w-1"), NOW + LEASE_S
        await ledger.reap("r1", later)
        other = await claim(ledger, "w-2", later)
        assert list(other.numbers) == [0]
        await ledger.submit(wide.lease_id, "w-1", submission(wide), later)
        await ledger.submit(other.lease_id, "w-2", submission(other), later)
        await ledger.judge(other.lease_id, receipt(other), later)
        beaten = await ledger.judge(wide.lease_id, receipt(wide), later)
        assert beaten.state is LeaseState.REJECTED
        assert "already accepted: shards 0 to 2" in beaten.verdict
        assert counts(await ledger.round("r1")) == (39, 0, 0, 1, 2)

    play(valkey, scenario)


def test_a_submission_that_states_other_shards_or_another_rank_is_refused(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=40), NOW)
        lease = await claim(ledger, "w-1")
        for changes in ({"shards": 2}, {"rank": 4}, {"shard": 1}):
            told = submission(lease).model_copy(update=changes)
            with pytest.raises(RankupError, match="not about"):
                await ledger.submit(lease.lease_id, "w-1", told, NOW)

    play(valkey, scenario)


def test_speed_is_measured_model_by_model(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=40, lease_target_s=3), NOW)
        await ledger.create_round(record("r2", shards=40, lease_target_s=3, model="other"), NOW)
        tiny, other = Seeker(models=("tiny",)), Seeker(models=("other",))
        sizes = []
        for seeker in (tiny, tiny, other, other):
            lease = await ledger.claim("w-1", NOW, seeker)
            assert isinstance(lease, Lease)
            sizes.append((lease.round_id, lease.shards))
            told = submission(lease, tokens=50 * lease.shards, seconds=lease.shards)
            await ledger.submit(lease.lease_id, "w-1", told, NOW)
        assert sizes == [("r1", 1), ("r1", 3), ("r2", 1), ("r2", 3)]

    play(valkey, scenario)


# -- stragglers --------------------------------------------------------------------------------------------------------


async def straggle(ledger: Ledger, **request: Any) -> Lease:
    """A round of one shard in the hands of `w-slow`, who needs 100 s for it; `w-quick` needs 1 s."""
    wanted = {"copies": 2, "lease_s": 1000, "lease_target_s": 1} | request
    await ledger.create_round(record(shards=1, **wanted), NOW)
    await show_speed(ledger, "w-quick", seconds=1.0)
    await show_speed(ledger, "w-slow", seconds=100.0)
    return await claim(ledger, "w-slow")


async def of_quick(ledger: Ledger, now: float = NOW, **seeker: Any) -> Lease | NoWork:
    return await ledger.claim("w-quick", now, Seeker(**seeker))


def test_who_would_be_faster_gets_a_copy_and_the_first_accepted_delta_wins(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        slow = await straggle(ledger)
        quick = await of_quick(ledger)
        assert isinstance(quick, Lease)
        assert (quick.shard, quick.fence) == (slow.shard, slow.fence + 1)
        pulse = await ledger.heartbeat(slow.lease_id, "w-slow", Heartbeat(fence=slow.fence, step=1), NOW + 1)
        assert pulse.go_on, "while its lease lives, a copy is no reason to stop"
        assert isinstance(await ledger.claim("w-third", NOW + 999), NoWork), "two copies are all"
        await ledger.submit(quick.lease_id, "w-quick", submission(quick), NOW + 2)
        assert (await ledger.judge(quick.lease_id, receipt(quick), NOW + 2)).state is LeaseState.ACCEPTED
        pulse = await ledger.heartbeat(slow.lease_id, "w-slow", Heartbeat(fence=slow.fence, step=2), NOW + 3)
        assert (pulse.go_on, "has been accepted" in pulse.reason) == (False, True)
        with pytest.raises(StateError, match="was accepted"):
            await ledger.submit(slow.lease_id, "w-slow", submission(slow), NOW + 4)
        assert isinstance(await ledger.claim("w-slow", NOW + 5), NoWork), "a settled lease blocks nobody"

    play(valkey, scenario)


def test_nobody_gets_a_copy_of_a_settled_shard(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1, copies=2, lease_target_s=1), NOW)
        await show_speed(ledger, "w-quick")
        late = await claim(ledger, "w-late")
        await ledger.reap("r1", NOW + LEASE_S)
        await claim(ledger, "w-slow", NOW + LEASE_S)
        await ledger.submit(late.lease_id, "w-late", submission(late), NOW + LEASE_S)
        await ledger.judge(late.lease_id, receipt(late), NOW + LEASE_S)
        for worker_id in ("w-quick", "w-slow"):
            assert isinstance(await ledger.claim(worker_id, NOW + 10_000), NoWork)

    play(valkey, scenario)


NO_COPIES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "the round allows none": ({"copies": 1}, {}, NOW),
    "it would end before a copy": ({}, {}, NOW + 99.5),
    "the copy does not fit the time": ({}, {"available_s": 0.5}, NOW),
}


@pytest.mark.parametrize(("request_", "seeker", "now"), NO_COPIES.values(), ids=NO_COPIES)
def test_a_copy_is_made_only_where_it_helps(
    valkey: ValkeyServer, request_: dict[str, Any], seeker: dict[str, Any], now: float
) -> None:
    async def scenario(ledger: Ledger) -> None:
        await straggle(ledger, **request_)
        assert isinstance(await of_quick(ledger, now, **seeker), NoWork)

    play(valkey, scenario)


def test_a_volunteer_of_unknown_speed_helps_once_a_lease_is_half_as_old_again_as_it_should_be(
    valkey: ValkeyServer,
) -> None:
    async def scenario(ledger: Ledger) -> None:
        slow = await straggle(ledger)
        assert slow.expected_s == 100.0 * (2 / 2)
        assert isinstance(await ledger.claim("w-new", NOW + 150), NoWork)
        copy = await ledger.claim("w-new", NOW + 151)
        assert isinstance(copy, Lease)
        assert copy.numbers == slow.numbers

    play(valkey, scenario)


def test_heartbeats_tell_when_a_lease_ends(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        slow = await straggle(ledger)
        eta = keys.round_key("r1", "eta")
        for step, now, ends_at in ((0, 10, 110), (5, 20, 20 + 20 * 20 / 5), (STEPS, 60, 60), (2 * STEPS, 70, 70)):
            await ledger.heartbeat(slow.lease_id, "w-slow", Heartbeat(fence=slow.fence, step=step), NOW + now)
            assert valkey.client().zscore(eta, slow.lease_id) == NOW + ends_at

    play(valkey, scenario)


# -- reasons -----------------------------------------------------------------------------------------------------------


def test_a_volunteer_without_work_is_told_why_and_counts_as_idle(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        async def why(worker_id: str, now: float = NOW, **seeker: Any) -> tuple[str, int]:
            found = await ledger.claim(worker_id, now, Seeker(**seeker))
            assert isinstance(found, NoWork)
            return found.why, found.idle

        assert await why("w-1") == ("no_round", 0)
        assert await why("w-2") == ("no_round", 1)
        await ledger.create_round(record(shards=1), NOW)
        assert await why("w-3", standing=Standing.WAITING) == ("waiting", 2)
        await ledger.apply("r1", Pause(), NOW)
        assert await why("w-1") == ("paused", 3)
        await ledger.apply("r1", Resume(), NOW)
        assert await why("w-1", models=("big",)) == ("other_models", 3)
        await claim(ledger, "w-1")
        assert await why("w-2") == ("all_handed_out", 2)
        assert await why("w-2", NOW + 3600) == ("all_handed_out", 0), "who has not asked for long is gone"

    play(valkey, scenario)


def test_a_worker_that_lost_the_answer_gets_its_lease_again_while_its_round_is_paused_or_closing(
    valkey: ValkeyServer,
) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=3, grace_s=100), NOW)
        held = await claim(ledger, "w-1")
        await hand_in(ledger, "w-2")
        await ledger.apply("r1", Pause(), NOW)
        assert (await claim(ledger, "w-1", NOW + 1)).lease_id == held.lease_id
        await ledger.apply("r1", Resume(), NOW)
        status, _ = await ledger.apply("r1", Close(), NOW)
        assert status.facts.state is RoundState.CLOSING
        again = await claim(ledger, "w-1", NOW + 2)
        assert (again.lease_id, again.expires_at) == (held.lease_id, NOW + 2 + LEASE_S)
        assert isinstance(await ledger.claim("w-3", NOW + 2), NoWork)

    play(valkey, scenario)


def test_while_a_delta_is_delivered_its_worker_gets_another_lease_and_no_third(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=9), NOW)
        first = await claim(ledger, "w-1")
        other = await ledger.claim("w-1", NOW, delivering="l-0000000000000000")
        assert isinstance(other, Lease)
        assert other.lease_id == first.lease_id, "of a lease that it does not hold nothing is believed"
        second = await ledger.claim("w-1", NOW, delivering=first.lease_id)
        assert isinstance(second, Lease)
        assert (second.lease_id != first.lease_id, set(second.numbers) & set(first.numbers)) == (True, set())
        # The answer was lost.
        again = await ledger.claim("w-1", NOW + 1, delivering=first.lease_id)
        assert isinstance(again, Lease)
        assert (again.lease_id, again.fence) == (second.lease_id, second.fence)
        refused = await ledger.claim("w-1", NOW + 1, delivering=second.lease_id)
        assert isinstance(refused, NoWork)
        assert refused.why == "busy"
        await ledger.submit(first.lease_id, "w-1", submission(first), NOW + 2)
        third = await ledger.claim("w-1", NOW + 2, delivering=second.lease_id)
        assert isinstance(third, Lease)
        for lease in (second, third):
            await ledger.heartbeat(lease.lease_id, "w-1", Heartbeat(fence=lease.fence), NOW + 3)
            await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW + 3)
        assert not valkey.client().exists(keys.LIVE, keys.DELIVERING)

    play(valkey, scenario)


@pytest.mark.parametrize("end", ["expires", "returned"])
def test_a_delivery_that_comes_to_nothing_leaves_room_for_another_lease(valkey: ValkeyServer, end: str) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=9), NOW)
        first = await claim(ledger, "w-1")
        second = await ledger.claim("w-1", NOW + LEASE_S / 2, delivering=first.lease_id)
        assert isinstance(second, Lease)
        if end == "expires":
            await ledger.reap("r1", NOW + LEASE_S + 1)
        else:
            await ledger.give_back(first.lease_id, "w-1", first.fence, "", NOW + 1)
        assert isinstance(await ledger.claim("w-1", NOW + LEASE_S + 1, delivering=second.lease_id), Lease)

    play(valkey, scenario)


def test_nobody_gets_a_copy_of_a_lease_of_their_own(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=1, copies=2, lease_target_s=10), NOW)
        slow = await claim(ledger, "w-1")
        beside = await ledger.claim("w-1", NOW + 50, delivering=slow.lease_id)
        assert isinstance(beside, NoWork)
        assert beside.why == "all_handed_out"
        assert isinstance(await ledger.claim("w-2", NOW + 50), Lease)

    play(valkey, scenario)


def test_a_round_that_is_paused_after_it_was_looked_at_grants_nothing(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(), NOW)
        desk = claims.Claims(ledger.valkey, ledger.records)
        seen = await desk.survey("w-1", NOW)

        async def outdated(worker_id: str, now: float) -> claims.Survey:
            return seen

        desk.survey = outdated  # type: ignore[method-assign]
        await ledger.apply("r1", Pause(), NOW)
        assert isinstance(await desk.claim("w-1", NOW, Seeker()), NoWork)
        await ledger.apply("r1", Resume(), NOW)
        assert isinstance(await desk.claim("w-1", NOW, Seeker()), Lease)

    play(valkey, scenario)


def test_the_number_of_live_leases_is_that_of_all_rounds_and_a_moment_old(valkey: ValkeyServer) -> None:
    async def run() -> None:
        async with connected(valkey.ledger_settings) as ledger:
            await scenario(ledger)

    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(shards=3), NOW)
        await ledger.create_round(record("r2", shards=3, model="other"), NOW)
        for number in range(4):
            await claim(ledger, f"w-{number}")
        assert await ledger.live_leases(NOW + 5) == 4
        valkey.client().delete(keys.round_key("r2", "expiry"))
        assert await ledger.live_leases(NOW + 6) == 4
        assert await ledger.live_leases(NOW + 7) == 2

    asyncio.run(run())


# -- any order of calls ----------------------------------------------------------------------------------------------

SHARDS, COPIES = 7, 2
WORKERS = [f"w-{number}" for number in range(4)]


class Drain(RuleBasedStateMachine):
    """One round on a real server: claims of four volunteers of any speed, beats, returns, expiries, submissions and
    verdicts in any order, under a clock that jumps."""

    server: ValkeyServer

    @initialize()
    def start(self) -> None:
        self.server.client().flushall()
        self.loop = asyncio.new_event_loop()
        no_wait = self.server.ledger_settings.model_copy(update={"require_fsync": False})
        self.ledger = self.run(Ledger.connect(no_wait))
        self.now = NOW
        request: dict[str, Any] = {"copies": COPIES, "lease_target_s": 100, "max_shards_per_lease": 4}
        self.run(self.ledger.create_round(record(shards=SHARDS, **request), NOW))
        self.given: dict[str, Lease] = {}

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.run(self.ledger.close())
            self.loop.close()

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def part(self, name: str) -> str:
        return keys.round_key("r1", name)

    def fences(self) -> dict[int, int]:
        return {int(shard): int(n) for shard, n in self.server.client().hgetall(self.part("fences")).items()}

    @rule(seconds=st.sampled_from([-3600.0, 0.5, 10.0, 61.0, 3600.0]))
    def clock_moves(self, seconds: float) -> None:
        self.now += seconds

    @rule(worker_id=st.sampled_from(WORKERS), available_s=st.none() | st.floats(0, 200), delivers=st.booleans())
    def claims(self, worker_id: str, available_s: float | None, delivers: bool) -> None:
        before, status = self.fences(), self.run(self.ledger.round("r1"))
        accepted = {int(shard) for shard in self.server.client().hkeys(self.part("accepted"))}
        held = (self.server.client().hget(keys.LIVE, worker_id) or "") if delivers else ""
        found = self.run(self.ledger.claim(worker_id, self.now, Seeker(available_s=available_s), delivering=held))
        if isinstance(found, NoWork):
            assert status.facts.counts.free == 0 or found.why in ("too_little_time", "busy")
            return
        assert found.lease_id != held
        assert found.worker_id == worker_id
        if found.lease_id in self.given:
            assert found.numbers == self.given[found.lease_id].numbers
            return
        assert accepted.isdisjoint(found.numbers)
        assert 1 <= found.shards <= 4
        assert 0 <= found.shard < found.numbers.stop <= SHARDS
        assert found.fence == 1 + max(before.get(shard, 0) for shard in found.numbers)
        self.given[found.lease_id] = found

    @precondition(lambda self: self.given)
    @rule(data=st.data(), act=st.sampled_from(["beat", "submit", "submit", "judge", "refuse", "return"]))
    def somebody_acts(self, data: st.DataObject, act: str) -> None:
        lease = data.draw(st.sampled_from(list(self.given.values())))
        tokens, seconds = data.draw(st.integers(1, 10_000)), data.draw(st.floats(0, 1000))
        told = submission(lease, tokens=tokens, seconds=seconds)
        lease_id, worker_id, fence = lease.lease_id, lease.worker_id, lease.fence
        beat = Heartbeat(fence=fence, step=data.draw(st.integers(0, 100)))
        calls: dict[str, Any] = {
            "beat": lambda: self.ledger.heartbeat(lease_id, worker_id, beat, self.now),
            "submit": lambda: self.ledger.submit(lease_id, worker_id, told, self.now),
            "judge": lambda: self.ledger.judge(lease_id, receipt(lease), self.now),
            "refuse": lambda: self.ledger.judge(lease_id, receipt(lease, accepted=False), self.now),
            "return": lambda: self.ledger.give_back(lease_id, worker_id, fence, "", self.now),
        }
        try:
            self.run(calls[act]())
        except StateError:
            return

    @rule()
    def keeper_reaps(self) -> None:
        self.run(self.ledger.reap("r1", self.now))

    @invariant()
    def every_shard_is_free_held_or_accepted_and_no_more_hands_hold_it_than_may(self) -> None:
        if not hasattr(self, "loop"):
            return
        client = self.server.client()
        audit(self.server)
        untouched = set(range(int(client.hget(keys.round_key("r1"), "next")), SHARDS))
        free = {int(shard) for shard in client.zrange(self.part("free"), 0, -1)} | untouched
        held = {int(shard) for shard in client.hkeys(self.part("holders"))}
        accepted = {int(shard) for shard in client.hkeys(self.part("accepted"))}
        assert free | held | accepted == set(range(SHARDS))
        assert free.isdisjoint(held | accepted)
        stored = [self.run(self.ledger.lease(lease_id)) for lease_id in self.given]
        hands = Counter(n for lease in stored if lease.state is LeaseState.GRANTED for n in lease.numbers)
        assert all(count <= COPIES for count in hands.values())
        for worker_id in WORKERS:
            mine = [lease for lease in stored if lease.worker_id == worker_id and lease.state is LeaseState.GRANTED]
            live = {client.hget(place, worker_id) for place in (keys.LIVE, keys.DELIVERING)}
            # A worker has one live lease beside one that it delivers, and at most some whose shards are settled.
            idle = [lease for lease in mine if lease.lease_id not in live]
            assert all(accepted.intersection(lease.numbers) for lease in idle)


def test_any_order_of_calls_keeps_every_shard_in_its_place(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Drain.server = valkey
    # Equal times are ordered by name: with random ones a failing run could not be run again.
    numbers = itertools.count(1)
    monkeypatch.setattr(claims, "new_lease_id", lambda: f"l-{next(numbers):016x}")
    run_state_machine_as_test(
        Drain,
        settings=settings(
            max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
