"""`rankup admin …`: what only the organiser does. Run on the server's machine, beside `rankup up`."""

from __future__ import annotations

import typer

from rankup.cli import gc, undo

app = typer.Typer(help="Undo versions, change the publisher's key, forget what nobody needs.", no_args_is_help=True)
undo.register(app)
gc.register(app)
