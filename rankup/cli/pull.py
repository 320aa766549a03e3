"""`rankup pull`: a version of the model in a folder, by the cheapest way from what lies there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rankup.pull import Planned, Pulled, Want
    from rankup.routes import Plan


def register(app: typer.Typer) -> None:
    app.command("pull")(pull_version)


def pull_version(
    url: str = typer.Argument(help="Gateway or static server (http…), s3://bucket, or a folder."),
    name: str = typer.Argument(None, help="MODEL, MODEL@VERSION or @VERSION; default: the only model, latest version."),
    to: Path = typer.Option(..., "--to", help="Folder for the model; an older version in it is updated."),
    revision: str = typer.Option(
        None, "--revision", help="Version number, `latest`, or the first 8 or more digits of a manifest's digest."
    ),
    key: str = typer.Option(None, "--key", help="Publisher's public key (hex); default: pinned at first use."),
    limit_rate: str = typer.Option(None, "--limit-rate", help="Bytes a second at most: 800K, 5M, 2MiB/s."),
    parallel: int = typer.Option(4, "--parallel", min=1, max=64, help="Downloads at once."),
    master: bool = typer.Option(
        False, "--master", help="The float32 masters and momenta, to go on folding, instead of the model."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan; fetch and write nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Download a version, verified, ready for `from_pretrained`. After an interruption run it again: it goes on.

    What lies in the folder is used: only patches, or only what changed, is fetched where that is cheaper.

    **Examples**

    - `rankup pull http://127.0.0.1:8420 --to ./model`
    - `rankup pull https://rankup.example.org smollm2@2 --to ./model`
    - `rankup pull s3://rankup smollm2 --to ./model --limit-rate 5M --dry-run`
    """
    import time

    from rankup.cli.output import print_json
    from rankup.cli.source import open_model, parse_rate
    from rankup.cli.transfer import transfer_bar
    from rankup.errors import InputError
    from rankup.pull import plan_pull, pull

    limit = parse_rate(limit_rate)
    wanted = parse_revision(revision)
    source, model, version = open_model(url, name)
    if revision is not None and version is not None:
        raise InputError("the version is named twice", remedy="Write MODEL@VERSION or --revision, not both.")
    asked = wanted if version is None else version
    want: Want = "master" if master else "export"
    title = f"{model}@{'latest' if asked is None else asked}"
    if dry_run:
        with transfer_bar(title, quiet=as_json) as progress:
            planned = plan_pull(source, model, asked, to, publisher_key=key, want=want, progress=progress)
        if as_json:
            print_json(_identity(planned) | {"plan": plan_json(planned.plan)})
        else:
            _print_plan(planned)
        return
    started = time.monotonic()
    with transfer_bar(title, quiet=as_json) as progress:
        pulled = pull(
            source,
            model,
            asked,
            to,
            publisher_key=key,
            want=want,
            on_plan=None if as_json else lambda planned: typer.echo(f"  plan      {plan_in_words(planned.plan)}"),
            progress=progress,
            parallel=parallel,
            limit=limit,
        )
    seconds = time.monotonic() - started
    for warning in pulled.warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    if as_json:
        print_json(
            _identity(pulled)
            | {
                "folder": str(to.resolve()),
                "fetched_bytes": pulled.fetched_bytes,
                "seconds": round(seconds, 3),
                "warnings": list(pulled.warnings),
                "plan": plan_json(pulled.plan),
            }
        )
    else:
        _print_pulled(pulled, to, seconds, loads=not master)


def parse_revision(text: str | None) -> int | str | None:
    """`3` -> 3, `latest` -> None, the beginning of a digest -> itself (checked by whoever looks for it)."""
    if text is None or text == "latest":
        return None
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 6 else text.lower()


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "fetch_bytes": plan.fetch_bytes,
        "full_bytes": plan.full_bytes,
        "rounds": [manifest.version for manifest in plan.chain[1:]],
        "contributions": len(plan.deltas),
        "files": [
            {
                "path": route.file.path,
                "size_bytes": route.file.size_bytes,
                "route": route.kind,
                "base": route.base,
                "patches": [patch.sha256 for patch in route.patches],
                "fetch_bytes": sum(ref.size_bytes for ref in route.fetched),
            }
            for route in plan.routes
        ],
    }


def plan_in_words(plan: Plan) -> str:
    """One line."""
    from rankup.cli.output import human_bytes

    kinds = Counter(route.kind for route in plan.routes)
    hops = max((len(route.patches) for route in plan.routes), default=0)
    rounds = len(plan.chain) - 1
    parts = {
        "patches": f"{kinds['patches']} by {'a patch' if hops == 1 else f'chains of up to {hops} patches'}",
        "rounds": f"{kinds['rounds']} made again from {rounds} round{'' if rounds == 1 else 's'} "
        f"({len(plan.deltas)} contributions)",
        "full": f"{kinds['full']} whole",
        "here": f"{kinds['here']} here already",
    }
    files = ", ".join(text for kind, text in parts.items() if kinds[kind])  # type: ignore[index]
    saved = f" instead of {human_bytes(plan.full_bytes)}" if plan.fetch_bytes < plan.full_bytes else ""
    return f"fetch {human_bytes(plan.fetch_bytes)}{saved}; {len(plan.routes)} files: {files}"


def _identity(found: Planned | Pulled) -> dict[str, Any]:
    return {
        "model": found.manifest.model,
        "version": found.manifest.version,
        "manifest": found.digest,
        "publisher_key": found.publisher_key,
    }


def _print_plan(planned: Planned) -> None:
    from rankup.cli.output import human_bytes, print_table

    plan = planned.plan
    print_table(
        f"{planned.manifest.model} version {planned.manifest.version}: {plan_in_words(plan)}",
        ("file", "#size", "route", "#fetch"),
        [
            (
                route.file.path,
                human_bytes(route.file.size_bytes),
                f"{route.kind} ({len(route.patches)})" if route.patches else route.kind,
                human_bytes(sum(ref.size_bytes for ref in route.fetched)),
            )
            for route in plan.routes
        ],
    )
    if plan.deltas:
        typer.echo(f"and {len(plan.deltas)} contributions, {human_bytes(sum(d.size_bytes for d in plan.deltas))}")


def _print_pulled(pulled: Pulled, to: Path, seconds: float, *, loads: bool) -> None:
    from rankup.cli.output import human_bytes
    from rankup.vision import has_processor

    manifest = pulled.manifest
    size = human_bytes(sum(route.file.size_bytes for route in pulled.plan.routes))
    typer.secho(f"{manifest.model} version {manifest.version} is in {to} ({size}, every hash checked)", fg="green")
    typer.echo(f"  fetched   {human_bytes(pulled.fetched_bytes)} of {size} in {seconds:.1f} s")
    typer.echo(f"  manifest  {pulled.digest}")
    typer.echo(f"  key       {pulled.publisher_key}")
    if loads:
        kind = "ImageTextToText" if has_processor(file.path for file in manifest.files) else "CausalLM"
        typer.echo(f"  load it   AutoModelFor{kind}.from_pretrained({str(to)!r})")
        typer.echo(f"  try it    rankup ask {to} 'What does `os.path.join` do in Python?'")
