"""What the agent and its trainer say to each other: one job file in, JSON lines out, one exit code at the end, and on
the way two orders in: pause, and how much of the time to compute.

What always holds: both sides parse with the same frozen models, unknown fields are refused, and the trainer's standard
output carries nothing but these lines (libraries that print are sent to the log). The agent decides from the exit code
what happened; the `Failed` line adds the words for the volunteer. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter

from rankup.message import Digest, Finite, Identifier, Message, TensorName
from rankup.protocol import MAX_SHARDS_PER_LEASE, DeviceKind
from rankup.recipe import Precision, Recipe
from rankup.settings import Reporter
from rankup.targets import Target


class TrainerExit(IntEnum):
    """Exit codes of the trainer."""

    DONE = 0
    CRASHED = 1
    """Anything unforeseen; the log has the traceback."""
    BAD_JOB = 2
    """A shard or the base does not fit the job: training again gives the same answer."""
    NOT_FINITE = 65
    """The loss or a factor became NaN or infinite."""
    DEVICE_FAILED = 70
    """The device or its driver reported an error that is none of the training's."""
    OUT_OF_MEMORY = 71
    DOES_NOT_FIT = 72
    """By what is free, so nothing was loaded; training again at once gives the same answer."""
    DISK_FULL = 74
    PAUSED = 75
    """Ended because it was asked to; what was trained so far is in the checkpoint."""
    MISSING_EXTRA = 78
    """torch, transformers, peft, trl or datasets cannot be imported, or the asked device is not there."""


class Job(Message):
    """All that one training run depends on: same job, same device, same threads, same delta."""

    round_id: Identifier
    lease_id: Identifier
    fence: Annotated[int, Field(ge=0)]
    model: Identifier
    base_manifest: Digest
    base_folder: Path
    """A Hugging Face folder whose hashes have been checked."""
    teacher_folder: Path | None = None
    """Another one: of the version that answers the prompts, where the recipe distils."""
    shard_files: Annotated[tuple[Path, ...], Field(min_length=1, max_length=MAX_SHARDS_PER_LEASE)]
    """JSON lines, one example each, in the order of the shards; all of them are trained together."""
    delta_file: Path
    """Where the delta is to be written."""
    recipe: Recipe
    """With the steps of one shard."""
    seed: int
    targets: dict[TensorName, Target]
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] = 1
    checkpoint_file: Path | None = None
    """Where to go on from, if it is there, and what a pause writes; None: the training cannot be paused."""
    checkpoint_every_s: Annotated[Finite, Field(gt=0)] = 60.0
    """A crash loses at most this much computing, and the step it happens in."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Examples that are in memory at a time, at most; None: as many as fit. A batch is the recipe's in any case."""
    precision: Precision | Literal["auto"] = "auto"
    """What the base is held in; auto: what `worker.precision` chooses."""
    report_to: tuple[Reporter, ...] = ()
    """Programs that are told loss and gradient norm of each step: see `worker.tracking`."""
    report_folder: Path | None = None
    """Where those keep their files."""
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """Added to the process's niceness."""
    share_percent: Annotated[int, Field(ge=1, le=100)] = 100
    """Of the time that a step takes until the next one ends, what is spent computing."""

    @property
    def steps(self) -> int:
        """Optimiser steps over all shards; warm-up and schedule go over all of them."""
        return self.recipe.steps * len(self.shard_files)

    @property
    def answers_file(self) -> Path:
        """Distillation: what the teacher answered, kept beside the delta to go on from."""
        return self.delta_file.with_name(ANSWERS_NAME)

    def training_digest(self) -> str:
        """What is trained, as sha256: a checkpoint of one job serves another exactly if these are equal.

        Device, threads, micro-batch and places may differ: they change the speed, and the last bits.
        """
        what = self.model_dump_json(
            include={"round_id", "lease_id", "model", "base_manifest", "recipe", "seed", "targets"}
        )
        return hashlib.sha256(f"{len(self.shard_files)} {what}".encode()).hexdigest()


