"""`rankup people log` and `rankup admin log`: what the organiser did, from the gateway or from object storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rankup.membership import Action
    from rankup.store import Store

LIMIT = typer.Option(50, "--limit", "-n", min=1, max=200, help="How many, the newest first.")
JSON = typer.Option(False, "--json", help="Print JSON instead of a table.")


def register_remote(app: typer.Typer, server_option: Any) -> None:
    """Add `log`, which asks a gateway."""

    def log(limit: int = LIMIT, server: str = server_option, as_json: bool = JSON) -> None:
        """Show what the organiser did: who, when, from where, with which arguments."""
        from rankup.cli.http import call, organiser_token, server_url
        from rankup.membership import ActionLog

        answer = call("GET", server_url(server), f"/v1/actions?limit={limit}", token=organiser_token())
        _print(ActionLog.model_validate(answer).actions, as_json)

    app.command("log")(log)


def register(app: typer.Typer) -> None:
    """Add `log`, which reads object storage on the server's machine."""
    app.command("log")(log_command)


def log_command(
    limit: int = typer.Option(50, "--limit", "-n", min=1, help="How many, the newest first."), as_json: bool = JSON
) -> None:
    """Show what the organiser did, from object storage: calls, and commands on this machine.

    **Examples**

    - `rankup admin log`
    - `rankup admin log --limit 1000 --json`
    """
    from coordinator import actions
    from rankup.cli.stack import ServerAccess
    from rankup.store import open_store

    store = open_store(ServerAccess.of_this_machine().store)
    _print(reversed(list(actions.read(store, limit))), as_json)


def record_command(store: Store, what: str, arguments: Mapping[str, Any]) -> None:
    """Keep in object storage that a command of the organiser was carried out on this machine."""
    import time

    from coordinator.actions import write_command

    write_command(store, what, arguments, time.time())


def _print(found: Iterable[Action], as_json: bool) -> None:
    import json
    from datetime import UTC, datetime

    from rankup.cli.output import print_json, print_table

    if as_json:
        print_json(list(found))
        return
    rows = [
        (
            datetime.fromtimestamp(one.at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            one.what,
            one.by,
            one.address,
            " ".join(one.subject.values()),
            json.dumps(one.arguments, ensure_ascii=False) if one.arguments else "",
        )
        for one in found
    ]
    print_table("", ("when (UTC)", "what", "by", "from", "about", "arguments"), rows)
