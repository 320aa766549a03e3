"""`rankup admin rebuild`: the ledger made again from object storage, after Valkey has lost its data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from coordinator.rebuild import Plan, Restored

SHOWN = 20
"""Rounds that are listed, the newest ones."""


def register(app: typer.Typer) -> None:
    """Add the command to `rankup admin`."""
    app.command("rebuild")(rebuild)


def rebuild(
    dry_run: bool = typer.Option(False, "--dry-run", help="Only show what object storage would bring back."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do it without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Restore everything that was accepted into an empty Valkey: rounds, verdicts, workers, invites, scores.

    The server may run meanwhile. A Valkey with rounds in it is refused. `rankup up` does the same by itself when it
    finds its Valkey empty. Volunteers who train at this moment lose their leases; everybody enrols again by itself.

    **Examples**

    - `rankup admin rebuild --dry-run`
    - `rankup admin rebuild --yes`
    - `RANKUP_STORE_ENDPOINT_URL=https://s3.example.org RANKUP_LEDGER_URL=redis://new:6379 rankup admin rebuild`
    """
    import asyncio
    import time

    from coordinator.ledger import Ledger
    from coordinator.rebuild import plan, restore
    from coordinator.schema import bring_up_to_date
    from rankup.cli.output import print_json
    from rankup.cli.stack import services_at_hand
    from rankup.errors import InputError
    from rankup.signing import load_private_key, public_key_hex
    from rankup.store import open_store

    with services_at_hand() as services:
        store = open_store(services.store)
        publisher_key = public_key_hex(load_private_key(services.publisher_key_file))
        with _bar(quiet=as_json) as progress:
            found = plan(store, publisher_key, progress=progress)
        if not as_json:
            _print_plan(found)
        if not dry_run and not yes:
            if not sys.stdin.isatty():
                raise InputError("nobody is there to be asked", remedy="Add --yes to do it without being asked.")
            typer.confirm("Restore this into the empty Valkey?", abort=True, err=True)

        async def fill() -> Restored:
            ledger = await Ledger.connect(services.ledger)
            try:
                await bring_up_to_date(ledger)
                with _bar(quiet=as_json) as progress:
                    return await restore(ledger, store, found, time.time(), progress=progress)
            finally:
                await ledger.close()

        done = None if dry_run else asyncio.run(fill())
    if as_json:
        print_json(_as_dict(found, done))
        return
    if done is None:
        typer.echo("a dry run: nothing was written")
        return
    rounds = sum(done.rounds.values())
    typer.secho(f"restored: {rounds} rounds, {done.workers} workers, {done.invites} invites", fg="green")
    typer.echo(f"  contributions  {done.accepted} accepted, {done.rejected} rejected, {done.queued} to be judged")


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yields the callback that draws counts; None when nothing shall be drawn."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def draw(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        yield draw


def _as_dict(found: Plan, done: Restored | None) -> dict[str, Any]:
    import dataclasses

    return {
        "dry_run": done is None,
        "rounds": [
            {
                "round_id": trace.round_id,
                "model": trace.model,
                "state": trace.facts.state.value,
                "reason": trace.facts.reason,
                "published_version": trace.facts.published_version,
                "verdicts": trace.verdicts,
                "submissions": trace.unjudged,
            }
            for trace in found.rounds
        ],
        "verdicts": found.verdicts,
        "submissions": found.unjudged,
        "workers": len(found.membership.workers),
        "invites": len(found.membership.invites),
        "restored": None if done is None else dataclasses.asdict(done),
    }


def _print_plan(found: Plan) -> None:
    from rankup.cli.output import print_table

    rows = [
        (trace.round_id, trace.facts.state.value, trace.verdicts, trace.unjudged, trace.facts.reason)
        for trace in found.rounds[-SHOWN:]
    ]
    if rows:
        print_table("", ("round", "state", "#verdicts", "#unjudged", "why"), rows)
    if len(found.rounds) > SHOWN:
        typer.echo(f"and {len(found.rounds) - SHOWN} older rounds")
    typer.echo(
        f"object storage has {len(found.rounds)} rounds, {found.verdicts} verdicts, "
        f"{len(found.membership.workers)} enrolled workers, {len(found.membership.invites)} invites"
    )
