"""Where a round was, by what object storage has of it: pure.

The evidence, strongest first:

    its ending (end.json)                    PUBLISHED, REJECTED or CANCELLED, as it says
    a version that the pointer has reached   PUBLISHED
    the organiser cancelled it               CANCELLED
    another round's version is newer than its base, or a newer campaign of its model is open
                                             CANCELLED: no version can come of it any more
    a version that the pointer has not reached, or a folded manifest
                                             EVALUATING
    the decision about its cohort            AGGREGATING
    the organiser closed it                  CLOSING, if a verdict is awaited
    nothing of all this                      OPEN, until its first deadline

What always holds: the time of closing is the one that the fold had, so that a fold that is done again gives the same
manifest; an evaluation with which a version may have been written stands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from coordinator import rounds
from coordinator.rounds import Counts, RoundFacts
from rankup.membership import Action
from rankup.protocol import RoundState
from rankup.records import Evaluation, RoundEnd, RoundRecord

ORDERS: Final = frozenset({"pause_round", "resume_round", "close_round", "last_round", "cancel_round"})
"""Actions of the organiser about one round."""


@dataclass(frozen=True)
class Made:
    """A version that a round made."""

    version: int
    digest: str
    evaluation: Evaluation | None
    closed_at: float
    published: bool
    """The pointer has reached it."""


@dataclass(frozen=True)
class Evidence:
    """What bears on the state of one round."""

    end: RoundEnd | None = None
    made: Made | None = None
    overtaken: str = ""
    """Why no version can come of it any more."""
    folded: tuple[str, float] | None = None
    """Digest of the folded manifest, and when the round closed."""
    decided_at: float | None = None
    """When the round closed, by the decision about its cohort."""
    orders: tuple[Action, ...] = ()
    """Of the organiser about this round, oldest first."""
    starts_paused: bool = False
    verdicts: int = 0
    """Receipts, good or bad."""
    unjudged: int = 0


def facts_from(record: RoundRecord, evidence: Evidence) -> RoundFacts:
    """The facts of the round, without its counts."""
    facts = _ordered(record, evidence)
    end, made = evidence.end, evidence.made
    if end is not None:
        return replace(
            facts,
            state=RoundState(end.state),
            reason=end.reason,
            closed_at=end.closed_at,
            evaluation=end.evaluation,
            published_version=end.published_version,
            repeat=end.rounds,
            paused_at=end.ended_at if end.paused else None,
            recorded=True,
        )
    if made is not None and made.published:
        return replace(
            facts,
            state=RoundState.PUBLISHED,
            closed_at=made.closed_at,
            evaluation=made.evaluation,
            published_version=made.version,
        )
    if made is None:
        given_up = next((order for order in evidence.orders if order.what == "cancel_round"), None)
        if given_up is not None:
            return cancelled(facts, "cancelled by the organiser", given_up.at)
        if evidence.overtaken:
            return cancelled(facts, evidence.overtaken, record.opened_at)
    if evidence.folded is not None:
        digest, closed_at = evidence.folded
        evaluation = made.evaluation if made is not None else None
        return replace(
            facts, state=RoundState.EVALUATING, closed_at=closed_at, folded_manifest=digest, evaluation=evaluation
        )
    if evidence.decided_at is not None:
        return replace(facts, state=RoundState.AGGREGATING, closed_at=evidence.decided_at)
    closed = next((order for order in evidence.orders if order.what == "close_round"), None)
    if closed is not None:
        return replace(facts, state=RoundState.CLOSING, reason="closed by the organiser", closed_at=closed.at)
    return facts


def _ordered(record: RoundRecord, evidence: Evidence) -> RoundFacts:
    """An open round that was paused, resumed and made the last one as the organiser wished."""
    facts = rounds.draft(record)
    if evidence.starts_paused:
        facts, _ = rounds.step(facts, rounds.Pause(), record.opened_at)
    facts, _ = rounds.step(facts, rounds.Open(), record.opened_at)
    for order in evidence.orders:
        match order.what:
            case "pause_round":
                facts, _ = rounds.step(facts, rounds.Pause(), order.at)
            case "resume_round":
                facts, _ = rounds.step(facts, rounds.Resume(), order.at)
            case "last_round":
                facts, _ = rounds.step(facts, rounds.EndCampaign(), order.at)
            case "close_round" if order.arguments.get("last"):
                facts, _ = rounds.step(facts, rounds.EndCampaign(), order.at)
    return replace(facts, counts=Counts())


def cancelled(facts: RoundFacts, reason: str, at: float) -> RoundFacts:
    """The facts of a round that was given up at this time."""
    return replace(facts, state=RoundState.CANCELLED, reason=reason, closed_at=at)
