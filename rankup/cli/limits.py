"""`rankup worker limits`: what this machine lends, shown and set, whether a worker runs or not.

The file is the order: a running worker reads it again within a second, and so do all workers of the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from worker.limits import Limits

_JSON = typer.Option(False, "--json", help="Print JSON.")
app = typer.Typer(help="What this machine lends: show and set the limits.", invoke_without_command=True)


@app.callback()
def show_limits(context: typer.Context, as_json: bool = _JSON) -> None:
    """Show the limits in limits.yaml of the worker's folder.

    **Examples**

    - `rankup worker limits`
    - `rankup worker limits set idle_time_to_run=5 exclusive_app=[steam,cs2]`
    """
    if context.invoked_subcommand is None:
        from worker.limitsfile import read_limits

        _print(read_limits(_home()), as_json)


@app.command("set")
def set_limits(
    changes: list[str] = typer.Argument(help="NAME=VALUE; a name without a value goes back to its default."),
    as_json: bool = _JSON,
) -> None:
    """Change limits; a running worker takes them over within a second.

    **Examples**

    - `rankup worker limits set run_gpu_if_user_active=true`
    - `rankup worker limits set start_hour=22 end_hour=7 week='{sat: [0, 24], sun: off}'`
    - `rankup worker limits set max_bytes_sec_up=500e3 gpu_temp_limit_c=80`
    - `rankup worker limits set exclusive_app=`
    """
    from worker.limitsfile import change_limits

    _print(change_limits(_home(), changes), as_json)


def value_in_words(value: object) -> str:
    """The value of a limit as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(value_in_words, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{day} {value_in_words(hours)}" for day, hours in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _home() -> Path:
    from rankup.settings import WorkerSettings

    return WorkerSettings().home


def _print(limits: Limits, as_json: bool) -> None:
    from rankup.cli.output import print_json, print_table
    from worker.limitwords import LIMIT_WORDS

    if as_json:
        print_json(limits)
        return
    values = limits.model_dump(mode="json")
    defaults = type(limits)().model_dump(mode="json")
    rows = [
        (
            about.name,
            f"{value_in_words(values[about.name])} {about.unit}".strip(),
            "" if values[about.name] == defaults[about.name] else "set",
            about.words,
        )
        for about in LIMIT_WORDS
    ]
    print_table("", ("limit", "value", "", "meaning"), rows)
