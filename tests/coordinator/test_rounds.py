from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator import rounds
from coordinator.rounds import (
    Admit,
    Aggregate,
    Cancel,
    Close,
    Counts,
    Evaluate,
    Evaluated,
    Failed,
    Folded,
    Open,
    OpenNext,
    Overtaken,
    Publish,
    Published,
    ReapLeases,
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
    "cancel": Cancel("no longer wanted"),
    "folded": Folded(DIGEST),
    "folded_other": Folded("d" * 64),
    "better": Evaluated(BETTER),
    "worse": Evaluated(WORSE),
    "published": Published(5),
    "overtaken": Overtaken(),
    "failed": Failed("object storage does not answer"),
}
# Rows: events; columns: state before; cells: state after, "!" for StateError. Time is 1050, but 1100 in `tick_late`.
TABLE = """
             draft     open        closing     aggregating evaluating published rejected cancelled
open         open      open        !           !           !          !         !        !
tick         draft     open        aggregating aggregating evaluating !         !        !
tick_late    draft     aggregating aggregating aggregating evaluating !         !        !
close        cancelled aggregating closing     !           !          !         !        !
cancel       cancelled cancelled   cancelled   cancelled   cancelled  !         !        !
folded       !         !           !           evaluating  evaluating !         !        !
folded_other !         !           !           evaluating  !          !         !        !
better       !         !           !           !           evaluating !         !        !
worse        !         !           !           !           rejected   !         !        !
published    !         !           !           !           !          !         !        !
overtaken    !         !           !           aggregating aggregating !        !        !
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
    assert commands == ((Publish(evaluation, DIGEST),) if passes else (OpenNext(1, None),))
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
    assert commands == (OpenNext(1, 5),)


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


def test_the_last_round_of_a_campaign_asks_for_nothing_more() -> None:
    for state in (RoundState.PUBLISHED, RoundState.REJECTED):
        assert rounds.owed(replace(in_state(state), index=1)) == ()


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
