"""The ledger: live rounds, leases, submissions and workers in Valkey (or Redis), kept by rules.

The rules stand in `coordinator.leases` and `coordinator.rounds`, the layout of the keys in `coordinator.ledger_keys`.
A change goes: read, step (pure), store by compare-and-set with every key that the step looked at among the conditions
(`lua/commit.lua`), and again from the start if somebody else was faster. Claiming is `coordinator.claims`.

What always holds:
- one shard of a round is never granted to more workers at a time than the round allows copies, and has at most one
  accepted delta, ever;
- an acknowledged submission or verdict is on the server's disk (WAITAOF) when `require_fsync` is set;
- every call may be repeated: a worker that lost an answer asks again and gets the same one;
- every call but the lists is O(log n) in shards and leases.

Workers are `coordinator.people`. Every method raises what `coordinator.valkey` raises. It does no scheduling and judges
no delta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from coordinator import leases
from coordinator import ledger_keys as keys
from coordinator.beats import Taken, take_beat
from coordinator.claims import Claims
from coordinator.late import opens_soon, taker_of
from coordinator.leases import Lease
from coordinator.ledger_rounds import RoundLedger
from coordinator.ledger_types import NoWork, Pulse, RoundStatus, Worker
from coordinator.matching import Seeker
from coordinator.pace import mean_speed
from coordinator.people import People
from coordinator.rounds import owed
from coordinator.valkey import ATTEMPTS, Valkey, back_off, lost_every_race
from rankup.errors import DeniedError, InputError, NotFoundError, NotYetError
from rankup.protocol import Heartbeat, LeaseState, RoundState
from rankup.records import Receipt, RoundRecord, Submission

__all__ = ["Ledger", "NoWork", "Pulse", "RoundStatus", "Worker"]

TAKER_RETRY_S: Final = 15.0
"""How soon a late delta may be offered again while its campaign is between two rounds."""
REAP_BATCH: Final = 1000


@dataclass(frozen=True)
class _Surroundings:
    """What a step of a lease looks at besides the lease."""

    record: RoundRecord
    """Of the round whose shards the lease holds."""
    round_state: RoundState
    held: bool
    """Some lease holds one of its shards."""
    accepted_by: str | None
    """A lease whose delta one of its shards already has."""
    handed_in_with: str | None
    """The lease that the delta in question was handed in with, if it was."""
    taker: RoundStatus | None
    """The round that takes its delta after the end of its own, if one does."""
    taker_soon: bool
    """Whether there will be one."""

    def steps(self, lease: Lease) -> int:
        """Those of the whole lease."""
        return self.record.request.recipe.steps * lease.shards


_Decide = Callable[[Lease, _Surroundings], leases.Event]


class Ledger(RoundLedger):
    """All live state. Make one with `Ledger.connect` inside the event loop that uses it."""

    def __init__(self, valkey: Valkey) -> None:
        super().__init__(valkey)
        self.people = People(valkey)
        self._claims = Claims(valkey, self.records)

    async def claim(
        self, worker_id: str, now: float, seeker: Seeker | None = None, *, delivering: str = ""
    ) -> Lease | NoWork:
        """As `Claims.claim`; by default for somebody who takes anything."""
        return await self._claims.claim(worker_id, now, seeker or Seeker(), delivering)

    async def live_leases(self, now: float) -> int:
        """As `Claims.live`."""
        return await self._claims.live(now)

    async def takes_late(self, lease: Lease) -> bool:
        """Whether a later round takes the delta of a lease whose round has ended.

        Raises:
            NotYetError: not yet.
        """
        record = await self.record(lease.home)
        taker, soon = await self._taker(lease.home, record.base_manifest)
        if taker is None and soon:
            raise _not_yet(lease)
        return taker is not None

    async def may_take_late(self, lease: Lease) -> bool:
        """As `takes_late`, and also where there will be such a round soon."""
        record = await self.record(lease.home)
        taker, soon = await self._taker(lease.home, record.base_manifest)
        return taker is not None or soon

    async def lease(self, lease_id: str) -> Lease:
        """Raises NotFoundError."""
        fields = await self.valkey.call("HGETALL", keys.lease_key(lease_id))
        if not fields:
            raise NotFoundError(f"no lease {lease_id}", remedy="Claim a new one.")
        return keys.parse_lease(fields)

    async def at_work(self, round_id: str, limit: int) -> list[tuple[Lease, str]]:
        """Leases under way, those that were heard of last first, and the names of their workers."""
        ids = await self.valkey.call("ZREVRANGE", keys.round_key(round_id, "expiry"), 0, limit - 1)
        rows = await self.valkey.read(*(["HGETALL", keys.lease_key(lease_id)] for lease_id in ids))
        leases = [keys.parse_lease(fields) for fields in rows if fields]
        names = await self.people.names([lease.worker_id for lease in leases])
        return [(lease, names.get(lease.worker_id, "")) for lease in leases]

    async def heartbeat(self, lease_id: str, worker_id: str, beat: Heartbeat, now: float) -> Pulse:
        """Keep a lease alive and note its progress.

        Raises:
            NotFoundError: no such lease.
            DeniedError: someone else's lease, or another fence.
            StateError: its delta was handed in, or it was returned.
        """

        def decide(lease: Lease, around: _Surroundings) -> leases.Event:
            _check_owner(lease, worker_id)
            lease_s, steps = around.record.request.lease_s, around.steps(lease)
            return leases.Beat(
                beat.fence, lease_s, steps, beat.step, beat.loss, beat.tokens_per_s, beat.grad_norm, beat.energy_j
            )

        lease, around = await self._change_lease(lease_id, decide, now)
        useful, reason = leases.go_on(
            lease,
            round_state=around.round_state,
            held=around.held,
            accepted_by=around.accepted_by,
            steps=around.steps(lease),
            late_is_welcome=around.taker is not None or around.taker_soon,
        )
        return Pulse(lease, useful, reason)

    async def take_beat(self, token_hash: str, lease_id: str, beat: Heartbeat, now: float) -> Taken | None:
        """As `beats.take_beat`: a heartbeat about which there is nothing to decide; None for any other."""
        return await take_beat(self.valkey, token_hash, lease_id, beat, now)

    async def give_back(self, lease_id: str, worker_id: str, fence: int, reason: str, now: float) -> Lease:
        """Return a lease unfinished: others can have its shards at once.

        Raises:
            NotFoundError: no such lease.
            DeniedError: someone else's lease, or another fence.
            StateError: its delta was handed in.
        """

        def decide(lease: Lease, _: _Surroundings) -> leases.Event:
            _check_owner(lease, worker_id)
            return leases.Return(fence, reason)

        return (await self._change_lease(lease_id, decide, now))[0]

    async def submit(self, lease_id: str, worker_id: str, submission: Submission, now: float) -> Lease:
        """Queue a delta for admission; when this returns, it is on the server's disk. Repeating changes nothing.

        After the end of its round it is queued in the round of the campaign that takes late deltas of it, if there is
        one: the lease then has another `round_id`.

        Raises:
            NotFoundError: no such lease.
            DeniedError: someone else's lease, another fence, or a delta that was handed in with another lease.
            InputError: the submission is about another lease, round, shards or rank.
            StateError: the lease has handed in another delta, another delta of its shards was accepted, or no round
                takes it any more.
            BusyError: the server has not written it to its disk in time: repeat.
            NotYetError: the round that takes it is not open yet.
        """
        statement = submission.statement

        def decide(lease: Lease, around: _Surroundings) -> leases.Event:
            _check_owner(lease, worker_id)
            told = (statement.lease_id, statement.round_id, submission.worker_id)
            told_of = (submission.shard, submission.shards, submission.rank)
            if (*told, *told_of) != (lease_id, lease.home, lease.worker_id, lease.shard, lease.shards, lease.rank):
                raise InputError(f"the submission is not about lease {lease_id}", remedy="Fill it in from the lease.")
            if around.handed_in_with not in (None, lease_id):
                raise DeniedError(
                    f"the delta {statement.sha256} was handed in with lease {around.handed_in_with}",
                    remedy="Hand in a delta that this lease trained.",
                )
            over = around.round_state not in leases.TAKES_SUBMISSIONS
            if over and around.taker_soon and around.taker is None and around.accepted_by is None:
                raise _not_yet(lease)
            taker = around.taker.record.round_id if around.taker is not None else None
            return leases.Submit(statement.fence, statement.sha256, around.round_state, around.accepted_by, taker)

        return (await self._change_lease(lease_id, decide, now, submission=submission, durable=True))[0]

    async def judge(self, lease_id: str, receipt: Receipt, now: float) -> Lease:
        """Store admission's verdict; a second accepted delta of a shard is rejected. Repeating changes nothing.

        Raises:
            NotFoundError: no such lease.
            StateError: the lease has handed in no delta, or another one.
            BusyError: the server has not written it to its disk in time: repeat.
        """
        contribution = receipt.submission.statement.sha256

        def decide(_: Lease, around: _Surroundings) -> leases.Event:
            return leases.Judge(contribution, receipt.accepted, receipt.reason, around.round_state, around.accepted_by)

        return (await self._change_lease(lease_id, decide, now, receipt=receipt, durable=True))[0]

    async def reap(self, round_id: str, now: float) -> list[str]:
        """Expire the leases that have run out, and return their ids.

        In a round that takes no deltas any more all leases end, and what a cancelled round has not judged is refused.
        """
        status = await self.round(round_id)
        over = status.facts.state not in leases.TAKES_SUBMISSIONS and status.facts.state is not RoundState.DRAFT
        until = "+inf" if over else repr(now)
        expiry = keys.round_key(round_id, "expiry")
        reaped: list[str] = []
        while batch := await self.valkey.call("ZRANGEBYSCORE", expiry, "-inf", until, "LIMIT", 0, REAP_BATCH):
            ended = [lease_id for lease_id in batch if await self._end(lease_id, now, round_over=over)]
            reaped += ended
            if len(batch) < REAP_BATCH or not ended:
                break
        if status.facts.state.ended:
            await self._refuse_unjudged(status, now)
        return reaped

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _end(self, lease_id: str, now: float, *, round_over: bool) -> bool:
        lease = await self.lease(lease_id)
        if lease.state is not LeaseState.GRANTED:
            return False
        expired, commands = leases.step(lease, leases.Expire(round_over), now)
        # Whoever was faster (a heartbeat, a submission) has saved the lease: no second try.
        return bool(commands) and await self.valkey.commit(_unchanged(lease), keys.lease_writes(expired, commands))

    async def _refuse_unjudged(self, status: RoundStatus, now: float) -> None:
        round_id, reason = status.record.round_id, f"the round is {status.facts.state.value}: {status.facts.reason}"
        while pending := await self.pending(round_id, limit=1):
            submission = pending[0]
            refusal = leases.Judge(submission.statement.sha256, False, reason, status.facts.state)
            lease = await self.lease(submission.statement.lease_id)
            refused, commands = leases.step(lease, refusal, now)
            await self.valkey.commit(_unchanged(lease), keys.lease_writes(refused, commands))
        after = await self.round(round_id)
        if not owed(after.facts):
            await self.valkey.commit([], [["ZREM", keys.UNFINISHED_ROUNDS, round_id]])

    async def _change_lease(
        self,
        lease_id: str,
        decide: _Decide,
        now: float,
        *,
        submission: Submission | None = None,
        receipt: Receipt | None = None,
        durable: bool = False,
    ) -> tuple[Lease, _Surroundings]:
        """Read, step, compare and set, until nobody comes between."""
        digest = submission.statement.sha256 if submission else ""
        for attempt in range(ATTEMPTS):
            lease = await self.lease(lease_id)
            home, shards = keys.round_key(lease.home), [str(number) for number in lease.numbers]
            state, holders, accepted, late, handed_in_with = await self.valkey.read(
                ["HGET", keys.round_key(lease.round_id), "state"],
                ["HMGET", f"{home}:holders", *shards],
                ["HMGET", f"{home}:accepted", *shards],
                ["HMGET", f"{home}:late", *shards],
                ["HGET", keys.DIGESTS, digest],
            )
            if state is None:
                raise NotFoundError(f"no round {lease.round_id}")
            [record] = await self.records([lease.home])
            taker, taker_soon = None, False
            if RoundState(state) not in leases.TAKES_SUBMISSIONS and lease.contribution is None:
                base = submission.statement.base_manifest if submission else record.base_manifest
                taker, taker_soon = await self._taker(lease.round_id, base)
            around = _Surroundings(
                record,
                RoundState(state),
                held=any(int(count or 0) > 0 for count in holders),
                accepted_by=next((found for found in (*accepted, *late) if found is not None), None),
                handed_in_with=handed_in_with,
                taker=taker,
                taker_soon=taker_soon,
            )
            changed, commands = leases.step(lease, decide(lease, around), now)
            if changed == lease and not commands:
                if durable:
                    # The first call may have failed for want of an fsync, and WAITAOF waits for writes of its own
                    # connection only: it needs one.
                    await self.valkey.commit([], [["SET", keys.BARRIER, lease_id]], durable=True)
                return lease, around
            conditions: list[keys.Condition] = [
                *_unchanged(lease),
                ["HGET", keys.round_key(lease.round_id), "state", state],
                ["HMGET", f"{home}:accepted", *shards, accepted],
                ["HMGET", f"{home}:late", *shards, late],
                ["HGET", keys.DIGESTS, digest, handed_in_with],
            ]
            if taker is not None:
                conditions.append(["HGET", keys.round_key(taker.record.round_id), "state", taker.facts.state.value])
            speed = await self._speed(lease, record, submission) if submission else None
            writes = keys.lease_writes(changed, commands, submission=submission, speed=speed, receipt=receipt)
            if await self.valkey.commit(conditions, writes, durable=durable):
                return replace(changed, rev=lease.rev + 1), around
            await back_off(attempt)
        raise lost_every_race(f"lease {lease_id}")

    async def _taker(self, round_id: str, base_manifest: str) -> tuple[RoundStatus | None, bool]:
        """The round that takes late deltas of an ended one, and whether there will be one."""
        unfinished = await self.unfinished()
        return taker_of(round_id, base_manifest, unfinished), opens_soon(round_id, unfinished)

    async def _speed(self, lease: Lease, record: RoundRecord, submission: Submission) -> tuple[str, float] | None:
        """Model, and the worker's tokens per second at it with this submission."""
        model, said = record.request.model, submission.statement
        before = await self.valkey.call("HGET", keys.worker_key(lease.worker_id, "score"), keys.SPEED + model)
        speed = mean_speed(float(before) if before is not None else None, said.tokens, said.seconds)
        return (model, speed) if speed is not None else None


def _check_owner(lease: Lease, worker_id: str) -> None:
    if lease.worker_id != worker_id:
        raise DeniedError(f"lease {lease.lease_id} belongs to another worker", remedy="Claim a lease of your own.")


def _not_yet(lease: Lease) -> NotYetError:
    return NotYetError(
        f"round {lease.home} takes no more deltas; the round after it takes late ones, and is not open yet",
        remedy="Keep the delta and hand it in again in a moment.",
        retry_after_s=TAKER_RETRY_S,
    )


def _unchanged(lease: Lease) -> list[keys.Condition]:
    return [["HGET", keys.lease_key(lease.lease_id), "rev", str(lease.rev)]]
