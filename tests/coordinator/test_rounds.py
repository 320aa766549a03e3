from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordinator import rounds
from coordinator.rounds import (
    Admit,
    Aggregate,
    Cancel,
    Close,
    Counts,
    EndCampaign,
    Evaluate,
    Evaluated,
    Failed,
    Folded,
    Open,
    OpenNext,
    Overtaken,
    Pause,
    Publish,
    Published,
    ReapLeases,
    Recorded,
    RecordEnd,
    Resume,
    RoundFacts,
    Tick,
)
from rankup.errors import StateError
from rankup.protocol import RoundState
from rankup.records import Evaluation

DIGEST = "c" * 64
BETTER = Evaluation(heldout_loss=2.9, parent_heldout_loss=3.0, examples=8, tokens=80)
WITHIN = Evaluation(heldout_loss=3.02, parent_heldout_loss=3.0, examples=8, tokens=80)
WORSE = Evaluation(heldout_loss=3.03, parent_heldout_loss=3.0, examples=8, tokens=80)
ALONE = Evaluation(heldout_loss=9.0, examples=8, tokens=80)

DRAFT = RoundFacts(
    state=RoundState.DRAFT,
    shards=4,
    quorum=3,
    min_contributions=2,
    deadline_s=100.0,
    index=0,
    repeat=2,
    max_loss_increase=0.0201,
)


def in_state(state: RoundState) -> RoundFacts:
    """Facts as they are in `state`, opened at 1000, with two accepted and none awaited."""
    if state is RoundState.DRAFT:
        return DRAFT
    facts = replace(DRAFT, state=state, opened_at=1000.0, deadline_at=1100.0, counts=Counts(free=2, accepted=2))
    if state is RoundState.EVALUATING:
        facts = replace(facts, folded_manifest=DIGEST)
    if state in (RoundState.PUBLISHED, RoundState.REJECTED):
        facts = replace(facts, evaluation=BETTER, published_version=5 if state is RoundState.PUBLISHED else None)
    return facts


EVENTS = {
    "open": Open(),
    "tick": Tick(),
    "tick_late": Tick(),
    "close": Close(),
    "close_now": Close(grace=False),
    "end_campaign": EndCampaign(),
    "pause": Pause(),
    "resume": Resume(),
    "cancel": Cancel("no longer wanted"),
    "folded": Folded(DIGEST),
    "folded_other": Folded("d" * 64),
    "better": Evaluated(BETTER),
    "worse": Evaluated(WORSE),
    "published": Published(5),
    "overtaken": Overtaken(),
    "recorded": Recorded(),
    "failed": Failed("object storage does not answer"),
}
# Rows: events; columns: state before; cells: state after, "!" for StateError. Time is 1050, but 1100 in `tick_late`.
TABLE = """
             draft     open        closing     aggregating evaluating published rejected cancelled
open         open      open        !           !           !          !         !        !
tick         draft     open        aggregating aggregating evaluating !         !        !
tick_late    draft     aggregating aggregating aggregating evaluating !         !        !
close        cancelled aggregating aggregating !           !          !         !        !
close_now    cancelled aggregating aggregating !           !          !         !        !
end_campaign draft     open        closing     aggregating evaluating !         !        !
pause        draft     open        closing     aggregating evaluating !         !        !
resume       draft     open        closing     aggregating evaluating !         !        !
cancel       cancelled cancelled   cancelled   cancelled   cancelled  !         !        !
folded       !         !           !           evaluating  evaluating !         !        !
folded_other !         !           !           evaluating  !          !         !        !
better       !         !           !           !           evaluating !         !        !
worse        !         !           !           !           rejected   !         !        !
published    !         !           !           !           !          !         !        !
overtaken    !         !           !           aggregating aggregating !        !        !
recorded     !         !           !           !           !          published rejected cancelled
failed       draft     open        closing     aggregating evaluating !         !        !
"""


def transitions() -> list[tuple[str, str, str]]:
    header, *rows = [line.split() for line in TABLE.strip().splitlines()]
    return [(name, state, after) for name, *cells in rows for state, after in zip(header, cells, strict=True)]


