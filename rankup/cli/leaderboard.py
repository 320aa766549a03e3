"""`rankup leaderboard`: who has contributed what, as everybody may see it."""

from __future__ import annotations

import typer

SERVER = typer.Option(
    None, "--server", help="URL of the server; default: $RANKUP_SERVER, else the one on this machine."
)


def register(app: typer.Typer) -> None:
    app.command("leaderboard")(leaderboard)


def leaderboard(
    teams: bool = typer.Option(False, "--teams", help="Teams instead of workers."),
    limit: int = typer.Option(50, min=1, max=1000, help="How many places."),
    server: str = SERVER,
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Show the leaderboard: by credit, then by accepted tokens.

    Credit are tokens in published versions, by the weight that they got; tokens of rounds that are not published yet
    wait in escrow.

    **Examples**

    - `rankup leaderboard --server https://rankup.example.org`
    - `rankup leaderboard --teams --json`
    """
    from rankup.cli.http import call, server_url
    from rankup.cli.output import print_json, print_table
    from rankup.membership import Leaderboard

    answer = call("GET", server_url(server), f"/v1/leaderboard?by={'team' if teams else 'worker'}&limit={limit}")
    board = Leaderboard.model_validate(answer)
    if as_json:
        print_json(list(board.teams if teams else board.rows))
    elif teams:
        rows = [(place, one.team, one.members, f"{one.credit:,.0f}") for place, one in enumerate(board.teams, 1)]
        print_table("", ("#", "team", "#members", "#credit"), rows)
    else:
        print_table(
            "",
            ("#", "name", "team", "#credit", "#in escrow", "#accepted", "#rejected", "#tokens"),
            [
                (
                    place,
                    one.name,
                    one.team,
                    f"{one.credit:,.0f}",
                    f"{one.escrow:,.0f}",
                    one.accepted,
                    one.rejected,
                    f"{one.tokens:,}",
                )
                for place, one in enumerate(board.rows, 1)
            ],
        )
