"""Finished deltas on bad lines: in parts, over outages of any length, at a rate, and held up in the middle."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import INVITE, FakeGateway, serve
from test_agent import FAKE_TRAINER, Machine, idle_machine, left_over, pull_nothing
from test_guest import PAUSABLE, Guest, change_limits_of

from rankup.errors import DiskFullError, InputError, IntegrityError, RankupError, UnreachableError
from rankup.parts import cut
from rankup.protocol import PartTicket, UploadRequest, UploadTicket
from rankup.settings import WorkerSettings
from worker import agent
from worker.client import GatewayClient
from worker.events import Kept, Paused, Resumed, Submitted, Summary, Uploading, Waiting, WorkerEvent
from worker.governor import Governor
from worker.limitsfile import change_limits
from worker.outbox import Outbox
from worker.retry import RetryPolicy
from worker.traffic import Traffic
from worker.uploading import StorageRefusedError, Upload

PART = 100
DATA = bytes(range(250)) * 3


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankup.parts.PART_BYTES", PART)


# -- one delta, and a store that does what a test says -----------------------------------------------------------------


@dataclass
class Bucket:
    """Object storage with its gateway: `troubles` are raised by the next transfers, first one first."""

    there: dict[int, bytes] = field(default_factory=dict)
    asked: list[UploadRequest] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    troubles: list[RankupError | None] = field(default_factory=list)
    forgetful: bool = False
    told: list[int] = field(default_factory=list)

    def ask(self, request: UploadRequest) -> UploadTicket:
        self.asked.append(request)
        missing = [part for part in cut(request.size_bytes) if part.number not in self.there]
        return UploadTicket(
            url="",
            headers={},
            expires_at=0.0,
            already_there=not missing,
            parts=tuple(PartTicket(number=part.number, url=str(part.number), headers={}) for part in missing[:3]),
            there_bytes=request.size_bytes - sum(part.size_bytes for part in missing),
        )

    def put(self, url: str, headers: dict[str, str], pieces: Iterator[bytes]) -> None:
        data = b"".join(pieces)
        assert headers["Content-Length"] == str(len(data))
        self.sent.append(int(url))
        if self.troubles and (trouble := self.troubles.pop(0)) is not None:
            raise trouble
        if not self.forgetful:
            self.there[int(url)] = data

    def upload(self, path: Path, **changes: Any) -> Upload:
        request = UploadRequest(fence=1, sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))
        ways: dict[str, Any] = {"ask": self.ask, "put": self.put, "pace": lambda count: None}
        return Upload(path, request, progress=lambda done, total: self.told.append(done), **ways | changes)


@pytest.fixture
def delta(small_parts: None, tmp_path: Path) -> Path:
    path = tmp_path / "delta"
    path.write_bytes(DATA)
    return path


def test_parts_go_one_after_the_other_and_are_named_by_their_hashes(delta: Path) -> None:
    bucket = Bucket()
    bucket.upload(delta).attempt()
    assert b"".join(bucket.there[number] for number in sorted(bucket.there)) == DATA
    assert bucket.sent == list(range(1, 9))
    assert bucket.asked[0].parts[1] == hashlib.sha256(DATA[PART : 2 * PART]).hexdigest()
    assert bucket.told == sorted(bucket.told)
    assert bucket.told[-1] == len(DATA)


def test_what_is_there_is_told_at_once_and_not_sent_again(delta: Path) -> None:
    bucket = Bucket(there={1: DATA[:PART], 3: DATA[2 * PART : 3 * PART]})
    bucket.upload(delta).attempt()
    assert bucket.sent == [2, 4, 5, 6, 7, 8]
    assert bucket.told[0] == 2 * PART


def test_a_failure_costs_the_part_that_was_on_its_way(delta: Path) -> None:
    bucket = Bucket(troubles=[None, None, UnreachableError("the line is dead")])
    upload = bucket.upload(delta)
    with pytest.raises(UnreachableError):
        upload.attempt()
    assert upload.accepted == 2
    upload.attempt()
    assert Counter(bucket.sent) == Counter([*range(1, 9), 3])


def test_a_store_that_goes_on_refusing_or_losing_parts_is_given_up(delta: Path) -> None:
    refusing = Bucket(troubles=[StorageRefusedError("no")] * 10)
    upload = refusing.upload(delta)
    for _ in range(3):
        with pytest.raises(StorageRefusedError):
            upload.attempt()
    with pytest.raises(InputError):
        upload.attempt()
    losing = Bucket(forgetful=True)
    with pytest.raises(InputError, match="lost part 1"):
        losing.upload(delta).attempt()
    assert Counter(losing.sent)[1] == 4


def test_refusals_between_parts_that_are_taken_are_not_added_up(delta: Path) -> None:
    bucket = Bucket(troubles=[StorageRefusedError("ran out"), None] * 6)
    upload = bucket.upload(delta)
    for _ in range(6):
        with pytest.raises(StorageRefusedError):
            upload.attempt()
    upload.attempt()
    assert len(bucket.there) == 8


def test_nothing_is_sent_of_a_file_that_is_not_what_was_stated(delta: Path) -> None:
    for changed in (DATA[:-1] + b"?", DATA + b"more", DATA[:-1]):
        delta.write_bytes(changed)
        bucket = Bucket()
        with pytest.raises(IntegrityError):
            bucket.upload(delta).attempt()
        assert (bucket.asked, bucket.sent) == ([], [])


def test_a_ticket_for_a_part_that_the_file_does_not_have_is_refused(delta: Path) -> None:
    odd = UploadTicket(
        url="", headers={}, expires_at=0.0, parts=(PartTicket(number=9, url="9", headers={}),), there_bytes=0
    )
    with pytest.raises(InputError, match="part 9 of 8"):
        Bucket().upload(delta, ask=lambda request: odd).attempt()


# -- patience ----------------------------------------------------------------------------------------------------------


class LeapingEvent(threading.Event):
    """An event whose waits take no time, but move a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        self.waits.append(timeout or 0.0)
        return self.is_set()


