"""What the agent shows of itself while two leases are under way: the one that is trained, and the one that goes up."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from worker.events import Claimed, Dropped, Starting, Step, Submitted, Uploading, WorkerEvent
from worker.governor import Governor
from worker.limits import Limits, Readings
from worker.outbox import Outbox
from worker.status import Board, Doing, Status
from worker.traffic import Traffic


class Shown:
    """A board beside a machine that nothing speaks against."""

    def __init__(self, home: Path, outbox: Outbox, governor: Governor, traffic: Traffic) -> None:
        self._parts = governor, outbox, traffic
        self._board = Board("http://h", lambda event: None)

    def after(self, *events: WorkerEvent) -> Status:
        for event in events:
            self._board(event)
        return self._board.status(*self._parts)


def idle(limits: Limits, *, gpu: bool, transferred_bytes: int) -> Readings:
    return Readings(now=datetime.now().astimezone(), transferred_bytes=transferred_bytes)


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    traffic = Traffic(tmp_path)
    with (
        Outbox(tmp_path / "outbox") as outbox,
        Governor(tmp_path, tmp_path, traffic, idle, lambda event: None, gpu=False, dedicated=True) as governor,
    ):
        yield Shown(tmp_path, outbox, governor, traffic)


def claimed(lease_id: str) -> Claimed:
    return Claimed(lease_id, "r1", "tiny", 3, 5, 25)


@pytest.mark.parametrize("end", [Submitted("l1", "ab" * 32, 99), Dropped("l1", "closed")])
def test_the_next_lease_stays_in_the_picture_while_the_delta_before_it_goes_up(shown: Shown, end: WorkerEvent) -> None:
    alone = shown.after(claimed("l1"), Starting("l1"), Step(25, 25, 2.0, 81.0), Uploading("l1", 0, 2048))
    assert (alone.doing, alone.upload.done if alone.upload else None) == (Doing.UPLOADING, 0)
    both = shown.after(claimed("l2"), Starting("l2"), Step(3, 25, 2.0, 81.0), Uploading("l1", 1024, 2048))
    assert (both.doing, both.lease.lease_id if both.lease else "") == (Doing.TRAINING, "l2")
    assert both.upload is not None
    assert (both.upload.lease_id, both.upload.done, both.upload.total) == ("l1", 1024, 2048)
    waits = shown.after(Step(25, 25, 1.9, 81.0), Uploading("l1", 1025, 2048))
    assert (waits.doing, waits.lease.lease_id if waits.lease else "") == (Doing.UPLOADING, "l2")
    after = shown.after(Starting("l2"), Step(4, 25, 2.0, 81.0), end)
    assert (after.doing, after.lease.lease_id if after.lease else "", after.upload) == (Doing.TRAINING, "l2", None)


def test_an_upload_without_a_next_lease_is_what_goes_on(shown: Shown) -> None:
    status = shown.after(claimed("l1"), Uploading("l1", 10, 2048), Submitted("l1", "ab" * 32, 99))
    assert (status.doing, status.lease, status.upload) == (Doing.IDLE, None, None)
    assert shown.after(Uploading("l0", 10, 2048)).doing is Doing.UPLOADING
