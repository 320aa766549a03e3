"""What follows a failure of the trainer."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from worker.job import TrainerExit
from worker.recovery import MAX_TRIES, Again, after_failure

CASES = {
    "memory: half of the batch": (TrainerExit.OUT_OF_MEMORY, 1, 8, False, Again(4, 0.0)),
    "the system killed it: the same": (-signal.SIGKILL, 2, 4, True, Again(2, 0.0)),
    "memory, but nothing left to halve": (TrainerExit.OUT_OF_MEMORY, 2, 1, True, None),
    "a crash before any checkpoint": (TrainerExit.CRASHED, 1, 4, False, None),
    "a crash after a new checkpoint": (TrainerExit.CRASHED, 1, 4, True, Again(4, 2.0)),
    "a segmentation fault after one": (-signal.SIGSEGV, 2, 4, True, Again(4, 2.0)),
    "the first failure of the device": (TrainerExit.DEVICE_FAILED, 1, 4, False, Again(4, 10.0)),
    "too many starts": (TrainerExit.OUT_OF_MEMORY, MAX_TRIES, 64, True, None),
    "a base that does not fit": (TrainerExit.DOES_NOT_FIT, 1, 4, True, None),
    "a bad job": (TrainerExit.BAD_JOB, 1, 4, True, None),
    "a loss that is not finite": (TrainerExit.NOT_FINITE, 1, 4, True, None),
    "ended by a person": (-signal.SIGTERM, 1, 4, True, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failure_is_answered_as_it_deserves(name: str) -> None:
    code, tries, micro_batch, new_checkpoint, answer = CASES[name]
    found = after_failure(
        int(code), tries=tries, micro_batch=micro_batch, new_checkpoint=new_checkpoint, device_failures=1
    )
    assert found == answer


MEMORY: dict[str, tuple[dict[str, Any], Again | None]] = {
    "activations were kept": ({"micro_batch": 1, "checkpointing": False}, Again(1, 0.0)),
    "smaller pieces come before 4 bits": ({"micro_batch": 3, "four_bit": True}, Again(1, 0.0)),
    "4 bits at last": ({"micro_batch": 1, "four_bit": True}, Again(1, 0.0, four_bit=True)),
    "nothing is left": ({"micro_batch": 1}, None),
}


@pytest.mark.parametrize("case", MEMORY)
def test_less_and_less_memory_is_used(case: str) -> None:
    held, answer = MEMORY[case]
    code = int(TrainerExit.OUT_OF_MEMORY)
    assert after_failure(code, tries=1, new_checkpoint=False, device_failures=0, **held) == answer


def test_a_device_that_fails_again_without_progress_is_given_up() -> None:
    code = int(TrainerExit.DEVICE_FAILED)
    assert after_failure(code, tries=2, micro_batch=4, new_checkpoint=False, device_failures=2) is None
    assert after_failure(code, tries=2, micro_batch=4, new_checkpoint=True, device_failures=2) is not None
