"""Rounds in the ledger: their records, what their machine knows, receipts and what awaits a verdict.

The part of `coordinator.ledger` that knows no lease. The rules are `coordinator.rounds`: a change goes read, step
(pure), store by compare-and-set with every count that the step looked at among the conditions, and again from the start
if somebody else was faster. Every method raises what `coordinator.valkey` raises.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, Self

from coordinator import ledger_keys as keys
from coordinator.ledger_types import RoundStatus
from coordinator.rounds import Command, Event, Open, Pause, RoundFacts, Tick, draft
from coordinator.rounds import step as step_round
from coordinator.valkey import ATTEMPTS, Valkey, back_off, lost_every_race
from rankup.errors import BusyError, NotFoundError
from rankup.message import canonical_json
from rankup.records import Receipt, RoundRecord, Submission
from rankup.settings import LedgerSettings

RECORDS_KEPT: Final = 128


class RoundLedger:
    """The rounds of one server. `coordinator.ledger.Ledger` is the whole of it."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
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

    async def create_round(
        self,
        record: RoundRecord,
        now: float,
        *,
        as_draft: bool = False,
        paused: bool = False,
        after: str | None = None,
    ) -> RoundStatus:
        """Store a round and open it (unless `as_draft`); one that exists stays as it is.

        `after` names the round before it in the campaign: with this one stored, that one owes nothing more.
        """
        facts = draft(record)
        if paused:
            facts, _ = step_round(facts, Pause(), now)
        if not as_draft:
            facts, _ = step_round(facts, Open(), now)
        round_id = record.round_id
        key = keys.round_key(round_id)
        request = record.request
        done = [["ZREM", keys.UNFINISHED_ROUNDS, after]] if after is not None else []
        fresh = ["shards", str(facts.shards), "lease_s", repr(request.lease_s)]
        fresh += ["steps", str(request.recipe.steps), "next", "0", "rejected", "0"]
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
        return (await self.records([round_id]))[0]

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
                return replace(status, facts=facts, rev=status.rev + 1), commands
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

    @asynccontextmanager
    async def alone(self, what: str, for_s: float) -> AsyncIterator[None]:
        """Do `what` while nobody else does it, for at most `for_s` seconds. Raises BusyError while somebody does."""
        key, mark = keys.lock_key(what), secrets.token_hex(8)
        if await self.valkey.call("SET", key, mark, "NX", "PX", int(for_s * 1000)) is None:
            raise BusyError(f"somebody else is {what} at the moment", remedy="Try again.", retry_after_s=1.0)
        try:
            yield
        finally:
            await self.valkey.commit([["GET", key, mark]], [["DEL", key]])

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _store_facts(self, status: RoundStatus, facts: RoundFacts) -> bool:
        round_id = status.record.round_id
        created_at = float(await self.valkey.call("HGET", keys.round_key(round_id), "created_at"))
        return await self.valkey.commit(
            keys.round_conditions(round_id, status.rev, status.facts, facts),
            keys.round_writes(round_id, status.rev, facts, created_at),
        )

    async def _statuses(self, round_ids: Sequence[str]) -> list[RoundStatus]:
        records = await self.records(round_ids)
        reads: list[list[str]] = []
        for round_id in round_ids:
            key = keys.round_key(round_id)
            reads += [["HGETALL", key], ["ZCARD", f"{key}:free"], ["ZCARD", f"{key}:expiry"]]
            reads += [["ZCARD", f"{key}:pending"], ["HLEN", f"{key}:accepted"], ["HLEN", f"{key}:receipts"]]
        replies = await self.valkey.read(*reads)
        statuses = []
        for record, start in zip(records, range(0, len(replies), 6), strict=True):
            fields, freed, leased, submitted, accepted, contributions = replies[start : start + 6]
            if not fields:  # The server lost its data while the record was kept here.
                raise NotFoundError(f"no round {record.round_id}")
            facts = keys.parse_facts(
                fields,
                freed=freed,
                leased=leased,
                submitted=submitted,
                accepted=accepted,
                contributions=contributions,
            )
            told = int(fields.get("told_shards", 0))
            shard_s = float(fields["told_seconds"]) / told if told else None
            statuses.append(RoundStatus(record, facts, int(fields["rev"]), shard_s))
        return statuses

    async def records(self, round_ids: Sequence[str]) -> list[RoundRecord]:
        """What was fixed when these rounds opened. Raises NotFoundError."""
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
