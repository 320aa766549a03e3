"""`rankup round …`: what the organiser of a round does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rankup.protocol import RoundRequest, RoundView

app = typer.Typer(help="Create, watch, pause, close and cancel rounds.", no_args_is_help=True)
SERVER = typer.Option(
    None, "--server", help="URL of the server; default: $RANKUP_SERVER, else the one on this machine."
)
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")
ROUND = typer.Argument(help="Id of the round, from `rankup round list`.")
FILE = typer.Argument(help="YAML, as `rankup round template` writes it.")


@app.command("template")
def template(
    model: str = typer.Option("my-model", help="Put this model into it."),
    dataset: str = typer.Option("my-dataset", help="Put this dataset into it."),
) -> None:
    """Print a round's file to start from: every field with its meaning, what is allowed and its default.

    **Examples**

    - `rankup round template > round.yaml`
    - `rankup round template --model smollm2 --dataset forum > round.yaml`
    """
    from rankup.cli import round_template

    typer.echo(round_template.template(model, dataset), nl=False)


@app.command("check")
def check(file: Path = FILE, as_json: bool = JSON) -> None:
    """Check a round's file without a server: every fault with its line, and what is allowed there.

    **Examples**

    - `rankup round check round.yaml`
    - `rankup round check round.yaml --json`
    """
    from rankup.cli import round_file
    from rankup.cli.output import print_json

    read = round_file.read_round_file(file)
    if as_json:
        faults = round_file.faults_of(read)
        print_json({"ok": not faults, "faults": [fault.as_dict() for fault in faults]})
        raise typer.Exit(2 if faults else 0)
    round_file.require_sound(read, str(file))
    typer.secho(f"{file} is sound; open it: rankup round create {file}", fg="green")


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a round's file: editors check and complete with it.

    **Examples**

    - `rankup round schema > round.schema.json`
    """
    from rankup.cli.output import print_json
    from rankup.cli.round_fields import described_schema

    print_json(described_schema())


