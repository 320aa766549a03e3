"""Blobs and deltas through the gateway itself, over real HTTP: `transfer` is "proxied"."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
import pytest
import structlog
from gateway_world import ORGANISER_TOKEN, World, furnished_gateway, sha256
from pydantic import SecretStr

from coordinator.access import Desk, GatewayDeps
from coordinator.blobs import PIECE_BYTES, Outgoing, UnsatisfiableError, wanted_range
from coordinator.spool import Spool
from coordinator.tickets import Ticket, TicketSigner
from rankup.errors import BusyError, DeniedError, DiskFullError, SetupError, TooLargeError
from rankup.folder import folder_lock
from rankup.protocol import LeaseGrant, UploadRequest
from rankup.records import BlobRef
from rankup.settings import CoordinatorSettings
from rankup.signing import public_key_hex
from rankup.sources import GatewaySource
from rankup.store import MemoryStore, S3Store, blob_key, put_blob
from rankup.versions import upload_key
from worker.client import GatewayClient
from worker.retry import RetryPolicy

if TYPE_CHECKING:
    from conftest import ValkeyServer

DELTA = b"a good delta" * 1000
MIB = 1024**2
log = structlog.get_logger(__name__)


class SlicedStore(MemoryStore):
    """Remembers the longest piece that was read at once."""

    longest = 0

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.longest = max(self.longest, length)
        return super().get_range(key, start, length)


@pytest.fixture
def world(valkey: ValkeyServer, tmp_path: Path) -> Iterator[World]:
    proxied = {"transfer": "proxied", "spool_dir": tmp_path / "spool"}
    with furnished_gateway(valkey.ledger_settings, store=SlicedStore(), changes=proxied) as made:
        yield made
    assert list((tmp_path / "spool").glob("*")) == []


class Granted(NamedTuple):
    """A lease and a ticket of one volunteer."""

    lease: LeaseGrant
    auth: dict[str, str]
    ticket: dict[str, Any]


def ask(world: World, lease: LeaseGrant, auth: dict[str, str], delta: bytes = DELTA) -> dict[str, Any]:
    asked = {"fence": lease.fence, "sha256": sha256(delta), "size_bytes": len(delta)}
    answer = world.http.post(f"/v1/leases/{lease.lease_id}/upload", json=asked, headers=auth)
    assert answer.status_code == 200, answer.text
    ticket: dict[str, Any] = answer.json()
    return ticket


@pytest.fixture
def granted(world: World) -> Granted:
    world.open_round()
    ada = world.join()
    lease = world.claim(ada)
    return Granted(lease, ada.auth, ask(world, lease, ada.auth))


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_a_round_of_calls_needs_no_address_but_the_gateway(world: World) -> None:
    round_id = world.open_round(shards=1)["round_id"]
    ada = world.join()
    lease = world.claim(ada)
    assert lease.shard_links[0].url == f"v1/blobs/{lease.shard_links[0].sha256}"
    assert sha256(world.http.get("/" + lease.shard_links[0].url).content) == lease.shard_links[0].sha256
    ticket = ask(world, lease, ada.auth)
    assert ticket["url"].startswith(f"v1/uploads/{lease.lease_id}/{sha256(DELTA)}?")
    assert ticket["headers"] == {"Content-Length": str(len(DELTA))}
    assert world.http.put("/" + ticket["url"], content=DELTA, headers=ticket["headers"]).status_code == 204
    assert world.store.get(upload_key(lease.lease_id, sha256(DELTA)), max_bytes=MIB) == DELTA
    assert ask(world, lease, ada.auth)["already_there"] is True
    submitted = world.http.post(
        f"/v1/leases/{lease.lease_id}/submit", json=ada.submission(lease, DELTA), headers=ada.auth
    )
    assert submitted.status_code == 202
    assert world.judge_all(round_id) == "aggregating"


def test_the_workers_client_moves_bytes_both_ways_and_shows_its_token_to_neither(
    world: World, granted: Granted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[httpx2.Headers] = []
    token = granted.auth["Authorization"].removeprefix("Bearer ")
    file = tmp_path / "delta"
    file.write_bytes(DELTA)
    request = UploadRequest(fence=granted.lease.fence, sha256=sha256(DELTA), size_bytes=len(DELTA))
    with GatewayClient(str(world.http.base_url), token=token, policy=RetryPolicy(0.0)) as client:
        client._storage.event_hooks = {"request": [lambda sent: seen.append(sent.headers)]}
        client.download(granted.lease.shard_links[0], tmp_path / "shard", max_bytes=MIB, progress=lambda *_: None)
        client.upload(granted.lease.lease_id, request, file, progress=lambda *_: None)
    assert sha256((tmp_path / "shard").read_bytes()) == granted.lease.shard_links[0].sha256
    assert world.store.get(upload_key(granted.lease.lease_id, sha256(DELTA)), max_bytes=MIB) == DELTA
    assert [("authorization" in headers) for headers in seen] == [False, False]


# -- reading -----------------------------------------------------------------------------------------------------------

BLOB = bytes(range(256)) * 4
RANGES: dict[str, tuple[str | None, tuple[int, int] | None]] = {
    "no header": (None, None),
    "from the start": ("bytes=0-9", (0, 10)),
    "to the end": ("bytes=1000-", (1000, 24)),
    "past the end": ("bytes=1000-9999", (1000, 24)),
    "the last bytes": ("bytes=-24", (1000, 24)),
    "more last bytes than there are": ("bytes=-9999", (0, 1024)),
    "one byte": ("Bytes=5-5", (5, 1)),
    "backwards": ("bytes=9-5", None),
    "two ranges": ("bytes=0-1,4-5", None),
    "another unit": ("pages=1-2", None),
    "no numbers": ("bytes=-", None),
    "not even ASCII": ("bytes=²-", None),
    "more digits than a number may have": ("bytes=" + "9" * 5000 + "-", None),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_is_the_one_that_was_asked_for_or_the_whole(name: str) -> None:
    header, wanted = RANGES[name]
    assert wanted_range(header, len(BLOB)) == wanted


@pytest.mark.parametrize(("header", "size_bytes"), [("bytes=1024-", 1024), ("bytes=-0", 1024), ("bytes=0-", 0)])
def test_a_range_without_bytes_is_refused(header: str, size_bytes: int) -> None:
    with pytest.raises(UnsatisfiableError):
        wanted_range(header, size_bytes)


def test_blobs_are_answered_whole_in_part_or_not_at_all(world: World) -> None:
    ref = put_blob(world.store, BLOB)
    url, etag = f"/v1/blobs/{ref.sha256}", f'"{ref.sha256}"'
    whole = world.http.get(url)
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, BLOB, etag)
    assert (whole.headers["content-length"], whole.headers["accept-ranges"]) == ("1024", "bytes")
    part = world.http.get(url, headers={"Range": "bytes=1000-"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, BLOB[1000:], "bytes 1000-1023/1024")
    outside = world.http.get(url, headers={"Range": "bytes=1024-"})
    assert (outside.status_code, outside.headers["content-range"]) == (416, "bytes */1024")
    assert outside.json()["type"].endswith("bad-input")
    head = world.http.head(url, headers={"Range": "bytes=1000-"})
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "1024")
    assert world.http.get(url, headers={"If-None-Match": etag}).status_code == 304
    assert world.http.get(url, headers={"Range": "bytes=1-", "If-Range": '"other"'}).status_code == 200
    assert world.http.get(f"/v1/blobs/{'0' * 64}").status_code == 404
    empty = put_blob(world.store, b"")
    assert world.http.get(f"/v1/blobs/{empty.sha256}").content == b""


def test_a_large_blob_is_read_in_pieces(world: World) -> None:
    data = os.urandom(3 * PIECE_BYTES + 5)
    ref = put_blob(world.store, data)
    assert world.http.get(f"/v1/blobs/{ref.sha256}").content == data
    assert isinstance(world.store, SlicedStore)
    assert world.store.longest == PIECE_BYTES


def test_answers_wait_for_each_other_until_their_readers_have_taken_them() -> None:
    outgoing = Outgoing(max_bytes=10)
    with outgoing.hold(100):
        for length in (1, 100):
            with pytest.raises(BusyError):
                outgoing.check(length)
    outgoing.check(100)
    with outgoing.hold(4):
        outgoing.check(6)


def test_an_answer_counts_until_it_is_taken_or_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    hold = Outgoing.hold

    @contextlib.contextmanager
    def watched(self: Outgoing, length: int) -> Iterator[None]:
        with hold(self, length):
            held.append(length)
            yield
        held.remove(length)

    monkeypatch.setattr(Outgoing, "hold", watched)
    data = os.urandom(16 * PIECE_BYTES)
    url = f"/v1/blobs/{put_blob(world.store, data).sha256}"
    with world.http.stream("GET", url) as answer:
        pieces = answer.iter_raw(1000)  # Kept: a generator that is dropped closes the connection.
        next(pieces)
        assert held == [len(data)]
    until(lambda: not held)
    assert world.http.get(url).content == data
    until(lambda: not held)


def test_a_pull_that_broke_off_goes_on_where_it_was(world: World, tmp_path: Path) -> None:
    from rankup.download import fetch

    data = os.urandom(2 * PIECE_BYTES)
    ref = put_blob(world.store, data)
    (tmp_path / ref.sha256).write_bytes(data[: PIECE_BYTES + 1])
    assert isinstance(world.store, SlicedStore)
    world.store.longest = 0
    with GatewaySource(str(world.http.base_url)) as source, folder_lock(tmp_path):
        fetch(source, [ref], tmp_path)
    assert (tmp_path / ref.sha256).read_bytes() == data
    assert world.store.longest == PIECE_BYTES - 1


def test_a_whole_version_is_pulled_through_the_gateway(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rankup.pull

    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "rankup")
    from history import MODEL, make_history

    history = make_history()
    for manifest in history.manifests:
        history.publish(manifest, key=world.publisher)
    for key in history.store.list(""):
        world.store.put(key, history.store.get(key, max_bytes=2**30))
    with GatewaySource(str(world.http.base_url)) as source:
        rankup.pull.pull(source, MODEL, None, tmp_path / "model", publisher_key=public_key_hex(world.publisher))
        stream = source.stream(BlobRef(sha256=sha256(b"short"), size_bytes=9), 7)
        put_blob(world.store, b"short")
        with stream as found:
            assert (found.start, found.total_bytes, list(found.chunks)) == (7, 5, [])
    assert list((tmp_path / "model").glob("*.safetensors"))


# -- refused uploads ---------------------------------------------------------------------------------------------------


def in_pieces(data: bytes) -> Iterator[bytes]:
    """Sent without a Content-Length."""
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def changed(url: str, old: str, new: str) -> str:
    assert old in url
    return url.replace(old, new)


BAD_BODIES: dict[str, tuple[Callable[[], Any], int, str]] = {
    "longer": (lambda: DELTA + b"!", 413, "too-large"),
    "longer, unannounced": (lambda: in_pieces(DELTA + b"!"), 413, "too-large"),
    "shorter": (lambda: DELTA[:-1], 400, "bad-input"),
    "shorter, unannounced": (lambda: in_pieces(DELTA[:-1]), 400, "bad-input"),
    "nothing": (lambda: b"", 400, "bad-input"),
    "other bytes": (lambda: b"A" + DELTA[1:], 400, "bad-input"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_other_bytes_than_the_tickets_are_not_stored(world: World, granted: Granted, name: str) -> None:
    body, status, code = BAD_BODIES[name]
    answer = world.http.put("/" + granted.ticket["url"], content=body())
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2].rpartition(":")[2]) == (status, code)
    assert answer.json()["remedy"]
    assert list(world.store.list("uploads/")) == []


BAD_ADDRESSES: dict[str, Callable[[str], str]] = {
    "forged signature": lambda url: url[:-64] + "0" * 64,
    "no signature": lambda url: url[:-64],
    "another size": lambda url: changed(url, f"size={len(DELTA)}", f"size={len(DELTA) + 1}"),
    "later expiry": lambda url: changed(url, "expires=1", "expires=2"),
    "another hash": lambda url: changed(url, sha256(DELTA), sha256(b"other")),
    "signature not ASCII": lambda url: url[:-1] + "%C2%B2",
}


@pytest.mark.parametrize("name", BAD_ADDRESSES)
def test_an_address_that_this_server_did_not_write_is_denied(world: World, granted: Granted, name: str) -> None:
    answer = world.http.put("/" + BAD_ADDRESSES[name](granted.ticket["url"]), content=DELTA)
    assert answer.status_code == 403, answer.text
    assert list(world.store.list("uploads/")) == []


def test_a_ticket_of_another_lease_is_denied(world: World, granted: Granted) -> None:
    bob = world.join("bob")
    lease = world.claim(bob)
    theirs = changed(granted.ticket["url"], granted.lease.lease_id, lease.lease_id)
    assert world.http.put("/" + theirs, content=DELTA).status_code == 403
    assert world.http.put("/" + ask(world, lease, bob.auth)["url"], content=DELTA).status_code == 204


def test_an_expired_ticket_is_denied(valkey: ValkeyServer, tmp_path: Path) -> None:
    late = [0.0]
    changes = {"transfer": "proxied", "spool_dir": tmp_path}
    with furnished_gateway(valkey.ledger_settings, changes=changes, clock=lambda: time.time() + late[0]) as world:
        world.open_round()
        ada = world.join()
        ticket = ask(world, world.claim(ada), ada.auth)
        late[0] = 3700.0
        answer = world.http.put("/" + ticket["url"], content=DELTA)
    assert (answer.status_code, "run out" in answer.json()["detail"]) == (403, True)


def test_a_server_with_presigned_links_takes_no_uploads(valkey: ValkeyServer) -> None:
    address = TicketSigner(ORGANISER_TOKEN).address(Ticket("l-1", sha256(DELTA), len(DELTA), 2**40))
    with furnished_gateway(valkey.ledger_settings) as world:
        assert world.http.put("/" + address, content=DELTA).status_code == 404


def test_other_routes_still_refuse_large_bodies(world: World) -> None:
    assert world.http.post("/v1/workers", content=b" " * 20_000).status_code == 413
    assert world.http.put("/v1/blobs/x", content=b" " * 20_000).status_code == 413
    assert world.http.post("/v1/uploads/a/b", content=b" " * 20_000).status_code == 413


def test_a_full_disk_is_507(world: World, granted: Granted, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        return type("Usage", (), {"free": 10})

    monkeypatch.setattr("coordinator.spool.shutil.disk_usage", full)
    answer = world.http.put("/" + granted.ticket["url"], content=DELTA)
    assert (answer.status_code, answer.json()["type"].endswith("disk-full")) == (507, True)
    assert "/" not in answer.json()["detail"]


def test_a_client_that_hangs_up_leaves_nothing_behind(world: World, granted: Granted, tmp_path: Path) -> None:
    address = (world.http.base_url.host, world.http.base_url.port or 80)
    head = f"PUT /{granted.ticket['url']} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DELTA)}\r\n\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + DELTA[:100])
        until(lambda: len(list((tmp_path / "spool").glob("*"))) == 1)
    until(lambda: not list((tmp_path / "spool").glob("*")))
    assert world.http.put("/" + granted.ticket["url"], content=DELTA).status_code == 204


def until(done: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- the parts ---------------------------------------------------------------------------------------------------------


def ticket_for(data: bytes, lease_id: str = "l-1") -> Ticket:
    return Ticket(lease_id=lease_id, sha256=sha256(data), size_bytes=len(data), expires_at=2_000)


def test_a_ticket_is_good_on_every_replica_and_for_no_other_organiser() -> None:
    ticket = ticket_for(DELTA)
    signature = TicketSigner("token").address(ticket).rpartition("signature=")[2]
    TicketSigner("token").check(ticket, signature, now=2_000.0)
    with pytest.raises(DeniedError):
        TicketSigner("token").check(ticket, signature, now=2_000.5)
    with pytest.raises(DeniedError):
        TicketSigner("another token").check(ticket, signature, now=1_000.0)


def test_without_an_organisers_token_nothing_can_be_signed(memory_store: MemoryStore) -> None:
    settings = CoordinatorSettings(transfer="proxied", organiser_token=SecretStr(""))

    async def no_ledger() -> Any:
        raise AssertionError

    with pytest.raises(SetupError, match="organiser"):
        Desk(GatewayDeps(no_ledger, memory_store, settings, "00" * 32, time.time))


async def paced(pieces: list[bytes], pause_s: float) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(pause_s)


PACES: dict[str, tuple[list[bytes], float, float, float]] = {
    # pieces, pause between them, silence allowed, bytes a second asked for
    "silent in the middle": ([b"abc", b"def"], 1.0, 0.05, 0.001),
    "trickling": ([b"a"] * 500, 0.01, 0.1, 1000.0),
}


@pytest.mark.parametrize("name", PACES)
def test_a_stalled_upload_is_given_up(memory_store: MemoryStore, tmp_path: Path, name: str) -> None:
    pieces, pause_s, silence_s, min_bytes_per_s = PACES[name]
    spool = Spool(memory_store, tmp_path, silence_s=silence_s, min_bytes_per_s=min_bytes_per_s)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(spool.take(ticket_for(b"".join(pieces)), paced(pieces, pause_s)))
    assert time.monotonic() - began < 0.9
    assert list(memory_store.list("")) == list(tmp_path.iterdir()) == []


def test_a_lease_has_one_upload_at_a_time_and_a_replica_only_so_many(memory_store: MemoryStore, tmp_path: Path) -> None:
    async def crowd() -> list[BaseException | None]:
        spool = Spool(memory_store, tmp_path, max_uploads=2)
        leases = ["l-1", "l-1", "l-2", "l-3"]
        takes = [spool.take(ticket_for(b"abcd", lease), paced([b"ab", b"cd"], 0.05)) for lease in leases]
        answers = await asyncio.gather(*takes, return_exceptions=True)
        await spool.take(ticket_for(b"abcd", "l-3"), paced([b"abcd"], 0.0))
        return answers

    assert [type(answer) for answer in asyncio.run(crowd())] == [type(None), BusyError, type(None), BusyError]
    assert len(list(memory_store.list("uploads/"))) == 3


def test_nothing_above_the_tickets_size_reaches_the_disk(memory_store: MemoryStore, tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65_536
            yield bytes(65_536)

    with pytest.raises(TooLargeError):
        asyncio.run(Spool(memory_store, tmp_path).take(ticket_for(bytes(10 * 65_536)), endless()))
    assert sent == 11 * 65_536


def test_a_file_that_cannot_be_written_any_more_is_a_full_disk(memory_store: MemoryStore) -> None:
    """/dev/full answers every write with ENOSPC."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    spool = Spool(memory_store, None)
    with full.open("wb", buffering=0) as file, pytest.raises(DiskFullError):
        asyncio.run(spool._receive(ticket_for(DELTA), paced([DELTA], 0.0), file))


