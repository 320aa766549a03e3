"""`rankup admin backup` and `rankup admin restore`: the bucket as a plain folder, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

SECRETS = "secrets"
"""Folder of the server's secrets within a backup, mode 700."""
SECRETS_NAME = "secrets.json"
KEY_NAME = "publisher.key"


def register(app: typer.Typer) -> None:
    """Add the commands to `rankup admin`."""
    app.command("backup")(back_up_bucket)
    app.command("restore")(restore_bucket)


def back_up_bucket(
    folder: Path = typer.Argument(help="Folder to make or to bring up to date; better not on the server's disk."),
    with_secrets: bool = typer.Option(
        False, "--with-secrets", help="Also the publisher's key, the invite and the organiser's token: keep it safe."
    ),
    check: bool = typer.Option(False, "--check", help="Hash again every blob that lies there already."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Copy the bucket into a plain folder: what is new since the last time. The server goes on meanwhile.

    After an interruption run it again: it goes on. Do not collect garbage (`rankup admin gc`) while it runs.

    **Examples**

    - `rankup admin backup /mnt/backup/rankup`
    - `rankup admin backup /mnt/backup/rankup --with-secrets --check`
    """
    import time

    from rankup.backup import back_up
    from rankup.cli.output import human_bytes, print_json
    from rankup.cli.stack import services_at_hand
    from rankup.store import open_store

    with services_at_hand() as services:
        where = f"{services.store.bucket} at {services.store.endpoint_url or 'AWS S3'}"
        with _bar("backup", quiet=as_json) as progress:
            done = back_up(
                open_store(services.store), folder, bucket=where, clock=time.time, check=check, progress=progress
            )
        kept = _keep_secrets(folder, services.publisher_key_file) if with_secrets else []
    state = done.state
    if as_json:
        report: dict[str, Any] = state.model_dump(mode="json")
        counts = {"copied": done.copied, "copied_bytes": done.copied_bytes, "vanished": done.vanished}
        print_json(report | counts | {"secrets": kept, "folder": str(folder.resolve())})
        return
    objects = sum(state.objects.values())
    typer.secho(f"{objects} objects ({human_bytes(state.total_bytes)}) are in {folder}", fg="green")
    typer.echo(f"  copied    {done.copied} ({human_bytes(done.copied_bytes)}), every blob checked by its hash")
    if kept:
        typer.echo(f"  secrets   {', '.join(kept)}: whoever has this folder can publish in your name")
    else:
        typer.echo("  secrets   none; nothing can be published without the publisher's key: --with-secrets")


def restore_bucket(
    folder: Path = typer.Argument(help="Folder that `rankup admin backup` made.", exists=True, file_okay=False),
    with_secrets: bool = typer.Option(False, "--with-secrets", help="Also the publisher's key and the tokens."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Put a backup into an empty bucket. Nothing is overwritten; after an interruption run it again.

    Then start the server (`rankup up`), which restores its Valkey from it, or run `rankup admin rebuild`.

    **Examples**

    - `RANKUP_HOME=/srv/rankup rankup admin restore /mnt/backup/rankup --with-secrets`
    - `RANKUP_STORE_BUCKET=rankup2 rankup admin restore /mnt/backup/rankup`
    """
    from rankup.cli.output import human_bytes, print_json
    from rankup.cli.stack import services_at_hand
    from rankup.givingback import restore
    from rankup.store import open_store

    given = _give_secrets_back(folder) if with_secrets else []
    with services_at_hand() as services:
        store = open_store(services.store)
        store.ensure_bucket()
        with _bar("restore", quiet=as_json) as progress:
            done = restore(store, folder, progress=progress)
    if as_json:
        counts = {"restored": done.copied, "restored_bytes": done.copied_bytes, "secrets": given}
        print_json(done.state.model_dump(mode="json") | counts)
        return
    typer.secho(f"{done.copied} objects ({human_bytes(done.copied_bytes)}) are in the bucket", fg="green")
    typer.echo("  next      rankup up, or rankup admin rebuild where the server runs")


@contextmanager
def _bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    from rankup.cli.transfer import storing_bar

    with storing_bar(title, quiet=quiet) as draw:
        yield draw


def _keep_secrets(folder: Path, key_file: Path) -> list[str]:
    """Copy them into the backup, for its owner only; the names of those that there are."""
    from rankup.cli.stack import server_home
    from rankup.durable import write_file
    from rankup.folder import disk_errors

    kept = []
    place = folder / SECRETS
    with disk_errors(place):
        place.mkdir(exist_ok=True)
        place.chmod(0o700)
        for source, name in ((server_home() / SECRETS_NAME, SECRETS_NAME), (key_file, KEY_NAME)):
            if source.is_file():
                write_file(place / name, source.read_bytes(), mode=0o600)
                kept.append(name)
    return kept


def _give_secrets_back(folder: Path) -> list[str]:
    """Copy them into the server's folder, where there are none. Raises SetupError where there are other ones."""
    from rankup.cli.stack import server_home
    from rankup.durable import write_file
    from rankup.errors import SetupError
    from rankup.folder import disk_errors
    from rankup.settings import CoordinatorSettings

    home = server_home()
    targets = {SECRETS_NAME: home / SECRETS_NAME, KEY_NAME: home / CoordinatorSettings().publisher_key_file}
    found = {name: folder / SECRETS / name for name in targets if (folder / SECRETS / name).is_file()}
    if not found:
        raise SetupError(f"{folder} has no secrets in it", remedy="Leave --with-secrets away.")
    for name, source in found.items():
        target = targets[name]
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise SetupError(
                f"{target} exists and is another one than in the backup",
                remedy="Move it away, or name another folder in RANKUP_HOME.",
            )
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
        for name, source in found.items():
            write_file(targets[name], source.read_bytes(), mode=0o600)
    return sorted(found)
