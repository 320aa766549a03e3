"""What the agent and its trainer say to each other: one job file in, JSON lines out, one exit code at the end.

What always holds: both sides parse with the same frozen models, unknown fields are refused, and the trainer's standard
output carries nothing but these lines (libraries that print are sent to the log). The agent decides from the exit code
what happened; the `Failed` line adds the words for the volunteer. Nothing here does I/O.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from rankup.message import Digest, Finite, Identifier, Message, TensorName
from rankup.recipe import Recipe
from rankup.targets import Target


class TrainerExit(IntEnum):
    """Exit codes of the trainer."""

    DONE = 0
    CRASHED = 1
    """Anything unforeseen; the log has the traceback."""
    BAD_JOB = 2
    """The shard or the base does not fit the job: training again gives the same answer."""
    NOT_FINITE = 65
    """The loss or a factor became NaN or infinite."""
    OUT_OF_MEMORY = 71
    DISK_FULL = 74
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
    shard_file: Path
    """JSON lines, one example each."""
    delta_file: Path
    """Where the delta is to be written."""
    recipe: Recipe
    seed: int
    targets: dict[TensorName, Target]
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] = 1


class Ready(Message):
    """Base and shard are loaded, the first step follows."""

    kind: Literal["ready"] = "ready"
    device: str
    examples: int
    import_s: Finite
    setup_s: Finite
    """Loading the base and preparing the shard, imports not counted."""


class StepDone(Message):
    """One optimiser step."""

    kind: Literal["step"] = "step"
    step: int
    steps: int
    loss: Finite
    """Mean loss of the batch in nats per token."""
    tokens: int
    """Tokens that contributed to the loss so far."""
    tokens_per_s: Finite
    """Over the last few steps."""


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


class Failed(Message):
    """Why there will be no delta, in words for the volunteer."""

    kind: Literal["failed"] = "failed"
    cause: str
    remedy: str


Line = Ready | StepDone | Finished | Failed
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def parse_line(text: str | bytes) -> Line:
    """One line of the trainer's standard output.

    Raises `pydantic.ValidationError` when it is none.
    """
    return _LINE.validate_json(text)


def format_line(line: Line) -> str:
    """The line with its newline; `parse_line(format_line(x)) == x`."""
    return line.model_dump_json() + "\n"
