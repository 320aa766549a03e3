"""`rankup up`: a server on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    app.command("up")(up)


def up(
    host: str = typer.Option(None, help="Address to listen on, 127.0.0.1 by default; 0.0.0.0 lets other machines in."),
    port: int = typer.Option(None, min=1, max=65535, help="Port to listen on, 8420 by default."),
    open_enrolment: bool = typer.Option(False, "--open", help="Let anybody join without an invite."),
) -> None:
    """Start a server on this machine: storage, ledger, Ray, gateway and keeper. Ctrl-C stops all of it.

    Data stays in the state folder ($RANKUP_HOME), so the next `rankup up` goes on where this one stopped.

    **Examples**

    - `rankup up`
    - `rankup up --port 9000`
    - `RANKUP_STORE_ENDPOINT_URL=https://s3.example.org RANKUP_LEDGER_URL=redis://valkey:6379 rankup up --host 0.0.0.0`
    """
    from rankup.cli.interrupt import interruptible
    from rankup.cli.stack import Stack
    from rankup.logs import configure_server
    from rankup.settings import CoordinatorSettings

    configure_server("server")
    settings = CoordinatorSettings()
    chosen = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    stack = Stack(
        settings.model_copy(update=chosen),
        open_enrolment=open_enrolment,
        say=lambda line: typer.echo(f"  {line}"),
    )
    with interruptible() as stopped:
        typer.secho("Starting (Ctrl-C stops everything)", bold=True)
        try:
            stack.start()
            typer.secho("\nReady.", fg="green", bold=True)
            typer.echo(f"  page         {stack.url}/")
            typer.echo(f"  join with    {stack.join_line()}")
            typer.echo("  next         rankup model import, rankup dataset build, rankup round create\n")
            stopped.wait()
        except KeyboardInterrupt:
            pass
        finally:
            typer.echo("Stopping")
            stack.stop()
    typer.echo("Stopped; nothing is left running.")
