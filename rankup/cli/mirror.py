"""`rankup mirror`: a model as a plain folder that any web server or USB stick can hand on."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command("mirror")(mirror_versions)


def mirror_versions(
    url: str = typer.Argument(help="Gateway or static server (http…), s3://bucket, or a folder."),
    name: str = typer.Argument(None, help="MODEL, MODEL@VERSION or @VERSION; default: the only model, latest version."),
    to: Path = typer.Option(..., "--to", help="Folder to make or to update."),
    history: int = typer.Option(1, "--history", min=1, help="How many versions, counted back from the newest."),
    masters: bool = typer.Option(False, "--masters", help="Float32 masters too: what `rankup verify` replays from."),
    contributions: bool = typer.Option(False, "--contributions", help="The deltas in the sums too."),
    key: str = typer.Option(None, "--key", help="Publisher's public key (hex); default: the one that signed before."),
    limit_rate: str = typer.Option(None, "--limit-rate", help="Bytes a second at most: 800K, 5M, 2MiB/s."),
    check: bool = typer.Option(False, "--check", help="Hash again everything that lies there already."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Make or update a folder from which anybody can pull. After an interruption run it again: it goes on.

    **Examples**

    - `rankup mirror https://rankup.example.org smollm2 --to /srv/www/models`
    - `rankup mirror s3://rankup smollm2 --to /media/stick --history 5 --limit-rate 5M`
    """
    from rankup.cli.output import human_bytes, print_json
    from rankup.cli.source import open_model, parse_rate
    from rankup.cli.transfer import transfer_bar
    from rankup.mirror import Wish, mirror

    rate = parse_rate(limit_rate)
    source, model, version = open_model(url, name)
    with transfer_bar(f"mirror {model}", quiet=as_json) as progress:
        made = mirror(
            source,
            model,
            version,
            to,
            history=history,
            wish=Wish(masters=masters, contributions=contributions),
            publisher_key=key,
            check=check,
            progress=progress,
            limit=rate,
        )
    if as_json:
        print_json(
            {
                "model": made.model,
                "version": made.version,
                "manifest": made.manifest,
                "publisher_key": made.publisher_key,
                "versions": made.versions,
                "blobs": made.blobs,
                "total_bytes": made.total_bytes,
                "fetched_bytes": made.fetched_bytes,
                "folder": str(to.resolve()),
            }
        )
        return
    oldest, newest = made.versions[0], made.versions[-1]
    span = f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
    typer.secho(f"{model} {span} in {to}: {made.blobs} blobs, {human_bytes(made.total_bytes)}", fg="green")
    typer.echo(f"  fetched   {human_bytes(made.fetched_bytes)}, every hash checked")
    typer.echo(f"  key       {made.publisher_key}")
    typer.echo(f"  serve it  any web server, for example: python -m http.server --directory {to}")
    typer.echo(f"  pull it   rankup pull URL {model} --to ./model")
