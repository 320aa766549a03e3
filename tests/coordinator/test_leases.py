from __future__ import annotations

from dataclasses import replace

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


def granted() -> Lease:
    lease, _ = leases.grant(
        lease_id="l-1", fence=FENCE, round_id="r1", shard=3, worker_id="w-1", now=100.0, lease_s=60.0
    )
    return lease


def in_state(state: LeaseState) -> Lease:
    handed_in = state in (LeaseState.SUBMITTED, LeaseState.ACCEPTED, LeaseState.REJECTED)
    return replace(granted(), state=state, contribution=MINE if handed_in else None)


EVENTS = {
    "beat": Beat(FENCE, 60.0, step=2),
    "submit": Submit(FENCE, MINE, OPEN),
    "submit other": Submit(FENCE, OTHER, OPEN),
    "submit too late": Submit(FENCE, MINE, AGGREGATING),
    "submit beaten": Submit(FENCE, MINE, OPEN, accepted_by="l-2"),
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
submit_beaten   !       submitted  accepted  rejected  !          !
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


@pytest.mark.parametrize("event", [Beat(FENCE - 1, 60.0), Submit(FENCE + 1, MINE, OPEN), Return(0)])
def test_another_fence_is_denied(event: leases.Event) -> None:
    with pytest.raises(DeniedError, match="fence"):
        leases.step(granted(), event, 101.0)


def test_a_heartbeat_moves_the_expiry_and_never_turns_progress_back() -> None:
    lease, commands = leases.step(granted(), Beat(FENCE, 60.0, step=9, loss=2.5, tokens_per_s=10.0), 130.0)
    assert lease.expires_at == 190.0
    assert commands == (leases.ExtendExpiry(190.0),)
    lease, _ = leases.step(lease, Beat(FENCE, 60.0, step=4), 140.0)
    assert (lease.step, lease.loss, lease.tokens_per_s) == (9, 2.5, 10.0)


def test_a_lease_does_not_expire_before_its_time() -> None:
    assert leases.step(granted(), Expire(), 159.9) == (granted(), ())
    assert leases.step(granted(), Expire(round_over=True), 0.0)[0].state is LeaseState.EXPIRED


def test_a_late_submission_holds_its_shard_again() -> None:
    lease, commands = leases.step(granted(), Expire(), 160.0)
    assert commands == (leases.ForgetExpiry(), leases.FreeShard())
    lease, commands = leases.step(lease, Submit(FENCE, MINE, CLOSING), 500.0)
    assert lease.state is LeaseState.SUBMITTED
    assert commands == (leases.HoldShard(), leases.QueueForAdmission(MINE))


def test_a_rejected_lease_frees_its_shard() -> None:
    lease, commands = leases.step(in_state(LeaseState.SUBMITTED), Judge(MINE, False, "norm is zero", OPEN), 200.0)
    assert lease.verdict == "norm is zero"
    assert leases.FreeShard() in commands
    assert leases.RecordRejected() in commands


def test_the_second_accepted_delta_of_a_shard_is_rejected_and_says_so() -> None:
    beaten = Judge(MINE, True, "fine", OPEN, accepted_by="l-9")
    lease, commands = leases.step(in_state(LeaseState.SUBMITTED), beaten, 200.0)
    assert "already accepted" in lease.verdict
    assert not any(isinstance(command, leases.RecordAccepted) for command in commands)


GO_ON_CASES = {
    "open, nobody else": (OPEN, FENCE, None, True),
    "closing still takes deltas": (CLOSING, FENCE, None, True),
    "the fold has begun": (AGGREGATING, FENCE, None, False),
    "another delta was accepted": (OPEN, FENCE, "l-2", False),
    "its own delta was accepted": (OPEN, FENCE, "l-1", True),
    "the shard was granted again": (OPEN, FENCE + 1, None, False),
}


@pytest.mark.parametrize(("state", "fence", "accepted_by", "useful"), GO_ON_CASES.values(), ids=GO_ON_CASES)
def test_a_worker_goes_on_while_its_work_can_still_count(
    state: RoundState, fence: int, accepted_by: str | None, useful: bool
) -> None:
    answer, reason = leases.go_on(granted(), round_state=state, newest_fence=fence, accepted_by=accepted_by)
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
                case leases.HoldShard():
                    self.holders[lease.shard] += 1
                    self.free.discard(lease.shard)
                case leases.FreeShard():
                    self.holders[lease.shard] -= 1
                    if not self.holders[lease.shard] and lease.shard not in self.accepted:
                        self.free.add(lease.shard)
                case leases.QueueForAdmission():
                    self.queue.append(lease.lease_id)
                case leases.LeaveQueue():
                    self.queue.remove(lease.lease_id)
                case leases.RecordAccepted():
                    assert lease.shard not in self.accepted
                    self.accepted[lease.shard] = lease.lease_id
                    self.free.discard(lease.shard)
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

    @precondition(lambda self: self.facts.state is RoundState.OPEN and self.free)
    @rule()
    def claim(self) -> None:
        shard = min(self.free)
        self.fences[shard] += 1
        lease, commands = leases.grant(
            lease_id=f"l-{len(self.leases)}",
            fence=self.fences[shard],
            round_id="r1",
            shard=shard,
            worker_id="w-1",
            now=self.now,
            lease_s=self.lease_s,
        )
        self.carry_out(lease, commands)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), kind=st.sampled_from(["beat", "submit", "submit", "return", "expire"]))
    def worker_acts(self, data: st.DataObject, kind: str) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases.values(), key=lambda lease: lease.lease_id)))
        match kind:
            case "beat":
                self.happens(lease, Beat(lease.fence, self.lease_s))
            case "submit":
                digest = f"{int(lease.lease_id[2:]):064x}"
                self.happens(lease, Submit(lease.fence, digest, self.facts.state, self.accepted.get(lease.shard)))
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
        accepted_by = self.accepted.get(lease.shard)
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
    def nobody_shares_a_shard_and_none_is_lost(self) -> None:
        for shard in self.holders:
            here = [lease for lease in self.leases.values() if lease.shard == shard]
            states = [lease.state for lease in here]
            holding = states.count(LeaseState.GRANTED) + states.count(LeaseState.SUBMITTED)
            assert states.count(LeaseState.GRANTED) <= 1
            assert states.count(LeaseState.ACCEPTED) == (shard in self.accepted)
            assert holding == self.holders[shard]
            assert (shard in self.free) == (holding == 0 and shard not in self.accepted)
            assert [lease.fence for lease in here] == list(range(1, len(here) + 1))

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
