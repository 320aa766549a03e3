"""`rankup worker status | page | pause | resume | finish | leave | logs | install-service`: a worker kept in hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rankup.cli import limits

if TYPE_CHECKING:
    from worker.control import Order
    from worker.status import Status

_SERVER = typer.Option(None, "--server", help="Which worker is meant, where several run: the address it joined.")
_JSON = typer.Option(False, "--json", help="Print JSON.")


def register(app: typer.Typer) -> None:
    """Add the commands to `rankup worker`."""
    app.command("status")(status)
    app.command("page")(page)
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("finish")(finish)
    app.command("leave")(leave)
    app.command("logs")(logs)
    app.command("install-service")(install_service)
    app.add_typer(limits.app, name="limits")


def status(
    watch: bool = typer.Option(False, "--watch", help="Show it again every second until Ctrl-C."),
    server: str = _SERVER,
    as_json: bool = _JSON,
) -> None:
    """Show what the running worker does, why it is paused, and what it has done so far.

    **Examples**

    - `rankup worker status`
    - `rankup worker status --watch`
    - `rankup worker status --json | jq .lease.eta_s`
    """
    if watch:
        _watch(server, as_json)
    else:
        _order("status", server, as_json)


def page(
    open_it: bool = typer.Option(False, "--open", help="Open it in the browser as well."),
    server: str = _SERVER,
    as_json: bool = _JSON,
) -> None:
    """Print an address that opens the running worker's page, once and within ten minutes; that browser stays let in.

    The page shows what the worker does, and pauses, resumes and limits it. Only this machine can reach it.

    **Examples**

    - `rankup worker page --open`
    """
    import time
    import webbrowser
    from urllib.parse import urlsplit

    from rankup.cli.output import print_json
    from rankup.errors import StateError
    from worker import control, pagekey
    from worker.page import page_address

    found = control.ask(_socket(server), control.Request(order="status")).page
    port = urlsplit(found).port
    if port is None:
        raise StateError("this worker has no page", remedy="Start it without RANKUP_WORKER_PAGE_PORT=off.")
    address = page_address(port, pagekey.make_code(pagekey.open_key(_home()), port, time.time()))
    opened = open_it and webbrowser.open(address)
    if as_json:
        print_json({"address": address, "opened": opened})
    else:
        typer.echo(address)


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


def _socket(server: str | None) -> Path:
    from worker import control, identity

    return control.find_socket(_home(), identity.normalise_url(server) if server else None)


def _order(order: Order, server: str | None, as_json: bool, *, seconds: float | None = None) -> None:
    from rankup.cli.output import print_json
    from worker import control

    answer = control.ask(_socket(server), control.Request(order=order, seconds=seconds))
    if as_json:
        print_json(answer)
    else:
        typer.echo(_in_lines(answer))


def _watch(server: str | None, as_json: bool) -> None:
    """The status once a second, in place or as a JSON line each, until Ctrl-C; the worker's end raises."""
    import time
    from contextlib import nullcontext

    from rich.live import Live
    from rich.text import Text

    from worker import control

    path, request = _socket(server), control.Request(order="status")
    with nullcontext() if as_json else Live(auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            answer = control.ask(path, request)
            if live is None:
                typer.echo(answer.model_dump_json())
            else:
                live.update(Text(_in_lines(answer)), refresh=True)
            time.sleep(1.0)


def _in_lines(status: Status) -> str:
    return "\n".join(f"{name:<9} {words}" for name, words in describe(status))


def describe(status: Status) -> list[tuple[str, str]]:
    """The status as lines of a name and words."""
    from rankup.cli.output import human_bytes
    from worker.events import shards_in_words

    after = ", ends after this lease" if status.finishing else ""
    after = ", ends now" if status.leaving else after
    lines = [
        ("worker", f"{status.name} at {status.server}, process {status.pid}, up {duration(status.uptime_s)}{after}"),
        ("state", status.doing.value + (f": {status.reason}" if status.reason else "")),
    ]
    lease = status.lease
    if lease is not None:
        numbers = [f"step {lease.step} of {lease.steps}"]
        if lease.loss is not None:
            numbers.append(f"loss {lease.loss:.3f}")
        if lease.tokens_per_s is not None:
            numbers.append(f"{lease.tokens_per_s:.0f} tokens/s")
        if lease.energy_j is not None:
            numbers.append(f"{lease.energy_j / 3600:.1f} Wh")
        if lease.eta_s is not None:
            numbers.append(f"about {duration(lease.eta_s)} to go")
        shards = shards_in_words(lease.shard, lease.shards)
        lines.append(("lease", f"{shards} of {lease.round_id}, {lease.model} version {lease.base_version}"))
        lines.append(("", ", ".join(numbers)))
    credit, ready = status.credit, f"{status.outbox_ready} to upload"
    if status.upload is not None:
        ready += f" ({human_bytes(status.upload.done)} of {human_bytes(status.upload.total)} sent)"
    changed = status.limits.model_dump(mode="json", exclude_defaults=True).items()
    lines += [
        ("outbox", f"{ready}, {status.outbox_submitted} waiting for their verdict"),
        ("today", f"{human_bytes(status.bytes_up)} up, {human_bytes(status.bytes_down)} down"),
        ("credit", f"{credit.accepted} accepted, {credit.rejected} rejected, {credit.tokens} tokens"),
        ("limits", ", ".join(f"{name}={limits.value_in_words(value)}" for name, value in changed) or "defaults"),
    ]
    if status.page:
        lines.append(("page", f"{status.page} (`rankup worker page --open`)"))
    return lines + [("note", words) for words in status.unread]


def duration(seconds: float) -> str:
    """A length of time in one unit: 45 s, 21 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
