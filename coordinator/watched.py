"""What many people look at at once: the leases under way in a round, read once a second however many ask.

What always holds: an answer is at most `FRESH_S` old and lists at most `LEASES_SHOWN` leases; those who ask at the same
time share one reading; no more than `ROUNDS_KEPT` rounds are remembered. It tells names and progress, no ids.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from coordinator.leases import Lease
from coordinator.ledger import Ledger
from rankup.protocol import LeaseProgress, LeasesAtWork
from rankup.records import RoundRecord

FRESH_S: Final = 1.0
LEASES_SHOWN: Final = 100
ROUNDS_KEPT: Final = 64


class Watched:
    """`ledger` connects, or gives the connected one; `clock` gives Unix seconds, `monotonic` seconds that only grow."""

    def __init__(
        self,
        ledger: Callable[[], Awaitable[Ledger]],
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._monotonic = monotonic
        self._kept: dict[str, tuple[float, asyncio.Task[LeasesAtWork]]] = {}

    async def leases(self, round_id: str) -> LeasesAtWork:
        """Raises NotFoundError, and what the ledger raises."""
        read_at, reading = self._kept.get(round_id, (0.0, None))
        if reading is None or self._monotonic() - read_at > FRESH_S or _failed(reading):
            self._kept.pop(round_id, None)
            while len(self._kept) >= ROUNDS_KEPT:
                del self._kept[next(iter(self._kept))]
            reading = asyncio.create_task(self._read(round_id))
            self._kept[round_id] = (self._monotonic(), reading)
        return await asyncio.shield(reading)

    async def _read(self, round_id: str) -> LeasesAtWork:
        ledger = await self._ledger()
        status = await ledger.round(round_id)
        found = await ledger.at_work(round_id, LEASES_SHOWN)
        return LeasesAtWork(
            round_id=round_id,
            at=self._clock(),
            total=max(status.facts.counts.leased, len(found)),
            leases=tuple(progress(lease, name, status.record) for lease, name in found),
        )


def _failed(reading: asyncio.Task[LeasesAtWork]) -> bool:
    return reading.done() and (reading.cancelled() or reading.exception() is not None)


def progress(lease: Lease, name: str, record: RoundRecord) -> LeaseProgress:
    """A lease as everybody may see it. Every sign of life puts its end off by the round's `lease_s`."""
    steps = record.request.recipe.steps * lease.shards
    seen_at = max(lease.granted_at, lease.expires_at - record.request.lease_s)
    done_at = None
    if 0 < lease.step <= steps:
        done_at = seen_at + (seen_at - lease.granted_at) * (steps - lease.step) / lease.step
    return LeaseProgress(
        name=name,
        shard=lease.shard,
        shards=lease.shards,
        step=lease.step,
        steps=steps,
        loss=lease.loss,
        tokens_per_s=lease.tokens_per_s,
        grad_norm=lease.grad_norm,
        energy_j=lease.energy_j,
        granted_at=lease.granted_at,
        seen_at=seen_at,
        done_at=done_at,
    )
