"""`rankup versions`, `pull`, `verify`, `ask`: for whoever wants the model, or does not trust its publisher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rankup.pull import Source

URL = typer.Argument(help="Gateway (http…), or s3://bucket with RANKUP_STORE_… set.")
NAME = typer.Argument(None, help="MODEL, MODEL@VERSION or @VERSION; default: the server's only model, latest version.")
KEY = typer.Option(None, "--key", help="Publisher's public key (hex); default: pinned at first use.")
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")


def register(app: typer.Typer) -> None:
    app.command("versions")(list_versions)
    app.command("pull")(pull_version)
    app.command("verify")(verify)
    app.command("ask")(ask)


def parse_name(url: str, name: str | None) -> tuple[str, int | None]:
    """`MODEL[@VERSION]` -> (model, version or None for the latest). Asks the gateway where the model is left out."""
    from rankup.errors import InputError

    model, _, version = (name or "").partition("@")
    if version and not version.isdecimal():
        raise InputError(f"{version!r} is no version number", remedy="Write MODEL@3, or leave @… out for the latest.")
    if not model:
        if url.startswith("s3://"):
            raise InputError("name the model", remedy="Write: rankup pull s3://bucket MODEL --to DIR")
        from rankup.cli.http import call

        models = call("GET", url, "/v1/models")["models"]
        if len(models) != 1:
            raise InputError(
                f"the server has {len(models)} models: {', '.join(models) or 'none'}",
                remedy="Name one: rankup pull URL MODEL --to DIR",
            )
        model = models[0]
    return model, int(version) if version else None


def open_source(url: str) -> Source:
    """Where versions come from: a gateway or a bucket."""
    from rankup.pull import GatewaySource, StoreSource

    if url.startswith("s3://"):
        from rankup.settings import StoreSettings
        from rankup.store import open_store

        return StoreSource(open_store(StoreSettings(bucket=url.removeprefix("s3://").strip("/"))))
    return GatewaySource(url)


def list_versions(
    url: str = typer.Argument(None, help="Gateway; default: the server on this machine."),
    model: str = typer.Argument(None, help="Default: all models."),
    as_json: bool = JSON,
) -> None:
    """Published versions of a model.

    **Examples**

    - `rankup versions http://127.0.0.1:8420`
    """
    from rankup.cli.http import call, server_url
    from rankup.cli.output import human_bytes, human_loss, print_json, print_table
    from rankup.protocol import VersionView

    url = server_url(url)
    models = [model] if model else call("GET", url, "/v1/models")["models"]
    views = [
        VersionView.model_validate(row)
        for m in models
        for row in call("GET", url, f"/v1/models/{m}/versions")["versions"]
    ]
    if as_json:
        print_json(views)
        return
    print_table(
        "",
        ("model", "#version", "latest", "#contributions", "#held-out loss", "#size", "manifest"),
        [
            (
                v.model,
                v.version,
                "yes" if v.latest else "",
                v.contributions,
                human_loss(v.heldout_loss),
                human_bytes(v.size_bytes),
                v.manifest[:16],
            )
            for v in views
        ],
    )


def pull_version(
    url: str = URL,
    name: str = NAME,
    to: Path = typer.Option(..., "--to", help="Folder for the model; an older version in it is updated."),
    key: str = KEY,
    as_json: bool = JSON,
) -> None:
    """Download a version, verified, ready for `from_pretrained`. After an interruption run it again: it goes on.

    **Examples**

    - `rankup pull http://127.0.0.1:8420 --to ./model`
    - `rankup pull https://rankup.example.org smollm2@2 --to ./model`
    """
    from rankup.cli.output import human_bytes, print_json
    from rankup.cli.transfer import transfer_bar
    from rankup.pull import pull

    model, version = parse_name(url, name)
    with transfer_bar(f"{model}@{'latest' if version is None else version}", quiet=as_json) as progress:
        pulled = pull(open_source(url), model, version, to, publisher_key=key, progress=progress)
    manifest = pulled.manifest
    if as_json:
        print_json(
            {"model": model, "version": manifest.version, "manifest": pulled.digest, "folder": str(to.resolve())}
        )
        return
    size = human_bytes(sum(file.size_bytes for file in manifest.export_files()))
    typer.secho(f"{model} version {manifest.version} is in {to} ({size}, every hash checked)", fg="green")
    typer.echo(f"  manifest  {pulled.digest}")
    typer.echo(f"  load it   AutoModelForCausalLM.from_pretrained({str(to)!r})")
    typer.echo(f"  try it    rankup ask {to} 'What does `os.path.join` do in Python?'")


def verify(
    url: str = URL,
    name: str = NAME,
    key: str = KEY,
    cache: Path = typer.Option(None, help="Folder that keeps downloads for the next verify; default: none is kept."),
    as_json: bool = JSON,
) -> None:
    """Replay a version from its parent and its contributions, and compare every tensor's hash. Needs no trust.

    **Examples**

    - `rankup verify http://127.0.0.1:8420`
    - `rankup verify http://127.0.0.1:8420 smollm2@1`
    """
    import tempfile

    from rankup.cli.output import human_bytes, print_json
    from rankup.cli.transfer import transfer_bar
    from rankup.replay import verify_version

    model, version = parse_name(url, name)
    with (
        tempfile.TemporaryDirectory(prefix="rankup-verify-") as scratch,
        transfer_bar(f"verify {model}", quiet=as_json) as progress,
    ):
        report = verify_version(
            open_source(url), model, version, cache=cache or Path(scratch), publisher_key=key, progress=progress
        )
    if as_json:
        import dataclasses

        print_json({"ok": report.ok} | dataclasses.asdict(report))
    elif report.ok:
        found = "bit-identical to its replay" if report.level == "replay" else "what its publisher signed"
        typer.secho(f"{model} version {report.version} is {found}", fg="green")
        if report.note:
            typer.echo(f"  note           {report.note}")
        typer.echo(f"  contributions  {report.contributions}")
        typer.echo(f"  tensors        {report.tensors} compared, {report.changed} changed by the round")
        typer.echo(f"  read           {human_bytes(report.bytes)} in {report.seconds:.1f} s")
    if not report.ok:
        from rankup.errors import IntegrityError

        raise IntegrityError(
            f"{model} version {report.version} differs from its replay in: {', '.join(report.mismatches[:8])}",
            remedy="Do not use this version, and tell the publisher.",
        )


def ask(
    folder: Path = typer.Argument(help="Folder of a pulled version."),
    question: str = typer.Argument(help="What to ask."),
    max_new_tokens: int = typer.Option(80, min=1, max=4096, help="Longest answer, in tokens."),
) -> None:
    """Ask a pulled model one question (greedy decoding, on the CPU)."""
    import os

    os.environ.setdefault("TQDM_DISABLE", "1")  # the answer is all that should be on the screen
    from aggregator.evaluate import answer

    typer.echo(answer(folder, question, max_new_tokens=max_new_tokens))
