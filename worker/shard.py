"""Shards as the trainer reads them: JSON lines, every row of one shape that TRL takes for supervised fine-tuning.

What always holds: rows that come out have one shape, over all shards, and only columns that TRL knows; several shards
give the rows that one file with all of their lines gives; what is wrong is told by its line.
Nothing here needs torch or the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankup.errors import InputError

ROW_SHAPES: tuple[frozenset[str], ...] = (
    frozenset({"prompt", "completion"}),
    frozenset({"messages"}),
    frozenset({"conversations"}),
    frozenset({"text"}),
)
"""What TRL takes for supervised fine-tuning; each of them conversational or plain where TRL allows it."""
_CARRIED = frozenset({"tools", "chat_template_kwargs"})


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The examples of all shards, in their order, reduced to the columns that TRL knows.

    Raises `InputError`: a line is no JSON object, an example has none of `ROW_SHAPES`, two have different ones, or
    there is none.
    """
    rows: list[dict[str, Any]] = []
    columns: frozenset[str] | None = None
    for where, line in _lines(paths):
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise InputError(f"{where} is not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object")
        shape = next((shape for shape in ROW_SHAPES if shape <= row.keys()), None)
        if shape is None:
            raise InputError(
                f"{where} has {sorted(row)[:8]}, which supervised fine-tuning cannot use",
                remedy="The organiser must give text, messages, or prompt and completion.",
            )
        if columns is not None and columns != shape:
            raise InputError(f"{where} has {sorted(shape)}, the lines before {sorted(columns)}")
        columns = shape
        rows.append({name: row[name] for name in sorted((shape | _CARRIED) & row.keys())})
    if not rows:
        raise InputError("the shard is empty" if len(paths) == 1 else f"all {len(paths)} shards are empty")
    return rows


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Where each line stands, in words, and the line; empty ones are left out."""
    for place, path in enumerate(paths, start=1):
        shard = "the shard" if len(paths) == 1 else f"shard {place} of {len(paths)}"
        # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold as they are.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                yield f"line {number} of {shard}", line
