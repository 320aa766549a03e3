"""`rankup worker status | pause | resume | finish | leave | limits | logs | install-service`: a worker kept in hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from worker.control import Order
    from worker.status import Status

_SERVER = typer.Option(None, "--server", help="Which worker is meant, where several run: the address it joined.")
_JSON = typer.Option(False, "--json", help="Print JSON.")
limits_app = typer.Typer(help="What this machine lends: show and set the limits.", invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add the commands to `rankup worker`."""
    app.command("status")(status)
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("finish")(finish)
    app.command("leave")(leave)
    app.command("logs")(logs)
    app.command("install-service")(install_service)
    app.add_typer(limits_app, name="limits")


def status(server: str = _SERVER, as_json: bool = _JSON) -> None:
    """Show what the running worker does, why it is paused, and what it has done so far.

    **Examples**

    - `rankup worker status`
    - `rankup worker status --json | jq .lease.eta_s`
    """
    _order("status", server, as_json)


def pause(
    duration: str = typer.Argument(None, help="30s, 20m, 2h or 1d; default: until `resume`.", metavar="[DURATION]"),
    server: str = _SERVER,
    as_json: bool = _JSON,
) -> None:
    """Stop training within seconds; memory of the card is free, and what was trained is kept.

    The lease is kept as long as its training took so far, at least 15 minutes, at most 4 hours.

    **Examples**

    - `rankup worker pause`
    - `rankup worker pause 2h`
    """
    _order("pause", server, as_json, seconds=parse_duration(duration) if duration else None)


def resume(server: str = _SERVER, as_json: bool = _JSON) -> None:
    """End your pause. Other reasons to wait, such as a battery, stay.

    **Examples**

    - `rankup worker resume`
    """
    _order("resume", server, as_json)


def finish(server: str = _SERVER, as_json: bool = _JSON) -> None:
    """Train the present lease to its end, hand it in, then stop.

    **Examples**

    - `rankup worker finish`
    """
    _order("finish", server, as_json)


def leave(server: str = _SERVER, as_json: bool = _JSON) -> None:
    """Give the present lease back, so that somebody else gets it at once, and stop. Finished deltas are kept.

    **Examples**

    - `rankup worker leave`
    """
    _order("leave", server, as_json)


def parse_duration(text: str) -> float:
    """Seconds of `90`, `30s`, `20m`, `2h`, `1.5h` or `1d`. Raises `InputError`."""
    from rankup.errors import InputError

    found = re.fullmatch(r"\s*(\d{1,7}(?:\.\d{1,3})?)\s*([smhd]?)\s*", text)
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if not 0 < seconds <= 31_536_000:
        raise InputError(f"{text!r} is not a duration", remedy="Write 30s, 20m, 2h or 1d.")
    return seconds


@limits_app.callback()
def show_limits(context: typer.Context, as_json: bool = _JSON) -> None:
    """Show the limits in limits.yaml of the worker's folder.

    **Examples**

    - `rankup worker limits`
    - `rankup worker limits set idle_time_to_run=5 exclusive_app=[steam,cs2]`
    """
    if context.invoked_subcommand is None:
        from worker.limitsfile import read_limits

        _print_limits(read_limits(_home()), as_json)


@limits_app.command("set")
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

    _print_limits(change_limits(_home(), changes), as_json)


