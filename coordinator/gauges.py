"""What the gauges show: rounds, leases, queues and versions, read from the ledger and from object storage.

What always holds: however often somebody scrapes, the servers behind are read once in `TTL_S`; at most `MAX_ROUNDS`
rounds and `MAX_MODELS` models are shown, the oldest rounds first. Without the ledger there is no reading (it raises);
without object storage the gauges of models are missing and `rankup_object_storage_up` is 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from starlette.concurrency import run_in_threadpool

from coordinator.catalogue import Catalogue
from coordinator.ledger import Ledger, RoundStatus
from coordinator.metrics import (
    MODEL_UPDATED,
    MODEL_VERSION,
    OLDEST_PENDING,
    OLDEST_ROUND,
    ROUND_DEADLINE,
    ROUND_FAILURES,
    ROUND_LEASES,
    ROUND_QUORUM,
    ROUND_SHARDS,
    ROUND_STATE,
    STORE_UP,
    UNFINISHED,
    Reading,
)
from rankup.errors import RankupError
from rankup.protocol import RoundState

TTL_S = 5.0
MAX_ROUNDS = 64
MAX_MODELS = 64


class Gauges:
    """The readings of one replica. `clock` gives Unix seconds."""

    def __init__(
        self, connect: Callable[[], Awaitable[Ledger]], catalogue: Catalogue, *, clock: Callable[[], float]
    ) -> None:
        self._connect = connect
        self._catalogue = catalogue
        self._clock = clock
        self._turn = asyncio.Lock()
        self._kept: tuple[float, tuple[Reading, ...]] | None = None

    async def read(self) -> tuple[Reading, ...]:
        """All readings, at most `TTL_S` old. Raises what the ledger raises."""
        async with self._turn:
            now = self._clock()
            if self._kept is None or not 0 <= now - self._kept[0] < TTL_S:
                rounds = [reading async for reading in _of_rounds(await self._connect(), now)]
                self._kept = now, (*rounds, *await run_in_threadpool(_of_models, self._catalogue))
            return self._kept[1]


async def _of_rounds(ledger: Ledger, now: float) -> AsyncIterator[Reading]:
    unfinished = await ledger.unfinished()
    live = [status for status in unfinished if not status.facts.state.ended]
    for status in live[:MAX_ROUNDS]:
        for reading in _of_round(status):
            yield reading
    oldest = [
        submission.submitted_at
        for status in live
        if status.facts.counts.submitted
        for submission in await ledger.pending(status.record.round_id, limit=1)
    ]
    opened = [status.facts.opened_at for status in live if status.facts.state is not RoundState.DRAFT]
    yield Reading(UNFINISHED, (), len(unfinished))
    yield Reading(OLDEST_PENDING, (), _age(oldest, now))
    yield Reading(OLDEST_ROUND, (), _age(opened, now))


def _of_round(status: RoundStatus) -> Iterator[Reading]:
    facts, counts = status.facts, status.facts.counts
    name = (status.record.request.model, status.record.round_id)
    leases = {"granted": counts.leased, "submitted": counts.submitted}
    leases |= {"accepted": counts.accepted, "rejected": counts.rejected}
    for state, number in leases.items():
        yield Reading(ROUND_LEASES, (*name, state), number)
    # A late submission can make a shard both free and accepted for a moment.
    held = max(0, facts.shards - counts.free - counts.accepted)
    for state, number in {"free": counts.free, "held": held, "accepted": counts.accepted}.items():
        yield Reading(ROUND_SHARDS, (*name, state), number)
    yield Reading(ROUND_STATE, (*name, facts.state.value), 1)
    yield Reading(ROUND_QUORUM, name, facts.quorum)
    yield Reading(ROUND_DEADLINE, name, facts.deadline_at)
    yield Reading(ROUND_FAILURES, name, facts.failures)


def _age(times: Sequence[float], now: float) -> float:
    return max(0.0, now - min(times)) if times else 0.0


def _of_models(catalogue: Catalogue) -> list[Reading]:
    found = []
    try:
        for model in catalogue.models()[:MAX_MODELS]:
            pointer = catalogue.pointer(model)
            found.append(Reading(MODEL_VERSION, (model,), pointer.version))
            found.append(Reading(MODEL_UPDATED, (model,), pointer.updated_at))
    except RankupError:
        return [Reading(STORE_UP, (), 0)]
    return [*found, Reading(STORE_UP, (), 1)]
