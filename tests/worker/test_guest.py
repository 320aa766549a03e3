"""A guest on somebody's machine: pauses, orders, limits, failures and restarts, against a gateway in this process."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import BASE_MANIFEST, INVITE, FakeGateway, serve
from test_agent import left_over, pull_nothing
from tiny_model import save_tiny_llama

from rankup.errors import NotFoundError, StateError
from rankup.protocol import LeaseState
from rankup.settings import WorkerSettings
from rankup.targets import select_targets
from worker import agent, control, leasework, limits, workloop
from worker.control import Reply, Request, ask, find_socket, socket_path
from worker.events import (
    Abandoned,
    Claimed,
    Kept,
    NoWork,
    PageOpened,
    Paused,
    Problem,
    Resumed,
    Retrying,
    Step,
    Submitted,
    Summary,
    WorkerEvent,
)
from worker.job import Job
from worker.limits import Limits, Readings
from worker.limitsfile import change_limits
from worker.pagekey import Door, open_key
from worker.status import Doing, Status
from worker.training import TRAINER_COMMAND

PAUSABLE = Path(__file__).with_name("pausable_trainer.py")


@dataclass
class Guest:
    """An agent in a thread on a machine whose readings a test sets."""

    home: Path
    url: str
    readings: dict[str, Any] = field(default_factory=dict)
    events: list[WorkerEvent] = field(default_factory=list)
    on_event: Callable[[WorkerEvent], None] = lambda event: None
    stop: threading.Event = field(default_factory=threading.Event)
    summary: Summary | None = None
    more: dict[str, Any] = field(default_factory=dict)
    patience_s: float = 60.0
    """Of the test."""
    _thread: threading.Thread | None = None

    def sense(self, limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings:
        found = Readings(now=datetime.now().astimezone(), gpu=gpu, transferred_bytes=transferred_bytes)
        return dataclasses.replace(found, **self.readings)

    def see(self, event: WorkerEvent) -> None:
        self.events.append(event)
        self.on_event(event)

    def start(self, mode: str = "slow", *, leases: int | None = 1, **more: Any) -> Guest:
        fields: dict[str, Any] = {
            "invite": INVITE,
            "name": "ada",
            "pull": pull_nothing,
            "verdict_wait_s": 5.0,
            "trainer_command": (sys.executable, str(PAUSABLE), mode),
        }
        settings = WorkerSettings(home=self.home, threads=1, timeout_s=5.0, patience_s=30.0, device="cpu")

        def work() -> None:
            self.summary = agent.run(
                self.url,
                **fields | more,
                settings=settings,
                max_leases=leases,
                stop=self.stop,
                report=self.see,
                sense=self.sense,
            )

        self._thread = threading.Thread(target=work)
        self._thread.start()
        return self

    def end(self, *, stop: bool = False) -> Summary:
        if stop:
            self.stop.set()
        assert self._thread is not None
        self._thread.join(self.patience_s)
        assert not self._thread.is_alive()
        assert self.summary is not None
        return self.summary

    def wait_for(self, kind: type, number: int = 1, **fields: Any) -> Any:
        until = time.monotonic() + self.patience_s
        while time.monotonic() < until:
            found = [e for e in self.of(kind) if all(getattr(e, name) == value for name, value in fields.items())]
            if len(found) >= number:
                return found[number - 1]
            time.sleep(0.01)
        raise AssertionError(f"no {kind.__name__} among {self.events}")

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    def ask(self, order: control.Order, seconds: float | None = None) -> Status:
        return ask(find_socket(self.home), Request(order=order, seconds=seconds))

    def starts(self) -> list[str]:
        return next(self.home.glob("servers/*/starts")).read_text().splitlines()


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MIN_PAUSE_S", 0.3)
    monkeypatch.setattr(limits, "CLEAR_S", 0.1)
    monkeypatch.setattr("worker.governor.LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("worker.recovery._CRASH_PAUSE_S", 0.0)
    monkeypatch.setattr(workloop, "_VERDICT_LOOK_S", 0.05)


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serve(FakeGateway()) as fake:
        yield fake


@pytest.fixture
def guest(gateway: FakeGateway, tmp_path: Path) -> Iterator[Guest]:
    machine = Guest(tmp_path / "home", gateway.url)
    yield machine
    machine.stop.set()


def test_a_game_ends_the_trainer_keeps_the_lease_and_training_goes_on_where_it_was(
    gateway: FakeGateway, guest: Guest
) -> None:
    change_limits_of(guest, "exclusive_app=cs2")
    gateway.offer("l1")
    guest.start()
    guest.wait_for(Step, step=2)
    guest.readings = {"programs": frozenset({"cs2"})}
    assert "cs2 is running" in guest.wait_for(Paused).reason
    beats = len(gateway.beats)
    status = guest.ask("status")
    assert (status.doing, status.lease and status.lease.lease_id) == (Doing.PAUSED, "l1")
    guest.readings = {}
    guest.wait_for(Resumed)
    assert guest.end().accepted == 1
    assert len(gateway.beats) > beats
    assert gateway.returned == {}
    first, second = guest.starts()
    assert first.startswith("0 ")
    assert int(second.split()[0]) >= 2
    assert [event.step for event in guest.of(Step)] == [1, 2, 3, 4, 5]


def test_no_lease_is_claimed_while_nothing_may_be_trained(gateway: FakeGateway, guest: Guest) -> None:
    gateway.offer("l1")
    guest.readings = {"on_battery": True}
    guest.start()
    guest.wait_for(Paused)
    time.sleep(0.3)
    assert guest.of(Claimed) == []
    assert guest.ask("status").reason.startswith("the machine runs on its battery")
    with pytest.raises(StateError, match="nice"):
        ask(find_socket(guest.home), Request(order="limits", changes=("run_on_batteries=true", "nice=99")))
    assert guest.ask("status").limits == Limits()
    status = ask(find_socket(guest.home), Request(order="limits", changes=("run_on_batteries=true",)))
    assert status.limits == Limits(run_on_batteries=True)
    assert guest.end().accepted == 1


def test_a_long_pause_gives_the_lease_back_and_does_not_tell_the_server_why(
    gateway: FakeGateway, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasework, "hold_s", lambda trained_s: 0.3)
    gateway.offer("l1")
    guest.start(leases=None)
    guest.wait_for(Step)
    guest.readings = {"on_battery": True}
    guest.wait_for(Abandoned)
    assert gateway.returned == {"l1": "paused for more than 0 minutes"}
    assert guest.end(stop=True).submitted == 0
    assert left_over(guest.home, "jobs/*") == []


def test_the_owner_pauses_resumes_and_lets_it_finish(gateway: FakeGateway, guest: Guest) -> None:
    gateway.offer("l1", "l2")
    guest.start(leases=None)
    guest.wait_for(Step, step=2)
    status = guest.ask("pause", seconds=3600.0)
    assert status.doing is Doing.PAUSED
    assert "you paused it until" in status.reason
    guest.wait_for(Paused)
    assert guest.ask("resume").doing is not Doing.PAUSED
    guest.wait_for(Resumed)
    guest.wait_for(Step, step=3)
    status = guest.ask("finish")
    assert status.finishing
    assert status.lease is not None
    assert (status.lease.steps, status.lease.loss, status.name) == (5, 1.0, "ada")
    assert status.limits == Limits()
    assert status.bytes_up > 0
    assert guest.end().submitted == 1
    assert gateway.waiting == ["l2"]
    assert guest.of(Submitted)[0].lease_id == "l1"


def test_a_pause_holds_after_a_restart_until_it_is_ended_on_the_page(gateway: FakeGateway, guest: Guest) -> None:
    gateway.offer("l1")
    guest.start(leases=None, keep_lease=lambda: True)
    guest.wait_for(Step, step=2)
    guest.ask("pause", seconds=3600.0)
    guest.wait_for(Paused)
    guest.end(stop=True)
    guest.stop.clear()
    again = Guest(guest.home, guest.url, stop=guest.stop).start()
    reason = again.wait_for(Paused).reason
    assert "you paused it until" in reason
    status = again.ask("status")
    assert (status.doing, status.paused_by_you, status.reason) == (Doing.PAUSED, True, reason)
    assert status.pause_ends_at is not None
    assert status.lease is not None
    assert status.lease.step >= 2
    port = int(again.of(PageOpened)[0].address.rpartition(":")[2].strip("/"))
    door = Door(open_key(guest.home), port)
    order = urllib.request.Request(
        f"http://127.0.0.1:{port}/order",
        data=b'{"order": "resume"}',
        headers={
            "Origin": f"http://127.0.0.1:{port}",
            "Content-Type": "application/json",
            "Cookie": f"{door.cookie_name}={door.cookie}",
        },
    )
    with urllib.request.urlopen(order, timeout=10) as answer:  # noqa: S310 - the address of the page
        assert not Reply.model_validate_json(answer.read()).status.paused_by_you  # type: ignore[union-attr]
    assert again.end().accepted == 1
    assert min(event.step for event in again.of(Step)) > 2


def test_what_the_trainer_and_the_disk_may_take_is_as_the_limits_say(gateway: FakeGateway, guest: Guest) -> None:
    change_limits_of(guest, "threads=3", "nice=17", "gpu_usage_limit=42", "disk_max_used_gb=0.001")
    old = guest.home / "cache" / "old"
    old.mkdir(parents=True)
    (old / "model.safetensors").write_bytes(bytes(2_000_000))
    gateway.offer("l1")
    guest.start()
    guest.wait_for(Step)
    job = Job.model_validate_json(next(guest.home.glob("servers/*/jobs/l1/job.json")).read_text())
    assert (job.threads, job.nice, job.share_percent) == (3, 17, 42)
    assert not old.exists()
    assert guest.end().accepted == 1


def test_a_stop_in_the_middle_gives_the_lease_back_at_once(gateway: FakeGateway, guest: Guest) -> None:
    gateway.offer("l1")
    guest.start(leases=None)
    guest.wait_for(Step, step=2)
    guest.end(stop=True)
    assert gateway.returned == {"l1": "the volunteer stopped the worker"}
    assert left_over(guest.home, "jobs/*") == []


def test_to_leave_is_to_return_the_lease_whatever_was_trained(gateway: FakeGateway, guest: Guest) -> None:
    gateway.offer("l1")
    guest.start(leases=None)
    guest.wait_for(Step, step=2)
    guest.ask("leave")
    guest.end()
    assert gateway.returned == {"l1": "the volunteer left"}
    assert left_over(guest.home, "jobs/*") == []
    with pytest.raises(NotFoundError, match="no worker runs"):
        guest.ask("status")


@pytest.mark.parametrize("why", ["the service stops", "the server is away"])
def test_a_lease_that_was_not_returned_is_gone_on_with_by_the_next_start(
    gateway: FakeGateway, guest: Guest, why: str
) -> None:
    gateway.offer("l1")
    guest.start(leases=None, keep_lease=lambda: why == "the service stops")
    guest.wait_for(Step, step=3)
    if why == "the server is away":
        gateway.outage = 10_000
    guest.end(stop=True)
    gateway.outage = 0
    assert gateway.returned == {}
    assert guest.wait_for(Kept).step >= 3
    guest.stop.clear()
    again = Guest(guest.home, guest.url, stop=guest.stop)
    assert again.start().end().accepted == 1
    assert min(event.step for event in again.of(Step)) > 3
    assert left_over(guest.home, "jobs/*") == []


@pytest.mark.parametrize("why", ["the round is over", "returned"])
def test_a_kept_training_of_no_more_use_is_dropped(gateway: FakeGateway, guest: Guest, why: str) -> None:
    gateway.offer("l1")
    guest.start(leases=None, keep_lease=lambda: True)
    guest.wait_for(Step, step=3)
    guest.end(stop=True)
    if why == "returned":
        gateway.granted.pop("l1")  # the server does not know the lease any more
    else:
        gateway.abandon.add("l1")
    guest.stop.clear()
    gateway.offer("l2")
    again = Guest(guest.home, guest.url, stop=guest.stop)
    assert again.start().end().accepted == 1
    assert [event.lease_id for event in again.of(Abandoned, Submitted)] == ["l1", "l2"]


def test_a_crash_of_the_trainer_costs_what_came_after_its_checkpoint(gateway: FakeGateway, guest: Guest) -> None:
    gateway.offer("l1")
    assert guest.start("crash-once").end().accepted == 1
    assert guest.starts() == ["0 None", "2 4"] or guest.starts() == ["0 None", "2 None"]
    assert guest.of(Retrying)[0].step == 2
    assert gateway.returned == {}


def test_where_memory_runs_out_half_of_the_batch_is_tried(gateway: FakeGateway, guest: Guest) -> None:
    gateway.offer("l1", "l2")
    assert guest.start("memory-once", leases=2).end().accepted == 2
    assert guest.starts() == ["0 None", "2 2", "0 2"]


def test_a_delta_that_is_finished_while_quiet_is_wanted_waits(gateway: FakeGateway, guest: Guest) -> None:
    change_limits_of(guest, "daily_xfer_limit_mb=1")
    gateway.offer("l1")

    def use_up(event: WorkerEvent) -> None:
        if isinstance(event, Step) and event.step == 2:
            guest.readings = {"transferred_bytes": 10**7}

    guest.on_event = use_up
    guest.start()
    guest.wait_for(Step, step=5)
    assert guest.end().waiting == 1
    assert gateway.uploads == {}
    guest.readings, guest.on_event = {}, lambda event: None
    assert guest.start(leases=0).end().accepted == 1


def test_a_broken_limits_file_is_told_and_the_limits_before_it_hold(gateway: FakeGateway, guest: Guest) -> None:
    change_limits_of(guest, "idle_time_to_run=7")
    guest.start(leases=None)
    guest.wait_for(NoWork)
    (guest.home / "limits.yaml").write_text("idle_time_to_run: [")
    assert "not YAML" in guest.wait_for(Problem).error.cause
    assert guest.ask("status").limits.idle_time_to_run == 7
    guest.end(stop=True)


def test_the_socket_is_its_owners_and_that_of_a_dead_agent_is_replaced(gateway: FakeGateway, guest: Guest) -> None:
    guest.home.mkdir(parents=True)
    path = socket_path(guest.home, guest.url)
    code = f"import socket, os; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(NotFoundError, match="left from one that died"):
        find_socket(guest.home)
    guest.start(leases=None)
    guest.wait_for(NoWork)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert guest.ask("status").pid == os.getpid()
    guest.end(stop=True)
    assert not path.exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_training_is_paused_in_seconds_and_ends_with_the_same_bits(
    gateway: FakeGateway, guest: Guest, tmp_path: Path
) -> None:
    """Two children with torch: one is paused in the middle, the other goes on; beside them a training at one go."""
    import psutil

    from worker import trainer
    from worker.job import Finished, StepDone

    base = tmp_path / "base"
    gateway.targets = select_targets(save_tiny_llama(base), gateway.recipe)
    gateway.recipe = gateway.recipe.model_copy(update={"steps": 40, "warmup_steps": 2, "learning_rate": 1e-2})
    gateway.announced = gateway.shard = b"".join(b'{"text": "list of %d files"}\n' % n for n in range(10))
    gateway.max_delta_bytes = 1_000_000

    def link_base(server: str, model: str, version: int, folder: Path, **_: Any) -> str:
        for path in base.iterdir():
            if not (folder / path.name).exists():
                os.link(path, folder / path.name)
        return BASE_MANIFEST

    gateway.offer("l1")
    guest.patience_s = 300.0
    guest.start(pull=link_base, trainer_command=TRAINER_COMMAND, name=None)
    guest.wait_for(Step, step=3)
    # Other tests of the same process may have left servers running.
    children = [child for child in psutil.Process().children(recursive=True) if "worker.trainer" in child.cmdline()]
    assert any(child.memory_info().rss > 100e6 for child in children)
    assert all(child.nice() == min(19, psutil.Process().nice() + Limits().nice) for child in children)
    began = time.monotonic()
    guest.ask("pause")
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert time.monotonic() - began < 5
    guest.wait_for(Paused)
    guest.ask("resume")
    assert guest.end().accepted == 1

    grant = gateway.granted["l1"]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "shard.jsonl").write_bytes(gateway.shard)
    job = Job(
        **{name: getattr(grant, name) for name in ("round_id", "lease_id", "fence", "model", "base_manifest", "seed")},
        base_folder=base,
        shard_files=(alone / "shard.jsonl",),
        delta_file=alone / "finished.delta",
        recipe=grant.recipe,
        targets=grant.targets,
        device="cpu",
        threads=1,
    )
    lines: list[Any] = []
    trainer.train(job, lines.append, started=time.perf_counter(), scratch=alone / "scratch")
    curve = [(line.step, line.loss) for line in lines if isinstance(line, StepDone)]
    assert [(event.step, event.loss) for event in guest.of(Step)] == curve
    said = gateway.submissions["l1"][0].statement
    assert isinstance(lines[-1], Finished)
    assert said.sha256 == lines[-1].sha256
    assert (said.tokens, said.steps) == (lines[-1].tokens, 40)
    # Ten rows of 15 characters and </s>, of which all but the first are predicted, in each of 13 epochs, and four more.
    assert said.tokens == (13 * 10 + 4) * 15
    assert next(iter(gateway.names.values())).startswith("volunteer-")
    assert gateway.states["l1"] is LeaseState.ACCEPTED


def change_limits_of(guest: Guest, *changes: str) -> None:
    change_limits(guest.home, changes)