def logs(
    lines: int = typer.Option(30, "--lines", "-n", min=1, max=10_000, help="How many of the last lines."),
    trainer: bool = typer.Option(False, "--trainer", help="The log of the newest training instead."),
    as_json: bool = _JSON,
) -> None:
    """Show what the worker has done lately, or what its trainer wrote.

    **Examples**

    - `rankup worker logs`
    - `rankup worker logs --trainer -n 100`
    """
    from rankup.cli.output import print_json
    from rankup.errors import NotFoundError
    from worker.journal import FILE_NAME
    from worker.training import log_tail

    home = _home()
    pattern = "servers/*/logs/*.log" if trainer else f"servers/*/{FILE_NAME}"
    found = sorted(home.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise NotFoundError(f"there is no log in {home}", remedy="Join first: `rankup worker join URL`.")
    tail = log_tail(found[-1], lines)
    if as_json:
        print_json({"file": str(found[-1]), "lines": tail})
    else:
        typer.echo("\n".join(tail))


def install_service(
    url: str = typer.Argument(help="The server that this machine has joined before."),
    threads: int = typer.Option(None, min=1, help="As for `join`."),
    device: str = typer.Option(None, help="As for `join`."),
    models: list[str] = typer.Option(None, "--model", help="As for `join`."),
    show: bool = typer.Option(False, "--print", help="Print the unit instead of writing it."),
    as_json: bool = _JSON,
) -> None:
    """Write a systemd user unit that runs the worker, and say how to enable it.

    **Examples**

    - `rankup worker install-service https://rankup.example.org`
    - `rankup worker install-service https://rankup.example.org --print`
    """
    from rankup.cli.output import print_json
    from rankup.errors import SetupError
    from worker import identity, service

    home = _home()
    server = identity.normalise_url(url)
    if identity.load_identity(identity.open_folder(home, server)) is None:
        raise SetupError(
            f"this machine has not joined {server} yet, and the unit must not hold an invite",
            remedy=f"Run `rankup worker join {server} --invite …` once, then this command again.",
        )
    chosen = (("--threads", threads), ("--device", device), *(("--model", model) for model in models or ()))
    options = [word for name, value in chosen if value is not None for word in (name, str(value))]
    text = service.unit_text(server, home, options=options)
    if show:
        typer.echo(text, nl=False)
        return
    path = service.install(text, service.unit_folder())
    steps = (
        f"systemctl --user daemon-reload && systemctl --user enable --now {service.UNIT_NAME}",
        "loginctl enable-linger    # only if it is to run while you are logged out",
        f"journalctl --user -u {service.UNIT_NAME} -f",
    )
    if as_json:
        print_json({"unit": str(path), "next": list(steps)})
        return
    typer.echo(f"Wrote {path}. Now:")
    for line in steps:
        typer.echo(f"  {line}")


# -- words -------------------------------------------------------------------------------------------------------------


def _home() -> Path:
    from rankup.settings import WorkerSettings

    return WorkerSettings().home


def _order(order: Order, server: str | None, as_json: bool, *, seconds: float | None = None) -> None:
    from rankup.cli.output import print_json
    from worker import control, identity

    path = control.find_socket(_home(), identity.normalise_url(server) if server else None)
    answer = control.ask(path, control.Request(order=order, seconds=seconds))
    if as_json:
        print_json(answer)
    else:
        typer.echo("\n".join(f"{name:<9} {words}" for name, words in describe(answer)))


def describe(status: Status) -> list[tuple[str, str]]:
    """The status as lines of a name and words."""
    from rankup.cli.output import human_bytes
    from worker.events import shards_in_words

    after = ", ends after this lease" if status.finishing else ""
    lines = [
        ("worker", f"{status.name} at {status.server}, process {status.pid}, up {_duration(status.uptime_s)}{after}"),
        ("state", status.doing.value + (f": {status.reason}" if status.reason else "")),
    ]
    lease = status.lease
    if lease is not None:
        numbers = [f"step {lease.step} of {lease.steps}"]
        if lease.loss is not None:
            numbers.append(f"loss {lease.loss:.3f}")
        if lease.tokens_per_s is not None:
            numbers.append(f"{lease.tokens_per_s:.0f} tokens/s")
        if lease.eta_s is not None:
            numbers.append(f"about {_duration(lease.eta_s)} to go")
        shards = shards_in_words(lease.shard, lease.shards)
        lines.append(("lease", f"{shards} of {lease.round_id}, {lease.model} version {lease.base_version}"))
        lines.append(("", ", ".join(numbers)))
    credit = status.credit
    changed = status.limits.model_dump(mode="json", exclude_defaults=True)
    lines += [
        ("outbox", f"{status.outbox_ready} to upload, {status.outbox_submitted} waiting for their verdict"),
        ("today", f"{human_bytes(status.bytes_up)} up, {human_bytes(status.bytes_down)} down"),
        ("credit", f"{credit.accepted} accepted, {credit.rejected} rejected, {credit.tokens} tokens"),
        ("limits", ", ".join(f"{name}={_value(value)}" for name, value in changed.items()) or "defaults"),
    ]
    return lines + [("note", words) for words in status.unread]


def _print_limits(limits: Any, as_json: bool) -> None:
    from rankup.cli.output import print_json, print_table

    if as_json:
        print_json(limits)
        return
    values = limits.model_dump(mode="json")
    defaults = type(limits)().model_dump(mode="json")
    rows = [(name, _value(value), "" if value == defaults[name] else "set") for name, value in values.items()]
    print_table("", ("limit", "value", ""), rows)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{day} {_value(hours)}" for day, hours in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
