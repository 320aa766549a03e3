"""`rankup doctor`: check the server on this machine, or the one that the settings name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from coordinator.diagnosis import Patient


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """Check what this server stands on: ports, clock, object storage, Valkey, disk, keys. Ends with 1 where one fails.

    The checks write scratch objects into the bucket (under `doctor/`) and remove them again. Warnings do not change the
    exit code. It takes the running server of this machine or, where RANKUP_STORE_* and RANKUP_LEDGER_URL are set, them.

    **Examples**

    - `rankup doctor`
    - `rankup doctor --json`
    """
    import asyncio
    import dataclasses

    from coordinator.diagnosis import Grade, examine
    from rankup.cli.output import print_json, print_table

    findings = asyncio.run(examine(find_patient()))
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        rows = [(each.check, each.grade.value, each.found, each.remedy) for each in findings]
        print_table("", ("check", "result", "found", "remedy"), rows)
    if any(finding.grade is Grade.FAIL for finding in findings):
        raise typer.Exit(1)


def find_patient() -> Patient:
    """The servers that the settings name, else those of the server that runs on this machine."""
    import tempfile

    from coordinator.diagnosis import Patient
    from rankup.cli.stack import SERVER_FILE, server_home
    from rankup.settings import CoordinatorSettings, LedgerSettings, StoreSettings

    home = server_home()
    settings, store, ledger = CoordinatorSettings(), StoreSettings(), LedgerSettings()
    named = bool(store.endpoint_url or store.access_key) and bool(ledger.url.get_secret_value())
    told = _read(home / SERVER_FILE)
    kept = _read(home / "secrets.json")
    changes: dict[str, object] = {"publisher_key_file": home / settings.publisher_key_file}
    if token := told.get("organiser_token") or kept.get("organiser_token"):
        changes |= {} if settings.organiser_token.get_secret_value() else {"organiser_token": token}
    settings = CoordinatorSettings.model_validate(settings.model_dump() | changes)
    folders = (home, Path(tempfile.gettempdir()), *filter(None, [settings.spool_dir]))
    if named:
        return Patient(settings, store, ledger, folders)
    missing = f"no server runs on this machine (no {home / SERVER_FILE}), and the settings name none"
    return Patient(
        settings,
        StoreSettings.from_wire(told["store"]) if "store" in told else None,
        LedgerSettings.from_wire(told["ledger"]) if "ledger" in told else None,
        folders,
        missing,
    )


def _read(path: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found
