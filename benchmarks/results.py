"""What a benchmark measured, kept beside what was measured before, shown on the screen and written as a page.

A benchmark has parts; each is measured alone and replaces what docs/results holds of it, so the page says for each
when, on which machine and under which load. What always holds: the page is made from the kept numbers and nothing else.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aggregate_report import describe
from aggregate_run import FOLDER, machine
from rich.console import Console
from rich.table import Table as ScreenTable

RESULTS: Final = FOLDER.parent / "docs" / "results"
Say = Callable[[str], None]


@dataclass
class Table:
    """The first column names the thing; all cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]] = field(default_factory=list)

    def row(self, *cells: str) -> None:
        """The cells of one row; those left out stay empty."""
        self.rows.append([*cells, *[""] * (len(self.columns) - len(cells))])


@dataclass
class Part:
    """Tables, and the goals that they meet or miss."""

    title: str
    tables: list[Table] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    """goal, found, met, why"""
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def table(self, title: str, *columns: str) -> Table:
        """A new table; the title may be empty where the part's own says enough."""
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def row(self, *cells: str) -> None:
        """One more row of the newest table."""
        self.tables[-1].row(*cells)

    def goal(self, goal: str, found: str, *, met: bool, why: str = "") -> None:
        self.goals.append({"goal": goal, "found": found, "met": met, "why": "" if met else why})


def measure(name: str, command: str, part_of: Callable[[Say], Part]) -> dict[str, Any]:
    """A part's result, with what it depends on."""
    before = os.getloadavg()[0]
    console = Console(stderr=True)
    with console.status(name) as status:

        def say(text: str) -> None:
            status.update(f"{name}: {text}")
            if not console.is_terminal:
                console.print(f"{name}: {text}", highlight=False)

        part = part_of(say)
    return dataclasses.asdict(part) | {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": [before, os.getloadavg()[0]],
        "machine": machine(),
    }


def keep(page: str, head: Sequence[str], order: Sequence[str], name: str, result: Mapping[str, Any]) -> None:
    """Put one part's result into docs/results/<page>.json and write <page>.md from it; `order`: of all its parts."""
    numbers = RESULTS / f"{page}.json"
    known = json.loads(numbers.read_text()) if numbers.exists() else {}
    known[name] = result
    ordered = {part: known[part] for part in order if part in known}
    numbers.write_text(json.dumps(ordered, indent=1) + "\n")
    (RESULTS / f"{page}.md").write_text(markdown(head, ordered))


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """All parts on the screen."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    for part in results.values():
        console.rule(part["title"])
        for found in part["tables"]:
            table = ScreenTable(title=found["title"] or None)
            for place, column in enumerate(found["columns"]):
                table.add_column(column, justify="left" if place == 0 else "right")
            for row in found["rows"]:
                table.add_row(*row)
            console.print(table)
        for goal in part["goals"]:
            colour = "green" if goal["met"] else "red"
            console.print(f"goal: {goal['goal']}: {goal['found']}, [{colour}]{_verdict(goal)}[/{colour}]")
        for note in part["notes"]:
            console.print(f"- {note}", highlight=False)


def markdown(head: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: its first lines, then every part with when and how it was measured."""
    lines = [*head, ""]
    for part in results.values():
        lines += _part(part)
    return "\n".join(lines)


def _verdict(goal: Mapping[str, Any]) -> str:
    return "met" if goal["met"] else f"missed: {goal['why']}"


def _part(part: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(part["versions"].items()))
    yield from (f"## {part['title']}", "", f"    {part['command']}", "")
    yield (
        f"{part['date']}. {describe(part['machine'])}. {versions + '. ' if versions else ''}"
        f"Load of the machine {part['load'][0]:.1f} before and {part['load'][1]:.1f} after."
    )
    yield ""
    if part["goals"]:
        rows = [[goal["goal"], goal["found"], _verdict(goal)] for goal in part["goals"]]
        yield from (*_table(("goal", "found", ""), rows), "")
    for found in part["tables"]:
        if found["title"]:
            yield from (f"{found['title']}:", "")
        yield from (*_table(found["columns"], found["rows"]), "")
    yield from (f"- {note}" for note in part["notes"])
    yield ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
