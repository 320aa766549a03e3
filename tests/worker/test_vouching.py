"""A server that lost all that it knew, at any moment of a lease: the work goes on and is handed in once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_gateway import STEPS, FakeGateway, serve
from test_agent import Machine
from test_guest import Guest

from rankup.errors import DeniedError, NotFoundError, NotYetError, RankupError, StateError
from rankup.protocol import LeaseState
from rankup.recipe import Recipe
from worker.client import GatewayClient
from worker.events import Abandoned, Dropped, Enrolled, Kept, Step, Submitted, Uploading, Waiting, WorkerEvent
from worker.retry import RetryPolicy
from worker.vouching import with_voucher

LONG = 40
"""Steps of about a second: several heartbeats."""


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serve(FakeGateway()) as fake:
        fake.offer("l1")
        yield fake


@pytest.fixture
def machine(gateway: FakeGateway, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home", gateway.url)


def once(moment: Callable[[WorkerEvent], bool], act: Callable[[], None]) -> Callable[[WorkerEvent], None]:
    """Acts at the first event that is the moment."""
    done = threading.Event()

    def see(event: WorkerEvent) -> None:
        if not done.is_set() and moment(event):
            done.set()
            act()

    return see


def at_step(number: int) -> Callable[[WorkerEvent], bool]:
    return lambda event: isinstance(event, Step) and event.step == number


def test_the_heartbeat_enrols_again_and_shows_the_voucher_while_training_goes_on(
    gateway: FakeGateway, machine: Machine
) -> None:
    gateway.recipe = Recipe(rank=2, steps=LONG)
    told: list[bool] = []
    lose = once(at_step(5), gateway.forget_everything)

    def see(event: WorkerEvent) -> None:
        lose(event)
        if isinstance(event, Step):
            told.append(bool(gateway.restored))

    machine.on_event = see
    summary = machine.work()
    assert told[0] is False
    assert told[-1] is True, "restored before the training was over"
    assert (summary.submitted, summary.accepted) == (1, 1)
    assert gateway.restored == ["l1"]
    assert gateway.beats[-1][1].step > 5
    assert [event.new for event in machine.of(Enrolled)] == [True, True]
    assert machine.of(Abandoned, Dropped) == []
    assert gateway.returned == {}


MOMENTS: dict[str, Callable[[WorkerEvent], bool]] = {
    "the last step": at_step(STEPS),
    "before the upload": lambda event: isinstance(event, Uploading),
    "after the upload": lambda event: isinstance(event, Uploading) and event.done == event.total,
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_finished_delta_is_handed_in_to_a_server_that_forgot_its_lease(
    gateway: FakeGateway, machine: Machine, moment: Callable[[WorkerEvent], bool]
) -> None:
    machine.on_event = once(moment, gateway.forget_everything)
    summary = machine.work()
    assert (summary.submitted, summary.accepted, summary.waiting) == (1, 1, 0)
    assert gateway.restored == ["l1"]
    assert len(gateway.submissions["l1"]) == 1
    assert machine.of(Dropped) == []


def test_a_submission_that_the_server_forgot_is_handed_in_again(gateway: FakeGateway, machine: Machine) -> None:
    gateway.verdict = LeaseState.SUBMITTED

    def lose() -> None:
        gateway.forget_everything()
        gateway.verdict = LeaseState.ACCEPTED

    machine.on_event = once(lambda event: isinstance(event, Submitted), lose)
    assert machine.work().accepted == 1
    assert gateway.restored == ["l1"]
    assert len(gateway.submissions["l1"]) == 2
    assert machine.of(Dropped) == []


def test_while_the_server_is_being_restored_training_goes_on_and_the_voucher_comes_again(
    gateway: FakeGateway, machine: Machine
) -> None:
    gateway.recipe = Recipe(rank=2, steps=LONG)
    gateway.refuse_restore = [NotYetError("being restored", retry_after_s=0.05) for _ in range(3)]
    machine.on_event = once(at_step(5), gateway.forget_everything)
    assert machine.work().accepted == 1
    assert gateway.restored == ["l1"]
    assert any("being restored" in event.reason for event in machine.of(Waiting))
    assert machine.of(Abandoned, Dropped) == []


def test_where_nobody_is_let_in_for_a_while_training_goes_on(gateway: FakeGateway, machine: Machine) -> None:
    gateway.recipe = Recipe(rank=2, steps=LONG)

    def close() -> None:
        gateway.forget_everything()
        gateway.refuse_enrol = DeniedError("invites are not known yet")

    def open_again() -> None:
        assert gateway.restored == []
        gateway.refuse_enrol = None

    shut, reopen = once(at_step(5), close), once(at_step(LONG - 5), open_again)
    machine.on_event = lambda event: (shut(event), reopen(event))[0]
    assert machine.work().accepted == 1
    assert gateway.restored == ["l1"]
    assert machine.of(Abandoned, Dropped) == []


@pytest.mark.parametrize("error", [StateError("round-1 is published: it takes no more"), DeniedError("not yours")])
def test_a_voucher_that_the_server_refuses_ends_the_training(
    gateway: FakeGateway, machine: Machine, error: RankupError
) -> None:
    gateway.refuse_restore = [error]
    machine.on_event = once(at_step(5), gateway.forget_everything)
    machine.work("endless")
    assert machine.of(Abandoned) == [Abandoned("l1", error.cause, returned=False)]


def test_a_refused_voucher_of_a_finished_delta_drops_it(gateway: FakeGateway, machine: Machine) -> None:
    gateway.refuse_restore = [StateError("it takes no more deltas") for _ in range(3)]
    machine.on_event = once(MOMENTS["before the upload"], gateway.forget_everything)
    assert machine.work().submitted == 0
    [dropped] = machine.of(Dropped)
    assert "takes no more deltas" in dropped.reason


def test_without_a_voucher_a_lease_that_the_server_forgot_is_over(gateway: FakeGateway, machine: Machine) -> None:
    gateway.vouchers = False
    machine.on_event = once(at_step(5), gateway.forget_everything)
    machine.work("endless")
    assert machine.of(Abandoned) == [Abandoned("l1", "no lease l1", returned=False)]
    assert gateway.restored == []


def test_a_kept_training_goes_on_on_a_server_that_forgot_its_lease(gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.recipe = Recipe(rank=2, steps=8)
    guest = Guest(tmp_path / "home", gateway.url)
    guest.start(leases=None, keep_lease=lambda: True)
    guest.wait_for(Step, step=3)
    guest.end(stop=True)
    assert guest.of(Kept)
    gateway.forget_everything()
    guest.stop.clear()
    again = Guest(guest.home, guest.url, stop=guest.stop)
    assert again.start().end().accepted == 1
    assert gateway.restored == ["l1"]
    assert again.of(Step)[0].step > 3
    assert len(gateway.claims) == 1


def test_a_delta_in_the_outbox_of_an_earlier_run_has_its_voucher(gateway: FakeGateway, machine: Machine) -> None:
    machine.stop_on(Uploading)
    assert machine.work(leases=None).waiting == 1
    gateway.forget_everything()
    machine.stop.clear()
    machine.on_event = lambda event: None
    assert machine.work(leases=0).accepted == 1
    assert gateway.restored == ["l1"]


def test_without_a_voucher_the_refusal_stays_what_it_was() -> None:
    def unknown() -> None:
        raise NotFoundError("no lease l9")

    with (
        serve(FakeGateway()) as fake,
        GatewayClient(fake.url, policy=RetryPolicy(patience_s=0.0)) as client,
        pytest.raises(NotFoundError, match="l9"),
    ):
        with_voucher(client, "l9", "", unknown)
