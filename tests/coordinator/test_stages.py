"""The stopwatch around the aggregator: it counts, and changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator.examples import EXAMPLES
from coordinator.metrics import Tally
from coordinator.stages import MeasuredAggregator, reason_class
from rankup.errors import UnreachableError
from rankup.protocol import SubmitRequest
from rankup.records import Check, Receipt, Submission

SUBMIT = EXAMPLES["/v1/leases/{lease_id}/submit"]


def receipt(*checks: tuple[str, bool], accepted: bool = False) -> Receipt:
    assert isinstance(SUBMIT, SubmitRequest)
    submission = Submission(
        statement=SUBMIT.statement,
        signature=SUBMIT.signature,
        public_key="d7" * 32,
        worker_id="w-1",
        worker_name="ada",
        shard=1,
        submitted_at=1.0,
    )
    return Receipt(
        submission=submission,
        accepted=accepted,
        reason="in plain words, with numbers: 12",
        checks=tuple(Check(name=name, passed=passed) for name, passed in checks),
        judged_at=2.0,
    )


class Scripted:
    """An aggregator that answers with what it is given, or raises it."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def _give(self, *_: Any) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    admit = fold = evaluate = publish = _give


CLASSES = {
    "accepted": (receipt(("size", True), accepted=True), "accepted"),
    "a check failed": (receipt(("size", True), ("norm", False)), "norm"),
    "an audit failed": (receipt(("size", True), ("norm", True), ("audit", False)), "audit"),
    "nothing was there to check": (receipt(), "upload"),
    "a check that is not known here": (receipt(("moon-phase", False)), "other"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_verdicts_are_counted_by_class_and_never_by_their_words(name: str) -> None:
    given, expected = CLASSES[name]
    tally = Tally()
    measured = MeasuredAggregator(Scripted(given), tally)
    assert asyncio.run(measured.admit(None, given.submission, 0.0, 0)) is given  # type: ignore[arg-type]
    assert reason_class(given) == expected
    counted = tally.take()
    verdict = "accepted" if given.accepted else "rejected"
    assert counted["rankup_admission_verdicts_total", verdict, expected] == 1
    assert sum(value for cell, value in counted.items() if cell[:2] == ("rankup_stage_duration_seconds", "admit")) >= 1


def test_every_stage_is_timed_and_a_failure_is_counted_by_its_code() -> None:
    tally = Tally()
    good = MeasuredAggregator(Scripted("answer"), tally)
    for call in (good.fold(None, (), 0.0), good.evaluate(None, None), good.publish(None)):  # type: ignore[arg-type]
        assert asyncio.run(call) == "answer"
    assert {cell[1] for cell in tally.take()} == {"fold", "evaluate", "publish"}
    for error, code in [(UnreachableError("x"), "unreachable"), (ValueError("x"), "other")]:
        bad = MeasuredAggregator(Scripted(error), tally)
        with pytest.raises(type(error)):
            asyncio.run(bad.fold(None, (), 0.0))  # type: ignore[arg-type]
        assert tally.take() == {("rankup_stage_failures_total", "fold", code): 1.0}
