"""The life of one round, as a pure function: `step(facts, event, now) -> (facts, commands)`.

    DRAFT ──Open──> OPEN ──quorum, deadline or Close──> CLOSING ──nobody awaited──> AGGREGATING <───────┐
                                                                                             │ Folded   │
    PUBLISHED <──Published── EVALUATING (gate passed) <──Evaluated── EVALUATING <────────────┘          │
    REJECTED  <──────────────────── gate failed ──────Evaluated────────┘ └──────────Overtaken───────────┘

    CANCELLED <── Cancel, from every state until the gate has passed; or closed with nothing accepted

What always holds:
- `owed(facts)` says what the state asks for and nothing but the state does: a keeper that dies at any point and ticks
  again gets the same commands again, so every command must be safe to carry out twice;
- work is never thrown away by a clock: a deadline with fewer than `min_contributions` accepted shards moves on by
  `deadline_s` (with the reason kept), and only Cancel ends CLOSING while a delta awaits its verdict;
- CLOSING waits for those who are still training until `grace_s` after `closed_at`, and not a tick longer; it does not
  wait where every shard has its delta, or where the organiser said so;
- Pause stops neither a training nor a quorum: no leases are granted, and the deadline moves by the time of the pause. A
  pause outlives its round: the next one of the campaign opens paused;
- `accepted` >= 1 in AGGREGATING, EVALUATING, PUBLISHED and REJECTED;
- PUBLISHED, REJECTED and CANCELLED are final and refuse every event but Recorded; what an ended round still owes stands
  in `owed`: `RecordEnd` until object storage has the ending, `OpenNext` until the round after it exists.

No I/O, no clock, no randomness here: the ledger stores what `step` returns, the keeper carries out the commands.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rankup.errors import StateError
from rankup.protocol import RoundState
from rankup.records import Evaluation, RoundRecord


@dataclass(frozen=True)
class Counts:
    """Where the shards of a round are.

    `free` and `accepted` count shards, `leased` leases under way, `submitted`, `rejected` and `contributions` (accepted
    ones) deltas.
    """

    free: int = 0
    leased: int = 0
    submitted: int = 0
    accepted: int = 0
    rejected: int = 0
    contributions: int = 0


@dataclass(frozen=True)
class RoundFacts:
    """All that the machine knows of a round. Times are Unix seconds, losses nats per token."""

    state: RoundState
    shards: int
    quorum: int
    min_contributions: int
    deadline_s: float
    index: int
    repeat: int
    max_loss_increase: float
    grace_s: float = 0.0
    """How long a closing round waits for leases under way."""
    paused_at: float | None = None
    """Since when nothing is granted; of a draft, since before it opened."""
    reason: str = ""
    """Why the round is where it is, in plain words."""
    opened_at: float = 0.0
    deadline_at: float = 0.0
    closed_at: float | None = None
    """When the round stopped handing out shards."""
    counts: Counts = field(default_factory=Counts)
    folded_manifest: str | None = None
    """Digest of the folded manifest (its evaluation still empty), if the fold gave one to remember."""
    evaluation: Evaluation | None = None
    published_version: int | None = None
    failures: int = 0
    """How often the present stage failed; back to 0 when it succeeds."""
    failure: str = ""
    """Why it failed the last time; empty when it succeeds."""
    recorded: bool = False
    """Object storage has the ending."""

    @property
    def paused(self) -> bool:
        return self.paused_at is not None

    @property
    def heldout_loss(self) -> float | None:
        return self.evaluation.heldout_loss if self.evaluation else None

    @property
    def parent_heldout_loss(self) -> float | None:
        return self.evaluation.parent_heldout_loss if self.evaluation else None


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """The organiser opens a draft; of an open round, nothing."""


@dataclass(frozen=True)
class Tick:
    """The keeper looks: time has passed and the counts may have changed (None: those in the facts are fresh)."""

    counts: Counts | None = None


@dataclass(frozen=True)
class Close:
    """The organiser wants no more contributions."""

    reason: str = "closed by the organiser"
    grace: bool = True
    """Wait for those who are training, as for a quorum; False: no longer than for verdicts."""


@dataclass(frozen=True)
class EndCampaign:
    """The organiser wants no round after this one, however many were asked for."""


@dataclass(frozen=True)
class Pause:
    """The organiser wants no leases granted for a while."""


@dataclass(frozen=True)
class Resume:
    """The organiser lets leases be granted again."""


@dataclass(frozen=True)
class Cancel:
    """The organiser gives the round up, and with it the rounds after it."""

    reason: str


@dataclass(frozen=True)
class Folded:
    """The sum is made; `manifest` is the digest of the manifest without its evaluation, or None if it was not kept (the
    fold is deterministic: who needs it again folds again)."""

    manifest: str | None = None


@dataclass(frozen=True)
class Evaluated:
    """The held-out losses; `passed` None lets the release gate of this module decide."""

    evaluation: Evaluation
    passed: bool | None = None


@dataclass(frozen=True)
class Published:
    """The pointer moved to `version`."""

    version: int


@dataclass(frozen=True)
class Overtaken:
    """The model has another version where the folded one should go: fold again, on that one, and measure again."""


@dataclass(frozen=True)
class Recorded:
    """Object storage has the ending of the round."""


@dataclass(frozen=True)
class Failed:
    """Carrying out a command failed: the state stays, the next Tick asks again."""

    reason: str


Event = (
    Open
    | Tick
    | Close
    | EndCampaign
    | Pause
    | Resume
    | Cancel
    | Folded
    | Evaluated
    | Published
    | Overtaken
    | Recorded
    | Failed
)


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReapLeases:
    """Expire the leases that ran out (of a round that takes no deltas any more: all of them)."""


@dataclass(frozen=True)
class Admit:
    """Judge every submission that awaits a verdict."""


@dataclass(frozen=True)
class Aggregate:
    """Fold the accepted contributions; answer with Folded."""


@dataclass(frozen=True)
class Evaluate:
    """Measure the held-out losses of the folded version; answer with Evaluated."""

    manifest: str | None = None


@dataclass(frozen=True)
class Publish:
    """Write the manifest with this evaluation and move the pointer; answer with Published."""

    evaluation: Evaluation
    manifest: str | None = None


@dataclass(frozen=True)
class RecordEnd:
    """Write down in object storage how the round ended; answer with Recorded."""


@dataclass(frozen=True)
class OpenNext:
    """Create round `index` of the campaign: on `published_version`, or on the same base if that is None."""

    index: int
    published_version: int | None = None
    paused: bool = False


Command = ReapLeases | Admit | Aggregate | Evaluate | Publish | RecordEnd | OpenNext
Outcome = tuple[RoundFacts, tuple[Command, ...]]


# -- the machine -------------------------------------------------------------------------------------------------------


def draft(record: RoundRecord) -> RoundFacts:
    """The facts of a round that nobody can join yet."""
    request = record.request
    return RoundFacts(
        state=RoundState.DRAFT,
        shards=len(record.shards),
        quorum=min(request.quorum or request.shards, len(record.shards)),
        min_contributions=min(request.min_contributions, len(record.shards)),
        deadline_s=request.deadline_s,
        index=record.index,
        repeat=request.repeat,
        max_loss_increase=request.max_loss_increase,
        grace_s=request.grace_s,
    )


def gate(facts: RoundFacts, evaluation: Evaluation) -> bool:
    """The release gate: the new held-out loss may exceed the parent's by at most `max_loss_increase`.

    Without a loss of the parent everything passes: there is nothing to compare with.
    """
    parent = evaluation.parent_heldout_loss
    return parent is None or evaluation.heldout_loss <= parent + facts.max_loss_increase


def owed(facts: RoundFacts) -> tuple[Command, ...]:
    """What the state asks for, whatever happened before: also of ended rounds."""
    match facts.state:
        case RoundState.DRAFT:
            return ()
        case RoundState.OPEN | RoundState.CLOSING:
            return (ReapLeases(), Admit()) if facts.counts.submitted else (ReapLeases(),)
        case RoundState.AGGREGATING:
            return (ReapLeases(), Aggregate())
        case RoundState.EVALUATING:
            if facts.evaluation is not None:
                return (Publish(facts.evaluation, facts.folded_manifest),)
            return (Evaluate(facts.folded_manifest),)
        case RoundState.CANCELLED:
            reap = (ReapLeases(),) if facts.counts.leased or facts.counts.submitted else ()
            return (*reap, *_unrecorded(facts))
        case RoundState.PUBLISHED | RoundState.REJECTED:
            if facts.index + 1 < facts.repeat:
                return (*_unrecorded(facts), OpenNext(facts.index + 1, facts.published_version, facts.paused))
            return _unrecorded(facts)


def _unrecorded(facts: RoundFacts) -> tuple[Command, ...]:
    return () if facts.recorded else (RecordEnd(),)


def step(facts: RoundFacts, event: Event, now: float) -> Outcome:
    """The facts after `event`, and what they ask for.

    Raises:
        StateError: the round has ended, or `event` does not fit its state.
    """
    if facts.state.ended:
        if isinstance(event, Recorded):
            facts = replace(facts, recorded=True)
            return facts, owed(facts)
        raise StateError(
            f"the round is {facts.state.value} for good: it cannot take {type(event).__name__}",
            remedy="Act on the round that is open now, or create a new one.",
        )
    match event:
        case Tick(counts=counts):
            facts = _tick(facts if counts is None else replace(facts, counts=counts), now)
        case Failed(reason=reason):
            return replace(facts, failure=reason, failures=facts.failures + 1), ()
        case Open():
            facts = _open(facts, now)
        case Close():
            facts = _close(facts, event, now)
        case EndCampaign():
            facts = replace(facts, repeat=facts.index + 1)
        case Pause():
            facts = facts if facts.paused else replace(facts, paused_at=now)
        case Resume():
            facts = _resume(facts, now)
        case Cancel(reason=reason):
            facts = _cancel(facts, reason, now)
        case Folded(manifest=manifest):
            facts = _folded(facts, manifest)
        case Evaluated():
            facts = _evaluated(facts, event)
        case Published(version=version):
            facts = _published(facts, version)
        case Overtaken():
            facts = _overtaken(facts)
        case Recorded():
            raise _refuse(facts, "have its ending recorded", "Tick, and carry out what the round asks for.")
    return facts, owed(facts)


def _refuse(facts: RoundFacts, what: str, remedy: str) -> StateError:
    return StateError(f"the round is {facts.state.value}: it cannot {what}", remedy=remedy)


def _open(facts: RoundFacts, now: float) -> RoundFacts:
    if facts.state is RoundState.OPEN:
        return facts
    if facts.state is not RoundState.DRAFT:
        raise _refuse(facts, "be opened again", "Create a new round.")
    paused_at = now if facts.paused else None
    return replace(facts, state=RoundState.OPEN, opened_at=now, deadline_at=now + facts.deadline_s, paused_at=paused_at)


def _resume(facts: RoundFacts, now: float) -> RoundFacts:
    if facts.paused_at is None:
        return facts
    lost_s = max(0.0, now - facts.paused_at) if facts.state is RoundState.OPEN else 0.0
    return replace(facts, paused_at=None, deadline_at=facts.deadline_at + lost_s)


def _tick(facts: RoundFacts, now: float) -> RoundFacts:
    counts = facts.counts
    if facts.state is RoundState.OPEN:
        if counts.accepted >= facts.quorum:
            facts = _to_closing(facts, f"quorum of {facts.quorum} reached", now)
        elif now >= facts.deadline_at and not facts.paused:
            if counts.accepted >= facts.min_contributions:
                facts = _to_closing(facts, f"deadline reached with {counts.accepted} accepted", now)
            elif counts.submitted == 0:
                return replace(
                    facts,
                    deadline_at=now + facts.deadline_s,
                    reason=f"deadline moved: {counts.accepted} accepted, at least {facts.min_contributions} needed",
                )
            # else: the deltas that await a verdict may be enough; the deadline waits for them.
    if facts.state is RoundState.CLOSING and counts.submitted == 0 and not _awaits_leases(facts, now):
        if counts.accepted == 0:
            return _to_cancelled(facts, f"{facts.reason}; no contribution was accepted", now)
        return replace(facts, state=RoundState.AGGREGATING, failures=0, failure="")
    return facts


def _awaits_leases(facts: RoundFacts, now: float) -> bool:
    """Whether a closing round still gives those who are training time to hand in something that it can use."""
    closed_at = facts.closed_at if facts.closed_at is not None else now
    return facts.counts.leased > 0 and facts.counts.accepted < facts.shards and now < closed_at + facts.grace_s


def _to_closing(facts: RoundFacts, reason: str, now: float) -> RoundFacts:
    return replace(facts, state=RoundState.CLOSING, reason=reason, closed_at=now, failures=0, failure="")


def _to_cancelled(facts: RoundFacts, reason: str, now: float) -> RoundFacts:
    closed_at = facts.closed_at if facts.closed_at is not None else now
    return replace(facts, state=RoundState.CANCELLED, reason=reason, closed_at=closed_at)


def _close(facts: RoundFacts, event: Close, now: float) -> RoundFacts:
    if not event.grace:
        facts = replace(facts, grace_s=0.0)
    if facts.state is RoundState.OPEN:
        # From here on it is the same as for a quorum: nothing accepted and nobody awaited ends the round at once.
        return _tick(_to_closing(facts, event.reason, now), now)
    if facts.state is RoundState.DRAFT:
        return _to_cancelled(facts, event.reason, now)
    if facts.state is RoundState.CLOSING:
        return _tick(facts, now)
    raise _refuse(facts, "be closed", "It takes no contributions any more: wait for its version.")


def _cancel(facts: RoundFacts, reason: str, now: float) -> RoundFacts:
    if facts.evaluation is not None:
        raise _refuse(
            facts, "be cancelled: its version has passed the gate", "Let it publish, then roll the version back."
        )
    return _to_cancelled(facts, reason, now)


def _folded(facts: RoundFacts, manifest: str | None) -> RoundFacts:
    if facts.state is RoundState.AGGREGATING:
        return replace(facts, state=RoundState.EVALUATING, folded_manifest=manifest, failures=0, failure="")
    if facts.state is RoundState.EVALUATING and manifest in (None, facts.folded_manifest):
        return facts
    raise _refuse(facts, "take a fold", "Tick, and carry out what the round asks for.")


def _evaluated(facts: RoundFacts, event: Evaluated) -> RoundFacts:
    if facts.state is not RoundState.EVALUATING:
        raise _refuse(facts, "take an evaluation", "Tick, and carry out what the round asks for.")
    if facts.evaluation is not None:
        return facts  # The first evaluation stands: its version may already be written.
    judged = replace(facts, evaluation=event.evaluation, failures=0, failure="")
    if gate(facts, event.evaluation) if event.passed is None else event.passed:
        return judged
    new, parent = event.evaluation.heldout_loss, event.evaluation.parent_heldout_loss
    compared = "" if parent is None else f" (parent {parent:.4f}, allowed increase {facts.max_loss_increase:g})"
    return replace(judged, state=RoundState.REJECTED, reason=f"release gate: held-out loss {new:.4f}{compared}")


def _published(facts: RoundFacts, version: int) -> RoundFacts:
    if facts.state is not RoundState.EVALUATING or facts.evaluation is None:
        raise _refuse(facts, "be published", "Evaluate its version first.")
    return replace(facts, state=RoundState.PUBLISHED, published_version=version, failures=0, failure="")


def _overtaken(facts: RoundFacts) -> RoundFacts:
    if facts.state is RoundState.AGGREGATING:
        return facts
    if facts.state is not RoundState.EVALUATING:
        raise _refuse(facts, "be folded again", "Tick, and carry out what the round asks for.")
    return replace(facts, state=RoundState.AGGREGATING, folded_manifest=None, evaluation=None, failures=0, failure="")