# -- memory ------------------------------------------------------------------------------------------------------------

SIZE = 64 * MIB
SERVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from gateway_world import furnished_gateway
from rankup.settings import LedgerSettings, StoreSettings
from rankup.store import S3Store
from pydantic import SecretStr

changes = {{"transfer": "proxied", "spool_dir": Path({spool!r}), "organiser_token": SecretStr("memory")}}
store = S3Store(StoreSettings.from_wire({store!r}))
with furnished_gateway(LedgerSettings.from_wire({ledger!r}), store=store, changes=changes) as world:
    print(world.http.base_url, flush=True)
    sys.stdin.read()
"""


def resident_mib(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


@pytest.mark.stack
def test_sixty_four_mebibytes_go_up_and_down_without_being_held(
    s3_store: S3Store, local_services: Any, valkey: ValkeyServer, tmp_path: Path
) -> None:
    s3_store.ensure_bucket()
    script = SERVER.format(
        tests=str(Path(__file__).parent),
        spool=str(tmp_path / "spool"),
        store=local_services.store_settings.to_wire(),
        ledger=valkey.ledger_settings.to_wire(),
    )
    data = os.urandom(SIZE)
    digest = hashlib.sha256(data).hexdigest()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip().rstrip("/")
            signer = TicketSigner("memory")

            def put(content: bytes) -> None:
                ticket = Ticket("l-memory", hashlib.sha256(content).hexdigest(), len(content), 2**40)
                answer = httpx2.put(f"{url}/{signer.address(ticket)}", content=content, timeout=60)
                assert answer.status_code == 204, answer.text

            put(b"to warm up")
            before = resident_mib(server.pid, "VmRSS")
            put(data)
            after_upload = resident_mib(server.pid, "VmHWM")
            s3_store.put(blob_key(digest), data)
            answer = httpx2.get(f"{url}/v1/blobs/{digest}", timeout=60)
            assert hashlib.sha256(answer.content).hexdigest() == digest
            after_download = resident_mib(server.pid, "VmHWM")
        finally:
            assert server.stdin is not None
            server.stdin.close()
    log.info("resident_mib", before=before, peak_upload=after_upload, peak_download=after_download)
    # put_file sends four parts at a time from the file; none of them is read whole.
    assert after_upload - before < 48
    assert after_download - before < 48
