"""`rankup versions`, `ask`: what is published, and what it answers."""

from __future__ import annotations

from pathlib import Path

import typer

JSON = typer.Option(False, "--json", help="Print JSON instead of text.")


def register(app: typer.Typer) -> None:
    app.command("versions")(list_versions)
    app.command("ask")(ask)


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
        ("model", "#version", "made by", "#contributions", "#held-out loss", "#size", "manifest"),
        [
            (
                v.model,
                f"latest {v.version}" if v.latest else v.version,
                v.change.partition(" of ")[0] if v.change else "round" if v.round_id else "import",
                v.contributions,
                human_loss(v.heldout_loss),
                human_bytes(v.size_bytes),
                v.manifest[:16],
            )
            for v in views
        ],
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