@pytest.mark.parametrize(("event", "before", "after"), transitions())
def test_every_event_in_every_state_does_what_the_table_says(event: str, before: str, after: str) -> None:
    facts, now = in_state(RoundState(before)), 1100.0 if event == "tick_late" else 1050.0
    if after == "!":
        with pytest.raises(StateError) as caught:
            rounds.step(facts, EVENTS[event], now)
        assert caught.value.cause
        assert caught.value.remedy
    else:
        assert rounds.step(facts, EVENTS[event], now)[0].state.value == after


def test_the_table_names_every_event() -> None:
    assert {event for event, _, _ in transitions()} == set(EVENTS)


CLOSING_CASES = {
    # name: (counts, now, state after, deadline after)
    "quorum": (Counts(accepted=3, leased=1), 1001.0, "aggregating", 1100.0),
    "quorum, one verdict awaited": (Counts(accepted=3, submitted=1), 1001.0, "closing", 1100.0),
    "not yet": (Counts(accepted=2, leased=2), 1099.9, "open", 1100.0),
    "deadline with enough": (Counts(accepted=2, leased=2), 1100.0, "aggregating", 1100.0),
    "deadline with enough, one awaited": (Counts(accepted=2, submitted=1), 1100.0, "closing", 1100.0),
    "deadline with too few moves": (Counts(accepted=1, leased=2), 1100.0, "open", 1200.0),
    "deadline with none moves": (Counts(free=4), 1150.0, "open", 1250.0),
    "deadline waits for verdicts": (Counts(accepted=1, submitted=1), 1100.0, "open", 1100.0),
    "clock far ahead": (Counts(accepted=1), 1e9, "open", 1e9 + 100.0),
    "clock far behind": (Counts(accepted=1), 0.0, "open", 1100.0),
}


@pytest.mark.parametrize(("counts", "now", "state", "deadline"), CLOSING_CASES.values(), ids=CLOSING_CASES)
def test_an_open_round_closes_by_quorum_or_by_a_deadline_with_enough(
    counts: Counts, now: float, state: str, deadline: float
) -> None:
    facts, _ = rounds.step(in_state(RoundState.OPEN), Tick(counts), now)
    assert (facts.state.value, facts.deadline_at) == (state, deadline)


def test_a_deadline_that_moves_says_why() -> None:
    facts, _ = rounds.step(in_state(RoundState.OPEN), Tick(Counts(accepted=1)), 1100.0)
    assert facts.reason == "deadline moved: 1 accepted, at least 2 needed"


def test_closing_waits_for_the_last_verdict_and_keeps_its_reason() -> None:
    facts, commands = rounds.step(in_state(RoundState.OPEN), Tick(Counts(accepted=3, submitted=1)), 1010.0)
    assert commands == (ReapLeases(), Admit())
    assert facts.closed_at == 1010.0
    facts, commands = rounds.step(facts, Tick(Counts(accepted=3, rejected=1)), 1020.0)
    assert commands == (ReapLeases(), Aggregate())
    assert (facts.reason, facts.closed_at) == ("quorum of 3 reached", 1010.0)


GRACE_CASES = {
    # name: (event, counts, grace_s, now, state after); the round was opened at 1000 and has 4 shards
    "quorum, one training": (Tick(Counts(accepted=3, leased=1)), 30.0, 1010.0, "closing"),
    "quorum, one training, no grace": (Tick(Counts(accepted=3, leased=1)), 0.0, 1010.0, "aggregating"),
    "quorum, nobody training": (Tick(Counts(free=1, accepted=3)), 30.0, 1010.0, "aggregating"),
    "all shards, a copy is training": (Tick(Counts(accepted=4, leased=1)), 30.0, 1010.0, "aggregating"),
    "deadline, two training": (Tick(Counts(accepted=2, leased=2)), 30.0, 1100.0, "closing"),
}


@pytest.mark.parametrize(("event", "grace_s", "now", "state"), GRACE_CASES.values(), ids=GRACE_CASES)
def test_a_round_that_closes_waits_only_for_those_whose_work_it_can_use(
    event: Tick, grace_s: float, now: float, state: str
) -> None:
    facts, _ = rounds.step(replace(in_state(RoundState.OPEN), grace_s=grace_s), event, now)
    assert facts.state.value == state


def closing(**counts: int) -> RoundFacts:
    """Closing since 1010 with a grace of 30 seconds."""
    facts = replace(in_state(RoundState.OPEN), grace_s=30.0, counts=Counts(**counts))
    facts, _ = rounds.step(facts, Close(), 1010.0)
    assert facts.state is RoundState.CLOSING
    return facts


