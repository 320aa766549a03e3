"""What a teacher is asked, and the file that keeps its answers until they are learned.

What always holds:
- which prompts are asked follows from the rows and the job's seed alone, and there are no more of them than the steps
  have examples;
- an answer is in the file with its whole batch or not at all; what a crash cut is dropped when the file is opened;
- a file of another training is never read, but replaced.

Nothing here needs torch: the agent reads from the file how far the teacher has come.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, TypeAlias

import numpy as np
from pydantic import Field, ValidationError

from rankup.errors import InputError
from rankup.message import Digest, Finite, Message

FORMAT = "rankup.answers/1"
MAX_LINE_BYTES = 64 * 1024**2
"""Of one batch of answers."""

Prompt: TypeAlias = str | list[dict[str, Any]]
"""Plain text, or the messages of a conversation."""


class Answer(Message):
    """What the teacher said to one prompt."""

    row: Annotated[int, Field(ge=0)]
    """Number of the prompt's row, over all shards."""
    text: str
    ended: bool
    """It came to an end by itself; else it was cut at the longest example."""


class _Head(Message):
    """The first line of the file."""

    format: str
    training: Digest


class _Batch(Message):
    """Every other line."""

    seconds: Annotated[Finite, Field(ge=0)]
    answers: tuple[Answer, ...]


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """What is asked of the teacher: the row's prompt, or its conversation before the assistant's last words.

    Raises InputError where the row asks nothing.
    """
    if isinstance(prompt := row.get("prompt"), str | list) and prompt:
        return prompt
    if isinstance(messages := row.get("messages"), list):
        said = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
        if asked := messages[: said[-1]] if said else messages:
            return asked
    raise InputError(
        f"a row with {sorted(row)} asks a teacher nothing",
        remedy="The organiser should distil on a dataset of prompts with completions, or of conversations.",
    )


def asked_rows(rows: int, wanted: int, seed: int, fits: Callable[[int], bool]) -> tuple[int, ...]:
    """Numbers of the rows that are asked, ascending: all that fit, or `wanted` of them, drawn by `seed`.

    `fits` is asked only of as many rows as it takes.
    """
    key = hashlib.sha256(f"rankup.prompts/1:{seed}".encode()).digest()
    order = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).permutation(rows)
    chosen: list[int] = []
    for row in order.tolist():
        if len(chosen) == wanted:
            break
        if fits(row):
            chosen.append(row)
    return tuple(sorted(chosen))


def batches(lengths: Mapping[int, int], size: int) -> list[tuple[int, ...]]:
    """Rows in batches of at most `size`, longest prompts first: those in a batch need little padding, and memory that
    is too small is noticed at once. `lengths` is in tokens."""
    rows = sorted(lengths, key=lambda row: (-lengths[row], row))
    return [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class _Found:
    """What a file holds that can be used, and where that ends in it."""

    training: str
    answers: tuple[Answer, ...]
    seconds: float
    end: int


def _read(path: Path) -> _Found | None:
    """None where there is no file, or one that does not begin as it should."""
    try:
        with path.open("rb") as file:
            head = _Head.model_validate_json(file.readline(MAX_LINE_BYTES))
            if head.format != FORMAT:
                return None
            answers: list[Answer] = []
            seconds, end = 0.0, file.tell()
            while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                try:
                    batch = _Batch.model_validate_json(line)
                except ValidationError:
                    break
                answers += batch.answers
                seconds, end = seconds + batch.seconds, file.tell()
    except (OSError, ValidationError):
        return None
    return _Found(head.training, tuple(answers), seconds, end)


def answers_progress(path: Path) -> tuple[int, float]:
    """Answers in the file at `path`, and the seconds that they took; zeros where there is none."""
    found = _read(path)
    return (0, 0.0) if found is None else (len(found.answers), found.seconds)


class AnswersFile:
    """The answers of one training, by row; a context manager. `training` is the job's digest."""

    def __init__(self, path: Path, training: str) -> None:
        found = _read(path)
        if found is not None and found.training != training:
            found = None
        self.answers: dict[int, Answer] = {} if found is None else {answer.row: answer for answer in found.answers}
        self._file: IO[bytes] = path.open("wb" if found is None else "r+b")
        if found is None:
            self._write(_Head(format=FORMAT, training=training))
        else:
            self._file.truncate(found.end)
            self._file.seek(found.end)

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        """Keep a batch; on the disk when this returns."""
        self._write(_Batch(seconds=seconds, answers=tuple(answers)))
        self.answers |= {answer.row: answer for answer in answers}

    def _write(self, line: Message) -> None:
        self._file.write(line.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
