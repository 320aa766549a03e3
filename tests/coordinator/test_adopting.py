"""Leases that the ledger forgot and that are taken up again: the rule, the ledger on a real Valkey, and any order of
losses, vouchers, submissions and verdicts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_world import LEASE_S, NOW, audit, claim, hand_in, play, receipt, record, submission

from coordinator import leases
from coordinator import ledger_keys as keys
from coordinator.adopting import adopt
from coordinator.leases import ExtendExpiry, HoldShards, Lease
from coordinator.ledger import Ledger
from coordinator.rounds import Cancel, Tick
from coordinator.unjudged import keep_submission
from coordinator.vouchers import VoucherSigner
from rankup.errors import DeniedError, NotFoundError, NotYetError, StateError
from rankup.protocol import Heartbeat, LeaseState, RoundState
from tests.coordinator.test_keeper import submission as toy_submission
from tests.coordinator.test_late_deltas import end_first_round
from tests.coordinator.test_rebuild import Campaign
from tests.coordinator.test_rebuild import play as play_campaign

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

ROUND = "r9"
SIGNER = VoucherSigner("the-organiser")
LEASE = Lease("l-1", 7, "r1", 3, "w-1", LeaseState.GRANTED, NOW, NOW + LEASE_S, shards=2, rank=4, expected_s=100.0)
GRANTED, EXPIRED = LeaseState.GRANTED, LeaseState.EXPIRED


def told(lease: Lease) -> Lease:
    """What its voucher tells of a lease."""
    return SIGNER.read(SIGNER.write(lease))


# -- vouchers ----------------------------------------------------------------------------------------------------------


def test_a_voucher_tells_what_the_lease_was_without_its_progress() -> None:
    at_work = replace(LEASE, step=12, loss=2.5, rev=9)
    assert told(at_work) == replace(LEASE, state=EXPIRED, expires_at=NOW)
    assert told(replace(LEASE, rank=None)).rank is None


def test_a_voucher_of_which_any_character_is_changed_is_refused() -> None:
    voucher = SIGNER.write(LEASE)
    for place, letter in enumerate(voucher):
        changed = voucher[:place] + ("A" if letter != "A" else "B") + voucher[place + 1 :]
        with pytest.raises(DeniedError):
            SIGNER.read(changed)


@pytest.mark.parametrize("voucher", ["", ".", "e30", "." + "0" * 64, "é." + "0" * 64, "e30." + "é" * 64])
def test_what_is_no_voucher_is_refused(voucher: str) -> None:
    with pytest.raises(DeniedError):
        SIGNER.read(voucher)


def test_the_voucher_of_another_server_is_refused() -> None:
    with pytest.raises(DeniedError):
        VoucherSigner("another organiser").read(SIGNER.write(LEASE))


# -- the rule ----------------------------------------------------------------------------------------------------------

ADOPTIONS: dict[str, tuple[dict[str, Any], LeaseState | None]] = {
    "nobody has its shards": ({}, GRANTED),
    "the round is closing": ({"round_state": RoundState.CLOSING}, GRANTED),
    "somebody has them, and two may": ({"hands": 1, "copies": 2}, GRANTED),
    "as many have them as may": ({"hands": 2, "copies": 2}, EXPIRED),
    "its worker has two other leases": ({"busy": True}, EXPIRED),
    "another delta was accepted": ({"accepted_by": "l-2"}, None),
    "the fold has begun, and nobody takes late ones": ({"round_state": RoundState.AGGREGATING}, None),
    "the fold has begun, and the next round takes it": (
        {"round_state": RoundState.AGGREGATING, "late_is_welcome": True},
        EXPIRED,
    ),
    "the round was cancelled": ({"round_state": RoundState.CANCELLED}, None),
}


@pytest.mark.parametrize(("around", "state"), ADOPTIONS.values(), ids=ADOPTIONS)
def test_a_lease_that_was_forgotten_goes_on_where_its_delta_can_still_count(
    around: dict[str, Any], state: LeaseState | None
) -> None:
    usual: dict[str, Any] = {
        "round_state": RoundState.OPEN,
        "accepted_by": None,
        "hands": 0,
        "copies": 1,
        "busy": False,
        "late_is_welcome": False,
        "lease_s": LEASE_S,
        "now": NOW + 500,
    }
    if state is None:
        with pytest.raises(StateError):
            leases.adopt(told(LEASE), **(usual | around))
        return
    adopted, commands = leases.adopt(told(LEASE), **(usual | around))
    same = ("lease_id", "fence", "round_id", "shard", "shards", "rank", "worker_id", "granted_at", "contribution")
    assert [getattr(adopted, name) for name in same] == [getattr(LEASE, name) for name in same]
    assert adopted.state is state
    granted_again = (HoldShards(), ExtendExpiry(NOW + 500 + LEASE_S, NOW + 600))
    assert commands == (granted_again if state is GRANTED else ())


# -- the ledger --------------------------------------------------------------------------------------------------------


async def forget(valkey: ValkeyServer, ledger: Ledger, **about: Any) -> None:
    """A ledger that lost a moment: it knows the round and nothing else."""
    valkey.client().flushall()
    await ledger.create_round(record(ROUND, **about), NOW)


def test_a_lease_that_was_granted_in_a_lost_moment_is_taken_up_and_its_shard_is_granted_to_nobody_else(
    valkey: ValkeyServer,
) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(ROUND), NOW)
        await claim(ledger, "w-1")
        old = await claim(ledger, "w-2")
        assert old.shard == 1
        await forget(valkey, ledger)
        again = await asyncio.gather(*(adopt(ledger, told(old), NOW + 5) for _ in range(8)))
        assert len(set(again)) == 1
        assert (again[0].state, again[0].fence, again[0].expires_at) == (GRANTED, old.fence, NOW + 5 + LEASE_S)
        assert await ledger.lease(old.lease_id) == again[0]
        audit(valkey, ROUND, forgotten=True)
        assert (await claim(ledger, "w-2")).lease_id == old.lease_id
        assert [(await claim(ledger, f"w-{number}")).shard for number in (3, 4)] == [0, 2]
        pulse = await ledger.heartbeat(old.lease_id, "w-2", Heartbeat(fence=old.fence, step=3), NOW + 6)
        assert pulse.go_on
        await ledger.submit(old.lease_id, "w-2", submission(old), NOW + 7)
        assert (await ledger.judge(old.lease_id, receipt(old), NOW + 8)).state is LeaseState.ACCEPTED
        assert (await adopt(ledger, told(old), NOW + 9)).state is LeaseState.ACCEPTED
        audit(valkey, ROUND, forgotten=True)

    play(valkey, scenario)


def test_a_grant_after_an_adopted_lease_has_a_higher_fence(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(ROUND, shards=1), NOW)
        for number in range(3):
            old = await claim(ledger, f"w-{number}", NOW + 100 * number)
            await ledger.reap(ROUND, NOW + 100 * number + 99)
        await forget(valkey, ledger, shards=1)
        await adopt(ledger, told(old), NOW)
        await ledger.give_back(old.lease_id, "w-2", old.fence, "", NOW)
        assert (await claim(ledger, "w-1")).fence == old.fence + 1 == 4

    play(valkey, scenario)


def test_where_the_shard_is_in_other_hands_the_lease_has_run_out_and_its_delta_is_welcome(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(ROUND, shards=1), NOW)
        old = await claim(ledger, "w-1")
        await forget(valkey, ledger, shards=1)
        other = await claim(ledger, "w-2")
        adopted = await adopt(ledger, told(old), NOW)
        assert (adopted.state, adopted.verdict) == (EXPIRED, "the server had forgotten it")
        pulse = await ledger.heartbeat(old.lease_id, "w-1", Heartbeat(fence=old.fence), NOW)
        assert not pulse.go_on
        assert "another worker" in pulse.reason
        await ledger.give_back(other.lease_id, "w-2", other.fence, "", NOW)
        assert (await ledger.heartbeat(old.lease_id, "w-1", Heartbeat(fence=old.fence), NOW)).go_on
        await ledger.submit(old.lease_id, "w-1", submission(old), NOW)
        assert (await ledger.judge(old.lease_id, receipt(old), NOW)).state is LeaseState.ACCEPTED
        audit(valkey, ROUND, forgotten=True)

    play(valkey, scenario)


def test_of_a_shard_with_an_accepted_delta_no_lease_is_taken_up(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(ROUND, shards=2), NOW)
        old = await claim(ledger, "w-1")
        await forget(valkey, ledger, shards=2)
        await hand_in(ledger, "w-2")
        with pytest.raises(StateError, match="was accepted"):
            await adopt(ledger, told(old), NOW)
        with pytest.raises(NotFoundError):
            await ledger.lease(old.lease_id)

    play(valkey, scenario)


def test_a_worker_with_two_other_leases_gets_no_third_one(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(ROUND, shards=6), NOW)
        await claim(ledger, "w-2")
        delivered = await claim(ledger, "w-1")
        trained = await ledger.claim("w-1", NOW, delivering=delivered.lease_id)
        assert isinstance(trained, Lease)
        await forget(valkey, ledger)
        new = await claim(ledger, "w-1")
        assert (await adopt(ledger, told(trained), NOW)).state is LeaseState.GRANTED
        assert (await adopt(ledger, told(delivered), NOW)).state is EXPIRED
        assert (await claim(ledger, "w-1")).lease_id == new.lease_id
        audit(valkey, ROUND, forgotten=True)

    play(valkey, scenario)


def test_the_lease_that_is_delivered_and_the_one_that_is_trained_are_both_taken_up(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(ROUND, shards=6), NOW)
        delivered = await claim(ledger, "w-1")
        trained = await ledger.claim("w-1", NOW, delivering=delivered.lease_id)
        assert isinstance(trained, Lease)
        await forget(valkey, ledger)
        for lease in (trained, delivered):
            assert (await adopt(ledger, told(lease), NOW)).state is LeaseState.GRANTED
        for lease in (delivered, trained):
            await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)
        assert not valkey.client().exists(keys.LIVE, keys.DELIVERING)
        audit(valkey, ROUND, forgotten=True)

    play(valkey, scenario)


def test_nothing_is_taken_up_into_a_round_that_is_being_restored_or_is_not_there(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        await ledger.create_round(record(ROUND), NOW)
        old = await claim(ledger, "w-1")
        valkey.client().flushall()
        with pytest.raises(NotFoundError, match="no round"):
            await adopt(ledger, told(old), NOW)
        await ledger.create_round(record(ROUND), NOW, as_draft=True)
        with pytest.raises(NotYetError, match="being restored"):
            await adopt(ledger, told(old), NOW)
        assert valkey.client().exists(keys.lease_key(old.lease_id)) == 0

    play(valkey, scenario)


@pytest.mark.parametrize("end", [Cancel("enough"), Tick()], ids=["cancelled", "being folded"])
def test_a_lease_whose_round_is_over_is_not_taken_up_where_nobody_takes_late_deltas(
    valkey: ValkeyServer, end: Cancel | Tick
) -> None:
    async def scenario(ledger: Ledger) -> None:
        about = {"shards": 2, "quorum": 1, "repeat": 1}
        await ledger.create_round(record(ROUND, **about), NOW)
        await claim(ledger, "w-2")
        old = await claim(ledger, "w-1")
        await forget(valkey, ledger, **about)
        assert (await hand_in(ledger, "w-2")).shard != old.shard
        status, _ = await ledger.apply(ROUND, end, NOW)
        with pytest.raises(StateError, match=f"is {status.facts.state.value}: it takes no more deltas"):
            await adopt(ledger, told(old), NOW)

    play(valkey, scenario)


def test_a_lease_of_an_ended_round_is_taken_up_for_the_next_one_that_takes_late_deltas(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        late = await end_first_round(ledger)
        valkey.client().delete(keys.lease_key(late.lease_id))
        assert (await adopt(ledger, told(late), NOW)).state is EXPIRED
        half = Heartbeat(fence=late.fence, step=13)
        assert (await ledger.heartbeat(late.lease_id, "w-late", half, NOW)).go_on
        moved = await ledger.submit(late.lease_id, "w-late", submission(late), NOW)
        assert (moved.round_id, moved.trained_for) == ("r2", "r1")
        await ledger.judge(late.lease_id, receipt(late), NOW)

    play(valkey, scenario)


# -- any order ---------------------------------------------------------------------------------------------------------

WORKERS = ("w-1", "w-2")
ACTS = st.lists(
    st.tuples(st.sampled_from(["claim", "lose", "adopt", "hand in", "judge", "time"]), st.integers(0, 3)),
    min_size=6,
    max_size=14,
)


class Lossy(Campaign):
    """A campaign whose volunteers remember every lease that they ever had."""

    def remember(self) -> None:
        self.granted: list[Lease] = []

    async def act(self, what: str, which: int) -> None:
        self.clock.now += 40 if what == "time" else 1
        if what == "claim":
            await self.claim(WORKERS[which % 2])
        elif what == "lose":
            await self.lose()
        elif what == "judge":
            await self.tick()
        elif self.granted:
            lease = self.granted[which % len(self.granted)]
            if what == "adopt":
                adopted = await adopt(self.ledger, told(lease), self.clock())
                assert (adopted.fence, adopted.numbers, adopted.home) == (lease.fence, lease.numbers, lease.home)
            elif what == "hand in":
                await self.hand_in(lease)

    async def claim(self, worker_id: str) -> Lease | None:
        found = await self.ledger.claim(worker_id, self.clock())
        if not isinstance(found, Lease):
            return None
        if found.lease_id not in {lease.lease_id for lease in self.granted}:
            self.granted.append(found)
        return found

    async def hand_in(self, lease: Lease) -> None:
        toy = toy_submission(lease)
        said = toy.statement.model_copy(update={"sha256": f"{int(lease.lease_id[2:], 16):064x}"})
        about = {"statement": said, "submitted_at": self.clock(), "shards": lease.shards}
        handed_in = toy.model_copy(update=about)
        taken = await self.ledger.submit(lease.lease_id, lease.worker_id, handed_in, self.clock())
        if taken.state is LeaseState.SUBMITTED:
            keep_submission(self.store, taken.round_id, handed_in)

    async def volunteer(self, worker_id: str, *, good: bool = True) -> bool:
        lease = await self.claim(worker_id)
        if lease is not None:
            with suppress(StateError):
                await self.hand_in(lease)
        return lease is not None


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS, copies=st.integers(1, 2))
def test_however_a_ledger_is_lost_and_leases_are_taken_up_a_shard_has_one_accepted_delta(
    valkey: ValkeyServer, acts: list[tuple[str, int]], copies: int
) -> None:
    """And the campaign goes on to its end."""
    valkey.client().flushall()

    async def scenario(ledger: Ledger) -> None:
        campaign = Lossy(valkey, ledger)
        campaign.remember()
        await campaign.open(copies=copies, lease_s=60)
        for what, which in acts:
            with suppress(StateError, NotFoundError, NotYetError):
                await campaign.act(what, which)
            for status in await ledger.rounds():
                audit(valkey, status.record.round_id, forgotten=True)
                counted = [one.submission.shard for one in await ledger.receipts(status.record.round_id)]
                assert len(counted) == len(set(counted))
        campaign.clock.now += 1000
        assert set(await campaign.play()) == {"published"}

    play_campaign(valkey, scenario)
