"""`rankup admin rebuild`, `backup` and `restore` over real servers, as an organiser types them."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from coordinator.ledger import Ledger
from rankup.cli import app
from rankup.cli.stack import Stack
from rankup.errors import InputError, SetupError, StateError
from rankup.local import LocalServices
from rankup.settings import CoordinatorSettings
from rankup.signing import save_private_key
from rankup.store import S3Store
from tests.coordinator.test_keeper import KEY, connect
from tests.coordinator.test_rebuild import ROUNDS, SHARDS, Campaign

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

Run = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A server's folder with the publisher's key, and what a server that was killed leaves behind."""
    server = tmp_path / "home" / "server"
    server.mkdir(parents=True)
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    save_private_key(server / "publisher.key", KEY.private_bytes(*pem))
    (server / "secrets.json").write_text("{}")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (server / "server.json").write_text(json.dumps({"pid": gone.pid}))
    return server


@pytest.fixture
def run(home: Path, valkey: ValkeyServer, local_services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the bucket that RANKUP_STORE_BUCKET names; its JSON. Raises what it raises."""
    settings = local_services.store_settings
    monkeypatch.setenv("RANKUP_HOME", str(home.parent))
    monkeypatch.setenv("RANKUP_STORE_ENDPOINT_URL", settings.endpoint_url)
    monkeypatch.setenv("RANKUP_STORE_ACCESS_KEY", settings.access_key)
    monkeypatch.setenv("RANKUP_STORE_SECRET_KEY", settings.secret_key.get_secret_value())
    monkeypatch.setenv("RANKUP_LEDGER_URL", valkey.ledger_settings.url.get_secret_value())

    def invoke(*words: str) -> Any:
        result = CliRunner().invoke(app, ["admin", *words], standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return json.loads(result.stdout) if "--json" in words else result.stdout

    return invoke


def bucket(local_services: LocalServices, name: str) -> S3Store:
    store = S3Store(local_services.store_settings.model_copy(update={"bucket": name}))
    store.ensure_bucket()
    return store


def played(valkey: ValkeyServer) -> Campaign:
    """A campaign that went to its end, and the ledger of it lost."""

    async def scenario() -> Campaign:
        ledger = await connect(valkey)
        campaign = Campaign(valkey, ledger)
        await campaign.open()
        await campaign.play()
        await ledger.close()
        return campaign

    campaign = asyncio.run(scenario())
    valkey.client().flushall()
    return campaign


def accepted(valkey: ValkeyServer) -> int:
    async def count(ledger: Ledger) -> int:
        return sum(row.accepted for row in await ledger.people.scores.leaderboard())

    async def scenario() -> int:
        ledger = await connect(valkey)
        try:
            return await count(ledger)
        finally:
            await ledger.close()

    return asyncio.run(scenario())


def test_a_bucket_is_backed_up_restored_elsewhere_and_its_ledger_made_again(
    run: Run,
    home: Path,
    valkey: ValkeyServer,
    local_services: LocalServices,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    campaign = played(valkey)
    source = bucket(local_services, "rebuild-source")
    for key in campaign.store.list(""):
        source.put(key, campaign.store.get(key, max_bytes=10**6))
    monkeypatch.setenv("RANKUP_STORE_BUCKET", "rebuild-source")

    shown = run("rebuild", "--dry-run", "--json")
    assert [one["state"] for one in shown["rounds"]] == ["published"] * ROUNDS
    assert (shown["restored"], accepted(valkey)) == (None, 0)
    with pytest.raises(InputError, match="nobody is there"):
        run("rebuild")
    done = run("rebuild", "--yes", "--json")["restored"]
    assert (done["accepted"], done["rejected"], done["rounds"]) == (ROUNDS * SHARDS, 0, {"published": ROUNDS})
    with pytest.raises(StateError, match="not empty"):
        run("rebuild", "--yes")

    folder = tmp_path / "backup"
    made = run("backup", str(folder), "--with-secrets", "--json")
    assert made["copied"] == sum(made["objects"].values()) > 0
    assert made["secrets"] == ["secrets.json", "publisher.key"]
    assert stat.S_IMODE((folder / "secrets" / "publisher.key").stat().st_mode) == 0o600
    assert run("backup", str(folder), "--json")["copied"] == 0

    valkey.client().flushall()
    monkeypatch.setenv("RANKUP_STORE_BUCKET", "rebuild-target")
    (home / "publisher.key").unlink()
    assert run("restore", str(folder), "--with-secrets", "--json")["restored"] == made["copied"]
    target = bucket(local_services, "rebuild-target")
    assert {key: target.get(key, max_bytes=10**6) for key in target.list("")} == {
        key: source.get(key, max_bytes=10**6) for key in source.list("")
    }
    assert "restored" in run("rebuild", "--yes")
    assert accepted(valkey) == ROUNDS * SHARDS


def test_a_server_that_starts_on_an_empty_valkey_restores_it_and_says_so_once(
    run: Run, home: Path, valkey: ValkeyServer, local_services: LocalServices
) -> None:
    campaign = played(valkey)
    store = bucket(local_services, "rebuild-start")
    for key in campaign.store.list(""):
        store.put(key, campaign.store.get(key, max_bytes=10**6))
    told: list[str] = []
    settings = CoordinatorSettings(publisher_key_file=home / "publisher.key")
    stack = Stack(settings, home=home, say=told.append)
    for _ in range(2):
        stack._prepare_ledger(
            local_services.store_settings.model_copy(update={"bucket": "rebuild-start"}), valkey.ledger_settings
        )
    assert [line for line in told if "restored" in line] == [
        f"ledger          restored: {ROUNDS} rounds, {ROUNDS * SHARDS} verdicts, 0 deltas to be judged"
    ]
    assert accepted(valkey) == ROUNDS * SHARDS


def test_secrets_of_another_server_are_not_overwritten(run: Run, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    (folder / "secrets").mkdir(parents=True)
    (folder / "secrets" / "publisher.key").write_text("another one")
    before = (home / "publisher.key").read_bytes()
    with pytest.raises(SetupError, match="another one"):
        run("restore", str(folder), "--with-secrets")
    assert (home / "publisher.key").read_bytes() == before
