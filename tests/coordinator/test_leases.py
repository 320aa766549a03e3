from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator import leases, rounds
from coordinator.leases import Beat, Expire, Judge, Lease, Return, Submit
from coordinator.rounds import Counts, RoundFacts
from rankup.errors import DeniedError, StateError
from rankup.protocol import LeaseState, RoundState
from rankup.records import Evaluation

OPEN, CLOSING, AGGREGATING = RoundState.OPEN, RoundState.CLOSING, RoundState.AGGREGATING
MINE, OTHER = "a" * 64, "b" * 64
FENCE = 7
COPIES = 2


def granted(**about: Any) -> Lease:
    wanted: dict[str, Any] = {
        "lease_id": "l-1",
        "fence": FENCE,
        "round_id": "r1",
        "shard": 3,
        "worker_id": "w-1",
        "expected_s": 40.0,
    }
    lease, _ = leases.grant(**(wanted | about), now=100.0, lease_s=60.0)
    return lease


def in_state(state: LeaseState) -> Lease:
    handed_in = state in (LeaseState.SUBMITTED, LeaseState.ACCEPTED, LeaseState.REJECTED)
    return replace(granted(), state=state, contribution=MINE if handed_in else None)


EVENTS: dict[str, leases.Event] = {
    "beat": Beat(FENCE, 60.0, 25, step=2),
    "submit": Submit(FENCE, MINE, OPEN),
    "submit other": Submit(FENCE, OTHER, OPEN),
    "submit too late": Submit(FENCE, MINE, AGGREGATING),
    "submit to the next": Submit(FENCE, MINE, AGGREGATING, taker="r2"),
    "submit beaten": Submit(FENCE, MINE, OPEN, accepted_by="l-2"),
    "submit beaten to the next": Submit(FENCE, MINE, AGGREGATING, accepted_by="l-2", taker="r2"),
    "return": Return(FENCE),
    "expire": Expire(),
    "accept": Judge(MINE, True, "fine", OPEN),
    "reject": Judge(MINE, False, "norm is zero", OPEN),
    "accept beaten": Judge(MINE, True, "fine", OPEN, accepted_by="l-2"),
    "accept cancelled": Judge(MINE, True, "fine", RoundState.CANCELLED),
    "accept other": Judge(OTHER, True, "fine", OPEN),
}
# Rows: state before; columns: events; cells: state after, or "!" for StateError. Time is after the expiry.
TABLE = """
             granted    submitted  accepted  rejected  expired    returned
beat         granted    !          !         !         expired    !
submit       submitted  submitted  accepted  rejected  submitted  submitted
submit_other submitted  !          !         !         submitted  submitted
submit_too_late !       submitted  accepted  rejected  !          !
submit_to_the_next submitted submitted accepted rejected submitted submitted
submit_beaten   !       submitted  accepted  rejected  !          !
submit_beaten_to_the_next ! submitted  accepted  rejected  !          !
return       returned   !          !         !         expired    returned
expire       expired    !          !         !         !          !
accept       !          accepted   accepted  rejected  !          !
reject       !          rejected   accepted  rejected  !          !
accept_beaten !         rejected   accepted  rejected  !          !
accept_cancelled !      rejected   accepted  rejected  !          !
accept_other !          !          !         !         !          !
"""


def transitions() -> list[tuple[str, str, str]]:
    header, *rows = [line.split() for line in TABLE.strip().splitlines()]
    return [
        (name.replace("_", " "), state, after)
        for name, *cells in rows
        for state, after in zip(header, cells, strict=True)
    ]


@pytest.mark.parametrize(("event", "before", "after"), transitions())
def test_every_event_in_every_state_does_what_the_table_says(event: str, before: str, after: str) -> None:
    lease = in_state(LeaseState(before))
    if after == "!":
        with pytest.raises(StateError) as caught:
            leases.step(lease, EVENTS[event], 1000.0)
        assert caught.value.cause
        assert caught.value.remedy
    else:
        changed, _ = leases.step(lease, EVENTS[event], 1000.0)
        assert changed.state.value == after


def test_the_table_names_every_event() -> None:
    assert {event for event, _, _ in transitions()} == set(EVENTS)


@pytest.mark.parametrize("event", [Beat(FENCE - 1, 60.0, 25), Submit(FENCE + 1, MINE, OPEN), Return(0)])
def test_another_fence_is_denied(event: leases.Event) -> None:
    with pytest.raises(DeniedError, match="fence"):
        leases.step(granted(), event, 101.0)


