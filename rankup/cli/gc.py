"""`rankup admin gc`: object storage forgets what no kept version and no promised replay needs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from rankup.cli.action_log import record_command

if TYPE_CHECKING:
    from aggregator.collect import Collected
    from aggregator.retention import Plan

SHOWN = 10
"""Versions of which it is said what they lose."""


def register(app: typer.Typer) -> None:
    """Add the command to `rankup admin`."""
    app.command("gc")(collect_garbage)


def collect_garbage(
    dry_run: bool = typer.Option(False, "--dry-run", help="Only show what would go, and why."),
    keep_exports: int = typer.Option(4, min=1, help="Newest versions that keep their full export files."),
    keep_masters: int = typer.Option(3, min=1, help="Newest versions that keep what their replay needs."),
    checkpoint_every: int = typer.Option(
        8, min=1, max=32, help="Every so many versions one keeps its full export files for good."
    ),
    keep_contributions: str = typer.Option(
        "all", help="'all', or of how many newest versions. A number gives up revocation and replay of older ones."
    ),
    grace_hours: float = typer.Option(48.0, min=1.0, help="Nothing younger goes: longer than any fold or upload."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do it without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Delete what no version that is kept, no promised replay and no open round needs.

    Rounds may go on meanwhile; do not roll back, revoke or build a dataset while it runs.

    **Examples**

    - `rankup admin gc --dry-run`
    - `rankup admin gc --keep-exports 8 --keep-masters 8 --yes`
    """
    import time

    from aggregator.collect import collect
    from aggregator.keeprules import Rules
    from rankup.cli.output import print_json
    from rankup.cli.stack import ServerAccess
    from rankup.errors import InputError
    from rankup.signing import load_private_key, public_key_hex
    from rankup.store import open_store

    if keep_contributions != "all" and not (keep_contributions.isascii() and keep_contributions.isdecimal()):
        raise InputError(f"--keep-contributions is {keep_contributions!r}", remedy="Write 'all' or a number.")
    rules = Rules(
        keep_exports=keep_exports,
        keep_masters=keep_masters,
        checkpoint_every=checkpoint_every,
        keep_contributions=None if keep_contributions == "all" else int(keep_contributions),
        grace_s=grace_hours * 3600.0,
    )

    def approve(plan: Plan) -> None:
        if yes:
            return
        if not as_json:
            _print_plan(plan)
        if not sys.stdin.isatty():
            raise InputError("nobody is there to be asked", remedy="Add --yes to do it without being asked.")
        typer.confirm(f"Delete {len(plan.removals)} objects? They cannot be brought back.", abort=True, err=True)

    access = ServerAccess.of_this_machine()
    store = open_store(access.store)
    done = collect(
        store,
        rules,
        clock=time.time,
        publisher_key=public_key_hex(load_private_key(access.publisher_key_file)),
        dry_run=dry_run,
        approve=approve,
    )
    if not dry_run:
        told = {"removed": done.removed, "removed_bytes": done.removed_bytes, "keep_contributions": keep_contributions}
        record_command(store, "collect_garbage", {**told, "keep_exports": keep_exports, "keep_masters": keep_masters})
    if as_json:
        print_json(_as_dict(done, dry_run=dry_run))
        return
    if dry_run or yes:
        _print_plan(done.plan)
    _print_outcome(done, dry_run=dry_run)


def _as_dict(done: Collected, *, dry_run: bool) -> dict[str, Any]:
    plan = done.plan
    return {
        "dry_run": dry_run,
        "removals": [{"key": one.key, "size_bytes": one.size_bytes, "why": one.why} for one in plan.removals],
        "planned_bytes": sum(one.size_bytes for one in plan.removals),
        "removed": done.removed,
        "removed_bytes": done.removed_bytes,
        "spared": done.spared,
        "unfinished_uploads": done.unfinished,
        "kept_blobs": plan.kept_blobs,
        "kept_bytes": plan.kept_bytes,
        "retained": {model: record.model_dump(mode="json") for model, record in plan.retained.items()},
    }


def _print_plan(plan: Plan) -> None:
    from rankup.cli.output import human_bytes, print_table

    sizes: dict[str, list[int]] = {}
    for one in plan.removals:
        sizes.setdefault(one.why, []).append(one.size_bytes)
    if sizes:
        rows = [(why, len(found), human_bytes(sum(found))) for why, found in sorted(sizes.items())]
        print_table("", ("what goes", "#objects", "#size"), rows)
    for model, record in plan.retained.items():
        for version, parts in sorted(record.gone.items())[-SHOWN:]:
            typer.echo(f"{model} version {version} will be without: {', '.join(parts)}")


def _print_outcome(done: Collected, *, dry_run: bool) -> None:
    from rankup.cli.output import human_bytes

    if done.unfinished:
        would = "would be ended" if dry_run else "were ended"
        typer.echo(f"{done.unfinished} uploads that nobody has gone on with {would}")
    plan = done.plan
    kept = f"{plan.kept_blobs} blobs ({human_bytes(plan.kept_bytes)}) stay"
    if dry_run:
        planned = human_bytes(sum(one.size_bytes for one in plan.removals))
        typer.echo(f"a dry run: {len(plan.removals)} objects ({planned}) would go, {kept}")
        return
    typer.secho(f"{done.removed} objects ({human_bytes(done.removed_bytes)}) are gone, {kept}", fg="green")
    if done.spared:
        typer.echo(f"{done.spared} more were planned, but are asked for since")
