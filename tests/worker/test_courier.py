"""A delta that takes its time to be handed in, and what the agent does meanwhile: the next lease, a pause, an end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import FakeGateway, serve
from test_agent import Machine

from rankup.errors import DeniedError, RankupError, StateError, UnreachableError
from rankup.protocol import LeaseState, LeaseView, SubmitRequest
from worker import workloop
from worker.client import StopRequested
from worker.courier import Courier
from worker.events import Claimed, Dropped, Paused, Step, Submitted, WorkerEvent
from worker.limits import Limits, Readings
from worker.limitsfile import change_limits


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    monkeypatch.setattr(workloop, "OVERLAP_AFTER_S", 0.05)
    with serve(FakeGateway()) as fake:
        yield fake


@pytest.fixture
def machine(gateway: FakeGateway, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home", gateway.url)


@contextmanager
def slow_line(gateway: FakeGateway, lease_id: str, refused: RankupError | None = None) -> Iterator[threading.Event]:
    """The delta of this lease is taken, or `refused`, only when the event is set."""
    arrives, submit = threading.Event(), gateway.submit

    def late(which: str, said: SubmitRequest, key: str) -> LeaseView:
        if which == lease_id:
            if not arrives.wait(3.0):
                raise UnreachableError("object storage is slow")
            if refused is not None:
                raise refused
        return submit(which, said, key)

    gateway.submit = late  # type: ignore[method-assign]
    try:
        yield arrives
    finally:
        arrives.set()
        gateway.submit = submit  # type: ignore[method-assign]


def once(seen: Callable[[WorkerEvent], bool], act: Callable[[], object]) -> Callable[[WorkerEvent], None]:
    return lambda event: (act(), None)[1] if seen(event) else None


def steps_of(machine: Machine, lease_id: str) -> Callable[[WorkerEvent], bool]:
    """Whether an event is a step of this lease."""
    return lambda event: isinstance(event, Step) and machine.of(Claimed)[-1].lease_id == lease_id


def test_the_next_lease_is_trained_while_a_delta_is_on_its_way(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2", "l3")
    seen: list[Any] = []
    with slow_line(gateway, "l1") as arrives:

        def second_begins() -> None:
            seen.append((gateway.states["l1"], len([beat for lease, beat in gateway.beats if lease == "l1"])))
            if len(seen) == 5:
                arrives.set()

        machine.on_event = once(steps_of(machine, "l2"), second_begins)
        summary = machine.work(leases=3)
    assert (summary.leases, summary.submitted, summary.accepted, summary.waiting) == (3, 3, 3, 0)
    assert [said.delivering for said in gateway.claims][:2] == [None, "l1"]
    assert {state for state, _ in seen} == {LeaseState.GRANTED}
    assert seen[-1][1] > seen[0][1], "the heart of the lease that is delivered goes on"
    assert [event.lease_id for event in machine.of(Submitted)] == ["l1", "l2", "l3"]
    assert not gateway.returned


def test_no_third_lease_is_claimed_while_a_delta_is_on_its_way(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2", "l3")
    states: dict[str, LeaseState] = {}
    claim = gateway.claim

    def seen(said: Any) -> Any:
        states.setdefault(f"claim {len(gateway.claims)}", gateway.states.get("l1", LeaseState.GRANTED))
        return claim(said)

    gateway.claim = seen  # type: ignore[method-assign]
    with slow_line(gateway, "l1") as arrives:
        machine.on_event = once(
            lambda event: isinstance(event, Step) and event.step == event.steps and len(machine.of(Claimed)) == 2,
            lambda: threading.Timer(0.5, arrives.set).start(),
        )
        assert machine.work(leases=3).accepted == 3
    assert states == {
        "claim 0": LeaseState.GRANTED,
        "claim 1": LeaseState.GRANTED,
        "claim 2": LeaseState.ACCEPTED,
    }


def test_a_short_upload_is_waited_for(gateway: FakeGateway, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloop, "OVERLAP_AFTER_S", 5.0)
    gateway.offer("l1", "l2")
    with slow_line(gateway, "l1") as arrives:
        threading.Timer(0.5, arrives.set).start()
        assert machine.work(leases=2).accepted == 2
    assert [said.delivering for said in gateway.claims] == [None, None]


def test_the_last_delta_is_waited_for_before_the_worker_ends(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2")
    with slow_line(gateway, "l2") as arrives:
        threading.Timer(0.6, arrives.set).start()
        assert machine.work(leases=2).accepted == 2


def test_a_worker_that_is_stopped_meanwhile_delivers_the_next_time(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2")
    with slow_line(gateway, "l1"):
        machine.on_event = once(steps_of(machine, "l2"), machine.stop.set)
        summary = machine.work(leases=None)
    assert (summary.leases, summary.submitted) == (2, 0)
    assert gateway.returned.keys() == {"l2"}
    machine.stop.clear()
    machine.on_event = lambda event: None
    assert machine.work(leases=0).waiting == 0
    assert gateway.states["l1"] is LeaseState.ACCEPTED


def test_a_delta_that_is_refused_ends_no_other_lease(gateway: FakeGateway, machine: Machine) -> None:
    gateway.offer("l1", "l2")
    with slow_line(gateway, "l1", StateError("another delta was accepted")) as arrives:
        machine.on_event = once(steps_of(machine, "l2"), arrives.set)
        summary = machine.work(leases=2)
    assert (summary.dropped, summary.accepted) == (1, 1)
    assert [event.lease_id for event in machine.of(Dropped)] == ["l1"]
    assert gateway.returned.keys() == {"l1"}


def test_a_server_that_stays_away_ends_the_worker_after_the_lease_that_it_trains(
    gateway: FakeGateway, machine: Machine
) -> None:
    gateway.offer("l1", "l2", "l3")

    def never(*_: Any) -> LeaseView:
        raise UnreachableError("object storage is away")

    gateway.submit = never  # type: ignore[method-assign]
    with pytest.raises(UnreachableError):
        machine.work(leases=None, patience_s=0.2)
    assert len(machine.of(Claimed)) <= 2
    assert not gateway.submissions
    assert len(list(machine.home.glob("servers/*/outbox/*.delta"))) == len(machine.of(Claimed))


def test_a_pause_holds_the_training_up_and_not_the_delta(gateway: FakeGateway, machine: Machine) -> None:
    playing = threading.Event()

    def sense(limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings:
        programs = frozenset({"cs2"}) if playing.is_set() else frozenset()
        return Readings(now=datetime.now().astimezone(), programs=programs, transferred_bytes=transferred_bytes)

    machine.home.mkdir(parents=True)
    change_limits(machine.home, ["exclusive_app=cs2"])
    gateway.offer("l1")
    with slow_line(gateway, "l1") as arrives:

        def see(event: WorkerEvent) -> None:
            if isinstance(event, Step) and event.step == event.steps:
                playing.set()
            if isinstance(event, Paused):
                threading.Timer(1.0, arrives.set).start()
            if isinstance(event, Submitted):
                machine.stop.set()

        machine.on_event = see
        summary = machine.work(leases=None, sense=sense)
    assert summary.submitted == 1
    told = [event.reason for event in machine.of(Paused)]
    assert told == ["cs2 is running (exclusive_app)"], "once, and then it is waited for"


# -- the courier alone -------------------------------------------------------------------------------------------------


def test_what_ends_a_delivery_is_raised_once_where_it_is_waited_for() -> None:
    def refused() -> None:
        raise DeniedError("no more of this machine")

    courier = Courier(refused, threading.Event())
    courier.send("l1", ExitStack())
    with pytest.raises(DeniedError):
        courier.finish()
    assert courier.wait(0)
    assert courier.lease_id is None


def test_a_stop_ends_the_wait_and_calling_off_the_delivery() -> None:
    stop, left, nothing = threading.Event(), threading.Event(), threading.Event()

    def deliver() -> None:
        while not courier.called_off:
            nothing.wait(0.01)

    courier = Courier(deliver, stop)
    heart = ExitStack()
    heart.callback(left.set)
    courier.send("l1", heart)
    assert not courier.wait(0.05)
    assert courier.lease_id == "l1"
    stop.set()
    with pytest.raises(StopRequested):
        courier.finish()
    assert not left.is_set()
    courier.call_off(5.0)
    assert left.is_set()