@pytest.mark.parametrize(
    ("counts", "now", "state"),
    [
        (Counts(accepted=2, leased=1), 1039.9, "closing"),
        (Counts(accepted=2, leased=1), 1040.0, "aggregating"),
        (Counts(accepted=2, free=2), 1011.0, "aggregating"),
        (Counts(accepted=2, leased=1, submitted=1), 1040.0, "closing"),
        (Counts(accepted=2, leased=1), 1e9, "aggregating"),
        (Counts(leased=1), 1040.0, "cancelled"),
    ],
    ids=["in time", "over", "all are back", "over, a verdict awaited", "clock far ahead", "over with nothing"],
)
def test_grace_ends_with_the_last_lease_or_by_the_clock(counts: Counts, now: float, state: str) -> None:
    facts, _ = rounds.step(closing(accepted=2, leased=2), Tick(counts), now)
    assert facts.state.value == state


def test_closing_now_waits_for_no_training_but_for_every_verdict() -> None:
    facts = replace(in_state(RoundState.OPEN), grace_s=30.0, counts=Counts(accepted=2, leased=2))
    assert rounds.step(facts, Close(grace=False), 1010.0)[0].state is RoundState.AGGREGATING
    assert rounds.step(closing(accepted=2, leased=2), Close(grace=False), 1011.0)[0].state is RoundState.AGGREGATING
    facts, _ = rounds.step(closing(accepted=2, leased=2, submitted=1), Close(grace=False), 1011.0)
    assert facts.state is RoundState.CLOSING


def test_a_pause_moves_the_deadline_by_its_length() -> None:
    facts, _ = rounds.step(in_state(RoundState.OPEN), Pause(), 1050.0)
    assert facts.paused
    facts, _ = rounds.step(facts, Tick(Counts(accepted=2)), 1200.0)
    assert (facts.state, facts.deadline_at) == (RoundState.OPEN, 1100.0)
    facts, _ = rounds.step(facts, Resume(), 1300.0)
    assert (facts.paused, facts.deadline_at) == (False, 1350.0)
    assert rounds.step(facts, Tick(Counts(accepted=2)), 1349.0)[0].state is RoundState.OPEN
    assert rounds.step(facts, Tick(Counts(accepted=2)), 1350.0)[0].state is RoundState.AGGREGATING


def test_pausing_twice_and_resuming_twice_change_nothing() -> None:
    once, _ = rounds.step(in_state(RoundState.OPEN), Pause(), 1050.0)
    assert rounds.step(once, Pause(), 1060.0)[0] == once
    again, _ = rounds.step(once, Resume(), 1070.0)
    assert rounds.step(again, Resume(), 1090.0)[0] == again
    assert rounds.step(once, Resume(), 0.0)[0].deadline_at == 1100.0  # The clock went back: nothing is taken away.


def test_a_paused_round_still_closes_by_its_quorum_and_hands_the_pause_on() -> None:
    facts, _ = rounds.step(in_state(RoundState.OPEN), Pause(), 1050.0)
    facts, _ = rounds.step(facts, Tick(Counts(accepted=3)), 1060.0)
    assert facts.state is RoundState.AGGREGATING
    facts, _ = rounds.step(facts, Folded(DIGEST), 1070.0)
    facts, _ = rounds.step(facts, Evaluated(BETTER), 1080.0)
    _, commands = rounds.step(facts, Published(5), 1090.0)
    assert OpenNext(1, 5, paused=True) in commands


def test_a_draft_that_is_paused_opens_paused() -> None:
    facts, _ = rounds.step(DRAFT, Pause(), 10.0)
    facts, _ = rounds.step(facts, Open(), 1000.0)
    assert (facts.state, facts.paused, facts.deadline_at) == (RoundState.OPEN, True, 1100.0)
    facts, _ = rounds.step(facts, Resume(), 1030.0)
    assert facts.deadline_at == 1130.0


@pytest.mark.parametrize("state", [s for s in RoundState if not s.ended])
def test_a_campaign_that_is_ended_opens_no_further_round(state: RoundState) -> None:
    facts, _ = rounds.step(in_state(state), EndCampaign(), 1050.0)
    assert (facts.state, facts.repeat) == (state, facts.index + 1)
    for ended in (RoundState.PUBLISHED, RoundState.REJECTED):
        assert not any(isinstance(command, OpenNext) for command in rounds.owed(replace(facts, state=ended)))


