"""`rankup up`: a server on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    app.command("up")(up)


def up(
    host: str = typer.Option(None, help="Address to listen on, 127.0.0.1 by default; 0.0.0.0 lets other machines in."),
    port: int = typer.Option(None, min=1, max=65535, help="Port to listen on, 8420 by default."),
    open_enrolment: bool = typer.Option(False, "--open", help="Let anybody join without an invite."),
    approval: bool = typer.Option(
        False, "--approval", help="Let anybody join, but begin only after `rankup people approve`, or with an invite."
    ),
) -> None:
    """Start a server on this machine: storage, ledger, Ray, gateway and keeper. Ctrl-C stops all of it.

    Data stays in the state folder ($RANKUP_HOME), so the next `rankup up` goes on where this one stopped. While it runs
    it starts again what dies.

    **Examples**

    - `rankup up`
    - `rankup up --port 9000`
    - `RANKUP_STORE_ENDPOINT_URL=https://s3.example.org RANKUP_LEDGER_URL=redis://valkey:6379 rankup up --host 0.0.0.0`
    """
    from rankup.cli.interrupt import interruptible
    from rankup.cli.stack import Stack
    from rankup.cli.watch import HeadLostError, begin_again
    from rankup.errors import InputError
    from rankup.logs import configure_server
    from rankup.settings import CoordinatorSettings

    configure_server("server")
    settings = CoordinatorSettings()
    if open_enrolment and approval:
        raise InputError("--open and --approval exclude each other", remedy="Choose one of them.")
    if open_enrolment or approval:
        settings = settings.model_copy(update={"enrolment": "open" if open_enrolment else "approval"})
    chosen = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    stack = Stack(
        settings.model_copy(update=chosen),
        say=lambda line: typer.echo(f"  {line}"),
    )
    lost = False
    with interruptible() as stopped:
        typer.secho("Starting (Ctrl-C stops everything)", bold=True)
        try:
            stack.start()
            typer.secho("\nReady.", fg="green", bold=True)
            typer.echo(f"  page         {stack.url}/")
            typer.echo(f"  join with    {stack.join_line()}")
            typer.echo("  next         rankup model import, rankup dataset build, rankup round create\n")
            stack.watch(stopped)
        except KeyboardInterrupt:
            pass
        except HeadLostError as exc:
            typer.secho(f"  {exc.cause}: starting the whole server again", fg="yellow")
            lost = True
        finally:
            typer.echo("Stopping")
            stack.stop()
    if lost and not stopped.is_set():
        begin_again()
    typer.echo("Stopped; nothing is left running.")
