"""The life of one lease, as a pure function: `step(lease, event, now) -> (lease, commands)`.

    grant ──> GRANTED ──Beat──> GRANTED (expiry moves)
                 │
                 ├──Submit──────────────> SUBMITTED ──Judge──> ACCEPTED
                 ├──Return──> RETURNED ─┐     ^        └─────> REJECTED (the shard is free again)
                 └──Expire──> EXPIRED  ─┴─Submit (late)
    adopt ──> GRANTED or EXPIRED: a lease that the ledger forgot, with the id and the fence that it had

What always holds:
- `fence` never changes; each grant of a shard carries a higher one, and every event of a worker must repeat it
  (fencing tokens: Kleppmann, "How to do distributed locking", 2016);
- a lease hands in at most one delta: `contribution` is set once, by the first Submit, and never changes;
- a lease is for neighbouring shards, and its delta is accepted for all of them or not at all;
- a late submission (of an expired or returned lease) is as good as one in time while the round takes submissions and no
  other delta of its shards is accepted; whoever leases them meanwhile does not matter, the first accepted one wins;
- a submission after the end of the round goes to a later round of the campaign where one takes it (`trained_for` names
  the old one). It is judged and counted there, and covers none of that round's shards;
- ACCEPTED and REJECTED are final; a repeated Submit of the same delta and a repeated Judge change nothing, so a caller
  whose answer was lost simply repeats itself;
- shards are held exactly by their GRANTED and SUBMITTED leases: every step into those states holds them, every step out
  of them (but into each other) frees them; whether a freed shard can be handed out again depends on its other holders.
  A lease that a later round judges holds nothing.

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
    """Neighbouring shards of one round in one worker's hands. Times are Unix seconds."""

    lease_id: str
    fence: int
    round_id: str
    """The round that judges its delta."""
    shard: int
    """The first one."""
    worker_id: str
    state: LeaseState
    granted_at: float
    expires_at: float
    shards: int = 1
    rank: int | None = None
    """Of the volunteer's tier, where that is not the recipe's."""
    expected_s: float = 0.0
    """How long it should take, by what was known when it was granted."""
    trained_for: str | None = None
    """The round that granted it, where a later one judges its delta."""
    step: int = 0
    """Training steps done, by the last heartbeat."""
    loss: float | None = None
    tokens_per_s: float | None = None
    grad_norm: float | None = None
    energy_j: float | None = None
    """Joules so far."""
    contribution: str | None = None
    """sha256 of the delta that was handed in."""
    verdict: str = ""
    """In plain words, once the lease is over."""
    rev: int = 0
    """Counts the stored changes: what compare-and-set compares."""

    @property
    def home(self) -> str:
        """The round whose shards these are."""
        return self.trained_for or self.round_id

    @property
    def numbers(self) -> range:
        """Of its shards."""
        return range(self.shard, self.shard + self.shards)

    def ends_at(self, steps: int, now: float) -> float:
        """When the training of `steps` steps should be over, by the pace so far."""
        if self.step == 0:
            return now + self.expected_s
        return now + max(0, steps - self.step) * (now - self.granted_at) / self.step

    def view(self) -> LeaseView:
        """The lease as its worker may see it."""
        return LeaseView(
            lease_id=self.lease_id,
            round_id=self.round_id,
            shard=self.shard,
            shards=self.shards,
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
    steps: int
    """Those of the whole lease."""
    step: int = 0
    """Those that are done."""
    loss: float | None = None
    tokens_per_s: float | None = None
    grad_norm: float | None = None
    energy_j: float | None = None


@dataclass(frozen=True)
class Submit:
    """The worker hands in a delta; the rest is read together with the lease."""

    fence: int
    contribution: str
    round_state: RoundState
    accepted_by: str | None = None
    """A lease whose delta one of the shards already has."""
    taker: str | None = None
    """A later round that takes the late deltas of this one."""


@dataclass(frozen=True)
class Return:
    """The worker gives the shards back unfinished."""

    fence: int
    reason: str = ""


@dataclass(frozen=True)
class Expire:
    """The reaper asks whether the lease has run out; `round_over` ends it whatever the clock says."""

    round_over: bool = False


@dataclass(frozen=True)
class Judge:
    """Admission's verdict on `contribution`; `accepted_by` is a lease whose delta one of the shards already has."""

    contribution: str
    accepted: bool
    reason: str
    round_state: RoundState
    accepted_by: str | None = None


Event = Beat | Submit | Return | Expire | Judge


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HoldShards:
    """One more lease holds its shards: nobody else gets them."""


@dataclass(frozen=True)
class FreeShards:
    """One lease less holds its shards: with no other holder and no accepted delta they can be handed out again."""


@dataclass(frozen=True)
class ExtendExpiry:
    """The lease runs out at `expires_at` unless another heartbeat comes; its training should be over at `ends_at`."""

    expires_at: float
    ends_at: float


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
    """The shards have their delta, from this lease, for good."""

    contribution: str


@dataclass(frozen=True)
class RecordRejected:
    """One more refused delta in the counters of the round and of the worker."""


Command = (
    HoldShards
    | FreeShards
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
    *,
    lease_id: str,
    fence: int,
    round_id: str,
    shard: int,
    worker_id: str,
    now: float,
    lease_s: float,
    shards: int = 1,
    rank: int | None = None,
    expected_s: float = 0.0,
) -> Outcome:
    """A new lease of `shards` from `shard` on; `fence` must be above that of every earlier grant of any of them.

    What `lua/claim.lua` does in one step on the server.
    """
    state, expires_at = LeaseState.GRANTED, now + lease_s
    lease = Lease(
        lease_id, fence, round_id, shard, worker_id, state, now, expires_at, shards, rank, expected_s=expected_s
    )
    return lease, (HoldShards(), ExtendExpiry(expires_at, now + expected_s))


def adopt(
    lease: Lease,
    *,
    round_state: RoundState,
    accepted_by: str | None,
    hands: int,
    copies: int,
    busy: bool,
    late_is_welcome: bool,
    lease_s: float,
    now: float,
) -> Outcome:
    """A lease that the ledger has forgotten, as its voucher tells of it, goes on.

    It is granted once more where a claim could have had a copy of its shards: each is in fewer hands (`hands`, the most
    of any) than the round allows `copies`, and its worker is not `busy` with two others. Else it has run out, and
    its finished delta is welcome as any late one.

    Raises:
        StateError: no round takes its delta, or a shard has its accepted delta already.
    """
    if accepted_by is not None:
        raise _accepted_already(lease, accepted_by)
    if round_state in TAKES_SUBMISSIONS and hands < copies and not busy:
        granted = replace(lease, state=LeaseState.GRANTED, expires_at=now + lease_s)
        return granted, (HoldShards(), ExtendExpiry(granted.expires_at, now + lease.expected_s))
    if round_state not in TAKES_SUBMISSIONS and not late_is_welcome:
        raise _takes_no_more(lease, round_state)
    expired = replace(lease, state=LeaseState.EXPIRED, expires_at=now, verdict="the server had forgotten it")
    return expired, ()


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


def go_on(
    lease: Lease,
    *,
    round_state: RoundState,
    held: bool,
    accepted_by: str | None,
    steps: int,
    late_is_welcome: bool,
) -> tuple[bool, str]:
    """Whether training this lease further can still be of use, and if not, why, in plain words.

    `held`: some lease holds one of its shards now; `steps` are those of the whole lease. Where `late_is_welcome` in a
    later round, a training that is half done when its round ends goes on: it counts for less, but it counts. While a
    lease lives, a copy of it in other hands is no reason to stop: the first accepted one wins.
    """
    if accepted_by is not None and accepted_by != lease.lease_id:
        return False, f"Another delta of {_shards(lease)} has been accepted."
    if round_state not in TAKES_SUBMISSIONS and not (late_is_welcome and 2 * lease.step >= steps):
        return False, f"Round {lease.home} is {round_state.value}: it takes no more deltas."
    if lease.state is LeaseState.EXPIRED and held:  # Not by this one: it has run out.
        return False, f"The lease expired and {_shards(lease)} went to another worker."
    return True, ""


def _shards(lease: Lease) -> str:
    if lease.shards == 1:
        return f"shard {lease.shard}"
    return f"shards {lease.shard} to {lease.numbers[-1]}"


def _check_fence(lease: Lease, fence: int) -> None:
    if fence != lease.fence:
        raise DeniedError(
            f"lease {lease.lease_id} has fence {lease.fence}, the message carries {fence}",
            remedy="Use the fence that came with the lease; if you have lost it, claim again.",
        )


def _refuse(lease: Lease, what: str, remedy: str) -> StateError:
    return StateError(f"lease {lease.lease_id} is {lease.state.value}: it cannot {what}", remedy=remedy)


def _accepted_already(lease: Lease, accepted_by: str) -> StateError:
    return StateError(
        f"another delta of {_shards(lease)} of round {lease.round_id} was accepted (lease {accepted_by})",
        remedy="Drop this delta and claim another lease.",
    )


def _takes_no_more(lease: Lease, round_state: RoundState) -> StateError:
    return StateError(
        f"round {lease.round_id} is {round_state.value}: it takes no more deltas",
        remedy="Drop this delta and claim another lease: no later round takes deltas of this one and its base.",
    )


def _beat(lease: Lease, event: Beat, now: float) -> Outcome:
    progress = replace(
        lease,
        # A heartbeat that overtook a later one must not turn the progress back.
        step=max(lease.step, event.step),
        loss=_newer(event.loss, lease.loss),
        tokens_per_s=_newer(event.tokens_per_s, lease.tokens_per_s),
        grad_norm=_newer(event.grad_norm, lease.grad_norm),
        energy_j=_newer(event.energy_j, lease.energy_j),
    )
    if lease.state is LeaseState.GRANTED:
        extended = replace(progress, expires_at=now + event.lease_s)
        return extended, (ExtendExpiry(extended.expires_at, extended.ends_at(event.steps, now)),)
    if lease.state is LeaseState.EXPIRED:
        return progress, ()  # The shards may be someone else's now; a finished delta is still welcome.
    raise _refuse(lease, "take a heartbeat", "Stop the heartbeat of this lease and claim the next one.")


def _newer(said: float | None, before: float | None) -> float | None:
    return before if said is None else said


def _submit(lease: Lease, event: Submit) -> Outcome:
    if lease.contribution is not None:
        if lease.contribution == event.contribution:
            return lease, ()
        raise _refuse(
            lease,
            f"take another delta: it already handed in {lease.contribution}",
            "Wait for the verdict on the first one; one lease hands in one delta.",
        )
    if event.accepted_by is not None:
        raise _accepted_already(lease, event.accepted_by)
    submitted = replace(lease, state=LeaseState.SUBMITTED, contribution=event.contribution, verdict="")
    queue = QueueForAdmission(event.contribution)
    if event.round_state in TAKES_SUBMISSIONS:
        held = ForgetExpiry() if lease.state is LeaseState.GRANTED else HoldShards()
        return submitted, (held, queue)
    if event.taker is None:
        raise _takes_no_more(lease, event.round_state)
    moved = replace(submitted, round_id=event.taker, trained_for=lease.round_id)
    if lease.state is LeaseState.GRANTED:
        return moved, (ForgetExpiry(), FreeShards(), queue)
    return moved, (queue,)


def _return(lease: Lease, event: Return) -> Outcome:
    if lease.state is LeaseState.GRANTED:
        returned = replace(lease, state=LeaseState.RETURNED, verdict=event.reason or "returned by its worker")
        return returned, (ForgetExpiry(), FreeShards())
    if lease.state in (LeaseState.RETURNED, LeaseState.EXPIRED):
        return lease, ()
    raise _refuse(lease, "be returned", "Nothing needs to be done: the delta is in the coordinator's hands.")


def _expire(lease: Lease, event: Expire, now: float) -> Outcome:
    if lease.state is not LeaseState.GRANTED:
        raise _refuse(lease, "expire", "Nothing needs to be done: only a granted lease runs out.")
    if event.round_over:
        over = replace(lease, state=LeaseState.EXPIRED, verdict="the round is over")
        return over, (ForgetExpiry(), FreeShards())
    if now < lease.expires_at:
        return lease, ()  # A heartbeat came first, or the clock went back.
    expired = replace(
        lease, state=LeaseState.EXPIRED, verdict="no heartbeat in time; a finished delta is still welcome"
    )
    return expired, (ForgetExpiry(), FreeShards())


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
    free = (FreeShards(),) if lease.trained_for is None else ()
    if event.accepted:
        if event.round_state not in TAKES_SUBMISSIONS:
            reason = f"the round is {event.round_state.value}"
        elif event.accepted_by is not None:
            reason = f"already accepted: {_shards(lease)} of round {lease.home}, with lease {event.accepted_by}"
        else:
            accepted = replace(lease, state=LeaseState.ACCEPTED, verdict=reason)
            return accepted, (LeaveQueue(), RecordAccepted(event.contribution), *free)
    rejected = replace(lease, state=LeaseState.REJECTED, verdict=reason)
    return rejected, (LeaveQueue(), RecordRejected(), *free)
