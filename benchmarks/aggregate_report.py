"""How benchmarks/aggregate.py shows what it measured: one table on the screen, and docs/results/aggregate.md."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("CPU s", "wall s", "peak MB")


def _cells(row: Mapping[str, Any]) -> list[str]:
    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"

    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return [row["way"], seconds(row["cpu_s"]), seconds(row["wall_s"]), peak, row["against"], row["remarks"]]


def show(results: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=describe(machine), show_lines=False)
    table.add_column("way", ratio=5)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("against", ratio=3)
    table.add_column("remarks", ratio=5)
    for part in results.values():
        table.add_section()
        table.add_row(f"[bold]{part['title']}[/bold]")
        for row in part["rows"]:
            table.add_row(*_cells(row))
        for goal in part["goals"]:
            colour = "green" if goal["met"] else "red"
            verdict = f"[{colour}]{'met' if goal['met'] else 'missed'}: {goal['found']}[/{colour}]"
            table.add_row(f"goal: {goal['goal']}", "", "", "", verdict, goal["why"])
    console.print(table)


def describe(machine: Mapping[str, Any]) -> str:
    family = f" (family {machine['cpu_family']})" if machine["cpu_family"] else ""
    return (
        f"{machine['cpu']}{family}, {machine['vector']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {machine['system']}, Python {machine['python']}"
    )


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page; each part says when and how it was measured."""
    lines = [
        "# What aggregation costs",
        "",
        "Written by `benchmarks/aggregate.py` (`make bench-aggregate`): the exact sum, `rankup merge`, a large fold",
        "and the robust rules, beside what others do. Nothing here is typed in by hand.",
        "",
    ]
    for part in results.values():
        lines += [f"## {part['title']}", ""]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(part["versions"].items()))
        lines += [
            f"    {part['command']}",
            "",
            f"{part['date']}. {describe(part['machine'])}. {versions + '. ' if versions else ''}"
            f"Load {part['load'][0]:.1f} before and {part['load'][1]:.1f} after.",
            "",
            "| way | CPU s | wall s | peak MB | against | remarks |",
            "|---|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in part["rows"]]
        if part["goals"]:
            lines += ["", "| goal | found | |", "|---|---|---|"]
            for goal in part["goals"]:
                verdict = "met" if goal["met"] else f"missed: {goal['why']}"
                lines.append(f"| {goal['goal']} | {goal['found']} | {verdict} |")
        lines += ["", *(f"- {note}" for note in part["notes"]), ""]
    return "\n".join(lines)