def test_a_heartbeat_moves_the_expiry_and_never_turns_progress_back() -> None:
    # 9 of 25 steps in 30 s: the other 16 take 53.3 s more.
    lease, commands = leases.step(granted(), Beat(FENCE, 60.0, 25, step=9, loss=2.5, tokens_per_s=10.0), 130.0)
    assert lease.expires_at == 190.0
    assert commands == (leases.ExtendExpiry(190.0, 130 + 16 * 30.0 / 9),)
    lease, _ = leases.step(lease, Beat(FENCE, 60.0, 25, step=4), 140.0)
    assert (lease.step, lease.loss, lease.tokens_per_s) == (9, 2.5, 10.0)


ENDS = {"before the first step": (0, 120.0, 160.0), "half way": (25, 150.0, 200.0), "done": (50, 150.0, 150.0)}


@pytest.mark.parametrize(("step", "now", "ends_at"), ENDS.values(), ids=ENDS)
def test_the_end_of_a_training_follows_from_its_pace(step: int, now: float, ends_at: float) -> None:
    assert replace(granted(), step=step).ends_at(50, now) == ends_at


def test_a_lease_does_not_expire_before_its_time() -> None:
    assert leases.step(granted(), Expire(), 159.9) == (granted(), ())
    assert leases.step(granted(), Expire(round_over=True), 0.0)[0].state is LeaseState.EXPIRED


def test_a_late_submission_holds_its_shard_again() -> None:
    lease, commands = leases.step(granted(), Expire(), 160.0)
    assert commands == (leases.ForgetExpiry(), leases.FreeShards())
    lease, commands = leases.step(lease, Submit(FENCE, MINE, CLOSING), 500.0)
    assert lease.state is LeaseState.SUBMITTED
    assert commands == (leases.HoldShards(), leases.QueueForAdmission(MINE))


LATE_COMMANDS = {
    LeaseState.GRANTED: (leases.ForgetExpiry(), leases.FreeShards(), leases.QueueForAdmission(MINE)),
    LeaseState.EXPIRED: (leases.QueueForAdmission(MINE),),
    LeaseState.RETURNED: (leases.QueueForAdmission(MINE),),
}


@pytest.mark.parametrize("state", LATE_COMMANDS)
def test_a_delta_for_the_next_round_leaves_its_shards_and_holds_none(state: LeaseState) -> None:
    lease, commands = leases.step(in_state(state), EVENTS["submit to the next"], 500.0)
    assert (lease.round_id, lease.trained_for, lease.home, commands) == ("r2", "r1", "r1", LATE_COMMANDS[state])
    for accepted in (True, False):
        _, commands = leases.step(lease, Judge(MINE, accepted, "as said", OPEN), 600.0)
        assert leases.FreeShards() not in commands
    again, commands = leases.step(lease, EVENTS["submit to the next"], 700.0)
    assert (again, commands) == (lease, ())


def test_a_rejected_lease_frees_its_shard() -> None:
    lease, commands = leases.step(in_state(LeaseState.SUBMITTED), Judge(MINE, False, "norm is zero", OPEN), 200.0)
    assert lease.verdict == "norm is zero"
    assert leases.FreeShards() in commands
    assert leases.RecordRejected() in commands


def test_the_second_accepted_delta_of_a_shard_is_rejected_and_says_so() -> None:
    beaten = Judge(MINE, True, "fine", OPEN, accepted_by="l-9")
    lease, commands = leases.step(in_state(LeaseState.SUBMITTED), beaten, 200.0)
    assert "already accepted" in lease.verdict
    assert not any(isinstance(command, leases.RecordAccepted) for command in commands)


EXPIRED = replace(granted(), state=LeaseState.EXPIRED)
GO_ON_CASES: dict[str, tuple[Lease, dict[str, Any], bool]] = {
    "open, nobody else": (granted(), {}, True),
    "closing still takes deltas": (granted(), {"round_state": CLOSING}, True),
    "the fold has begun": (granted(), {"round_state": AGGREGATING}, False),
    "the fold has begun, and little was done": (
        replace(EXPIRED, step=12),
        {"round_state": AGGREGATING, "late_is_welcome": True},
        False,
    ),
    "the fold has begun, but half was done": (
        replace(EXPIRED, step=13),
        {"round_state": AGGREGATING, "late_is_welcome": True},
        True,
    ),
    "half was done, and nobody wants it": (replace(EXPIRED, step=13), {"round_state": AGGREGATING}, False),
    "another delta was accepted": (granted(), {"accepted_by": "l-2"}, False),
    "its own delta was accepted": (granted(), {"accepted_by": "l-1"}, True),
    "somebody has a copy": (granted(), {"held": True}, True),
    "it expired": (EXPIRED, {}, True),
    "it expired, and somebody else has the shard": (EXPIRED, {"held": True}, False),
}


