"""How benchmarks/load.py shows what it measured: its tables on the screen, and docs/results/load.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aggregate_report import describe
from rich.console import Console
from rich.table import Table


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    for part in results.values():
        console.rule(part["title"])
        for found in part["tables"]:
            table = Table(title=found["title"])
            for place, column in enumerate(found["columns"]):
                table.add_column(column, justify="left" if place == 0 else "right")
            for row in found["rows"]:
                table.add_row(*row)
            console.print(table)
        for goal in part["goals"]:
            colour = "green" if goal["met"] else "red"
            verdict = "met" if goal["met"] else f"missed: {goal['why']}"
            console.print(f"goal: {goal['goal']}: {goal['found']}, [{colour}]{verdict}[/{colour}]")
        for note in part["notes"]:
            console.print(f"- {note}", highlight=False)


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page; each part says when and how it was measured."""
    lines = [
        "# What the door takes",
        "",
        "Written by `benchmarks/load.py` (`make bench-load`): simulated volunteers over real HTTP on loopback, against",
        "`rankup up` with real Valkey, real object storage and real Ray Serve. Nothing here is typed in by hand.",
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
        f"Load of the machine {part['load'][0]:.1f} before and {part['load'][1]:.1f} after."
    )
    yield ""
    if part["goals"]:
        verdicts = ["met" if goal["met"] else f"missed: {goal['why']}" for goal in part["goals"]]
        rows = [[goal["goal"], goal["found"], verdict] for goal, verdict in zip(part["goals"], verdicts, strict=True)]
        yield from _table(("goal", "found", ""), rows)
        yield ""
    for found in part["tables"]:
        yield f"{found['title']}:"
        yield ""
        yield from _table(found["columns"], found["rows"])
        yield ""
    yield from (f"- {note}" for note in part["notes"])
    yield ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
