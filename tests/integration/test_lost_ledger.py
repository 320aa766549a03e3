"""A whole agent at work while its server loses the ledger and gets it back: gateway, Valkey and agent are real."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from coordinator import rebuild
from rankup.settings import WorkerSettings
from rankup.signing import public_key_hex
from tests.coordinator.conftest import ValkeyServer
from tests.coordinator.gateway_world import INVITE, World, furnished_gateway
from worker import agent
from worker.events import Abandoned, Dropped, Enrolled, Step, Submitted, WorkerEvent
from worker.limits import Limits, Readings

FAKE_TRAINER = Path(__file__).parents[1] / "worker" / "fake_trainer.py"
STEPS = 80
"""Two seconds or so."""
SETTINGS = {"transfer": "proxied", "heartbeat_s": 0.1, "poll_s": 0.1}


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer(Path(tempfile.mkdtemp(prefix="rk-", dir="/tmp")))
    server.start()
    yield server
    server.kill()
    shutil.rmtree(server.folder)


def idle_machine(limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings:
    return Readings(now=datetime.now().astimezone(), transferred_bytes=transferred_bytes)


def lose(valkey: ValkeyServer, world: World) -> None:
    """For some heartbeats the ledger is empty, then it is restored."""
    valkey.client().flushall()
    time.sleep(0.4)
    found = rebuild.plan(world.store, public_key_hex(world.publisher))
    world.with_ledger(lambda ledger: rebuild.restore(ledger, world.store, found, time.time()))


def test_a_training_goes_on_while_the_ledger_is_lost_and_restored(valkey: ValkeyServer, tmp_path: Path) -> None:
    with furnished_gateway(valkey.ledger_settings, changes=SETTINGS) as world:
        view = world.open_round(recipe={"steps": STEPS, "rank": 2})
        events: list[WorkerEvent] = []
        loss = threading.Thread(target=lose, args=(valkey, world))

        def see(event: WorkerEvent) -> None:
            events.append(event)
            if isinstance(event, Step) and event.step == 10:
                loss.start()

        def pull(server: str, model: str, version: int, folder: Path, **_: Any) -> str:
            (folder / "config.json").write_text("{}")
            return str(view["base_manifest"])

        agent.run(
            str(world.http.base_url),
            invite=INVITE,
            settings=WorkerSettings(home=tmp_path / "home", threads=1, timeout_s=5.0, patience_s=60.0),
            max_leases=1,
            stop=threading.Event(),
            report=see,
            trainer_command=(sys.executable, str(FAKE_TRAINER), "ok"),
            pull=pull,
            sense=idle_machine,
            verdict_wait_s=0.0,
        )
        loss.join()
        kinds = [type(event) for event in events]
        assert kinds.count(Submitted) == 1
        assert kinds.count(Enrolled) >= 2
        assert not {Abandoned, Dropped} & set(kinds)
        world.judge_all(view["round_id"])
        assert world.http.get(f"/v1/rounds/{view['round_id']}").json()["accepted"] == 1
