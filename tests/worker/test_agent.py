"""The whole loop against a gateway in the same process and a trainer without a model."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import BASE_MANIFEST, INVITE, SHARD, FakeGateway, serve

from rankup.errors import (
    DeniedError,
    DiskFullError,
    InputError,
    IntegrityError,
    SetupError,
    StateError,
    TooLargeError,
    UnreachableError,
)
from rankup.protocol import MAX_LEASE_BYTES, LeaseState, Standing
from rankup.settings import WorkerSettings
from worker import agent
from worker.events import (
    Abandoned,
    Claimed,
    Downloading,
    Dropped,
    Enrolled,
    NoWork,
    Problem,
    Step,
    Submitted,
    Summary,
    Uploading,
    Verdict,
    Waiting,
    WorkerEvent,
)
from worker.limits import Limits, Readings

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")


def idle_machine(limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings:
    return Readings(now=datetime.now().astimezone(), transferred_bytes=transferred_bytes)


def pull_nothing(server: str, model: str, version: int, folder: Path, **_: Any) -> str:
    (folder / "config.json").write_text("{}")
    return BASE_MANIFEST


@dataclass
class Machine:
    """One volunteer's machine: run the agent on it with `work`."""

    home: Path
    url: str
    events: list[WorkerEvent] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    on_event: Callable[[WorkerEvent], None] = lambda event: None
    models: tuple[str, ...] = ()

    def see(self, event: WorkerEvent) -> None:
        self.events.append(event)
        self.on_event(event)

    def work(self, mode: str = "ok", *, leases: int | None = 1, patience_s: float = 30.0, **more: Any) -> Summary:
        return agent.run(
            self.url,
            **{"invite": INVITE, "name": "ada", "pull": pull_nothing, "verdict_wait_s": 5.0, "sense": idle_machine}
            | more,
            settings=WorkerSettings(
                home=self.home, threads=1, timeout_s=5.0, patience_s=patience_s, models=self.models
            ),
            max_leases=leases,
            stop=self.stop,
            report=self.see,
            trainer_command=(sys.executable, str(FAKE_TRAINER), mode),
        )

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kinds)]

    def stop_on(self, kind: type) -> None:
        self.on_event = lambda event: self.stop.set() if isinstance(event, kind) else None


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serve(FakeGateway()) as fake:
        yield fake