def test_closing_with_nothing_accepted_cancels() -> None:
    empty = replace(in_state(RoundState.OPEN), counts=Counts(free=4))
    assert rounds.step(empty, Close(), 1010.0)[0].state is RoundState.CANCELLED
    awaited = replace(in_state(RoundState.OPEN), counts=Counts(free=3, submitted=1))
    facts, _ = rounds.step(awaited, Close(), 1010.0)
    assert facts.state is RoundState.CLOSING
    facts, _ = rounds.step(facts, Tick(Counts(free=4, rejected=1)), 1020.0)
    assert facts.state is RoundState.CANCELLED
    assert "no contribution was accepted" in facts.reason


def test_an_organiser_may_close_below_the_minimum() -> None:
    facts = replace(in_state(RoundState.OPEN), counts=Counts(accepted=1))
    assert rounds.step(facts, Close(), 1010.0)[0].state is RoundState.AGGREGATING


GATE_CASES = {"better": (BETTER, True), "within": (WITHIN, True), "worse": (WORSE, False), "no parent": (ALONE, True)}


@pytest.mark.parametrize(("evaluation", "passes"), GATE_CASES.values(), ids=GATE_CASES)
def test_the_gate_compares_with_the_parent(evaluation: Evaluation, passes: bool) -> None:
    facts, commands = rounds.step(in_state(RoundState.EVALUATING), Evaluated(evaluation), 1200.0)
    assert (facts.state is RoundState.EVALUATING) is passes
    assert commands == ((Publish(evaluation, DIGEST),) if passes else (RecordEnd(), OpenNext(1, None)))
    assert facts.heldout_loss == evaluation.heldout_loss


def test_a_version_goes_out_and_the_next_round_is_asked_for() -> None:
    facts, commands = rounds.step(in_state(RoundState.AGGREGATING), Folded(DIGEST), 1200.0)
    assert commands == (Evaluate(DIGEST),)
    facts, commands = rounds.step(facts, Evaluated(BETTER), 1210.0)
    assert commands == (Publish(BETTER, DIGEST),)
    with pytest.raises(StateError, match="passed the gate"):
        rounds.step(facts, Cancel("too late"), 1215.0)
    facts, commands = rounds.step(facts, Published(5), 1220.0)
    assert facts.state is RoundState.PUBLISHED
    assert commands == (RecordEnd(), OpenNext(1, 5))
    facts, commands = rounds.step(facts, Recorded(), 1230.0)
    assert (facts.state, commands) == (RoundState.PUBLISHED, (OpenNext(1, 5),))


def test_the_first_evaluation_stands() -> None:
    facts, _ = rounds.step(in_state(RoundState.EVALUATING), Evaluated(BETTER), 1200.0)
    assert rounds.step(facts, Evaluated(WORSE), 1300.0) == (facts, (Publish(BETTER, DIGEST),))


def test_a_version_that_was_overtaken_is_folded_and_measured_again() -> None:
    facts, _ = rounds.step(in_state(RoundState.EVALUATING), Evaluated(BETTER), 1200.0)
    facts, commands = rounds.step(facts, Overtaken(), 1210.0)
    assert (facts.state, facts.folded_manifest, facts.evaluation) == (RoundState.AGGREGATING, None, None)
    assert commands == (ReapLeases(), Aggregate())
    facts, commands = rounds.step(facts, Folded("d" * 64), 1220.0)
    assert commands == (Evaluate("d" * 64),)
    facts, commands = rounds.step(facts, Evaluated(WITHIN), 1230.0)
    assert commands == (Publish(WITHIN, "d" * 64),)


@pytest.mark.parametrize("state", [s for s in RoundState if s.ended])
def test_the_last_round_of_a_campaign_asks_for_its_record_and_nothing_more(state: RoundState) -> None:
    facts = replace(in_state(state), index=1)
    assert rounds.owed(facts) == (RecordEnd(),)
    facts, commands = rounds.step(facts, Recorded(), 2000.0)
    assert (facts.state, commands) == (state, ())


