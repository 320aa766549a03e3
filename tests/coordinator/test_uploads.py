"""Deltas in parts: what a ticket says is missing, over a line that breaks, straight to object storage and through the
gateway."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import structlog
from gateway_world import Volunteer, World, furnished_gateway, sha256

from coordinator.tickets import Piece, Ticket, TicketSigner
from coordinator.uploads import PARTS_A_TICKET, ticket_in_parts
from rankup.errors import BusyError, UnreachableError
from rankup.multipart import ArrivedPart
from rankup.parts import cut
from rankup.protocol import LeaseGrant, UploadRequest, UploadTicket
from rankup.store import MemoryStore, S3Store
from rankup.versions import upload_key
from worker.client import GatewayClient
from worker.retry import RetryPolicy

if TYPE_CHECKING:
    from conftest import ValkeyServer

    from rankup.local import LocalServices

MIB = 1024**2
PART = 1000
DELTA = os.urandom(3 * PART + 500)
LEASE = "l-1"
log = structlog.get_logger(__name__)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankup.parts.PART_BYTES", PART)


def request_for(delta: bytes, fence: int = 1) -> UploadRequest:
    digests = tuple(sha256(delta[part.start : part.start + part.size_bytes]) for part in cut(len(delta)))
    return UploadRequest(fence=fence, sha256=sha256(delta), size_bytes=len(delta), parts=digests)


class Hiding(MemoryStore):
    """Tells no part's sha256, as some servers do."""

    def arrived_parts(self, key: str, upload_id: str) -> tuple[ArrivedPart, ...]:
        parts = super().arrived_parts(key, upload_id)
        return tuple(ArrivedPart(part.number, part.size_bytes, part.etag) for part in parts)


class Bench:
    """A store, and tickets for one delta of one lease."""

    def __init__(self, store: MemoryStore, folder: Path, delta: bytes = DELTA) -> None:
        self.store = store
        self.delta = delta
        self.key = upload_key(LEASE, sha256(delta))
        self._file = folder / "part"

    def ask(self, **changes: Any) -> UploadTicket:
        request = request_for(self.delta).model_copy(update=changes)
        return ticket_in_parts(self.store, LEASE, request, signer=None, now=1_000.0)

    def send(self, number: int, data: bytes | None = None, upload_id: str | None = None) -> None:
        part = cut(len(self.delta))[number - 1]
        self._file.write_bytes(self.delta[part.start : part.start + part.size_bytes] if data is None else data)
        digest = sha256(self._file.read_bytes())
        self.store.put_part(self.key, upload_id or self.upload_ids()[0], number, self._file, sha256=digest)

    def upload_ids(self) -> list[str]:
        return [upload.upload_id for upload in self.store.open_uploads(self.key)]


@pytest.fixture
def bench(small_parts: None, memory_store: MemoryStore, tmp_path: Path) -> Bench:
    return Bench(memory_store, tmp_path)


# -- what a ticket says ------------------------------------------------------------------------------------------------


def test_a_ticket_names_what_is_missing_and_the_last_question_puts_it_together(bench: Bench) -> None:
    asked = bench.ask()
    assert [part.number for part in asked.parts] == [1, 2, 3, 4]
    assert (asked.there_bytes, asked.already_there) == (0, False)
    assert [part.headers["Content-Length"] for part in asked.parts] == ["1000", "1000", "1000", "500"]
    bench.send(1)
    bench.send(4)
    again = bench.ask()
    assert ([part.number for part in again.parts], again.there_bytes) == ([2, 3], 1500)
    assert len(bench.upload_ids()) == 1
    bench.send(2)
    bench.send(3)
    assert bench.store.head(bench.key) is None
    end = bench.ask()
    assert (end.already_there, end.parts) == (True, ())
    assert bench.store.get(bench.key, max_bytes=MIB) == DELTA
    assert bench.upload_ids() == []


def test_a_part_with_other_bytes_than_named_is_asked_for_again(bench: Bench) -> None:
    bench.ask()
    bench.send(1)
    bench.send(2, bytes(PART))
    bench.send(3, b"too short")
    assert [part.number for part in bench.ask().parts] == [2, 3, 4]