def test_an_outage_of_two_days_is_ridden_out_and_told_but_asked_about_ever_more_rarely() -> None:
    stop, told = LeapingEvent(), []
    outage_s = 48 * 3600.0

    def attempt() -> str:
        if stop.now < outage_s:
            raise UnreachableError("the server is away")
        return "back"

    with GatewayClient(
        "http://127.0.0.1:1",
        policy=RetryPolicy(WorkerSettings().patience_s),
        stop=stop,
        on_waiting=lambda error, pause_s: told.append(pause_s),
        clock=lambda: stop.now,
    ) as client:
        assert client.patiently(attempt) == "back"
    assert stop.now < outage_s + 120
    assert max(told) <= 120
    assert 1000 < len(told) < 5000
    assert len([pause for pause in told[:10] if pause > 20]) == 0


def test_patience_begins_anew_with_every_part_that_arrived(
    small_parts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = LeapingEvent()
    path = tmp_path / "delta"
    path.write_bytes(DATA)
    # Every second transfer fails, and the failures together take longer than patience is.
    bucket = Bucket(troubles=[None, UnreachableError("again")] * 7)
    request = UploadRequest(fence=1, sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))
    policy = RetryPolicy(patience_s=2.0, base_s=1.0)
    with GatewayClient(
        "http://127.0.0.1:1", policy=policy, stop=stop, clock=lambda: stop.now, draw=lambda: 1.0
    ) as client:
        monkeypatch.setattr(client, "upload_ticket", lambda lease_id, asked, policy: bucket.ask(asked))
        monkeypatch.setattr(client, "_put", bucket.put)
        client.upload("l1", request, path, progress=lambda *_: None)
        assert stop.now > 2 * policy.patience_s
        bucket = Bucket(troubles=[UnreachableError("again")] * 7)
        monkeypatch.setattr(client, "_put", bucket.put)
        with pytest.raises(UnreachableError):
            client.upload("l1", request, path, progress=lambda *_: None)


# -- the agent ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serve(FakeGateway()) as fake:
        yield fake


@pytest.fixture
def machine(gateway: FakeGateway, tmp_path: Path, small_parts: None) -> Machine:
    return Machine(tmp_path / "home", gateway.url)


def delivered(gateway: FakeGateway) -> bytes:
    (submission,) = gateway.submissions["l1"]
    data = gateway.uploads[submission.statement.sha256]
    assert hashlib.sha256(data).hexdigest() == submission.statement.sha256
    return data


def test_an_outage_in_the_middle_of_an_upload_sends_nothing_twice(gateway: FakeGateway, machine: Machine) -> None:
    def go_away(number: int) -> None:
        if number == 3:
            gateway.outage = 3  # the answer to this part is lost as well
            gateway.on_part = lambda number: None

    gateway.offer("l1")
    gateway.on_part = go_away
    assert machine.work().accepted == 1
    assert len(machine.of(Waiting)) >= 2
    parts = len(cut(len(delivered(gateway))))
    assert gateway.part_puts == list(range(1, parts + 1))


def test_a_worker_that_was_stopped_in_the_middle_of_an_upload_goes_on_with_it(
    gateway: FakeGateway, machine: Machine
) -> None:
    gateway.offer("l1")
    gateway.on_part = lambda number: machine.stop.set() if number == 2 else None
    assert machine.work(leases=None).waiting == 1
    assert left_over(machine.home, "outbox/*.delta") == ["l1.delta"]
    arrived = len(gateway.part_puts)
    machine.stop.clear()
    gateway.on_part = lambda number: None
    machine.events.clear()
    assert machine.work(leases=0).accepted == 1
    parts = len(cut(len(delivered(gateway))))
    assert gateway.part_puts == list(range(1, parts + 1))
    assert machine.of(Uploading)[0].done == arrived * PART