@app.command("create")
def create(
    path: Path = typer.Argument(None, metavar="[FILE]", help="YAML with the whole request; options override it."),
    model: str = typer.Option(None, help="Model to train, as named by `rankup model import`."),
    dataset: str = typer.Option(None, help="Dataset to train on, as named by `rankup dataset build`."),
    file: Path = typer.Option(None, "--file", "-f", help="The same as FILE."),
    repeat: int = typer.Option(None, help="Rounds in a row, each on the version before it."),
    shards: int = typer.Option(None, help="Shards that one round hands out."),
    quorum: int = typer.Option(None, help="Accepted shards that close a round; default: all."),
    deadline_s: float = typer.Option(None, help="Seconds until a round closes with what it has."),
    method: str = typer.Option(
        None, help="What is minimised: sft, dpo, kto or distillation; it has to fit the dataset's rows."
    ),
    beta: float = typer.Option(None, help="dpo and kto: how tightly the model is held to its base."),
    packing: bool = typer.Option(None, help="sft: put several short examples into one sequence."),
    assistant_only: bool = typer.Option(None, help="sft on messages: learn the assistant's words only."),
    rank: int = typer.Option(None, help="LoRA rank."),
    steps: int = typer.Option(None, help="Training steps of one shard."),
    batch_size: int = typer.Option(None, help="Examples of one step."),
    max_tokens: int = typer.Option(None, help="Longest example, in tokens."),
    learning_rate: float = typer.Option(None, help="Peak learning rate of a volunteer."),
    teacher: str = typer.Option(None, help="Model whose answers are learned; the method is then distillation."),
    teacher_version: int = typer.Option(None, help="Its version; default: the latest when each round opens."),
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
    - `rankup round create --model qwen3 --dataset forum --teacher smollm2 --teacher-version 3`
    - `rankup round create --model smollm2 --dataset preferences --method dpo --beta 0.1 --learning-rate 5e-5`
    - `rankup round create round.yaml`
    - `rankup round create round.yaml --repeat 20`
    """
    from rankup.cli.http import call, organiser_token, server_url
    from rankup.cli.output import print_json
    from rankup.protocol import RoundView

    outer = {"momentum": momentum, "learning_rate": outer_lr}
    method = method or ("distillation" if teacher is not None else None)
    recipe: dict[str, Any] = {"rank": rank, "steps": steps, "batch_size": batch_size, "max_tokens": max_tokens}
    recipe |= {"method": method, "beta": beta, "packing": packing, "assistant_only": assistant_only}
    recipe |= {"learning_rate": learning_rate, "aggregation": {"rule": rule, "outer": outer}}
    options: dict[str, Any] = {"model": model, "dataset": dataset, "repeat": repeat, "shards": shards}
    options |= {"teacher": teacher, "teacher_version": teacher_version}
    options |= {"quorum": quorum, "deadline_s": deadline_s, "recipe": recipe}
    request = _request(path or file, options)
    answer = call(
        "POST", server_url(server), "/v1/rounds", token=organiser_token(), body=request.model_dump(mode="json")
    )
    view = RoundView.model_validate(answer)
    if as_json:
        print_json(view)
        return
    typer.secho(f"Round {view.round_id} is open", fg="green")
    typer.echo(f"  base     {view.model} version {view.base_version}")
    typer.echo(f"  shards   {view.shards}; the round closes with {view.quorum} of them accepted")
    if view.licence:
        typer.echo(f"  licence  {view.licence}")
    typer.echo(f"  watch    rankup round watch {view.round_id}")


def _request(path: Path | None, options: dict[str, Any]) -> RoundRequest:
    """The request of a file with the options that were given over it. Raises InputError that tells every fault."""
    from rankup.cli.round_file import RoundFile, read_round_file, require_sound
    from rankup.protocol import RoundRequest

    read = read_round_file(path) if path is not None else RoundFile({}, {})
    data = _over(read.data, options)
    require_sound(replace(read, data=data), str(path) if path is not None else "the request")
    return RoundRequest.model_validate(data)


def _over(data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(data)
    for name, value in options.items():
        if isinstance(value, dict):
            inner = merged.get(name) or {}
            if isinstance(inner, dict) and (over := _over(inner, value)):
                merged[name] = over
        elif value is not None:
            merged[name] = value
    return merged


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
        ("round", "state", "#shards", "#at work", "#version", "#loss", "reason"),
        [
            (
                v.round_id,
                _state(v),
                f"{v.accepted}/{v.shards}",
                v.leased,
                "-" if v.published_version is None else v.published_version,
                human_loss(v.heldout_loss),
                v.reason,
            )
            for v in views
        ],
    )


def _state(view: RoundView) -> str:
    return f"{view.state.value}, paused" if view.paused and not view.state.ended else view.state.value


@app.command("show")
def show(round_id: str = ROUND, server: str = SERVER) -> None:
    """One round, as JSON."""
    from rankup.cli.http import call, server_url
    from rankup.cli.output import print_json

    print_json(call("GET", server_url(server), f"/v1/rounds/{round_id}"))


@app.command("watch")
def watch(
    round_id: str = typer.Argument(None, help="Default: the newest round that has not ended."),
    server: str = SERVER,
    every_s: float = typer.Option(1.0, min=0.2, help="Seconds between two looks."),
    follow: bool = typer.Option(True, help="Go on to the next round of the campaign."),
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON for each change."),
) -> None:
    """Follow a round in the terminal, and the rounds of its campaign after it; Ctrl-C ends it.

    Shards, time left, losses, and who is training. It needs no token.

    **Examples**

    - `rankup round watch`
    - `rankup round watch smollm2-r0003-9f3c2a --no-follow`
    - `rankup round watch --json | jq .round.accepted`
    """
    from rankup.cli import round_watch
    from rankup.cli.http import server_url

    url = server_url(server)
    first = round_id or round_watch.newest_round(url).round_id
    round_watch.show(url, first, every_s=every_s, follow=follow, as_json=as_json)


def _organiser_call(
    round_id: str, action: str, server: str | None, as_json: bool, body: dict[str, Any] | None = None
) -> None:
    from rankup.cli.http import call, organiser_token, server_url
    from rankup.cli.output import print_json
    from rankup.protocol import RoundView

    path = f"/v1/rounds/{round_id}/{action}"
    view = RoundView.model_validate(call("POST", server_url(server), path, token=organiser_token(), body=body or {}))
    if as_json:
        print_json(view)
        return
    typer.echo(f"{view.round_id} is {_state(view)}" + (f": {view.reason}" if view.reason else ""))
    if not view.state.ended and view.index + 1 == view.repeat:
        typer.echo("It is the last round of its campaign.")


@app.command("pause")
def pause(round_id: str = ROUND, server: str = SERVER, as_json: bool = JSON) -> None:
    """Grant no leases for a while. Who is training goes on, and the deadline moves by the length of the pause.

    Rounds that follow in the campaign open paused too, until `resume`.

    **Examples**

    - `rankup round pause smollm2-r0003-9f3c2a`
    """
    _organiser_call(round_id, "pause", server, as_json)


@app.command("resume")
def resume(round_id: str = ROUND, server: str = SERVER, as_json: bool = JSON) -> None:
    """Grant leases again after `pause`.

    **Examples**

    - `rankup round resume smollm2-r0003-9f3c2a`
    """
    _organiser_call(round_id, "resume", server, as_json)


@app.command("close")
def close(
    round_id: str = ROUND,
    now: bool = typer.Option(False, "--now", help="Wait for nobody who is still training."),
    last: bool = typer.Option(False, "--last", help="Open no further round of the campaign."),
    server: str = SERVER,
    as_json: bool = JSON,
) -> None:
    """Close a round early: no new leases, then a version of what was accepted.

    It waits up to the round's `grace_s` for those who are training, and for every verdict.

    **Examples**

    - `rankup round close smollm2-r0003-9f3c2a`
    - `rankup round close smollm2-r0003-9f3c2a --now`
    - `rankup round close smollm2-r0003-9f3c2a --last`
    """
    _organiser_call(round_id, "close", server, as_json, {"grace": not now, "last": last})


@app.command("last")
def last_round(round_id: str = ROUND, server: str = SERVER, as_json: bool = JSON) -> None:
    """Let a round go on to its own end, and open none after it.

    **Examples**

    - `rankup round last smollm2-r0003-9f3c2a`
    """
    _organiser_call(round_id, "last", server, as_json)


@app.command("cancel")
def cancel(round_id: str = ROUND, server: str = SERVER, as_json: bool = JSON) -> None:
    """Give a round and the rest of its campaign up: no version comes of it.

    **Examples**

    - `rankup round cancel smollm2-r0003-9f3c2a`
    """
    _organiser_call(round_id, "cancel", server, as_json)
