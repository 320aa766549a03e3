"""The life of one lease, as a pure function: `step(lease, event, now) -> (lease, commands)`.

    grant ──> GRANTED ──Beat──> GRANTED (expiry moves)
                 │
                 ├──Submit──────────────> SUBMITTED ──Judge──> ACCEPTED
                 ├──Return──> RETURNED ─┐     ^        └─────> REJECTED (the shard is free again)
                 └──Expire──> EXPIRED  ─┴─Submit (late)

What always holds:
- `fence` never changes; each grant of a shard carries a higher one, and every event of a worker must repeat it
  (fencing tokens: Kleppmann, "How to do distributed locking", 2016);
- a lease hands in at most one delta: `contribution` is set once, by the first Submit, and never changes;
- a late submission (of an expired or returned lease) is as good as one in time while the round takes submissions and no
  other delta of the shard is accepted; whoever leases the shard meanwhile does not matter, the first accepted one wins;
- ACCEPTED and REJECTED are final; a repeated Submit of the same delta and a repeated Judge change nothing, so a caller
  whose answer was lost simply repeats itself;
- a shard is held exactly by its GRANTED and SUBMITTED leases: every step into those states holds it, every step out of
  them (but into each other) frees it; whether a freed shard can be handed out again depends on its other holders.

No I/O, no clock, no randomness here: the ledger stores what `step` returns and carries out the commands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rankup.errors import DeniedError, StateError
from rankup.protocol import LeaseState, LeaseView, RoundState

TAKES_SUBMISSIONS = frozenset({RoundState.OPEN, RoundState.CLOSING})
"""While a round is closing it grants nothing, but a delta that arrives before the fold starts still counts."""


@dataclass(frozen=True)
class Lease:
    """One shard of one round in one worker's hands. Times are Unix seconds."""

    lease_id: str
    fence: int
    round_id: str
    shard: int
    worker_id: str
    state: LeaseState
    granted_at: float
    expires_at: float
    step: int = 0
    """Training steps done, by the last heartbeat."""
    loss: float | None = None
    tokens_per_s: float | None = None
    contribution: str | None = None
    """sha256 of the delta that was handed in."""
    verdict: str = ""
    """In plain words, once the lease is over."""
    rev: int = 0
    """Counts the stored changes: what compare-and-set compares."""

    def view(self) -> LeaseView:
        """The lease as its worker may see it."""
        return LeaseView(
            lease_id=self.lease_id,
            round_id=self.round_id,
            shard=self.shard,
            worker_id=self.worker_id,
            state=self.state,
            fence=self.fence,
            expires_at=self.expires_at,
            step=self.step,
            contribution=self.contribution,
            verdict=self.verdict,
        )


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beat:
    """The worker is alive: the lease now lasts `lease_s` from now."""

    fence: int
    lease_s: float
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Submit:
    """The worker hands in a delta; `round_state` and `accepted_by` (a lease id) are read together with the lease."""

    fence: int
    contribution: str
    round_state: RoundState
    accepted_by: str | None = None


@dataclass(frozen=True)
class Return:
    """The worker gives the shard back unfinished."""

    fence: int
    reason: str = ""


@dataclass(frozen=True)
class Expire:
    """The reaper asks whether the lease has run out; `round_over` ends it whatever the clock says."""

    round_over: bool = False


@dataclass(frozen=True)
class Judge:
    """Admission's verdict on `contribution`; `accepted_by` is the lease whose delta the shard already has, if any."""

    contribution: str
    accepted: bool
    reason: str
    round_state: RoundState
    accepted_by: str | None = None


Event = Beat | Submit | Return | Expire | Judge


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HoldShard:
    """One more lease holds the shard: nobody else gets it."""


@dataclass(frozen=True)
class FreeShard:
    """One lease less holds the shard: with no other holder and no accepted delta it can be handed out again."""


@dataclass(frozen=True)
class ExtendExpiry:
    """The lease runs out at `expires_at` unless another heartbeat comes."""

    expires_at: float


@dataclass(frozen=True)
class ForgetExpiry:
    """The lease cannot run out any more, and its worker is free to claim another one."""


@dataclass(frozen=True)
class QueueForAdmission:
    """The delta awaits a verdict."""

    contribution: str


@dataclass(frozen=True)
class LeaveQueue:
    """The delta has its verdict."""


@dataclass(frozen=True)
class RecordAccepted:
    """The shard has its delta, from this lease, for good."""

    contribution: str


@dataclass(frozen=True)
class RecordRejected:
    """One more refused delta in the counters of the round and of the worker."""


Command = (
    HoldShard
    | FreeShard
    | ExtendExpiry
    | ForgetExpiry
    | QueueForAdmission
    | LeaveQueue
    | RecordAccepted
    | RecordRejected
)
Outcome = tuple[Lease, tuple[Command, ...]]


# -- the machine -------------------------------------------------------------------------------------------------------


def grant(
    *, lease_id: str, fence: int, round_id: str, shard: int, worker_id: str, now: float, lease_s: float
) -> tuple[Lease, tuple[Command, ...]]:
    """A new lease of `shard`; `fence` must be above that of every earlier grant of the same shard."""
    lease = Lease(lease_id, fence, round_id, shard, worker_id, LeaseState.GRANTED, now, now + lease_s)
    return lease, (HoldShard(), ExtendExpiry(lease.expires_at))