class Ready(Message):
    """Base and shards are loaded, the next step follows."""

    kind: Literal["ready"] = "ready"
    device: str
    examples: int
    step: Annotated[int, Field(ge=0)] = 0
    """Steps that a checkpoint brought along."""
    precision: Precision = "float32"
    """Of the frozen base."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Examples that are in memory at a time."""
    checkpointing: bool = False
    """Whether activations are computed twice, to save memory."""
    pausable: bool = False
    """Whether `PAUSE` on standard input makes it write a checkpoint and end."""
    import_s: Finite
    setup_s: Finite
    """Loading the base and preparing the shards, imports not counted."""


class Answered(Message):
    """Distillation, before `Ready`: so many prompts of all that are asked have the teacher's answer. No answer that was
    told of is lost in a pause, which may come from the first such line on."""

    kind: Literal["answered"] = "answered"
    done: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(ge=1)]


class StepDone(Message):
    """One optimiser step."""

    kind: Literal["step"] = "step"
    step: int
    steps: int
    loss: Finite
    """Mean loss of the batch: in nats per token, of preferences as `worker.preference` says."""
    tokens: int
    """Tokens that contributed to the loss so far."""
    tokens_per_s: Finite
    """Over the last few steps."""
    grad_norm: Finite | None = None
    """Before it is cut to the recipe's `max_grad_norm`; None: it was not finite, and the step was left out."""
    energy_j: Finite | None = None
    """Joules that the card has used for this training so far; None: it does not tell."""


class Finished(Message):
    """The delta is written, flushed to disk and closed."""

    kind: Literal["finished"] = "finished"
    path: Path
    sha256: Digest
    size_bytes: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    """Tokens that contributed to the loss, over all steps."""
    steps: Annotated[int, Field(ge=1)]
    first_loss: Finite
    """Mean over the first steps (a fifth of all, at most five)."""
    last_loss: Finite
    """Mean over as many steps at the end."""
    seconds: Annotated[Finite, Field(ge=0)]
    """Wall-clock time of the whole process, imports included."""
    device: DeviceKind = "cpu"
    precision: Precision = "float32"
    """Of the frozen base."""
    tokens_per_s: Annotated[Finite, Field(ge=0)] | None = None
    """Over all steps, without what comes before and after."""
    grad_norm: Annotated[Finite, Field(ge=0)] | None = None
    """Mean over the same steps as `last_loss`."""
    energy_j: Annotated[Finite, Field(ge=0)] | None = None


class Paused(Message):
    """The last line of a training that was asked to pause."""

    kind: Literal["paused"] = "paused"
    step: Annotated[int, Field(ge=0)]
    """Steps in the checkpoint; 0: there was nothing to keep."""


class Failed(Message):
    """Why there will be no delta, in words for the volunteer."""

    kind: Literal["failed"] = "failed"
    cause: str
    remedy: str


Line = Answered | Ready | StepDone | Paused | Finished | Failed
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


ANSWERS_NAME: Final = "answers.jsonl"
"""Of the file in a lease's folder that keeps what a teacher answered."""
PAUSE: Final = "pause"
"""A line on the trainer's standard input: write the checkpoint and end with `TrainerExit.PAUSED`."""


def share_order(percent: int) -> str:
    """A line on the trainer's standard input: compute this much of the time from now on (1 to 100)."""
    return f"share {percent}"


def parse_share(order: str) -> int | None:
    """The percentage of `share_order`, or None for any other line."""
    word, _, number = order.strip().partition(" ")
    return min(100, max(1, int(number))) if word == "share" and number.isdecimal() and len(number) < 4 else None


def parse_line(text: str | bytes) -> Line:
    """One line of the trainer's standard output.

    Raises `pydantic.ValidationError` when it is none.
    """
    return _LINE.validate_json(text)


def format_line(line: Line) -> str:
    """The line with its newline; `parse_line(format_line(x)) == x`."""
    return line.model_dump_json() + "\n"
