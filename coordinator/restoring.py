"""One restore of the ledger, step by step: `coordinator.rebuild` says what holds of the whole.

    mark  ->  people  ->  away with what a restore before this one left  ->  each round as a draft: verdicts, queue,
    free shards, fences  ->  all rounds into their states, the mark away: one step

Verdicts go through `leases.step` and `ledger_keys.lease_writes` as they did the first time. Every write but those of
people asks for the mark, so a restore that another one has overtaken writes nothing more.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import structlog

from coordinator import leases
from coordinator import ledger_keys as keys
from coordinator.actions import Membership
from coordinator.catalogue import read_manifest
from coordinator.leases import Lease
from coordinator.ledger import Ledger
from coordinator.ledger_types import Worker
from coordinator.opening import next_round_id
from coordinator.pace import mean_speed
from coordinator.traces import Trace, read_cohort, read_round
from coordinator.unjudged import read_submission
from rankup.errors import ConflictError, IntegrityError
from rankup.protocol import DeviceProfile, LeaseState, Pointer, RoundState, Standing
from rankup.records import Receipt, RoundRecord, Submission
from rankup.store import Store
from rankup.stored import read_record
from rankup.versions import receipt_key, receipt_prefix, submission_prefix

PARALLEL: Final = 16
BATCH: Final = 200
"""Receipts whose writes are made in one step."""
AT_ONCE: Final = 64
"""Workers that are written at the same time."""
SPAN: Final = 1000
"""Shards that are named in one write."""
FENCE_STEP: Final = 2**20
"""Above what is known of a shard; and above the milliseconds of the clock, for what an earlier restore began with."""
REBUILDING: Final = keys.PREFIX + "rebuilding"
"""The mark of the restore that is under way, or was cut off."""
_BEGUN: Final = ("rounds", "rounds:open", "rounds:unfinished", "digests", "live", "delivering", "idle", "board")
_BEGUN_SCORES: Final = ("board:credit", "teams:credit", "settled", "settled:rounds")
_BEGUN_PATTERNS: Final = ("round:*", "lease:*", "worker:*:score", "worker:*:contributions")
_JUDGED_IN: Final = RoundState.CLOSING
"""A round in which every verdict was possible."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is in all (0: not known)."""

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a restore brings back."""

    rounds: tuple[Trace, ...]
    """Oldest first."""
    membership: Membership
    publisher_key: str | None

    @property
    def verdicts(self) -> int:
        return sum(trace.verdicts for trace in self.rounds)

    @property
    def unjudged(self) -> int:
        return sum(trace.unjudged for trace in self.rounds)


@dataclass
class Restored:
    """What was brought back."""

    rounds: dict[str, int] = field(default_factory=dict)
    """State -> how many."""
    accepted: int = 0
    rejected: int = 0
    queued: int = 0
    """Submissions that await their verdict again."""
    workers: int = 0
    invites: int = 0


class Restore:
    """One restore, under a mark of its own in the ledger."""

    def __init__(
        self, ledger: Ledger, store: Store, found: Plan, now: float, tell: Progress, pool: ThreadPoolExecutor
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._plan = found
        self._now = now
        self._tell = tell
        self._pool = pool
        self._mark = secrets.token_hex(8)
        self._done = Restored()
        self._names = {trace.round_id for trace in found.rounds}
        self._told = 0
        self._speeds: dict[tuple[str, str], float | None] = {}
        self._enrolled = found.membership.workers
        self._workers: dict[str, Worker] = dict(self._enrolled)
        self._publish: list[list[str]] = []
        """The writes of the last step."""

    async def run(self) -> Restored:
        await self._ledger.valkey.call("SET", REBUILDING, self._mark)
        # Who is in which team must be known before the bookkeeper of a running server sees the rounds.
        await self._people()
        await self._clear()
        for trace in self._plan.rounds:
            await self._round(trace)
        await self._bring_back([one for one in self._workers.values() if one.worker_id not in self._enrolled])
        await self._commit([*self._publish, ["DEL", REBUILDING]], durable=True)
        self._done.workers, self._done.invites = len(self._workers), len(self._plan.membership.invites)
        log.info("ledger_restored", rounds=sum(self._done.rounds.values()), accepted=self._done.accepted)
        return self._done

    async def _commit(self, writes: Sequence[keys.Row], *, durable: bool = False) -> None:
        if not await self._ledger.valkey.commit([["GET", REBUILDING, self._mark]], writes, durable=durable):
            raise ConflictError("somebody else has begun to restore the ledger", remedy="Wait until that is done.")

    async def _clear(self) -> None:
        """Away with what a restore before this one left."""
        valkey = self._ledger.valkey
        await self._commit([["DEL", *(keys.PREFIX + name for name in (*_BEGUN, *_BEGUN_SCORES))]])
        for pattern in _BEGUN_PATTERNS:
            cursor = "0"
            while True:
                cursor, page = await valkey.call("SCAN", cursor, "MATCH", keys.PREFIX + pattern, "COUNT", SPAN)
                if page:
                    await self._commit([["DEL", *page]])
                if str(cursor) == "0":
                    break

    # rounds

    async def _round(self, trace: Trace) -> None:
        record = await asyncio.to_thread(read_round, self._store, trace.round_id)
        await self._ledger.create_round(record, trace.opened_at, as_draft=True)
        counted = await asyncio.to_thread(self._counted, trace, record)
        receipts = await asyncio.to_thread(self._receipts, trace)
        shards = _Shards()
        for batch in _batches(_in_order(receipts, counted), BATCH):
            writes: list[keys.Row] = []
            for receipt in batch:
                writes += self._verdict(trace, record, receipt, shards, counted)
            await self._commit(writes)
            self._count("restoring verdicts", len(batch))
        judged = {one.submission.statement.lease_id for one in receipts}
        for waiting in _batches(await asyncio.to_thread(self._unjudged, trace, judged), BATCH):
            await self._commit([row for one in waiting for row in self._queue(trace, record, one, shards)])
        for row in shards.rest(trace, len(record.shards), self._now):
            await self._commit([row])
        state = trace.facts.state
        self._done.rounds[state.value] = self._done.rounds.get(state.value, 0) + 1
        # A draft is stored once, so its revision is 1.
        self._publish += keys.round_writes(trace.round_id, 1, trace.facts, trace.opened_at)
        if trace.facts.recorded and next_round_id(record, record.index + 1) in self._names:
            self._publish.append(["ZREM", keys.UNFINISHED_ROUNDS, trace.round_id])

    def _counted(self, trace: Trace, record: RoundRecord) -> frozenset[str] | None:
        """The contributions that count, where that was decided."""
        if trace.has_cohort:
            return frozenset(member.contribution for member in read_cohort(self._store, trace.round_id).members)
        if trace.made is None:
            return None
        made = Pointer(
            model=record.request.model, version=trace.made.version, manifest=trace.made.digest, updated_at=0.0
        )
        return frozenset(term.contribution for term in read_manifest(self._store, made).terms)

    def _receipts(self, trace: Trace) -> list[Receipt]:
        prefix = receipt_prefix(trace.round_id)
        return list(self._pool.map(partial(_read_receipt, self._store, trace.round_id), self._store.list(prefix)))

    def _unjudged(self, trace: Trace, judged: set[str]) -> list[Submission]:
        found = self._pool.map(
            partial(read_submission, self._store, trace.round_id), self._store.list(submission_prefix(trace.round_id))
        )
        waiting = (one for one in found if one.statement.lease_id not in judged)
        return sorted(waiting, key=lambda one: (one.submitted_at, one.statement.lease_id))

    def _verdict(
        self, trace: Trace, record: RoundRecord, receipt: Receipt, shards: _Shards, counted: frozenset[str] | None
    ) -> list[keys.Row]:
        submission = receipt.submission
        lease, writes = self._handed_in(trace, record, submission, shards)
        contribution, accepted, reason = submission.statement.sha256, receipt.accepted, receipt.reason
        taken_by = shards.taken_by(lease)
        if accepted and taken_by is None and counted is not None and contribution not in counted:
            accepted, reason = False, "it was not among the contributions of which the round was made"
        event = leases.Judge(contribution, accepted, reason, _JUDGED_IN, taken_by)
        judged, commands = leases.step(lease, event, receipt.judged_at)
        if judged.state is LeaseState.ACCEPTED:
            self._done.accepted += 1
            shards.take(judged)
        else:
            self._done.rejected += 1
        return [*writes, *keys.lease_writes(judged, commands, receipt=receipt)]

    def _queue(self, trace: Trace, record: RoundRecord, submission: Submission, shards: _Shards) -> list[keys.Row]:
        """Queue it again, or refuse it where its round judges nothing any more."""
        lease, writes = self._handed_in(trace, record, submission, shards)
        facts = trace.facts
        if facts.state in leases.TAKES_SUBMISSIONS:
            self._done.queued += 1
            shards.hold(lease)
            return writes
        reason = f"the round is {facts.state.value}: {facts.reason}"
        refusal = leases.Judge(submission.statement.sha256, False, reason, facts.state)
        refused, commands = leases.step(lease, refusal, self._now)
        self._done.rejected += 1
        return [*writes, *keys.lease_writes(refused, commands)]

    def _handed_in(
        self, trace: Trace, record: RoundRecord, submission: Submission, shards: _Shards
    ) -> tuple[Lease, list[keys.Row]]:
        """The lease after its submission, with the writes that store it."""
        said, worker_id = submission.statement, submission.worker_id
        self._meet(submission)
        lease = Lease(
            lease_id=said.lease_id,
            fence=said.fence,
            round_id=said.round_id,
            shard=submission.shard,
            worker_id=worker_id,
            state=LeaseState.EXPIRED,
            granted_at=submission.submitted_at - said.seconds,
            expires_at=submission.submitted_at,
            shards=submission.shards,
            rank=submission.rank,
            step=said.steps,
            loss=said.last_loss,
        )
        here = said.round_id == trace.round_id
        event = leases.Submit(
            said.fence,
            said.sha256,
            _JUDGED_IN if here else RoundState.PUBLISHED,
            taker=None if here else trace.round_id,
        )
        handed_in, commands = leases.step(lease, event, submission.submitted_at)
        shards.touch(handed_in)
        model = record.request.model
        before = self._speeds.get((worker_id, model))
        pace = self._speeds[worker_id, model] = mean_speed(before, said.tokens, said.seconds)
        speed = (model, pace) if pace is not None else None
        return handed_in, keys.lease_writes(handed_in, commands, submission=submission, speed=speed)

    # people

    def _meet(self, submission: Submission) -> None:
        """A worker of which no enrolment is kept is known by what it handed in."""
        if submission.worker_id not in self._workers:
            self._workers[submission.worker_id] = Worker(
                worker_id=submission.worker_id,
                name=submission.worker_name,
                public_key=submission.public_key,
                device=DeviceProfile(),
                enrolled_at=submission.submitted_at,
            )

    async def _people(self) -> None:
        await self._bring_back(list(self._enrolled.values()))
        for invite in self._plan.membership.invites.values():
            await self._ledger.people.invites.restore(invite)
        for team in self._plan.membership.closed_teams:
            await self._ledger.people.invites.close_team(team)

    async def _bring_back(self, workers: Sequence[Worker]) -> None:
        people = self._ledger.people

        async def bring_back(worker: Worker) -> None:
            await people.restore(worker)
            if worker.standing is not Standing.MEMBER:
                # It may have enrolled in the empty ledger, which knew of no standing.
                await people.set_standing(worker.worker_id, worker.standing, self._now, worker.note)

        for number, some in enumerate(_batches(workers, AT_ONCE)):
            await asyncio.gather(*map(bring_back, some))
            self._tell("restoring workers", number * AT_ONCE + len(some), len(workers))

    def _count(self, what: str, more: int) -> None:
        self._told += more
        self._tell(what, self._told, max(self._told, self._plan.verdicts))


class _Shards:
    """What became of the shards of one round, and of those of earlier rounds whose late deltas it took."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], str] = {}
        self._fences: dict[int, int] = {}
        self._held: set[int] = set()

    def touch(self, lease: Lease) -> None:
        if lease.trained_for is None:
            for shard in lease.numbers:
                self._fences[shard] = max(self._fences.get(shard, 0), lease.fence)

    def take(self, lease: Lease) -> None:
        self._taken.update({(lease.home, shard): lease.lease_id for shard in lease.numbers})

    def hold(self, lease: Lease) -> None:
        if lease.trained_for is None:
            self._held.update(lease.numbers)

    def taken_by(self, lease: Lease) -> str | None:
        return next((self._taken[lease.home, n] for n in lease.numbers if (lease.home, n) in self._taken), None)

    def rest(self, trace: Trace, count: int, now: float) -> Iterator[keys.Row]:
        """Writes that make every other shard free, and fence off what was granted and is forgotten."""
        round_id, over = trace.round_id, trace.facts.state.ended
        # Nobody asks for the shards of a round that has ended: those that nobody touched stay unnamed.
        known = max(self._fences, default=-1) + 1 if over else count
        settled = self._held | {shard for home, shard in self._taken if home == round_id}
        free = [str(shard) for shard in range(known) if shard not in settled]
        for names in _batches(free, SPAN):
            yield ["ZADD", keys.round_key(round_id, "free"), *(word for name in names for word in (name, name))]
        at_least = FENCE_STEP + int(now * 1000)
        fences = {
            shard: max(at_least, FENCE_STEP + self._fences.get(shard, 0)) for shard in (() if over else range(known))
        }
        for pairs in _batches(fences.items(), SPAN):
            yield ["HSET", keys.round_key(round_id, "fences"), *(str(word) for pair in pairs for word in pair)]
        yield ["HSET", keys.round_key(round_id), "next", str(known)]


def _in_order(receipts: Iterable[Receipt], counted: frozenset[str] | None) -> list[Receipt]:
    """As they were judged; those that were accepted and then did not count come last."""

    def rank(receipt: Receipt) -> tuple[bool, float, str]:
        contribution = receipt.submission.statement.sha256
        passed_over = receipt.accepted and counted is not None and contribution not in counted
        return passed_over, receipt.judged_at, contribution

    return sorted(receipts, key=rank)


def _read_receipt(store: Store, round_id: str, key: str) -> Receipt:
    receipt = read_record(store, key, Receipt)
    if key != receipt_key(round_id, receipt.submission.statement.sha256):
        raise IntegrityError(
            f"{key} in object storage is not what its name says",
            remedy="Restore it from a backup, or move it away: what it says is lost then.",
        )
    return receipt


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