def step(lease: Lease, event: Event, now: float) -> Outcome:
    """The lease after `event`, and what must be stored together with it.

    Raises:
        DeniedError: the event carries another fence than the lease.
        StateError: the lease cannot do this in its present state.
    """
    match event:
        case Beat():
            _check_fence(lease, event.fence)
            return _beat(lease, event, now)
        case Submit():
            _check_fence(lease, event.fence)
            return _submit(lease, event)
        case Return():
            _check_fence(lease, event.fence)
            return _return(lease, event)
        case Expire():
            return _expire(lease, event, now)
        case Judge():
            return _judge(lease, event)


def go_on(lease: Lease, *, round_state: RoundState, newest_fence: int, accepted_by: str | None) -> tuple[bool, str]:
    """Whether training this lease further can still be of use, and if not, why, in plain words."""
    if round_state not in TAKES_SUBMISSIONS:
        return False, f"Round {lease.round_id} is {round_state.value}: it takes no more deltas."
    if accepted_by is not None and accepted_by != lease.lease_id:
        return False, f"Another delta of shard {lease.shard} has been accepted."
    if newest_fence > lease.fence:
        return False, f"The lease expired and shard {lease.shard} was given to another worker."
    return True, ""


def _check_fence(lease: Lease, fence: int) -> None:
    if fence != lease.fence:
        raise DeniedError(
            f"lease {lease.lease_id} has fence {lease.fence}, the message carries {fence}",
            remedy="Use the fence that came with the lease; if you have lost it, claim again.",
        )


def _refuse(lease: Lease, what: str, remedy: str) -> StateError:
    return StateError(f"lease {lease.lease_id} is {lease.state.value}: it cannot {what}", remedy=remedy)


def _beat(lease: Lease, event: Beat, now: float) -> Outcome:
    progress = replace(
        lease,
        # A heartbeat that overtook a later one must not turn the progress back.
        step=max(lease.step, event.step),
        loss=event.loss if event.loss is not None else lease.loss,
        tokens_per_s=event.tokens_per_s if event.tokens_per_s is not None else lease.tokens_per_s,
    )
    if lease.state is LeaseState.GRANTED:
        extended = replace(progress, expires_at=now + event.lease_s)
        return extended, (ExtendExpiry(extended.expires_at),)
    if lease.state is LeaseState.EXPIRED:
        return progress, ()  # The shard may be someone else's now; a finished delta is still welcome.
    raise _refuse(lease, "take a heartbeat", "Stop the heartbeat of this lease and claim the next one.")


def _submit(lease: Lease, event: Submit) -> Outcome:
    if lease.contribution is not None:
        if lease.contribution == event.contribution:
            return lease, ()
        raise _refuse(
            lease,
            f"take another delta: it already handed in {lease.contribution}",
            "Wait for the verdict on the first one; one lease hands in one delta.",
        )
    if event.round_state not in TAKES_SUBMISSIONS:
        raise StateError(
            f"round {lease.round_id} is {event.round_state.value}: it takes no more deltas",
            remedy="Drop this delta and claim a lease of the round that is open now.",
        )
    if event.accepted_by is not None:
        raise StateError(
            f"another delta of shard {lease.shard} of round {lease.round_id} was accepted (lease {event.accepted_by})",
            remedy="Drop this delta and claim another shard.",
        )
    submitted = replace(lease, state=LeaseState.SUBMITTED, contribution=event.contribution, verdict="")
    queue = QueueForAdmission(event.contribution)
    if lease.state is LeaseState.GRANTED:
        return submitted, (ForgetExpiry(), queue)
    return submitted, (HoldShard(), queue)


def _return(lease: Lease, event: Return) -> Outcome:
    if lease.state is LeaseState.GRANTED:
        returned = replace(lease, state=LeaseState.RETURNED, verdict=event.reason or "returned by its worker")
        return returned, (ForgetExpiry(), FreeShard())
    if lease.state in (LeaseState.RETURNED, LeaseState.EXPIRED):
        return lease, ()
    raise _refuse(lease, "be returned", "Nothing needs to be done: the delta is in the coordinator's hands.")


def _expire(lease: Lease, event: Expire, now: float) -> Outcome:
    if lease.state is not LeaseState.GRANTED:
        raise _refuse(lease, "expire", "Nothing needs to be done: only a granted lease runs out.")
    if event.round_over:
        over = replace(lease, state=LeaseState.EXPIRED, verdict="the round is over")
        return over, (ForgetExpiry(), FreeShard())
    if now < lease.expires_at:
        return lease, ()  # A heartbeat came first, or the clock went back.
    expired = replace(
        lease, state=LeaseState.EXPIRED, verdict="no heartbeat in time; a finished delta is still welcome"
    )
    return expired, (ForgetExpiry(), FreeShard())


def _judge(lease: Lease, event: Judge) -> Outcome:
    if lease.contribution is None or lease.contribution != event.contribution:
        raise StateError(
            f"lease {lease.lease_id} is {lease.state.value} with contribution {lease.contribution}, "
            f"the verdict is on {event.contribution}",
            remedy="Judge what stands in the queue of the round.",
        )
    if lease.state is not LeaseState.SUBMITTED:
        return lease, ()  # The first verdict stands.
    reason = event.reason
    if event.accepted:
        if event.round_state not in TAKES_SUBMISSIONS:
            reason = f"the round is {event.round_state.value}"
        elif event.accepted_by is not None:
            reason = f"already accepted: shard {lease.shard} has the delta of lease {event.accepted_by}"
        else:
            accepted = replace(lease, state=LeaseState.ACCEPTED, verdict=reason)
            return accepted, (LeaveQueue(), RecordAccepted(event.contribution), FreeShard())
    rejected = replace(lease, state=LeaseState.REJECTED, verdict=reason)
    return rejected, (LeaveQueue(), RecordRejected(), FreeShard())
