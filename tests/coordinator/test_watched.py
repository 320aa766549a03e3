"""What many look at is read once a second, and a reading that failed is not kept."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.leases import Lease
from coordinator.watched import FRESH_S, LEASES_SHOWN, ROUNDS_KEPT, Watched, progress
from rankup.errors import NotFoundError, UnreachableError
from rankup.protocol import LeaseState, RoundRequest
from rankup.recipe import Recipe
from rankup.records import BlobRef, RoundRecord

NOW = 1_000_000.0
REQUEST = RoundRequest(model="tiny", dataset="docs", recipe=Recipe(steps=20), lease_s=60.0)
RECORD = RoundRecord(
    round_id="r1",
    request=REQUEST,
    index=0,
    base_version=0,
    base_manifest="0" * 64,
    shards=(BlobRef(sha256="1" * 64, size_bytes=1),),
    targets={},
    opened_at=NOW,
)
LEASE = Lease("l-1", 1, "r1", 0, "w-1", LeaseState.GRANTED, NOW, NOW + 60.0)


class Reads:
    """A ledger that counts how often it is read, and may fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.error: Exception | None = None

    async def round(self, round_id: str) -> Any:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(record=RECORD, facts=SimpleNamespace(counts=SimpleNamespace(leased=150)))

    async def at_work(self, round_id: str, limit: int) -> list[tuple[Lease, str]]:
        self.asked.append((round_id, limit))
        return [(LEASE, "ada")]


def watched(reads: Reads, times: list[float]) -> Watched:
    async def ledger() -> Any:
        return reads

    return Watched(ledger, clock=lambda: NOW, monotonic=lambda: times[0])


def test_many_who_ask_within_a_second_share_one_reading() -> None:
    async def scenario() -> None:
        reads, times = Reads(), [5.0]
        board = watched(reads, times)
        answers = await asyncio.gather(*(board.leases("r1") for _ in range(20)))
        assert len({id(answer) for answer in answers}) == 1
        times[0] += FRESH_S
        await board.leases("r1")
        assert reads.asked == [("r1", LEASES_SHOWN)]
        times[0] += 0.01
        assert (await board.leases("r1")).total == 150
        assert len(reads.asked) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [UnreachableError("away"), NotFoundError("no round")])
def test_a_reading_that_failed_is_told_and_tried_again(error: Exception) -> None:
    async def scenario() -> None:
        reads = Reads()
        board = watched(reads, [5.0])
        reads.error = error
        with pytest.raises(type(error)):
            await board.leases("r1")
        reads.error = None
        assert (await board.leases("r1")).leases[0].name == "ada"

    asyncio.run(scenario())


def test_one_who_hangs_up_takes_nobody_elses_answer_away() -> None:
    async def scenario() -> None:
        board = watched(Reads(), [5.0])
        first = asyncio.create_task(board.leases("r1"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await board.leases("r1")).leases

    asyncio.run(scenario())


def test_names_of_rounds_that_nobody_asks_for_any_more_are_forgotten() -> None:
    async def scenario() -> None:
        board = watched(Reads(), [5.0])
        for number in range(ROUNDS_KEPT + 5):
            await board.leases(f"r{number}")
        assert len(board._kept) == ROUNDS_KEPT

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("step", "shards", "expires_at", "seen_at", "done_at"),
    [
        (0, 1, NOW + 60, NOW, None),
        (5, 1, NOW + 70, NOW + 10, NOW + 40),  # 5 of 20 steps in 10 s: 30 s more
        (5, 2, NOW + 70, NOW + 10, NOW + 80),
        (20, 1, NOW + 100, NOW + 40, NOW + 40),
        (99, 1, NOW + 100, NOW + 40, None),  # More steps than there are say nothing about the end.
        (5, 1, NOW - 500, NOW, NOW),  # A clock that went back.
    ],
)
def test_the_end_of_a_lease_follows_from_its_pace(
    step: int, shards: int, expires_at: float, seen_at: float, done_at: float | None
) -> None:
    shown = progress(replace(LEASE, step=step, shards=shards, expires_at=expires_at), "ada", RECORD)
    assert (shown.steps, shown.seen_at, shown.done_at) == (20 * shards, seen_at, done_at)
