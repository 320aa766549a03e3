"""`rankup doctor`: which server it looks at, what it prints, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from rankup.cli import server_doctor
from rankup.signing import generate_private_key, save_private_key

if TYPE_CHECKING:
    from rankup.local import LocalServices


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKUP_HOME", str(tmp_path))
    folder = tmp_path / "server"
    folder.mkdir()
    save_private_key(folder / "publisher.key", generate_private_key())
    return folder


def run(*arguments: str) -> Any:
    app = typer.Typer()
    server_doctor.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_the_running_server_is_examined_and_json_is_printed(home: Path, local_services: LocalServices) -> None:
    facts = {
        "store": local_services.store_settings.to_wire(),
        "ledger": local_services.ledger_settings.to_wire(),
        "organiser_token": "o" * 32,
    }
    (home / "server.json").write_text(json.dumps(facts))
    done = run("--json")
    found = {finding["check"]: finding for finding in json.loads(done.output)}
    failed = [name for name, finding in found.items() if finding["grade"] == "fail"]
    # What else listens on this machine is not for a test to say.
    assert set(failed) <= {"open ports", "ray authentication", "disk"}
    assert done.exit_code == bool(failed)
    assert found["s3 privacy"]["grade"] == found["valkey fsync"]["grade"] == found["secrets"]["grade"] == "ok"
    assert str(home / "publisher.key") in found["publisher's key"]["found"]
    assert local_services.store_settings.secret_key.get_secret_value() not in done.output


def test_without_a_server_it_says_so_with_a_remedy_and_fails(home: Path) -> None:
    done = run("--json")
    assert done.exit_code == 1
    found = {finding["check"]: finding for finding in json.loads(done.output)}
    for check in ("s3", "valkey"):
        assert found[check]["grade"] == "fail"
        assert "no server runs on this machine" in found[check]["found"]
        assert "RANKUP_LEDGER_URL" in found[check]["remedy"]
    table = run()
    assert table.exit_code == 1
    assert "fail" in table.output


def test_servers_in_the_settings_go_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "server.json").write_text("{}")
    monkeypatch.setenv("RANKUP_STORE_ENDPOINT_URL", "http://s3.example.org")
    monkeypatch.setenv("RANKUP_LEDGER_URL", "redis://valkey.example.org")
    monkeypatch.setenv("RANKUP_COORDINATOR_PUBLISHER_KEY_FILE", "/elsewhere/key")
    patient = server_doctor.find_patient()
    assert patient.store is not None
    assert patient.ledger is not None
    assert patient.store.endpoint_url == "http://s3.example.org"
    assert patient.ledger.url.get_secret_value() == "redis://valkey.example.org"
    assert patient.settings.publisher_key_file == Path("/elsewhere/key")
