"""`rankup worker doctor`, and what `join` shows before it joins: what was found, and what the worker will do."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankup.finding import Finding
    from rankup.settings import WorkerSettings
    from worker.doctor import Examination
    from worker.plan import Part, Plan, Task

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to `rankup worker`."""
    app.command("doctor")(doctor)


def doctor(
    url: str = typer.Argument(None, help="Server to check against; default: only this machine is checked."),
    what_leaves: bool = typer.Option(False, "--what-leaves", help="Print what leaves this machine, and check nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Check whether this machine can train, and say what the worker would do. Ends with 1 where a check fails.

    With a server it also says which round it would work on, what that downloads and uploads, and how long it takes
    until the first credit. Nothing is joined or claimed; at most 1.1 MB each way measure the link.

    **Examples**

    - `rankup worker doctor`
    - `rankup worker doctor http://127.0.0.1:8420`
    - `rankup worker doctor --what-leaves`
    """
    from rankup.cli.output import print_json
    from rankup.settings import WorkerSettings
    from worker.doctor import examine

    if what_leaves:
        _print_what_leaves(as_json)
        return
    found = examine(WorkerSettings(), url)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        show(found, time.time())
    if found.failed:
        raise typer.Exit(1)


def before_join(settings: WorkerSettings, url: str, *, invite: str, as_json: bool) -> None:
    """Show what was found and what the worker will do. Raises `SetupError` where it cannot work."""
    from worker.doctor import examine

    found = examine(settings, url, invite=invite, joining=True)
    if as_json:
        _event("doctor", findings=[dataclasses.asdict(finding) for finding in found.findings])
        if found.plan is not None:
            _event("plan", **dataclasses.asdict(found.plan))
    else:
        show(found, time.time())
    found.require_fit()


def show(found: Examination, now: float) -> None:
    """A table in a terminal, plain lines elsewhere; then the plan, where there is one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in found.findings:
            style = _STYLES[finding.grade]
            table.add_row(Text(finding.grade, style=style), finding.check, Text(finding.found))
            if finding.remedy:
                table.add_row("", "", Text(f"→ {finding.remedy}", style=style))
        console.print(table)
    else:
        typer.echo("\n".join(finding_lines(found.findings)))
    if found.plan is None:
        return
    lines = plan_lines(found.plan, now)
    if not console.is_terminal:
        typer.echo("\n".join(f"{name:<10}{words}".rstrip() for name, words in lines))
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, words in lines:
        table.add_row(name, Text(words))
    console.print(Text("\nWhat it will do", style="bold"))
    console.print(table)
    console.print()


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """One line a finding, and one for its remedy."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.grade:<5}{finding.check:<10}{finding.found}")
        if finding.remedy:
            lines.append(f"{'':<15}-> {finding.remedy}")
    return lines


def plan_lines(plan: Plan, now: float) -> list[tuple[str, str]]:
    """The plan as lines of a name and words. Names that strangers chose are shown without characters that deceive."""
    from rankup.cli.round_watch import shown

    lines = [("waits", plan.waits)] if plan.waits else []
    if plan.task is not None:
        lines += _task_lines(plan.task, now)
    lines += [("or", shown(words)) for words in plan.others[:3]]
    if len(plan.others) > 3:
        lines.append(("or", f"one of {len(plan.others) - 3} more rounds"))
    return lines + [("not", shown(words)) for words in plan.refused[:5]]


def _task_lines(task: Task, now: float) -> list[tuple[str, str]]:
    from rankup.cli.control import duration
    from rankup.cli.output import human_bytes
    from rankup.cli.round_watch import shown, span

    licence = f", given under {shown(task.licence)}" if task.licence else ""
    until = f"closes in {span(task.deadline_at - now)}"
    lines = [
        ("round", f"{task.round_id}: {task.model} version {task.base_version}{licence}; {until}"),
        ("training", f"{task.method}, rank {task.rank} ({task.tier}), {task.steps} steps a shard"),
    ]
    if task.teacher:
        lines.append(("teacher", f"{task.teacher} answers the prompts"))
    memory = task.memory
    if memory.needs_bytes is not None:
        examples = f"{memory.micro_batch} example{'s' if memory.micro_batch > 1 else ''} at a time"
        lines.append(("memory", f"about {human_bytes(memory.needs_bytes)}: base in {memory.precision}, {examples}"))
    if task.download_bytes is not None and task.disk_bytes is not None:
        lines.append(("download", f"{human_bytes(task.download_bytes)} ({task.download_origin})"))
        lines.append(("disk", f"{human_bytes(task.disk_bytes)} for the base"))
    lines.append(("upload", f"about {human_bytes(task.upload_bytes)} for each lease"))
    parts = " + ".join(f"{part.name} {_span(part)}" for part in task.parts)
    whole = f"in about {duration(task.first_credit_s)}" if task.first_credit_s is not None else "cannot be told yet"
    lines.append(("credit", f"the first {whole}: {parts}"))
    training = next(part for part in task.parts if part.name == "training")
    lines.append(("", f"an estimate. Training: {training.origin}"))
    return lines + [("note", shown(words)) for words in task.notes]


def _span(part: Part) -> str:
    from rankup.cli.control import duration

    if part.seconds is None:
        return f"unknown ({part.origin})"
    return duration(part.seconds) if part.seconds >= 1 else "< 1 s"


def _event(name: str, **fields: object) -> None:
    """One line of `join --json`."""
    sys.stdout.write(json.dumps({"event": name, **fields}, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _print_what_leaves(as_json: bool) -> None:
    from rankup.cli.output import print_json, print_table
    from worker.leaves import LEAVING, STAYING

    if as_json:
        print_json({"leaves": [dataclasses.asdict(item) for item in LEAVING], "stays": list(STAYING)})
        return
    print_table("", ("when", "name", "what", "what for"), [(i.when, i.name, i.what, i.why) for i in LEAVING])
    typer.echo("What stays here:")
    for words in STAYING:
        typer.echo(f"- {words}")