def test_a_game_holds_an_upload_up_in_the_middle_and_nothing_that_arrived_is_sent_again(
    gateway: FakeGateway, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.limits.MIN_PAUSE_S", 0.2)
    monkeypatch.setattr("worker.limits.CLEAR_S", 0.1)
    monkeypatch.setattr("worker.governor.LOOK_EVERY_S", 0.05)
    guest = Guest(tmp_path / "home", gateway.url)
    change_limits_of(guest, "exclusive_app=cs2", "max_bytes_sec_up=1500")
    at: dict[str, float] = {}

    def play(number: int) -> None:
        if number == 2:
            guest.readings = {"programs": frozenset({"cs2"})}
            at["game"] = time.monotonic()

    gateway.on_part = play
    gateway.offer("l1")
    guest.start("ok", leases=None, trainer_command=(sys.executable, str(FAKE_TRAINER), "ok"))
    assert "cs2 is running" in guest.wait_for(Paused).reason
    assert time.monotonic() - at["game"] < 1.0
    arrived = list(gateway.part_puts)
    time.sleep(0.5)
    assert gateway.part_puts == arrived
    assert gateway.submissions == {}
    guest.readings = {}
    guest.wait_for(Resumed)
    guest.wait_for(Submitted)
    assert guest.end(stop=True).accepted == 1
    parts = len(cut(len(delivered(gateway))))
    assert sorted(gateway.part_puts) == list(range(1, parts + 1))


def test_a_disk_without_room_for_a_finished_delta_keeps_the_training_for_the_next_start(
    gateway: FakeGateway, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.recovery._CRASH_PAUSE_S", 0.0)

    def work() -> Summary:
        return agent.run(
            gateway.url,
            invite=INVITE,
            settings=WorkerSettings(home=machine.home, threads=1, timeout_s=5.0, device="cpu", page_port="off"),
            max_leases=1,
            stop=machine.stop,
            report=machine.see,
            trainer_command=(sys.executable, str(PAUSABLE), "crash-once"),
            pull=pull_nothing,
            sense=idle_machine,
            verdict_wait_s=5.0,
        )

    def full(*_: object) -> None:
        raise DiskFullError("no room left")

    gateway.offer("l1")
    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "put", full)
        with pytest.raises(DiskFullError):
            work()
    assert gateway.returned == {}
    assert [event.step for event in machine.of(Kept)] == [2]
    assert work().accepted == 1
    starts = next(machine.home.glob("servers/*/starts")).read_text().splitlines()
    assert [line.split()[0] for line in starts] == ["0", "2", "2"]


# -- rates and the limit of the day ------------------------------------------------------------------------------------


class Timed(Traffic):
    """Notes when it was asked."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.asked_at: list[float] = []

    def sent(self, count: int) -> float:
        self.asked_at.append(time.monotonic())
        return super().sent(count)


def test_an_upload_goes_as_fast_as_the_limit_says(gateway: FakeGateway, tmp_path: Path) -> None:
    data = bytes(500_000)
    path = tmp_path / "delta"
    path.write_bytes(data)
    gateway.granted["l1"] = gateway.grant("l1")
    gateway.states["l1"] = gateway.verdict
    traffic = Timed(tmp_path)
    traffic.set_rates(up=500_000.0, down=0.0)
    request = UploadRequest(fence=7, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    with GatewayClient(gateway.url, token=token_of(gateway), policy=RetryPolicy(0.0), meter=traffic) as client:
        client.upload("l1", request, path, progress=lambda *_: None)
    assert traffic.asked_at[-1] - traffic.asked_at[0] == pytest.approx(1.0, rel=0.1)
    assert gateway.uploads[request.sha256] == data


def token_of(gateway: FakeGateway) -> str:
    gateway.tokens["token"] = "0" * 64
    return "token"


def test_the_limit_of_the_day_holds_from_its_last_byte_on(tmp_path: Path) -> None:
    change_limits(tmp_path, ["daily_xfer_limit_mb=1"])
    events: list[WorkerEvent] = []
    traffic = Traffic(tmp_path)
    governor = Governor(tmp_path, tmp_path, traffic, idle_machine, events.append, gpu=False)
    governor.look()
    traffic.sent(999_999)
    assert governor.transfer_hold() is None
    traffic.received(1)
    assert "daily_xfer_limit_mb" in (governor.transfer_hold() or "")
    assert governor.hold() is None


def test_what_is_checked_ends_a_slow_upload_between_two_pieces(gateway: FakeGateway, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.write_bytes(bytes(200_000))
    traffic = Traffic(tmp_path)
    traffic.set_rates(up=1000.0, down=0.0)
    gateway.granted["l1"] = gateway.grant("l1")
    gateway.states["l1"] = gateway.verdict
    request = UploadRequest(fence=7, sha256=hashlib.sha256(bytes(200_000)).hexdigest(), size_bytes=200_000)
    stop_at = time.monotonic() + 0.5

    def check() -> None:
        if time.monotonic() > stop_at:
            raise KeyboardInterrupt

    with (
        GatewayClient(gateway.url, token=token_of(gateway), policy=RetryPolicy(0.0), meter=traffic) as client,
        pytest.raises(KeyboardInterrupt),
    ):
        client.upload("l1", request, path, progress=lambda *_: None, check=check)
    assert time.monotonic() - stop_at < 0.5
    assert gateway.uploads == {}