@pytest.mark.parametrize(("lease", "around", "useful"), GO_ON_CASES.values(), ids=GO_ON_CASES)
def test_a_worker_goes_on_while_its_work_can_still_count(lease: Lease, around: dict[str, Any], useful: bool) -> None:
    usual: dict[str, Any] = {
        "round_state": OPEN,
        "held": False,
        "accepted_by": None,
        "steps": 25,
        "late_is_welcome": False,
    }
    answer, reason = leases.go_on(lease, **(usual | around))
    assert answer is useful
    assert bool(reason) is not useful


class World(RuleBasedStateMachine):
    """One round and its leases, with the commands carried out on plain dictionaries, under any order of events and a
    clock that jumps."""

    @initialize(shards=st.integers(1, 4), quorum=st.integers(1, 4), minimum=st.integers(1, 4))
    def start(self, shards: int, quorum: int, minimum: int) -> None:
        self.now, self.lease_s = 1000.0, 60.0
        quorum = min(quorum, shards)
        facts = RoundFacts(RoundState.DRAFT, shards, quorum, min(minimum, quorum), 300.0, 0, 2, 0.02)
        self.facts, _ = rounds.step(facts, rounds.Open(), self.now)
        self.leases: dict[str, Lease] = {}
        self.free = set(range(shards))
        self.holders = dict.fromkeys(range(shards), 0)
        self.fences = dict.fromkeys(range(shards), 0)
        self.queue: list[str] = []
        self.accepted: dict[int, str] = {}
        self.rejected = 0

    def counts(self) -> Counts:
        leased = sum(lease.state is LeaseState.GRANTED for lease in self.leases.values())
        return Counts(len(self.free), leased, len(self.queue), len(self.accepted), self.rejected)

    def carry_out(self, lease: Lease, commands: tuple[leases.Command, ...]) -> None:
        self.leases[lease.lease_id] = lease
        for command in commands:
            match command:
                case leases.HoldShards():
                    for shard in lease.numbers:
                        self.holders[shard] += 1
                        self.free.discard(shard)
                case leases.FreeShards():
                    for shard in lease.numbers:
                        self.holders[shard] -= 1
                        if not self.holders[shard] and shard not in self.accepted:
                            self.free.add(shard)
                case leases.QueueForAdmission():
                    self.queue.append(lease.lease_id)
                case leases.LeaveQueue():
                    self.queue.remove(lease.lease_id)
                case leases.RecordAccepted():
                    assert self.accepted.keys().isdisjoint(lease.numbers)
                    self.accepted |= dict.fromkeys(lease.numbers, lease.lease_id)
                    self.free.difference_update(lease.numbers)
                case leases.RecordRejected():
                    self.rejected += 1

    def happens(self, lease: Lease, event: leases.Event) -> None:
        try:
            changed, commands = leases.step(lease, event, self.now)
        except StateError:
            return
        assert changed.fence == lease.fence
        assert lease.contribution in (None, changed.contribution)
        self.carry_out(changed, commands)
        assert leases.step(changed, event, self.now)[0] == changed if not isinstance(event, Expire) else True

    def tell(self, event: rounds.Event) -> None:
        live = replace(self.facts, counts=self.counts())
        if self.facts.state.ended:
            with pytest.raises(StateError):
                rounds.step(live, event, self.now)
            return
        try:
            self.facts, commands = rounds.step(live, event, self.now)
        except StateError:
            return
        if isinstance(event, rounds.Tick) and not self.facts.state.ended:
            assert rounds.step(self.facts, event, self.now) == (self.facts, commands)

    @rule(seconds=st.sampled_from([-3600.0, -1.0, 0.5, 30.0, 61.0, 301.0, 1e6]))
    def clock_moves(self, seconds: float) -> None:
        self.now += seconds

    def hand_out(self, shard: int, count: int) -> None:
        fence = 1 + max(self.fences[number] for number in range(shard, shard + count))
        lease, commands = leases.grant(
            lease_id=f"l-{len(self.leases)}",
            fence=fence,
            round_id="r1",
            shard=shard,
            shards=count,
            worker_id="w-1",
            now=self.now,
            lease_s=self.lease_s,
        )
        self.fences |= dict.fromkeys(lease.numbers, fence)
        self.carry_out(lease, commands)

    def taken(self, lease: Lease) -> str | None:
        return next((self.accepted[shard] for shard in lease.numbers if shard in self.accepted), None)

    @precondition(lambda self: self.facts.state is RoundState.OPEN and self.free)
    @rule(most=st.integers(1, 4))
    def claim(self, most: int) -> None:
        shard, count = min(self.free), 1
        while count < most and shard + count in self.free:
            count += 1
        self.hand_out(shard, count)

    @precondition(lambda self: self.facts.state is RoundState.OPEN and not self.free)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        stragglers = [
            lease
            for lease in self.leases.values()
            if lease.state is LeaseState.GRANTED
            and self.taken(lease) is None
            and all(self.holders[shard] < COPIES for shard in lease.numbers)
        ]
        if stragglers:
            lease = data.draw(st.sampled_from(stragglers))
            self.hand_out(lease.shard, lease.shards)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), kind=st.sampled_from(["beat", "submit", "submit", "return", "expire"]))
    def worker_acts(self, data: st.DataObject, kind: str) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases.values(), key=lambda lease: lease.lease_id)))
        match kind:
            case "beat":
                self.happens(lease, Beat(lease.fence, self.lease_s, 25 * lease.shards))
            case "submit":
                digest = f"{int(lease.lease_id[2:]):064x}"
                self.happens(lease, Submit(lease.fence, digest, self.facts.state, self.taken(lease)))
            case "return":
                self.happens(lease, Return(lease.fence))
            case _:
                over = self.facts.state not in leases.TAKES_SUBMISSIONS
                self.happens(lease, Expire(round_over=over))

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), good=st.booleans())
    def admission_judges(self, data: st.DataObject, good: bool) -> None:
        lease = self.leases[data.draw(st.sampled_from(self.queue))]
        assert lease.contribution is not None
        accepted_by = self.taken(lease)
        self.happens(lease, Judge(lease.contribution, good, "as drawn", self.facts.state, accepted_by))

    @rule()
    def keeper_ticks(self) -> None:
        before = self.facts
        self.tell(rounds.Tick())
        if before.state is RoundState.OPEN and self.facts.state is RoundState.CLOSING:
            assert len(self.accepted) >= before.min_contributions

    @rule(event=st.sampled_from([rounds.Close(), rounds.Cancel("test"), rounds.Failed("S3 is away")]))
    def organiser_or_fate_acts(self, event: rounds.Event) -> None:
        self.tell(event)

    @rule(loss=st.sampled_from([2.0, 3.0, 3.5]))
    def aggregator_answers(self, loss: float) -> None:
        evaluation = Evaluation(heldout_loss=loss, parent_heldout_loss=3.0, examples=4, tokens=40)
        self.tell(rounds.Folded(MINE))
        self.tell(rounds.Evaluated(evaluation))
        self.tell(rounds.Published(1))

    @invariant()
    def no_shard_is_in_too_many_hands_and_none_is_lost(self) -> None:
        for shard in self.holders:
            here = [lease for lease in self.leases.values() if shard in lease.numbers]
            states = [lease.state for lease in here]
            holding = states.count(LeaseState.GRANTED) + states.count(LeaseState.SUBMITTED)
            assert states.count(LeaseState.GRANTED) <= COPIES
            assert states.count(LeaseState.ACCEPTED) == (shard in self.accepted)
            assert holding == self.holders[shard]
            assert (shard in self.free) == (holding == 0 and shard not in self.accepted)
            fences = [lease.fence for lease in here]
            assert fences == sorted(set(fences))

    @invariant()
    def nothing_that_awaits_a_verdict_is_left_behind(self) -> None:
        if self.facts.state not in (RoundState.OPEN, RoundState.CLOSING, RoundState.CANCELLED):
            assert not self.queue
            assert self.accepted

    @invariant()
    def the_next_round_is_owed_exactly_after_a_version_or_a_refused_one(self) -> None:
        owed = any(isinstance(command, rounds.OpenNext) for command in rounds.owed(self.facts))
        assert owed == (self.facts.state in (RoundState.PUBLISHED, RoundState.REJECTED))


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
