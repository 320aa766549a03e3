"""`rankup people …`: who takes part, for the organiser: invites, approvals, bans, and what was done."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import typer

from rankup.cli import action_log

if TYPE_CHECKING:
    from rankup.membership import Invite, Person

app = typer.Typer(help="Invite, approve and ban people; see what they did.", no_args_is_help=True)
SERVER = typer.Option(
    None, "--server", help="URL of the server; default: $RANKUP_SERVER, else the one on this machine."
)
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")
WORKER = typer.Argument(help="Worker id, as `rankup people list` shows it.")
_UNITS = {"m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
action_log.register_remote(app, SERVER)


def seconds_of(text: str) -> float:
    """ "90m", "12h", "7d" or "2w" in seconds. Raises InputError."""
    from rankup.errors import InputError

    found = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if found is None:
        raise InputError(f"{text!r} is no length of time", remedy="Write minutes, hours, days or weeks: 90m, 12h, 7d.")
    return int(found[1]) * _UNITS[found[2]]


def _call(method: str, path: str, server: str | None, body: Any = None) -> Any:
    from rankup.cli.http import call, organiser_token, server_url

    return call(method, server_url(server), path, token=organiser_token(), body=body)


def _when(at: float | None) -> str:
    from datetime import UTC, datetime

    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


# -- invites -----------------------------------------------------------------------------------------------------------


@app.command("invite")
def invite(
    uses: int = typer.Option(1, min=1, help="How many new workers may join with it."),
    lasts: str = typer.Option("7d", "--for", help="How long it is good for: 90m, 12h, 7d, 2w."),
    team: str = typer.Option("", help="Who joins with it is in this team, and the team is closed to all others."),
    note: str = typer.Option("", help="For yourself: whom it is for."),
    server: str = SERVER,
    as_json: bool = JSON,
) -> None:
    """Make an invite. Its code is shown now and never again.

    **Examples**

    - `rankup people invite`
    - `rankup people invite --uses 20 --for 12h --team lovelace`
    """
    from rankup.cli.output import print_json
    from rankup.membership import InviteRequest, NewInvite

    asked = InviteRequest(uses=uses, for_s=seconds_of(lasts), team=team, note=note)
    made = NewInvite.model_validate(_call("POST", "/v1/invites", server, asked.model_dump(mode="json")))
    if as_json:
        print_json(made)
        return
    typer.secho(made.code, fg="green", bold=True)
    typer.echo(f"  good for   {made.invite.uses} workers, until {_when(made.invite.expires_at)} UTC")
    typer.echo("  they type  rankup worker join URL --invite " + made.code)


@app.command("invites")
def invites(server: str = SERVER, as_json: bool = JSON) -> None:
    """List the invites that were made, used up and expired ones included."""
    from rankup.cli.output import print_json
    from rankup.membership import Invites

    found = Invites.model_validate(_call("GET", "/v1/invites", server))
    if as_json:
        print_json(found)
        return
    _print_invites(found.invites)


def _print_invites(found: tuple[Invite, ...]) -> None:
    from rankup.cli.output import print_table

    columns = ("invite", "#left", "#uses", "until (UTC)", "team", "note")
    rows = [(one.invite_id, one.left, one.uses, _when(one.expires_at), one.team, one.note) for one in found]
    print_table("", columns, rows)


@app.command("uninvite")
def uninvite(
    invite_id: str = typer.Argument(help="As `rankup people invites` shows it."), server: str = SERVER
) -> None:
    """Withdraw an invite: nobody joins with it any more. Who did stays."""
    _call("POST", f"/v1/invites/{quote(invite_id, safe='')}/withdraw", server, {})
    typer.echo(f"{invite_id} is withdrawn")


# -- who there is ------------------------------------------------------------------------------------------------------


@app.command("list")
def list_people(
    standing: str = typer.Option(None, help="Only those: member, waiting or banned."),
    limit: int = typer.Option(200, min=1, max=1000, help="How many, those who joined last first."),
    offset: int = typer.Option(0, min=0, help="How many to pass over before."),
    server: str = SERVER,
    as_json: bool = JSON,
) -> None:
    """List who joined, with what they have done.

    **Examples**

    - `rankup people list`
    - `rankup people list --standing banned --json`
    """
    _list(server, as_json, limit=limit, offset=offset, standing=standing)


@app.command("waiting")
def waiting(server: str = SERVER, as_json: bool = JSON) -> None:
    """List who waits for your approval."""
    _list(server, as_json, limit=1000, offset=0, standing="waiting")


def _list(server: str | None, as_json: bool, *, limit: int, offset: int, standing: str | None) -> None:
    from rankup.cli.output import print_json, print_table
    from rankup.errors import InputError
    from rankup.membership import PeoplePage
    from rankup.protocol import Standing

    if standing is not None and standing not in [*Standing]:
        raise InputError(f"{standing!r} is no standing", remedy="Write member, waiting or banned.")
    wanted = f"&standing={standing}" if standing else ""
    page = PeoplePage.model_validate(_call("GET", f"/v1/people?limit={limit}&offset={offset}{wanted}", server))
    if as_json:
        print_json(page)
        return
    columns = ("worker", "name", "team", "standing", "#accepted", "#rejected", "#credit", "#reputation", "last seen")
    rows = [
        (
            one.worker_id,
            one.name,
            one.team,
            one.standing,
            one.accepted,
            one.rejected,
            f"{one.credit:,.0f}",
            _reputation(one.reputation),
            _when(one.seen_at),
        )
        for one in page.people
    ]
    print_table("", columns, rows)


def _reputation(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


@app.command("show")
def show(worker_id: str = WORKER, server: str = SERVER, as_json: bool = JSON) -> None:
    """One worker: standing, machine, what it has done."""
    from rankup.cli.output import print_json
    from rankup.membership import Person

    person = Person.model_validate(_call("GET", f"/v1/people/{quote(worker_id, safe='')}", server))
    if as_json:
        print_json(person)
        return
    _print_person(person)


def _print_person(person: Person) -> None:
    from rankup.cli.output import human_bytes

    device = person.device
    memory = f", {human_bytes(device.memory_bytes)}" if device.memory_bytes else ""
    about = [
        ("worker", person.worker_id),
        ("name", person.name),
        ("team", person.team or "-"),
        ("standing", person.standing.value + (f": {person.note}" if person.note else "")),
        ("machine", f"{device.kind} {device.name}".strip() + memory),
        ("joined", f"{_when(person.enrolled_at)} UTC"),
        ("last seen", f"{_when(person.seen_at)} UTC"),
        ("accepted", f"{person.accepted}, rejected {person.rejected}, {person.valid_in_a_row} valid in a row"),
        ("tokens", f"{person.tokens:,} accepted, {person.unpublished:,} of them in rounds without a version"),
        ("credit", f"{person.credit:,.0f}, in escrow {person.escrow:,.0f}"),
        ("reputation", _reputation(person.reputation)),
    ]
    for name, words in about:
        typer.echo(f"  {name:<11} {words}")


# -- what the organiser says of them -----------------------------------------------------------------------------------


@app.command("approve")
def approve(
    workers: list[str] = typer.Argument(None, help="Worker ids."),
    everybody: bool = typer.Option(False, "--all", help="Everybody who waits."),
    server: str = SERVER,
) -> None:
    """Let workers who wait for it begin.

    **Examples**

    - `rankup people approve w-2b9d6c1e8f405a73`
    - `rankup people approve --all`
    """
    from rankup.membership import Approved, ApproveRequest

    asked = ApproveRequest(workers=tuple(workers or ()), everybody=everybody)
    done = Approved.model_validate(_call("POST", "/v1/people/approve", server, asked.model_dump(mode="json")))
    typer.echo(f"approved: {', '.join(done.workers) or 'nobody was waiting'}")


@app.command("ban")
def ban(
    worker_id: str = WORKER,
    reason: str = typer.Option(..., "--reason", help="Why; the worker is told."),
    server: str = SERVER,
) -> None:
    """Refuse everything that a worker asks from now on. What was accepted of it stays: see `rankup admin revoke`."""
    _tell(worker_id, "ban", server, {"reason": reason})


@app.command("unban")
def unban(worker_id: str = WORKER, server: str = SERVER) -> None:
    """Take a ban back."""
    _tell(worker_id, "unban", server)


@app.command("revoke")
def revoke(worker_id: str = WORKER, server: str = SERVER) -> None:
    """Make a worker's token worth nothing, for example after it leaked. The worker gets a new one by its key."""
    _tell(worker_id, "revoke", server)


def _tell(worker_id: str, what: str, server: str | None, body: dict[str, str] | None = None) -> None:
    from rankup.membership import Person

    person = Person.model_validate(_call("POST", f"/v1/people/{quote(worker_id, safe='')}/{what}", server, body or {}))
    done = "has no valid token any more" if what == "revoke" else f"is {person.standing.value}"
    typer.echo(f"{person.worker_id} ({person.name}) {done}" + (f": {person.note}" if person.note else ""))