def test_parts_that_do_not_fit_together_are_thrown_away_and_sent_again(small_parts: None, tmp_path: Path) -> None:
    bench = Bench(Hiding(), tmp_path)
    bench.ask()
    for number in (1, 2, 3, 4):
        bench.send(number, bytes(PART) if number == 2 else None)
    with pytest.raises(BusyError):
        bench.ask()
    assert bench.upload_ids() == []
    assert len(bench.ask().parts) == 4
    for number in (1, 2, 3, 4):
        bench.send(number)
    assert bench.ask().already_there
    assert bench.store.get(bench.key, max_bytes=MIB) == DELTA


def test_of_two_uploads_that_were_begun_at_once_one_is_gone_on_with(bench: Bench) -> None:
    older, younger = bench.store.begin_upload(bench.key), bench.store.begin_upload(bench.key)
    for number in (1, 2, 3, 4):
        bench.send(number, upload_id=older)
    bench.send(1, upload_id=younger)
    assert bench.ask().already_there
    assert bench.upload_ids() == []


def test_a_lease_has_parts_of_one_delta_only(bench: Bench, tmp_path: Path) -> None:
    bench.ask()
    bench.send(1)
    bystander = bench.store.begin_upload(upload_key("l-10", "3" * 64))
    other = Bench(bench.store, tmp_path, bytes(4 * PART))
    for _ in range(2):
        assert len(other.ask().parts) == 4
    assert {upload.key for upload in bench.store.open_uploads("uploads/")} == {other.key, upload_key("l-10", "3" * 64)}
    assert bystander in {upload.upload_id for upload in bench.store.open_uploads("uploads/")}


def test_an_upload_that_ends_while_it_is_looked_at_is_asked_for_again(small_parts: None, tmp_path: Path) -> None:
    class Ending(MemoryStore):
        def arrived_parts(self, key: str, upload_id: str) -> tuple[ArrivedPart, ...]:
            self.abort_upload(key, upload_id)
            return super().arrived_parts(key, upload_id)

    bench = Bench(Ending(), tmp_path)
    bench.ask()
    with pytest.raises(BusyError):
        bench.ask()


def test_an_answer_has_so_many_addresses_and_no_more(
    small_parts: None, memory_store: MemoryStore, tmp_path: Path
) -> None:
    bench = Bench(memory_store, tmp_path, bytes(100 * PART))
    numbers = [part.number for part in bench.ask().parts]
    assert numbers == list(range(1, PARTS_A_TICKET + 1))


# -- over HTTP, through the gateway ------------------------------------------------------------------------------------


@pytest.fixture
def proxied(small_parts: None, valkey: ValkeyServer, tmp_path: Path) -> Iterator[World]:
    changes = {"transfer": "proxied", "spool_dir": tmp_path / "spool"}
    with furnished_gateway(valkey.ledger_settings, changes=changes) as made:
        yield made
    assert list((tmp_path / "spool").glob("*")) == []


def leased(world: World) -> tuple[Volunteer, LeaseGrant]:
    world.open_round()
    ada = world.join()
    return ada, world.claim(ada)


def asked(world: World, ada: Volunteer, lease: LeaseGrant, **changes: Any) -> Any:
    said = request_for(DELTA, lease.fence).model_dump(mode="json") | changes
    return world.http.post(f"/v1/leases/{lease.lease_id}/upload", json=said, headers=ada.auth)


def test_the_workers_client_sends_parts_through_the_gateway(proxied: World, tmp_path: Path) -> None:
    ada, lease = leased(proxied)
    file = tmp_path / "delta"
    file.write_bytes(DELTA)
    told: list[int] = []
    request = UploadRequest(fence=lease.fence, sha256=sha256(DELTA), size_bytes=len(DELTA))
    with GatewayClient(str(proxied.http.base_url), token=ada.token, policy=RetryPolicy(0.0)) as client:
        client.upload(lease.lease_id, request, file, progress=lambda done, total: told.append(done))
    assert proxied.store.get(upload_key(lease.lease_id, sha256(DELTA)), max_bytes=MIB) == DELTA
    assert told == sorted(told)
    assert told[-1] == len(DELTA)
    submitted = proxied.http.post(
        f"/v1/leases/{lease.lease_id}/submit", json=ada.submission(lease, DELTA), headers=ada.auth
    )
    assert submitted.status_code == 202


