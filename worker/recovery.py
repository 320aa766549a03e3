"""What to do when the trainer fails: start it again, smaller or later, or give the lease back. Pure policy.

What always holds: a failure that training again would repeat (a bad shard, a loss that is not finite) is never tried
again; a crash is tried again only from a checkpoint that is newer than the last failure, or once where the device gave
out; where the memory gave out, less of it is used: smaller pieces of a batch, then 4 bits; there are at most
`MAX_TRIES` starts of one lease.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from worker.job import TrainerExit

MAX_TRIES = 6
_DEVICE_PAUSE_S = 10.0
_CRASH_PAUSE_S = 2.0

MEMORY_EXITS = frozenset({int(TrainerExit.OUT_OF_MEMORY), -int(signal.SIGKILL)})
"""The system kills with SIGKILL when memory runs out."""
_CRASHES = frozenset(
    {int(TrainerExit.CRASHED), -int(signal.SIGSEGV), -int(signal.SIGABRT), -int(signal.SIGBUS), -int(signal.SIGFPE)}
)


@dataclass(frozen=True)
class Again:
    """Start the trainer once more, after `pause_s`, with so many examples in memory at a time."""

    micro_batch: int
    pause_s: float
    four_bit: bool = False
    """With the base in 4 bits, and as many examples as fit beside that."""


def after_failure(
    exit_code: int,
    *,
    tries: int,
    micro_batch: int,
    new_checkpoint: bool,
    device_failures: int,
    checkpointing: bool = True,
    four_bit: bool = False,
) -> Again | None:
    """What follows the `tries`-th start of the trainer, which ended with `exit_code`; None: give the lease back.

    `new_checkpoint`: there is one that the start before had not; `device_failures`: how often the device has failed
    in this lease, this time included; `checkpointing`: whether activations were computed twice already, as they are
    whenever pieces of a batch are asked for; `four_bit`: whether the base may be held in 4 bits, and is not yet.
    """
    if tries >= MAX_TRIES:
        return None
    if exit_code in MEMORY_EXITS:
        if micro_batch > 1 or not checkpointing:
            return Again(max(1, micro_batch // 2), 0.0)
        return Again(1, 0.0, four_bit=True) if four_bit else None
    if exit_code == TrainerExit.DEVICE_FAILED:
        return Again(micro_batch, _DEVICE_PAUSE_S) if new_checkpoint or device_failures == 1 else None
    if exit_code in _CRASHES and new_checkpoint:
        return Again(micro_batch, _CRASH_PAUSE_S)
    return None
