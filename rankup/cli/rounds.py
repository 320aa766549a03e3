"""`rankup round …`: what the organiser of a round does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rankup.protocol import RoundView

app = typer.Typer(help="Create, watch, close and cancel rounds.", no_args_is_help=True)
SERVER = typer.Option(
    None, "--server", help="URL of the server; default: $RANKUP_SERVER, else the one on this machine."
)
JSON = typer.Option(False, "--json", help="Print JSON instead of a table.")


@app.command("create")
def create(
    model: str = typer.Option(None, help="Model to train, as named by `rankup model import`."),
    dataset: str = typer.Option(None, help="Dataset to train on, as named by `rankup dataset build`."),
    file: Path = typer.Option(None, "--file", "-f", help="YAML with the whole request; options override it."),
    repeat: int = typer.Option(None, help="Rounds in a row, each on the version before it."),
    shards: int = typer.Option(None, help="Shards that one round hands out."),
    quorum: int = typer.Option(None, help="Accepted contributions that close a round; default: all shards."),
    deadline_s: float = typer.Option(None, help="Seconds until a round closes with what it has."),
    rank: int = typer.Option(None, help="LoRA rank."),
    steps: int = typer.Option(None, help="Training steps of one shard."),
    batch_size: int = typer.Option(None, help="Examples of one step."),
    max_tokens: int = typer.Option(None, help="Longest example, in tokens."),
    learning_rate: float = typer.Option(None, help="Peak learning rate of a volunteer."),
    rule: str = typer.Option(
        None, help="How contributions are weighed: mean_by_tokens, multi_krum, geometric_median or centred_clipping."
    ),
    momentum: float = typer.Option(None, help="Nesterov momentum of the outer step; default: 0.875."),
    outer_lr: float = typer.Option(None, help="Learning rate of the outer step; default: 0.75."),
    server: str = SERVER,
    as_json: bool = JSON,
) -> None:
    """Open a round, or several in a row.

    **Examples**

    - `rankup round create --model smollm2 --dataset pydocs --repeat 2 --shards 3 --steps 25`
    - `rankup round create --model smollm2 --dataset pydocs --shards 20 --rule multi_krum`
    - `rankup round create --model smollm2 --dataset pydocs --repeat 8 --momentum 0 --outer-lr 1`
    - `rankup round create --file round.yaml`
    """
    from rankup.cli.http import call, organiser_token, server_url
    from rankup.cli.output import print_json
    from rankup.protocol import RoundRequest, RoundView

    data = _read_yaml(file) if file else {}
    top: dict[str, Any] = {"model": model, "dataset": dataset, "repeat": repeat, "shards": shards, "quorum": quorum}
    top["deadline_s"] = deadline_s
    recipe: dict[str, Any] = {"rank": rank, "steps": steps, "batch_size": batch_size, "max_tokens": max_tokens}
    recipe["learning_rate"] = learning_rate
    data |= _given(top)
    data["recipe"] = (data.get("recipe") or {}) | _given(recipe)
    aggregation = (data["recipe"].get("aggregation") or {}) | _given({"rule": rule})
    outer = (aggregation.get("outer") or {}) | _given({"momentum": momentum, "learning_rate": outer_lr})
    data["recipe"]["aggregation"] = aggregation | {"outer": outer}
    request = RoundRequest.model_validate(data)
    answer = call(
        "POST", server_url(server), "/v1/rounds", token=organiser_token(), body=request.model_dump(mode="json")
    )
    view = RoundView.model_validate(answer)
    if as_json:
        print_json(view)
        return
    typer.secho(f"Round {view.round_id} is open", fg="green")
    typer.echo(f"  base     {view.model} version {view.base_version}")
    typer.echo(f"  shards   {view.shards}, closes with {view.quorum} accepted contributions")
    typer.echo(f"  watch    rankup round watch {view.round_id}")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    from rankup.errors import InputError

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise InputError(f"cannot read {path}: {exc}", remedy="See docs/quickstart.md for an example.") from exc
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping with at least `model` and `dataset`")
    return data


@app.command("list")
def list_rounds(server: str = SERVER, as_json: bool = JSON) -> None:
    """All rounds, newest first."""
    from rankup.cli.http import call, server_url
    from rankup.cli.output import human_loss, print_json, print_table
    from rankup.protocol import RoundView

    answer = call("GET", server_url(server), "/v1/rounds")
    views = [RoundView.model_validate(row) for row in answer["rounds"]]
    if as_json:
        print_json(views)
        return
    print_table(
        "",
        ("round", "model", "state", "#accepted", "#leased", "#free", "#version", "#held-out loss", "reason"),
        [
            (
                v.round_id,
                v.model,
                v.state,
                f"{v.accepted}/{v.quorum}",
                v.leased,
                v.free,
                "-" if v.published_version is None else v.published_version,
                human_loss(v.heldout_loss),
                v.reason,
            )
            for v in views
        ],
    )


def fetch_round(url: str, round_id: str) -> RoundView:
    """One round as the server shows it."""
    from rankup.cli.http import call
    from rankup.protocol import RoundView

    return RoundView.model_validate(call("GET", url, f"/v1/rounds/{round_id}"))


@app.command("show")
def show(round_id: str, server: str = SERVER) -> None:
    """One round, as JSON."""
    from rankup.cli.http import server_url
    from rankup.cli.output import print_json

    print_json(fetch_round(server_url(server), round_id))


@app.command("watch")
def watch(
    round_id: str = typer.Argument(None, help="Default: the newest round."),
    server: str = SERVER,
    every_s: float = typer.Option(1.0, min=0.2, help="Seconds between two looks."),
) -> None:
    """Follow a round in the terminal until it ends."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rankup.cli.http import call, server_url
    from rankup.errors import NotFoundError

    url = server_url(server)
    if round_id is None:
        rounds = call("GET", url, "/v1/rounds")["rounds"]
        if not rounds:
            raise NotFoundError("there is no round yet", remedy="Create one: rankup round create --help")
        round_id = rounds[0]["round_id"]
    columns = (
        TextColumn("[bold]{task.fields[round_id]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("accepted, {task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task("", round_id=round_id)
        while True:
            view = fetch_round(url, round_id)
            text = f"{view.leased} training, {view.free} free: {view.state}" + (
                f" ({view.reason})" if view.reason else ""
            )
            progress.update(task, total=view.quorum, completed=view.accepted, description=text)
            if view.state.ended:
                break
            time.sleep(every_s)
    if view.published_version is not None:
        from rankup.cli.output import human_loss

        typer.secho(f"published version {view.published_version} of {view.model}", fg="green")
        typer.echo(f"held-out loss {human_loss(view.parent_heldout_loss)} -> {human_loss(view.heldout_loss)}")


def _organiser_call(round_id: str, action: str, server: str | None) -> None:
    from rankup.cli.http import call, organiser_token, server_url
    from rankup.protocol import RoundView

    answer = call("POST", server_url(server), f"/v1/rounds/{round_id}/{action}", token=organiser_token(), body={})
    view = RoundView.model_validate(answer)
    typer.echo(f"{view.round_id} is {view.state}" + (f": {view.reason}" if view.reason else ""))


@app.command("close")
def close(round_id: str, server: str = SERVER) -> None:
    """Close a round early: no new leases, then the sum of what was accepted."""
    _organiser_call(round_id, "close", server)


@app.command("cancel")
def cancel(round_id: str, server: str = SERVER) -> None:
    """Cancel a round: nothing is published from it."""
    _organiser_call(round_id, "cancel", server)