def test_a_failure_is_kept_until_its_stage_succeeds_and_the_command_comes_again() -> None:
    facts = in_state(RoundState.AGGREGATING)
    for count in (1, 2):
        facts, commands = rounds.step(facts, Failed("S3 does not answer"), 1200.0)
        assert (facts.failures, facts.failure, commands) == (count, "S3 does not answer", ())
    facts, commands = rounds.step(facts, Tick(), 1201.0)
    assert commands == (ReapLeases(), Aggregate())
    facts, _ = rounds.step(facts, Folded(DIGEST), 1202.0)
    assert (facts.failures, facts.failure) == (0, "")


@pytest.mark.parametrize("state", [s for s in RoundState if not s.ended])
def test_a_keeper_that_ticks_again_gets_the_same_commands(state: RoundState) -> None:
    facts, commands = rounds.step(in_state(state), Tick(), 1050.0)
    if not facts.state.ended:
        assert rounds.step(facts, Tick(), 1051.0) == (facts, commands)
    assert rounds.owed(facts) == commands


class AnyOrder(RuleBasedStateMachine):
    """Whatever order events come in, and however the clock jumps."""

    @initialize(grace_s=st.sampled_from([0.0, 30.0]), repeat=st.integers(1, 3))
    def draft(self, grace_s: float, repeat: int) -> None:
        self.now = 1000.0
        self.facts = replace(DRAFT, grace_s=grace_s, repeat=repeat)
        self.commands: tuple[rounds.Command, ...] = ()
        self.tell(Open())

    def tell(self, event: rounds.Event) -> None:
        before = self.facts
        try:
            self.facts, self.commands = rounds.step(before, event, self.now)
        except StateError:
            assert before.state.ended or not isinstance(event, Tick | Pause | Resume | EndCampaign | Failed)
            return
        assert before.state.ended is isinstance(event, Recorded)
        self.check(before, event)

    def check(self, before: RoundFacts, event: rounds.Event) -> None:
        after, was, now_in = self.facts, before.state, self.facts.state
        if was is RoundState.OPEN and now_in is not RoundState.OPEN and isinstance(event, Tick):
            quorum = after.counts.accepted >= after.quorum
            late = self.now >= before.deadline_at and after.counts.accepted >= after.min_contributions
            assert quorum or (late and not before.paused)
        if was in (RoundState.OPEN, RoundState.CLOSING) and now_in is RoundState.AGGREGATING:
            assert after.counts.accepted >= 1
            assert after.counts.submitted == 0
            assert after.closed_at is not None
            waited = self.now >= after.closed_at + after.grace_s
            assert waited or not after.counts.leased or after.counts.accepted >= after.shards
        if isinstance(event, Pause | Resume):
            assert now_in is was
            assert after.paused is isinstance(event, Pause)
            assert after.deadline_at >= before.deadline_at
        else:
            assert after.paused is before.paused
        if not isinstance(event, Failed):
            assert self.commands == rounds.owed(after)

    @rule(seconds=st.sampled_from([0.0, 1.0, 29.0, 31.0, 99.0, 3600.0, -3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        least = self.facts.counts.accepted
        accepted = data.draw(st.integers(least, 4))
        counts = Counts(
            free=data.draw(st.integers(0, 4 - accepted)),
            leased=data.draw(st.integers(0, 3)),
            submitted=data.draw(st.integers(0, 2)),
            accepted=accepted,
        )
        self.tell(Tick(counts))

    @rule(name=st.sampled_from(sorted(EVENTS)))
    def happens(self, name: str) -> None:
        self.tell(EVENTS[name])

    @rule()
    def goes_on_well(self) -> None:
        """What the state asks for succeeds, so that the later states are reached too."""
        for command in self.commands:
            match command:
                case Aggregate():
                    self.tell(Folded(DIGEST))
                case Evaluate():
                    self.tell(Evaluated(BETTER))
                case Publish():
                    self.tell(Published(5))

    @invariant()
    def what_an_ended_round_opens_next_fits_its_facts(self) -> None:
        opens = [command for command in rounds.owed(self.facts) if isinstance(command, OpenNext)]
        more = self.facts.index + 1 < self.facts.repeat
        assert bool(opens) is (more and self.facts.state in (RoundState.PUBLISHED, RoundState.REJECTED))
        assert all(command.paused is self.facts.paused for command in opens)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
