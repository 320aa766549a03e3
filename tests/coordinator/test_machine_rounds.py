"""Rounds and what is around them: from wherever chance has led a campaign, it ends once everybody does their
part; and a keeper that dies between any two commands carries out nothing twice that shows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from coordinator import rounds
from coordinator.rounds import (
    Admit,
    Aggregate,
    Cancel,
    Close,
    Command,
    Counts,
    EndCampaign,
    Evaluate,
    Evaluated,
    Event,
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

HOUR = 3600.0
OTHERS_CHANGE = "rollback"


@dataclass
class Around:
    """What a keeper sees of the leases, the queue and the receipts of one round."""

    shards: int
    leased: list[float] = field(default_factory=list)
    """When each live lease runs out."""
    submitted: int = 0
    accepted: int = 0
    rejected: int = 0

    def counts(self) -> Counts:
        free = max(0, self.shards - self.accepted - len(self.leased) - self.submitted)
        return Counts(free, len(self.leased), self.submitted, self.accepted, self.rejected, self.accepted)


class Campaign(RuleBasedStateMachine):
    """A keeper, volunteers, an organiser and a clock that none of them can trust."""

    @initialize(
        shards=st.integers(1, 4),
        quorum=st.integers(1, 4),
        minimum=st.integers(1, 4),
        repeat=st.integers(1, 3),
        grace_s=st.sampled_from([0.0, 300.0]),
        paused=st.booleans(),
    )
    def begins(self, shards: int, quorum: int, minimum: int, repeat: int, grace_s: float, paused: bool) -> None:
        quorum = min(quorum, shards)
        self.plan = RoundFacts(
            state=RoundState.DRAFT,
            shards=shards,
            quorum=quorum,
            min_contributions=min(minimum, quorum),
            deadline_s=HOUR,
            index=0,
            repeat=repeat,
            max_loss_increase=0.02,
            grace_s=grace_s,
        )
        self.now = 1000.0
        self.versions = ["base"]
        """The round, or the change, that made each version; the last one is `latest`."""
        self.recorded: set[int] = set()
        self.ended: list[RoundState] = []
        self.cancelled = False
        self.round_opens(0, paused=paused)

    def round_opens(self, index: int, *, paused: bool) -> None:
        facts = replace(self.plan, index=index)
        if paused:
            facts, _ = rounds.step(facts, Pause(), self.now)
        self.facts, _ = rounds.step(facts, Open(), self.now)
        self.around = Around(self.plan.shards)
        self.folded_on: dict[str, int] = {}
        """Manifest -> the version that it would be."""

    def tell(self, event: Event) -> None:
        before = self.facts
        live = replace(before, counts=self.around.counts())
        event = Tick(self.around.counts()) if isinstance(event, Tick) else event
        try:
            self.facts, _ = rounds.step(live, event, self.now)
        except StateError:
            return
        if self.facts.state.ended and not before.state.ended:
            self.ended.append(self.facts.state)

    # -- the keeper ----------------------------------------------------------------------------------------------------

    @rule(dies_after=st.integers(0, 4), works=st.booleans(), loss=st.sampled_from([2.9, 9.9]))
    def the_keeper_ticks(self, dies_after: int, works: bool, loss: float) -> None:
        """It carries out some of what is owed and dies; or what it tries fails."""
        self.tell(Tick())
        for command in rounds.owed(replace(self.facts, counts=self.around.counts()))[:dies_after]:
            if works:
                self.carry_out(command, loss)
            else:
                self.tell(Failed("object storage does not answer"))

    def carry_out(self, command: Command, loss: float) -> None:
        index = self.facts.index
        match command:
            case ReapLeases():
                over = self.facts.state not in (RoundState.OPEN, RoundState.CLOSING)
                self.around.leased = [] if over else [end for end in self.around.leased if end > self.now]
                if self.facts.state.ended:
                    self.around.rejected += self.around.submitted
                    self.around.submitted = 0
            case Admit():
                self.around.accepted += self.around.submitted
                self.around.submitted = 0
            case Aggregate():
                assert self.around.accepted > 0
                manifest = f"{len(self.versions):064x}"
                self.folded_on[manifest] = len(self.versions)
                self.tell(Folded(manifest))
            case Evaluate():
                self.tell(Evaluated(Evaluation(heldout_loss=loss, parent_heldout_loss=3.0, examples=1, tokens=1)))
            case Publish(evaluation=evaluation, manifest=manifest):
                assert evaluation.heldout_loss < 3.02
                self.publish(str(manifest), f"round {index}")
            case RecordEnd():
                self.recorded.add(index)
                self.tell(Recorded())
            case OpenNext(index=following, paused=paused):
                assert following == index + 1
                self.round_opens(following, paused=paused)

    def publish(self, manifest: str, made_by: str) -> None:
        """By compare-and-swap of the pointer; what is published already is only told again."""
        if made_by in self.versions:
            self.tell(Published(self.versions.index(made_by)))
        elif self.folded_on[manifest] == len(self.versions):
            self.versions.append(made_by)
        else:
            self.tell(Overtaken())

    # -- the others ----------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([-HOUR, 1.0, 60.0, 301.0, HOUR, 10 * HOUR]))
    def the_clock_jumps(self, seconds: float) -> None:
        self.now += seconds

    @rule(hands_in=st.booleans(), lasts_s=st.sampled_from([60.0, HOUR]))
    def a_volunteer_comes(self, hands_in: bool, lasts_s: float) -> None:
        if self.around.leased and hands_in and self.facts.state in (RoundState.OPEN, RoundState.CLOSING):
            self.around.leased.pop()
            self.around.submitted += 1
        elif self.facts.state is RoundState.OPEN and not self.facts.paused and self.around.counts().free:
            self.around.leased.append(self.now + lasts_s)

    @rule(good=st.booleans())
    def a_verdict_comes(self, good: bool) -> None:
        if self.around.submitted and self.facts.state in (RoundState.OPEN, RoundState.CLOSING):
            self.around.submitted -= 1
            self.around.accepted += good
            self.around.rejected += not good

    @rule(event=st.sampled_from([Pause(), Resume(), Close(), Close(grace=False), EndCampaign(), Open()]))
    def the_organiser_acts(self, event: Event) -> None:
        self.tell(event)

    @rule(sure=st.integers(0, 4))
    def the_organiser_cancels(self, sure: int) -> None:
        if sure == 0:
            self.tell(Cancel("test"))

    @rule()
    def somebody_else_makes_a_version(self) -> None:
        self.versions.append(f"{OTHERS_CHANGE} {len(self.versions)}")

    # -- what always holds ---------------------------------------------------------------------------------------------

    @invariant()
    def no_round_makes_two_versions_and_what_is_published_is_there(self) -> None:
        made = [version for version in self.versions if version.startswith("round")]
        assert len(set(made)) == len(made)
        assert sorted(made) == made
        if self.facts.state is RoundState.PUBLISHED:
            assert self.versions[self.facts.published_version or 0] == f"round {self.facts.index}"
        if self.facts.state in (RoundState.REJECTED, RoundState.CANCELLED):
            assert f"round {self.facts.index}" not in self.versions

    @invariant()
    def a_state_owes_something_until_it_has_ended_for_good(self) -> None:
        owed = rounds.owed(replace(self.facts, counts=self.around.counts()))
        if not self.facts.state.ended:
            assert owed
        elif not owed:
            assert self.facts.index in self.recorded
            last = self.facts.index + 1 >= self.facts.repeat
            assert last or self.facts.state is RoundState.CANCELLED

    def teardown(self) -> None:
        """Everybody does their part: so many steps, and no more, lead from anywhere to the end of the campaign."""
        if not hasattr(self, "facts"):
            return
        for _ in range(40 * self.plan.repeat):
            self.tell(Resume())
            self.now += 60.0
            while self.around.counts().free and self.facts.state is RoundState.OPEN:
                self.a_volunteer_comes(hands_in=False, lasts_s=HOUR)
            while self.around.leased and self.facts.state in (RoundState.OPEN, RoundState.CLOSING):
                self.a_volunteer_comes(hands_in=True, lasts_s=HOUR)
            self.the_keeper_ticks(dies_after=4, works=True, loss=2.9)
            self.no_round_makes_two_versions_and_what_is_published_is_there()
            if self.facts.state.ended and not rounds.owed(replace(self.facts, counts=self.around.counts())):
                break
        else:
            raise AssertionError(f"the campaign does not end: {self.facts}")
        assert self.facts.index in self.recorded
        assert self.around.leased == []
        assert self.around.submitted == 0


def play(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Campaign,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_every_campaign_ends_once_everybody_does_their_part() -> None:
    play(120, 50)


@pytest.mark.long
def test_every_campaign_of_a_hundred_thousand_steps_ends() -> None:
    play(1_000, 100)
