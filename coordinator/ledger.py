"""The ledger: live rounds, leases, submissions and workers in Valkey (or Redis), kept by rules.

The rules stand in `coordinator.leases` and `coordinator.rounds`, the layout of the keys in `coordinator.ledger_keys`.
A change goes: read, step (pure), store by compare-and-set with every key that the step looked at among the conditions
(`lua/commit.lua`), and again from the start if somebody else was faster. Claiming is one script (`lua/claim.lua`).

What always holds:
- one shard of a round is never granted to two workers at a time, and has at most one accepted delta, ever;
- an acknowledged submission or verdict is on the server's disk (WAITAOF) when `require_fsync` is set;
- every call may be repeated: a worker that lost an answer asks again and gets the same one;
- every call but the lists is O(log n) in shards and leases.

Workers are `coordinator.people`. Every method raises what `coordinator.valkey` raises. It does no scheduling and judges
no delta.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from coordinator import leases
from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger_types import NoWork, Pulse, RoundStatus, Worker
from coordinator.people import People
from coordinator.rounds import Command, Event, Open, RoundFacts, Tick, draft, owed
from coordinator.rounds import step as step_round
from coordinator.valkey import ATTEMPTS, Valkey, back_off, lost_every_race
from rankup.errors import DeniedError, InputError, NotFoundError
from rankup.message import canonical_json
from rankup.protocol import Heartbeat, LeaseState, RoundState
from rankup.records import Receipt, RoundRecord, Submission
from rankup.settings import LedgerSettings

__all__ = ["Ledger", "NoWork", "Pulse", "RoundStatus", "Worker"]

NO_ROUND_RETRY_S: Final = 15.0
NO_SHARD_RETRY_S: Final = 5.0
REAP_BATCH: Final = 1000
RECORDS_KEPT: Final = 128


@dataclass(frozen=True)
class _Surroundings:
    """What a step of a lease looks at besides the lease."""

    round_state: RoundState
    lease_s: float
    newest_fence: int
    accepted_by: str | None
    handed_in_with: str | None
    """The lease that the delta in question was handed in with, if it was."""


_Decide = Callable[[Lease, _Surroundings], leases.Event]


class Ledger:
    """All live state. Make one with `Ledger.connect` inside the event loop that uses it."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.people = People(valkey)
        # Records never change, and have an entry for each shard: the latest ones are kept.
        self._records: dict[str, RoundRecord] = {}

    @classmethod
    async def connect(cls, settings: LedgerSettings) -> Self:
        """As `Valkey.connect`."""
        return cls(await Valkey.connect(settings))

    async def close(self) -> None:
        """Close every connection; the ledger is of no use afterwards."""
        await self.valkey.close()

    async def ping(self) -> None:
        """Return if the server answers, else raise UnreachableError."""
        await self.valkey.ping()

    # -- rounds --------------------------------------------------------------------------------------------------------

    async def create_round(
        self, record: RoundRecord, now: float, *, as_draft: bool = False, after: str | None = None
    ) -> RoundStatus:
        """Store a round and open it (unless `as_draft`); one that exists stays as it is.

        `after` names the round before it in the campaign: with this one stored, that one owes nothing more.
        """
        facts = draft(record)
        if not as_draft:
            facts, _ = step_round(facts, Open(), now)
        round_id = record.round_id
        key = keys.round_key(round_id)
        request = record.request
        done = [["ZREM", keys.UNFINISHED_ROUNDS, after]] if after is not None else []
        fresh = ["shards", str(facts.shards), "lease_s", repr(request.lease_s), "next", "0", "rejected", "0"]
        writes = [
            ["HSET", key, *fresh, "created_at", repr(now)],
            ["SET", keys.round_key(round_id, "record"), canonical_json(record).decode()],
            ["ZADD", keys.ROUNDS, repr(now), round_id],
            ["ZADD", keys.UNFINISHED_ROUNDS, repr(now), round_id],
            *keys.round_writes(round_id, 0, facts, now),
            *done,
        ]
        if not await self.valkey.commit([["EXISTS", key, "0"]], writes) and done:
            await self.valkey.commit([], done)
        return await self.round(round_id)

    async def record(self, round_id: str) -> RoundRecord:
        """What was fixed when the round opened. Raises NotFoundError."""
        return (await self._load_records([round_id]))[0]

    async def round(self, round_id: str) -> RoundStatus:
        """The round as it is now. Raises NotFoundError."""
        return (await self._statuses([round_id]))[0]

    async def rounds(self, limit: int = 100) -> list[RoundStatus]:
        """The newest `limit` rounds, newest first."""
        return await self._statuses(await self.valkey.call("ZREVRANGE", keys.ROUNDS, 0, limit - 1))

    async def unfinished(self) -> list[RoundStatus]:
        """Every round that owes its keeper something (`rounds.owed`), oldest first; ended ones too, as long as their
        campaign waits for its next round."""
        return await self._statuses(await self.valkey.call("ZRANGE", keys.UNFINISHED_ROUNDS, 0, -1))

    async def apply(self, round_id: str, event: Event, now: float) -> tuple[RoundStatus, tuple[Command, ...]]:
        """Take `event` into the round and store the outcome; the counts of a Tick are read here, whatever it carries.

        Raises:
            NotFoundError: there is no such round.
            StateError: the round has ended, or the event does not fit its state.
        """
        for attempt in range(ATTEMPTS):
            status = await self.round(round_id)
            live = Tick(status.facts.counts) if isinstance(event, Tick) else event
            facts, commands = step_round(status.facts, live, now)
            if facts == status.facts:
                return status, commands
            if await self._store_facts(status, facts):
                return RoundStatus(status.record, facts, status.rev + 1), commands
            await back_off(attempt)
        raise lost_every_race(f"round {round_id}")

    async def receipts(self, round_id: str) -> list[Receipt]:
        """The receipts of the accepted contributions, sorted by contribution: the same list for everybody."""
        found = await self.valkey.call("HVALS", keys.round_key(round_id, "receipts"))
        return sorted((Receipt.model_validate_json(doc) for doc in found), key=lambda r: r.submission.statement.sha256)

    async def pending(self, round_id: str, limit: int = 1000) -> list[Submission]:
        """The submissions that await a verdict, oldest first."""
        ids = await self.valkey.call("ZRANGE", keys.round_key(round_id, "pending"), 0, limit - 1)
        if not ids:
            return []
        found = await self.valkey.call("HMGET", keys.round_key(round_id, "submissions"), *ids)
        return [Submission.model_validate_json(doc) for doc in found if doc is not None]

    # -- leases --------------------------------------------------------------------------------------------------------

    async def claim(self, worker_id: str, now: float) -> Lease | NoWork:
        """A lease of the lowest free shard of the oldest open round, or the lease that this worker holds already."""
        lease_id = f"l-{secrets.token_hex(8)}"
        reply = await self.valkey.call("EVAL", keys.CLAIM_LUA, 0, keys.PREFIX, worker_id, lease_id, f"{now:.6f}")
        if reply[0] == 1:
            return keys.parse_lease(dict(zip(reply[1::2], reply[2::2], strict=True)))
        if reply[1] == 0:
            return NoWork("No round is open.", NO_ROUND_RETRY_S)
        return NoWork("All shards of the open rounds are handed out.", NO_SHARD_RETRY_S)

    async def lease(self, lease_id: str) -> Lease:
        """Raises NotFoundError."""
        fields = await self.valkey.call("HGETALL", keys.lease_key(lease_id))
        if not fields:
            raise NotFoundError(f"no lease {lease_id}", remedy="Claim a new one.")
        return keys.parse_lease(fields)

    async def heartbeat(self, lease_id: str, worker_id: str, beat: Heartbeat, now: float) -> Pulse:
        """Keep a lease alive and note its progress.

        Raises:
            NotFoundError: no such lease.
            DeniedError: someone else's lease, or another fence.
            StateError: its delta was handed in, or it was returned.
        """

        def decide(lease: Lease, around: _Surroundings) -> leases.Event:
            _check_owner(lease, worker_id)
            return leases.Beat(beat.fence, around.lease_s, beat.step, beat.loss, beat.tokens_per_s)

        lease, around = await self._change_lease(lease_id, decide, now)
        useful, reason = leases.go_on(
            lease,
            round_state=around.round_state,
            newest_fence=around.newest_fence,
            accepted_by=around.accepted_by,
        )
        return Pulse(lease, useful, reason)

    async def give_back(self, lease_id: str, worker_id: str, fence: int, reason: str, now: float) -> Lease:
        """Return a shard unfinished: others can have it at once.

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

        Raises:
            NotFoundError: no such lease.
            DeniedError: someone else's lease, another fence, or a delta that was handed in with another lease.
            InputError: the submission is about another lease, round or shard.
            StateError: the lease has handed in another delta, another delta of the shard was accepted, or the round
                takes no more deltas.
            BusyError: the server has not written it to its disk in time: repeat.
        """
        statement = submission.statement

        def decide(lease: Lease, around: _Surroundings) -> leases.Event:
            _check_owner(lease, worker_id)
            told = (statement.lease_id, statement.round_id, submission.shard, submission.worker_id)
            if told != (lease.lease_id, lease.round_id, lease.shard, lease.worker_id):
                raise InputError(f"the submission is not about lease {lease_id}", remedy="Fill it in from the lease.")
            if around.handed_in_with not in (None, lease_id):
                raise DeniedError(
                    f"the delta {statement.sha256} was handed in with lease {around.handed_in_with}",
                    remedy="Hand in a delta that this lease trained.",
                )
            return leases.Submit(statement.fence, statement.sha256, around.round_state, around.accepted_by)

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
            key, shard = keys.round_key(lease.round_id), str(lease.shard)
            (state, lease_s), fence, accepted_by, handed_in_with = await self.valkey.read(
                ["HMGET", key, "state", "lease_s"],
                ["HGET", f"{key}:fences", shard],
                ["HGET", f"{key}:accepted", shard],
                ["HGET", keys.DIGESTS, digest],
            )
            if state is None:
                raise NotFoundError(f"no round {lease.round_id}")
            around = _Surroundings(RoundState(state), float(lease_s), int(fence), accepted_by, handed_in_with)
            changed, commands = leases.step(lease, decide(lease, around), now)
            if changed == lease and not commands:
                if durable:
                    # The first call may have failed for want of an fsync, and WAITAOF waits for writes of its own
                    # connection only: it needs one.
                    await self.valkey.commit([], [["SET", keys.BARRIER, lease_id]], durable=True)
                return lease, around
            conditions: list[keys.Condition] = [
                *_unchanged(lease),
                ["HGET", key, "state", state],
                ["HGET", f"{key}:accepted", shard, accepted_by],
                ["HGET", keys.DIGESTS, digest, handed_in_with],
            ]
            writes = keys.lease_writes(changed, commands, submission=submission, receipt=receipt)
            if await self.valkey.commit(conditions, writes, durable=durable):
                return replace(changed, rev=lease.rev + 1), around
            await back_off(attempt)
        raise lost_every_race(f"lease {lease_id}")

    async def _store_facts(self, status: RoundStatus, facts: RoundFacts) -> bool:
        round_id = status.record.round_id
        created_at = float(await self.valkey.call("HGET", keys.round_key(round_id), "created_at"))
        return await self.valkey.commit(
            keys.round_conditions(round_id, status.rev, status.facts, facts),
            keys.round_writes(round_id, status.rev, facts, created_at),
        )

    async def _statuses(self, round_ids: Sequence[str]) -> list[RoundStatus]:
        records = await self._load_records(round_ids)
        reads: list[list[str]] = []
        for round_id in round_ids:
            key = keys.round_key(round_id)
            reads += [["HGETALL", key], ["ZCARD", f"{key}:free"], ["ZCARD", f"{key}:expiry"]]
            reads += [["ZCARD", f"{key}:pending"], ["HLEN", f"{key}:accepted"]]
        replies = await self.valkey.read(*reads)
        statuses = []
        for record, start in zip(records, range(0, len(replies), 5), strict=True):
            fields, freed, leased, submitted, accepted = replies[start : start + 5]
            if not fields:  # The server lost its data while the record was kept here.
                raise NotFoundError(f"no round {record.round_id}")
            facts = keys.parse_facts(fields, freed=freed, leased=leased, submitted=submitted, accepted=accepted)
            statuses.append(RoundStatus(record, facts, int(fields["rev"])))
        return statuses

    async def _load_records(self, round_ids: Sequence[str]) -> list[RoundRecord]:
        missing = [round_id for round_id in round_ids if round_id not in self._records]
        docs = await self.valkey.read(*(["GET", keys.round_key(round_id, "record")] for round_id in missing))
        for round_id, doc in zip(missing, docs, strict=True):
            if doc is None:
                raise NotFoundError(f"no round {round_id}")
            self._records[round_id] = RoundRecord.model_validate_json(doc)
        found = [self._records[round_id] for round_id in round_ids]
        while len(self._records) > RECORDS_KEPT:
            del self._records[next(iter(self._records))]
        return found


def _check_owner(lease: Lease, worker_id: str) -> None:
    if lease.worker_id != worker_id:
        raise DeniedError(f"lease {lease.lease_id} belongs to another worker", remedy="Claim a lease of your own.")


def _unchanged(lease: Lease) -> list[keys.Condition]:
    return [["HGET", keys.lease_key(lease.lease_id), "rev", str(lease.rev)]]
