"""How commands speak: tables for people, JSON lines for programs, errors with cause and remedy. No business logic."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import typer

_UsageError: Any = typer.BadParameter.__bases__[0]
"""Wrong options or arguments. Reached through typer: newer ones carry a click of their own, older ones use click's."""
_verbose = False


def configure_logs(verbose: bool) -> None:
    """Log events go to stderr: warnings by default, everything with --verbose."""
    from rankup.logs import configure_command

    global _verbose
    _verbose = verbose
    configure_command(verbose)


def exit_for(exc: Exception) -> int:
    """Print `exc` as a person needs it and return the exit code of the process."""
    from pydantic import ValidationError

    from rankup.errors import InputError, RankupError, SetupError

    if isinstance(exc, typer.Exit):
        return int(exc.exit_code)
    if isinstance(exc, typer.Abort):
        return 130
    if isinstance(exc, _UsageError):
        exc.show()
        return int(exc.exit_code)
    if isinstance(exc, ValidationError):
        exc_shown: Exception = InputError(explain_validation(exc))
    elif isinstance(exc, ModuleNotFoundError) and (extra := _extra_of(exc.name or "")):
        exc_shown = SetupError(
            f"this command needs the Python package {exc.name!r}, which is not installed",
            remedy=f"Run: pip install 'rankup[{extra}]'",
        )
    else:
        exc_shown = exc
    if _verbose or not isinstance(exc_shown, RankupError):
        traceback.print_exception(exc, file=sys.stderr)
    if not isinstance(exc_shown, RankupError):
        typer.secho("error: this is a fault in Rankup; please report it with the lines above", fg="red", err=True)
        return 70
    typer.secho(f"error: {exc_shown.cause}", fg="red", err=True)
    typer.secho(f"remedy: {exc_shown.remedy}", fg="yellow", err=True)
    return exc_shown.exit_code


def _extra_of(module: str) -> str | None:
    """The extra that brings a missing package; None for one that every installation must have."""
    match module.split(".")[0]:
        case (
            "ray"
            | "redis"
            | "fastapi"
            | "uvicorn"
            | "jinja2"
            | "starlette"
            | "pyarrow"
            | "prometheus_client"
            | "limits"
            | "openskill"
        ):
            return "coordinator"
        case "torch" | "transformers" | "peft" | "trl" | "datasets" | "gguf" | "psutil" | "accelerate" | "tokenizers":
            return "worker"
        case _:
            return None


def explain_validation(exc: Any) -> str:
    """One line out of a pydantic ValidationError: field and message of each fault."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'input'}: {e['msg']}" for e in exc.errors())


def print_json(value: Any) -> None:
    """One JSON document on stdout. Takes pydantic models, and lists and dicts of them."""
    from pydantic import BaseModel

    def plain(item: object) -> object:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        return str(item)

    typer.echo(json.dumps(value, default=plain, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A rich table; columns whose name starts with '#' are right-aligned numbers, and the first one is never cut."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for place, column in enumerate(columns):
        justify: Any = "right" if column.startswith("#") else "left"
        table.add_column(column.removeprefix("#"), justify=justify, no_wrap=place == 0)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console().print(table)


def human_bytes(count: float) -> str:
    """Decimal units, as disks and links are sold: 538.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