BAD_PARTS: dict[str, tuple[Callable[[str, LeaseGrant], str], bytes, int]] = {
    # how the address is changed, the body, and the answer
    "another part": (lambda url, _: url.replace("/parts/1?", "/parts/2?"), DELTA[:PART], 403),
    "another delta": (lambda url, _: url.replace(sha256(DELTA), sha256(b"other")), DELTA[:PART], 403),
    "another lease": (lambda url, lease: url.replace(lease.lease_id, "l-2"), DELTA[:PART], 403),
    "another upload": (lambda url, _: url.replace("upload=", "upload=0"), DELTA[:PART], 403),
    "another size": (lambda url, _: url.replace("size=1000", "size=1001"), DELTA[: PART + 1], 403),
    "another hash": (lambda url, _: url.replace(sha256(DELTA[:PART]), sha256(bytes(PART))), bytes(PART), 403),
    "as the whole delta": (lambda url, _: url.replace("/parts/1", ""), DELTA[:PART], 403),
    "part 0": (lambda url, _: url.replace("/parts/1?", "/parts/0?"), DELTA[:PART], 422),
    "other bytes": (lambda url, _: url, bytes(PART), 400),
    "too many bytes": (lambda url, _: url, DELTA[: PART + 1], 413),
    "too few bytes": (lambda url, _: url, DELTA[: PART - 1], 400),
}


def test_an_address_takes_its_part_and_nothing_else(proxied: World) -> None:
    ada, lease = leased(proxied)
    first = asked(proxied, ada, lease).json()["parts"][0]
    assert first["url"].startswith(f"v1/uploads/{lease.lease_id}/{sha256(DELTA)}/parts/1?")
    for name, (change, body, status) in BAD_PARTS.items():
        changed = change(first["url"], lease)
        assert changed != first["url"] or status != 403, name
        assert proxied.http.put("/" + changed, content=body).status_code == status, name
    assert len(asked(proxied, ada, lease).json()["parts"]) == 4
    assert proxied.http.put("/" + first["url"], content=DELTA[:PART]).status_code == 204
    assert len(asked(proxied, ada, lease).json()["parts"]) == 3
    (upload,) = proxied.store.open_uploads("uploads/")
    proxied.store.abort_upload(upload.key, upload.upload_id)
    assert proxied.http.put("/" + first["url"], content=DELTA[:PART]).status_code == 404


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"parts": ["0" * 64]}, 422),
        ({"parts": ["0" * 64] * 5}, 422),
        ({"parts": ["no hash"] * 4}, 422),
        ({"parts": ["0" * 64] * 513}, 413),
        ({"size_bytes": 2**40}, 422),
        ({"fence": 0}, 403),
    ],
)
def test_a_request_whose_parts_make_no_sense_begins_nothing(
    proxied: World, changes: dict[str, Any], status: int
) -> None:
    ada, lease = leased(proxied)
    assert asked(proxied, ada, lease, **changes).status_code == status
    assert list(proxied.store.open_uploads("")) == []


def test_other_tickets_signed_with_the_same_key_are_not_mistaken_for_parts() -> None:
    signer = TicketSigner("token")
    tickets = [
        Ticket("l", "a", 1, 2),
        Ticket("l", "a", 1, 2, Piece("d", "u", 1)),
        Ticket("l", "a", 1, 2, Piece("d", "u", 11)),
        Ticket("l", "a", 1, 2, Piece("d", "1\nu", 1)),
        Ticket("l", "a", 1, 2, Piece("d", "", 1)),
    ]
    assert len({signer.address(ticket).rpartition("signature=")[2] for ticket in tickets}) == len(tickets)


