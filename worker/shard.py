"""A shard as the trainer reads it: JSON lines, every row of one shape that TRL takes for supervised fine-tuning.

What always holds: rows that come out have one shape and only columns that TRL knows; what is wrong is told by its line.
Nothing here needs torch or the network.
"""

from __future__ import annotations

import json
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The shard's examples, reduced to the columns that TRL knows.

    Raises `InputError`: a line is no JSON object, an example has none of `ROW_SHAPES`, or two have different ones.
    """
    rows: list[dict[str, Any]] = []
    columns: frozenset[str] | None = None
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise InputError(f"line {number} of the shard is not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise InputError(f"line {number} of the shard is not a JSON object")
        shape = next((shape for shape in ROW_SHAPES if shape <= row.keys()), None)
        if shape is None:
            raise InputError(
                f"line {number} of the shard has {sorted(row)[:8]}, which supervised fine-tuning cannot use",
                remedy="The organiser must give text, messages, or prompt and completion.",
            )
        if columns is not None and columns != shape:
            raise InputError(f"line {number} of the shard has {sorted(shape)}, the lines before {sorted(columns)}")
        columns = shape
        rows.append({name: row[name] for name in sorted((shape | _CARRIED) & row.keys())})
    if not rows:
        raise InputError("the shard is empty")
    return rows
