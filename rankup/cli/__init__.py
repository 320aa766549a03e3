"""The `rankup` command: one typer application, its commands in the modules beside this one.

Holds always: importing this package imports neither torch nor ray nor boto3; heavy imports stand inside the commands. A
RankupError ends the process with its own exit code and prints cause and remedy; Ctrl-C ends it with 130.
"""

from __future__ import annotations

import sys

import typer

from rankup import __version__
from rankup.cli import (
    admin,
    data,
    delta,
    demo,
    export,
    leaderboard,
    merge,
    mirror,
    people,
    publish,
    pull,
    rounds,
    serve,
    server_doctor,
    sign,
    verify,
    versions,
    volunteer,
)

app = typer.Typer(
    name="rankup",
    help="Fine-tune one language model together: volunteers train LoRA deltas, the exact sum becomes the next version.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankup {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="Print log events to stderr, and tracebacks of errors."
    ),
    _version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    from rankup.cli.output import configure_logs

    configure_logs(verbose)


serve.register(app)
server_doctor.register(app)
demo.register(app)
versions.register(app)
leaderboard.register(app)
pull.register(app)
verify.register(app)
mirror.register(app)
publish.register(app)
merge.register(app)
sign.register(export.app)
app.add_typer(volunteer.app, name="worker")
app.add_typer(rounds.app, name="round")
app.add_typer(people.app, name="people")
app.add_typer(data.models_app, name="model")
app.add_typer(data.datasets_app, name="dataset")
app.add_typer(delta.app, name="delta")
app.add_typer(export.app, name="export")
app.add_typer(admin.app, name="admin")


def main() -> None:
    """Entry point of the console script."""
    from rankup.cli.output import exit_for

    try:
        code = app(standalone_mode=False)
    except Exception as exc:  # noqa: BLE001 - the outermost frame: everything becomes a message and an exit code
        sys.exit(exit_for(exc))
    except KeyboardInterrupt:
        sys.exit(130)
    # Without its standalone mode typer hands an exit code back instead of ending the process with it.
    if isinstance(code, int):
        sys.exit(code)