# -- over a line that breaks -------------------------------------------------------------------------------------------


class Line:
    """A TCP line to a server that breaks once `left` bytes went up; all that goes up is counted."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.left = 2**60
        self.up_bytes = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            threading.Thread(target=self._up, args=(near, far), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near), daemon=True).start()

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            with suppress(OSError):
                while self.left > 0 and (data := near.recv(min(65_536, self.left))):
                    self.left -= len(data)
                    self.up_bytes += len(data)
                    far.sendall(data)
            for side in (near, far):
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)

    def _copy(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                to.sendall(data)


@contextmanager
def line_to(url: str) -> Iterator[Line]:
    parts = urlsplit(url)
    line = Line((parts.hostname or "", parts.port or 80))
    try:
        yield line
    finally:
        line.close()


def upload_over(line: Line, world: World, delta: Path, cut_after: int, *, url: str = "") -> dict[str, float]:
    """Upload until the line breaks, in one client; then by another one, as after a restart. Counts bytes.

    `url`: where the gateway is reached, if not at its own address.
    """
    size_bytes = delta.stat().st_size
    ada, lease = leased(world)
    with delta.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    request = UploadRequest(fence=lease.fence, sha256=digest, size_bytes=size_bytes)
    told: list[int] = []
    line.left = cut_after
    url, policy = url or str(world.http.base_url), RetryPolicy(0.0)
    with GatewayClient(url, token=ada.token, policy=policy) as client, pytest.raises(UnreachableError):
        client.upload(lease.lease_id, request, delta, progress=lambda *_: None)
    before, line.left, line.up_bytes = line.up_bytes, 2**60, 0
    began = time.monotonic()
    with GatewayClient(url, token=ada.token, policy=policy) as client:
        client.upload(lease.lease_id, request, delta, progress=lambda done, _: told.append(done))
    key = upload_key(lease.lease_id, digest)
    assert world.store.head(key) is not None
    assert told[0] > 0, "what was there is told at once"
    return {
        "before": before,
        "after": line.up_bytes,
        "twice": before + line.up_bytes - size_bytes,
        "seconds": time.monotonic() - began,
    }


def test_a_line_that_breaks_costs_at_most_one_part(
    local_services: LocalServices, valkey: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.grants.delta_bound_bytes", lambda _: 2**31)
    size_mib = int(os.environ.get("RANKUP_TEST_UPLOAD_MIB", "17"))
    delta = tmp_path / "delta"
    delta.write_bytes(os.urandom(size_mib * MIB))
    settings = local_services.store_settings.model_copy(update={"bucket": f"line-{uuid4().hex}"})
    S3Store(settings).ensure_bucket()
    with line_to(settings.endpoint_url) as line:
        store = S3Store(settings.model_copy(update={"public_endpoint_url": line.url}))
        with furnished_gateway(valkey.ledger_settings, store=store) as world:
            found = upload_over(line, world, delta, (size_mib // 2 + 4) * MIB)
            (key,) = store.list("uploads/")
            store.get_file(key, tmp_path / "arrived")
    log.info("upload_resumed", size_mib=size_mib, **found)
    assert (tmp_path / "arrived").read_bytes() == delta.read_bytes()
    assert 0 <= found["twice"] < 8 * MIB + 64 * 1024, found


def test_it_costs_no_more_through_the_gateway(
    valkey: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 100_000
    monkeypatch.setattr("rankup.parts.PART_BYTES", part)
    delta = tmp_path / "delta"
    delta.write_bytes(os.urandom(8 * part))
    changes = {"transfer": "proxied", "spool_dir": tmp_path / "spool"}
    with (
        furnished_gateway(valkey.ledger_settings, changes=changes) as world,
        line_to(str(world.http.base_url)) as line,
    ):
        found = upload_over(line, world, delta, 4 * part + part // 2, url=line.url)
        (key,) = world.store.list("uploads/")
        assert world.store.get(key, max_bytes=MIB) == delta.read_bytes()
    # Questions and headers of ten calls go over this line too.
    assert 0 < found["twice"] < part + 20_000, found
