"""Shards as the trainer reads them: JSON lines, every row of one shape that the recipe's method trains on.

What always holds: rows that come out have one shape, over all shards, and only columns that TRL knows; several shards
give the rows that one file with all of their lines gives; what is wrong is told by its line.
Nothing here needs torch or the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankup.chat import CARRIED, needs, template_settings
from rankup.errors import InputError
from rankup.images import require_pictured
from rankup.recipe import Method
from rankup.shapes import SHAPES, TRAINED_ON, shape_of


def read_rows(paths: Sequence[Path], method: Method = "sft") -> list[dict[str, Any]]:
    """The examples of all shards, in their order, reduced to the columns that TRL knows.

    Raises `InputError`: a line is no JSON object, an example has no shape or one that the method does not train on, two
    have different ones, or there is none.
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
        shape = shape_of(row)
        if shape is None or shape not in TRAINED_ON[method]:
            raise InputError(
                f"{where} has {sorted(row)[:8]}, which the method {method} cannot use",
                remedy=f"The organiser must give rows of the shape {' or '.join(TRAINED_ON[method])}.",
            )
        fields = frozenset(SHAPES[shape])
        if columns is not None and columns != fields:
            raise InputError(f"{where} has {sorted(fields)}, the lines before {sorted(columns)}")
        columns = fields
        if "images" in fields:
            require_pictured(row)
        chat = "images" not in fields and any(isinstance(row[name], list) for name in fields)
        kept = {name: row[name] for name in sorted((fields | set(CARRIED if chat else ())) & row.keys())}
        template_settings(kept)  # raises where a setting would be more than one
        if method == "distillation" and (words := needs(kept)):
            raise InputError(
                f"{where} has {', '.join(sorted(words))}, of which distillation makes no use",
                remedy="The organiser should choose the method sft, or a dataset of plain conversations.",
            )
        rows.append(kept)
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
