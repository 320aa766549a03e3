"""How benchmarks/pull.py shows what it measured: one table a part on the screen, and docs/results/pull.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from aggregate_report import describe
from rich.console import Console
from rich.table import Table


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 180)
    for part in results.values():
        table = Table(title=part["title"])
        for place, column in enumerate(part["columns"]):
            last = place == len(part["columns"]) - 1
            table.add_column(column, justify="left" if place == 0 or last else "right")
        for row in part["rows"]:
            table.add_row(*row)
        console.print(table)
        for goal in part["goals"]:
            colour = "green" if goal["met"] else "red"
            verdict = "met" if goal["met"] else f"missed: {goal['why']}"
            console.print(f"goal: {goal['goal']}: {goal['found']}, [{colour}]{verdict}[/{colour}]")


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page; each part says when and how it was measured."""
    lines = [
        "# What an update costs",
        "",
        "Written by `benchmarks/pull.py` (`make bench-pull`) from real rounds of SmolLM2-135M-Instruct",
        "(`benchmarks/rounds.py`): patches, pulls and what an interruption costs, beside what others do; and by",
        "`benchmarks/corruption.py`: damage, and whether it is found. Nothing here is typed in by hand.",
        "",
    ]
    for part in results.values():
        lines += _part(part)
    return "\n".join(lines)


def _part(part: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(part["versions"].items()))
    yield f"## {part['title']}"
    yield ""
    yield f"    {part['command']}"
    yield ""
    yield (
        f"{part['date']}. {describe(part['machine'])}. {versions + '. ' if versions else ''}"
        f"Load {part['load'][0]:.1f} before and {part['load'][1]:.1f} after."
    )
    yield ""
    yield from _table(part["columns"], part["rows"])
    if part["goals"]:
        yield ""
        yield from _table(
            ("goal", "found", ""),
            [
                [goal["goal"], goal["found"], "met" if goal["met"] else f"missed: {goal['why']}"]
                for goal in part["goals"]
            ],
        )
    yield ""
    yield from (f"- {note}" for note in part["notes"])
    yield ""


def _table(columns: Any, rows: Any) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
