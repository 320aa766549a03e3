"""The aggregator with a stopwatch: how long each stage of a round took, how often it failed, and what was decided.

What always holds: answers and errors pass through unchanged; a stage that is repeated after a crash counts again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from coordinator.metrics import OTHER, REASONS, STAGE_FAILURES, STAGE_SECONDS, VERDICTS, Tally, error_code
from rankup.errors import RankupError
from rankup.protocol import Pointer
from rankup.records import Evaluation, Manifest, Receipt, RoundRecord, Submission

if TYPE_CHECKING:
    from coordinator.keeper import Aggregator


def reason_class(receipt: Receipt) -> str:
    """Why a contribution was accepted or not: one of `metrics.REASONS` or "other", never the words of the verdict."""
    if receipt.accepted:
        return "accepted"
    failed = next((check.name for check in receipt.checks if not check.passed), "upload")
    return failed if failed in REASONS else OTHER


class MeasuredAggregator:
    """Another aggregator, measured."""

    def __init__(self, inner: Aggregator, tally: Tally) -> None:
        self._inner = inner
        self._tally = tally

    async def admit(self, record: RoundRecord, submission: Submission, now: float, valid_in_a_row: int) -> Receipt:
        with self._stage("admit"):
            receipt = await self._inner.admit(record, submission, now, valid_in_a_row)
        self._tally.add(VERDICTS, "accepted" if receipt.accepted else "rejected", reason_class(receipt))
        return receipt

    async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
        with self._stage("fold"):
            return await self._inner.fold(record, receipts, now)

    async def evaluate(self, record: RoundRecord, manifest: Manifest) -> Evaluation:
        with self._stage("evaluate"):
            return await self._inner.evaluate(record, manifest)

    async def publish(self, manifest: Manifest) -> Pointer:
        with self._stage("publish"):
            return await self._inner.publish(manifest)

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception as exc:
            code = error_code(exc.code) if isinstance(exc, RankupError) else OTHER
            self._tally.add(STAGE_FAILURES, stage, code)
            raise
        self._tally.observe(STAGE_SECONDS, stage, value=time.perf_counter() - started)
