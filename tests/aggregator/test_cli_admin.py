"""`rankup admin` as an organiser types it, on a real object storage; no Ray takes part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner
from undo_world import MODEL, NESTEROV, LocalPipeline, UndoWorld, bits, make_undo_world, oracle

from rankup.cli import undo
from rankup.cli.admin import app
from rankup.errors import InputError, SetupError
from rankup.replay import verify_version
from rankup.settings import LedgerSettings
from rankup.signing import load_private_key, public_key_hex
from rankup.sources import StoreSource
from rankup.store import S3Store

if TYPE_CHECKING:
    from rankup.local import LocalServices

BUCKET = "undone"


@pytest.fixture
def world(local_services: LocalServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UndoWorld:
    """Three rounds of the toy in a bucket of their own, and the file by which commands find the server."""
    made = make_undo_world(tmp_path)
    for _ in range(3):
        made.play(NESTEROV, count=2)
    settings = local_services.store_settings.model_copy(update={"bucket": BUCKET})
    store = S3Store(settings)
    store.ensure_bucket()
    for key in list(store.list("")):
        store.delete(key)
    for key in made.store.list(""):
        store.put(key, made.store.get(key, max_bytes=10**7))
    home = tmp_path / "home" / "server"
    home.mkdir(parents=True)
    access = {
        "url": "http://127.0.0.1:1",
        "organiser_token": "x",
        "store": settings.to_wire(),
        "ledger": LedgerSettings().to_wire(),
        "ray_address": "",
        "ray_token_file": "",
        "publisher_key_file": str(made.key_file),
    }
    (home / "server.json").write_text(json.dumps(access))
    monkeypatch.setenv("RANKUP_HOME", str(tmp_path / "home"))
    return UndoWorld(tmp_path, store, made.key_file, LocalPipeline(store, made.key_file), made.rounds)


def run(*arguments: str) -> str:
    with capture_logs():
        ended = CliRunner().invoke(app, arguments)
    if ended.exception is not None:
        raise ended.exception
    return ended.output


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.mark.stack
def test_an_organiser_revokes_rolls_back_and_changes_the_key(world: UndoWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = world.rounds
    listed = run_json("contributions", MODEL)
    assert [one["version"] for one in listed] == [1, 1, 2, 2, 3, 3]
    eve = listed[2]
    assert eve["worker_name"] in run("contributions", f"{MODEL}@2")
    mine = [one["contribution"] for one in listed if one["worker_name"] == eve["worker_name"]]

    planned = run_json("revoke", MODEL, eve["worker_id"], "--dry-run")
    assert (planned["contributions"], planned["from_version"]) == (sorted(mine), 0)
    assert planned["rounds_of_versions"] == [1, 2, 3]
    assert world.latest().version == 3

    made = run_json("revoke", MODEL, eve["worker_name"], "--reason", "a bot", "--yes")
    assert (made["version"], made["change"]["reason"]) == (4, "a bot")
    assert bits(world.latest()) == oracle([(one, set(mine)) for one in (a, b, c)])
    assert "without them already" in run("revoke", MODEL, eve["worker_name"], "--yes")

    with pytest.raises(InputError, match="was revoked"):
        run("rollback", MODEL, "1", "--yes")
    with pytest.raises(InputError, match="nobody is there"):
        run("rollback", MODEL, "0")
    monkeypatch.setattr(undo.sys, "stdin", Teletype())
    asked: list[str] = []
    monkeypatch.setattr(undo.typer, "confirm", lambda question, **_: asked.append(question))
    undo.roll_back_command(MODEL, 0, reason="", yes=False, as_json=False)
    assert asked == ["toy: version 4 is the latest. Publish version 0 again, as 5?"]
    assert (world.latest().version, bits(world.latest())) == (5, oracle([]))

    old = world.public
    assert run_json("rotate-key", "--yes")["versions"] == {MODEL: 6}
    assert public_key_hex(load_private_key(world.key_file)) == world.public != old
    source, cache = StoreSource(world.store), world.folder / "cache"
    report = verify_version(source, MODEL, None, cache=cache, level="chain", publisher_key=old)
    assert report.ok, report.mismatches


class Teletype:
    def isatty(self) -> bool:
        return True


def test_without_a_server_on_this_machine_nothing_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKUP_HOME", str(tmp_path))
    for arguments in (("rollback", MODEL, "1"), ("revoke", MODEL, "Eve"), ("contributions", MODEL), ("rotate-key",)):
        with pytest.raises(SetupError, match="no server runs"):
            run(*arguments)
