"""`rankup admin …`: what only the organiser does. Run on the server's machine, beside `rankup up`."""

from __future__ import annotations

import typer

from rankup.cli import action_log, backup, gc, rebuild, undo

app = typer.Typer(
    help="Undo versions, change the key, back up, restore, forget what nobody needs.", no_args_is_help=True
)
undo.register(app)
gc.register(app)
backup.register(app)
rebuild.register(app)
action_log.register(app)