@pytest.fixture
def machine(gateway: FakeGateway, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home", gateway.url)


def left_over(home: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in home.glob(f"servers/*/{pattern}"))


def test_a_lease_goes_from_claim_to_verdict(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2")
    summary = machine.work("noisy", leases=2)
    assert (summary.leases, summary.submitted, summary.accepted, summary.waiting) == (2, 2, 2, 0)
    assert summary.tokens == 2 * 8 * 5
    assert [event.step for event in machine.of(Step)] == [1, 2, 3, 4, 5] * 2
    assert [event.lease_id for event in machine.of(Verdict)] == ["l1", "l2"]
    assert [event.done == event.total for event in machine.of(Uploading)][-1]
    statement = gateway.submissions["l1"][0].statement
    assert statement.sha256 in gateway.uploads
    assert (statement.device, statement.precision, statement.tokens_per_s) == ("cuda", "nf4", 90.0)
    assert (statement.grad_norm, statement.energy_j) == (0.5, 2.0 * statement.steps)
    assert left_over(machine.home, "outbox/*.delta") == []
    assert left_over(machine.home, "jobs/*") == []


def test_the_shards_of_a_lease_are_fetched_and_trained_together(gateway: FakeGateway, machine: Machine) -> None:
    gateway.shards = gateway.links = 3
    gateway.offer("l1")
    summary = machine.work()
    assert (summary.submitted, summary.accepted) == (1, 1)
    claimed, bytes_ = machine.of(Claimed)[0], [event.done for event in machine.of(Downloading)]
    assert (claimed.shard, claimed.shards, claimed.steps) == (0, 3, 3 * 5)
    assert bytes_ == [len(SHARD), 2 * len(SHARD), 3 * len(SHARD)]
    assert {event.total for event in machine.of(Downloading)} == {3 * len(SHARD)}
    assert [(event.step, event.steps) for event in machine.of(Step)] == [(n, 15) for n in range(1, 16)]
    assert gateway.submissions["l1"][0].statement.steps == 15


@pytest.mark.parametrize(
    ("shards", "links", "size", "kind"),
    [(3, 2, 10, InputError), (257, 257, 10, InputError), (2, 2, MAX_LEASE_BYTES // 2 + 1, TooLargeError)],
)
def test_a_lease_with_missing_links_or_too_many_bytes_goes_back_before_anything_is_fetched(
    gateway: FakeGateway, machine: Machine, shards: int, links: int, size: int, kind: type
) -> None:
    class Announced(bytes):
        def __len__(self) -> int:
            return size

    gateway.shards, gateway.links, gateway.announced = shards, links, Announced(SHARD)
    gateway.offer("l1")
    machine.work()
    assert [type(event.error) for event in machine.of(Problem)] == [kind]
    assert list(gateway.returned) == ["l1"]
    assert machine.of(Downloading) == []


def test_a_claim_says_what_is_wished_for_and_what_there_is(gateway: FakeGateway, machine: Machine) -> None:
    machine.models = ("tiny", "small")
    machine.home.mkdir()
    (machine.home / "limits.yaml").write_text("start_hour: 0\nend_hour: 24\nweek: {mon: [0, 24]}\n")
    gateway.offer("l1")
    machine.work()
    (claim,) = gateway.claims
    assert claim.models == ("tiny", "small")
    assert claim.memory_bytes is not None
    assert claim.memory_bytes > 0
    assert claim.available_s is None


def test_the_team_is_told_once_and_kept(gateway: FakeGateway, machine: Machine) -> None:
    machine.work(leases=0, team="harbour")
    machine.work(leases=0)
    machine.work(leases=0, team="harbour")
    assert gateway.teams == ["harbour"]
    machine.work(leases=0, name="grace")
    machine.work(leases=0, team="")
    assert gateway.teams == ["harbour", "harbour", ""]


def test_a_machine_that_waits_for_approval_says_so_and_goes_on_asking(gateway: FakeGateway, machine: Machine) -> None:
    gateway.standing = Standing.WAITING
    gateway.offer("l1")

    def approve(event: WorkerEvent) -> None:
        if len(machine.of(NoWork)) == 2:
            gateway.standing = Standing.MEMBER

    machine.on_event = approve
    assert machine.work().accepted == 1
    assert [event.waiting for event in machine.of(Enrolled)] == [True]
    assert machine.of(NoWork)[0] == NoWork("The organiser approves each machine.", 0.05, "waiting")
    assert len(gateway.claims) >= 3


@pytest.mark.parametrize("known", [True, False], ids=["known before", "new"])
def test_a_banned_machine_ends_with_the_reason(gateway: FakeGateway, machine: Machine, known: bool) -> None:
    if known:
        machine.work(leases=0)
    gateway.standing = Standing.BANNED
    gateway.offer("l1")
    with pytest.raises(DeniedError, match="banned" if known else "takes no more work") as caught:
        machine.work()
    assert "organiser" in caught.value.remedy
    assert machine.of(Claimed) == []


def test_identity_is_private_and_used_again(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2")
    machine.work()
    machine.work(invite="")
    assert [event.new for event in machine.of(Enrolled)] == [True, False]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in machine.home.glob("servers/*/*")}
    assert modes["worker.key"] == modes["identity.json"] == 0o600
    assert stat.S_IMODE(next(machine.home.glob("servers/*")).stat().st_mode) == 0o700


def test_a_server_that_forgot_the_token_gets_a_new_enrolment_of_the_same_key(
    gateway: FakeGateway, machine: Machine
) -> None:
    gateway.offer("l1")
    machine.on_event = lambda event: gateway.forget_tokens() if isinstance(event, Step) and event.step == 5 else None
    summary = machine.work()
    assert summary.accepted == 1
    assert len(gateway.names) == 1
    assert [event.new for event in machine.of(Enrolled)] == [True, True]


def test_the_trainer_is_ended_when_the_server_says_abandon(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    gateway.abandon.add("l1")
    summary = machine.work("endless")
    assert machine.of(Abandoned) == [Abandoned("l1", "the round is over", returned=False)]
    assert (summary.leases, summary.submitted) == (1, 0)
    assert "l1" not in gateway.returned


def test_heartbeats_tell_step_and_loss(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    gateway.on_beat = lambda: gateway.abandon.add("l1") if gateway.beats[-1][1].step > 0 else None
    machine.work("endless")
    last = gateway.beats[-1][1]
    assert last.step > 0
    assert (last.tokens_per_s, last.grad_norm, last.energy_j) == (100.0, 0.5, 2.0 * last.step)
    assert last.loss is not None


def test_an_outage_in_the_middle_of_submit_gives_one_submission(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    gateway.outage_after_submit = 3
    summary = machine.work()
    assert (summary.submitted, summary.accepted) == (1, 1)
    shas = {said.statement.sha256 for said in gateway.submissions["l1"]}
    assert len(gateway.submissions["l1"]) == 2
    assert len(shas) == 1
    assert machine.of(Waiting)


def test_a_server_that_stays_away_ends_the_run_and_the_next_one_delivers(
    gateway: FakeGateway, machine: Machine
) -> None:
    gateway.offer("l1")
    gateway.outage_after_submit = 10_000
    with pytest.raises(UnreachableError):
        machine.work(patience_s=0.5)
    assert left_over(machine.home, "outbox/*.delta") == ["l1.delta"]
    gateway.outage = 0
    summary = machine.work(leases=0)
    assert (summary.leases, summary.submitted, summary.accepted) == (0, 1, 1)


def test_a_rejected_verdict_is_told_with_its_reason(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    gateway.verdict = LeaseState.REJECTED
    summary = machine.work()
    assert machine.of(Verdict) == [Verdict("l1", False, "norm is above the limit")]
    assert (summary.accepted, summary.rejected) == (0, 1)


def test_a_verdict_does_not_hold_up_the_next_lease(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2")
    gateway.verdict = LeaseState.SUBMITTED

    def judge(event: WorkerEvent) -> None:
        if isinstance(event, Submitted) and event.lease_id == "l2":
            gateway.states.update(l1=LeaseState.ACCEPTED, l2=LeaseState.ACCEPTED)

    machine.on_event = judge
    assert machine.work(leases=2).accepted == 2
    order = [type(event).__name__ for event in machine.of(Claimed, Submitted, Verdict)]
    assert order == ["Claimed", "Submitted", "Claimed", "Submitted", "Verdict", "Verdict"]


def test_a_delta_of_a_closed_round_is_dropped_with_the_reason(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2")

    def reopen(event: WorkerEvent) -> None:
        gateway.refuse_submit = None if isinstance(event, Dropped) else gateway.refuse_submit

    gateway.refuse_submit = StateError("the round is closed", remedy="Nothing to do.")
    machine.on_event = reopen
    summary = machine.work(leases=2)
    assert machine.of(Dropped) == [Dropped("l1", "the round is closed Nothing to do.")]
    assert (summary.dropped, summary.accepted) == (1, 1)
    assert left_over(machine.home, "outbox/*.delta") == []


def test_stop_ends_the_trainer_and_returns_the_lease(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    machine.stop_on(Step)
    summary = machine.work("endless", leases=None)
    assert gateway.returned == {"l1": "the volunteer stopped the worker"}
    assert (summary.leases, summary.submitted) == (1, 0)
    assert machine.of(Abandoned)[0].returned


def test_a_keyboard_interrupt_is_a_stop(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")

    def interrupt(event: WorkerEvent) -> None:
        if isinstance(event, Step):
            machine.on_event = lambda event: None
            raise KeyboardInterrupt

    machine.on_event = interrupt
    summary = machine.work("endless", leases=None)
    assert list(gateway.returned) == ["l1"]
    assert summary.leases == 1


def test_stop_during_the_upload_keeps_the_delta_for_the_next_run(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    machine.stop_on(Uploading)
    assert machine.work(leases=None).waiting == 1
    assert gateway.returned == {}
    machine.stop.clear()
    machine.on_event = lambda event: None
    assert machine.work(leases=0).accepted == 1


def test_stop_ends_a_wait_for_work_at_once(gateway: FakeGateway, machine: Machine) -> None:
    threading.Timer(0.3, machine.stop.set).start()
    began = time.monotonic()
    machine.work(leases=None)
    assert time.monotonic() - began < 5.0


def test_a_crashed_trainer_returns_the_lease_with_the_end_of_its_log(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2", "l3", "l4")
    with pytest.raises(SetupError, match="3 leases in a row"):
        machine.work("crash", leases=None)
    assert sorted(gateway.returned) == ["l1", "l2", "l3"]
    assert "something is wrong with the fan" in machine.of(Problem)[0].error.cause
    assert "ended with code 1" in gateway.returned["l1"]


def test_a_delta_that_is_not_what_the_trainer_reported_is_not_handed_in(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    summary = machine.work("liar")
    assert (summary.submitted, gateway.uploads) == (0, {})
    assert machine.of(Problem)[0].error.code == "bad-delta"


def test_a_full_disk_in_the_trainer_returns_the_lease(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    with pytest.raises(DiskFullError) as caught:
        machine.work("full-disk")
    assert "room left" in gateway.returned["l1"]
    assert "space" in caught.value.remedy


def test_a_full_disk_while_pulling_returns_the_lease(gateway: FakeGateway, machine: Machine) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    gateway.offer("l1")
    with pytest.raises(DiskFullError):
        machine.work(pull=full)
    assert "no room left" in gateway.returned["l1"]


def test_another_base_than_the_lease_names_is_refused(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    machine.work(pull=lambda *_, **__: "0" * 64)
    assert isinstance(machine.of(Problem)[0].error, IntegrityError)
    assert list(gateway.returned) == ["l1"]


def test_a_shard_with_other_bytes_is_refused(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1")
    gateway.shard = gateway.shard[:-2] + b"!\n"
    machine.work()
    assert isinstance(machine.of(Problem)[0].error, IntegrityError)
    assert list(gateway.returned) == ["l1"]


def test_another_publisher_key_stops_the_worker(gateway: FakeGateway, machine: Machine) -> None:
    machine.work(leases=0)
    gateway.publisher_key = "ab" * 32
    with pytest.raises(IntegrityError, match="publisher key"):
        machine.work(leases=0)


def test_a_wrong_invite_is_told_with_a_remedy(gateway: FakeGateway, machine: Machine) -> None:
    with pytest.raises(DeniedError, match="wrong invite") as caught:
        machine.work(invite="nope")
    assert caught.value.remedy


def test_two_workers_never_share_a_server_folder(gateway: FakeGateway, machine: Machine) -> None:
    failures: list[SetupError] = []

    def second(event: WorkerEvent) -> None:
        if isinstance(event, Claimed):
            with pytest.raises(SetupError, match="another worker") as caught:
                Machine(machine.home, machine.url).work()
            failures.append(caught.value)

    gateway.offer("l1")
    machine.on_event = second
    machine.work()
    assert len(failures) == 1
