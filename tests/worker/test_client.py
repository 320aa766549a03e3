"""The client against a small server that misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rankup.errors import (
    BusyError,
    DiskFullError,
    InputError,
    IntegrityError,
    RankupError,
    RetryableError,
    SetupError,
    StateError,
    TooLargeError,
    UnreachableError,
)
from rankup.protocol import PROTOCOL_VERSION, BlobLink, Heartbeat, UploadRequest
from worker.client import GatewayClient, StopRequested
from worker.disk import full_disk_means_disk_full
from worker.retry import RetryPolicy

BLOB = bytes(range(256)) * 5000


class Fault(Enum):
    ERROR_500 = "a bare 500"
    RESET = "the connection is reset"
    SLOW = "no answer in time"
    BUSY = "429 with a time to come back"
    PROXY_404 = "a proxy without its gateway"
    NOT_JSON = "a page of somebody else"
    CUT = "half of the body"


@dataclass
class FaultyServer:
    """`faults` are used up one a request (None: no fault); then it answers as it should. `seen` has every request."""

    faults: list[Fault | None] = field(default_factory=list)
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    problem: dict[str, Any] | None = None
    protocol: int = PROTOCOL_VERSION
    blob: bytes = BLOB
    put_status: int = 200
    url: str = ""

    def answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        if self.problem is not None:
            return self.problem["status"], "application/problem+json", json.dumps(self.problem).encode()
        if path == "/blob":
            return 200, "application/octet-stream", self.blob
        if method == "PUT":
            return self.put_status, "text/plain", b"AccessDenied"
        if path.endswith("/upload"):
            ticket = {"url": f"{self.url}/put", "headers": {"X-Signed": "1"}, "expires_at": 0.0}
            return 200, "application/json", json.dumps(ticket).encode()
        if path.endswith("/heartbeat"):
            return 200, "application/json", json.dumps({"go_on": True, "heartbeat_s": 1, "expires_at": 1}).encode()
        info = {
            "protocol": self.protocol,
            "server_version": "9",
            "publisher_key": "0" * 64,
            "models": [],
            "invite_needed": False,
            "max_delta_bytes": 1,
        }
        return 200, "application/json", json.dumps(info).encode()


def make_handler(world: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            world.seen.append((self.command, self.path, dict(self.headers), body))
            status, media_type, content = world.answer(self.command, self.path)
            fault = world.faults.pop(0) if world.faults else None
            if fault is Fault.RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            if fault is Fault.SLOW:
                time.sleep(1.0)
            if fault is Fault.ERROR_500:
                status, media_type, content = 500, "text/plain", b"oops"
            if fault is Fault.PROXY_404:
                status, media_type, content = 404, "text/plain", b"Path '/' not found"
            if fault is Fault.NOT_JSON:
                media_type, content = "text/html", b"<h1>It works!</h1>"
            if fault is Fault.BUSY:
                status, media_type = 429, "application/problem+json"
                content = json.dumps(problem("busy", 429, retry_after_s=0.2)).encode()
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault is Fault.CUT else content)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - the names that http.server asks for

        def log_message(self, *_: object) -> None:
            """Tests read `seen` instead."""

    return Handler


def problem(code: str, status: int, **more: Any) -> dict[str, Any]:
    fields = {"type": f"https://rankup.dev/problems/{code}", "title": code, "status": status}
    return {**fields, "detail": "this happened", "remedy": "do that", **more}


@pytest.fixture
def world() -> Iterator[FaultyServer]:
    world = FaultyServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(world))
    world.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield world
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(world: FaultyServer) -> Iterator[GatewayClient]:
    policy = RetryPolicy(patience_s=10.0, base_s=0.01, cap_s=0.05)
    with GatewayClient(world.url, token="secret", timeout_s=0.3, policy=policy) as client:
        yield client


def nothing(done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.mark.parametrize("fault", list(Fault))
def test_a_passing_fault_is_ridden_out(world: FaultyServer, client: GatewayClient, fault: Fault) -> None:
    world.faults = [fault, fault]
    assert client.info().server_version == "9"
    assert len(world.seen) == 3


def test_a_busy_server_is_not_asked_before_its_time(world: FaultyServer, client: GatewayClient) -> None:
    world.faults = [Fault.BUSY]
    began = time.monotonic()
    client.info()
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("fault", [Fault.ERROR_500, Fault.RESET, Fault.SLOW, Fault.PROXY_404])
def test_without_patience_the_first_fault_is_raised(world: FaultyServer, fault: Fault) -> None:
    world.faults = [fault]
    with (
        GatewayClient(world.url, timeout_s=0.2, policy=RetryPolicy(0.0)) as client,
        pytest.raises(RetryableError) as caught,
    ):
        client.info()
    assert caught.value.remedy
    assert len(world.seen) == 1


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [("wrong-state", 409, StateError), ("bad-input", 400, InputError), ("unheard-of", 418, RankupError)],
)
def test_a_fatal_problem_is_raised_at_once_with_cause_and_remedy(
    world: FaultyServer, client: GatewayClient, code: str, status: int, kind: type[RankupError]
) -> None:
    world.problem = problem(code, status)
    with pytest.raises(kind) as caught:
        client.heartbeat("l1", Heartbeat(fence=1))
    assert (caught.value.cause, caught.value.remedy) == ("this happened", "do that")
    assert len(world.seen) == 1


def test_a_missing_server_is_unreachable_and_every_pause_is_told() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    pauses: list[float] = []
    policy = RetryPolicy(patience_s=0.2, base_s=0.01, cap_s=0.02)
    with (
        GatewayClient(url, policy=policy, on_waiting=lambda error, pause_s: pauses.append(pause_s)) as client,
        pytest.raises(UnreachableError),
    ):
        client.info()
    assert len(pauses) > 3
    assert max(pauses) <= 0.02


def test_stop_ends_waiting(world: FaultyServer) -> None:
    stop = threading.Event()
    world.problem = problem("unreachable", 503)
    policy = RetryPolicy(patience_s=60.0, base_s=30.0)
    with GatewayClient(
        world.url, policy=policy, stop=stop, on_waiting=lambda *_: stop.set(), draw=lambda: 1.0
    ) as client:
        with pytest.raises(StopRequested):
            client.info()
        assert len(world.seen) == 1


def test_another_protocol_is_a_setup_error_that_says_who_must_update(
    world: FaultyServer, client: GatewayClient
) -> None:
    world.protocol = PROTOCOL_VERSION + 1
    with pytest.raises(SetupError) as caught:
        client.info()
    assert "pip install" in caught.value.remedy


def link(world: FaultyServer, data: bytes = BLOB, size: int | None = None) -> BlobLink:
    digest = hashlib.sha256(data).hexdigest()
    return BlobLink(sha256=digest, size_bytes=len(data) if size is None else size, url=f"{world.url}/blob")


@pytest.mark.parametrize("fault", [Fault.ERROR_500, Fault.RESET, Fault.CUT])
def test_a_download_survives_faults_and_shows_no_token(
    world: FaultyServer, client: GatewayClient, tmp_path: Path, fault: Fault
) -> None:
    world.faults = [fault]
    seen: list[tuple[int, int]] = []
    client.download(
        link(world), tmp_path / "shard", max_bytes=10**9, progress=lambda done, total: seen.append((done, total))
    )
    assert (tmp_path / "shard").read_bytes() == BLOB
    assert seen[-1] == (len(BLOB), len(BLOB))
    assert all("Authorization" not in headers for _, _, headers, _ in world.seen)


@pytest.mark.parametrize(
    ("make_link", "max_bytes", "kind"),
    [
        (lambda world: link(world), 10, TooLargeError),
        (lambda world: link(world, size=10), 10**9, IntegrityError),
        (lambda world: link(world, BLOB[:-1] + b"!"), 10**9, IntegrityError),
    ],
    ids=["above the limit", "longer than announced", "another hash"],
)
def test_a_download_with_wrong_bytes_leaves_nothing(
    world: FaultyServer,
    client: GatewayClient,
    tmp_path: Path,
    make_link: Callable[[FaultyServer], BlobLink],
    max_bytes: int,
    kind: type[RankupError],
) -> None:
    with pytest.raises(kind):
        client.download(make_link(world), tmp_path / "shard", max_bytes=max_bytes, progress=nothing)
    assert list(tmp_path.iterdir()) == []


def upload(client: GatewayClient, path: Path) -> list[int]:
    done: list[int] = []
    request = UploadRequest(fence=1, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=len(BLOB))
    client.upload("l1", request, path, progress=lambda now, total: done.append(now))
    return done


def test_an_upload_is_streamed_with_its_length_and_the_tickets_headers(
    world: FaultyServer, client: GatewayClient, tmp_path: Path
) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB)
    assert upload(client, path) == [n * 64 * 1024 for n in range(1, 20)] + [len(BLOB)]
    method, _, headers, body = world.seen[-1]
    assert (method, body) == ("PUT", BLOB)
    named = {name.lower(): value for name, value in headers.items()}
    assert (named["x-signed"], named["content-length"]) == ("1", str(len(BLOB)))
    assert "transfer-encoding" not in named
    assert "authorization" not in named


def test_a_broken_upload_asks_for_a_new_ticket(world: FaultyServer, client: GatewayClient, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB)
    world.faults = [None, Fault.ERROR_500, Fault.ERROR_500, None, Fault.RESET]
    upload(client, path)
    assert [method for method, *_ in world.seen] == ["POST", "PUT", "POST", "POST", "PUT", "POST", "PUT"]


def test_an_object_store_that_goes_on_refusing_is_not_asked_for_ever(
    world: FaultyServer, client: GatewayClient, tmp_path: Path
) -> None:
    path = tmp_path / "delta"
    path.write_bytes(BLOB)
    world.put_status = 403
    with pytest.raises(InputError, match="403 to the upload: AccessDenied"):
        upload(client, path)
    assert [method for method, *_ in world.seen] == ["POST", "PUT"] * 4


@pytest.mark.parametrize(
    ("name", "error", "failures", "waited_s", "draw", "pause_s"),
    [
        # base 1 s doubles with each failure: 1, 2, 4, ... times the draw
        ("first", UnreachableError("x"), 1, 0.0, 1.0, 1.0),
        ("third", UnreachableError("x"), 3, 0.0, 1.0, 4.0),
        ("half the jitter", UnreachableError("x"), 3, 0.0, 0.5, 2.0),
        ("capped at 20 s", UnreachableError("x"), 40, 0.0, 1.0, 20.0),
        # a busy server's own time is added to the jitter: 30 + 1
        ("busy", BusyError("x", retry_after_s=30.0), 1, 0.0, 1.0, 31.0),
        # a tenth of the outage, 6 s, is below the cap
        ("not slower yet", UnreachableError("x"), 40, 60.0, 1.0, 20.0),
        ("never past patience", UnreachableError("x"), 40, 85.0, 1.0, 5.0),
        ("patience is over", UnreachableError("x"), 2, 90.0, 0.5, None),
    ],
)
def test_pauses_follow_full_jitter(
    name: str, error: RetryableError, failures: int, waited_s: float, draw: float, pause_s: float | None
) -> None:
    policy = RetryPolicy(patience_s=90.0, base_s=1.0, cap_s=20.0)
    assert policy.pause_s(error, failures, waited_s, lambda: draw) == pause_s, name


@pytest.mark.parametrize(("waited_s", "pause_s"), [(200.0, 20.0), (600.0, 60.0), (1200.0, 120.0), (36_000.0, 120.0)])
def test_after_a_long_outage_the_server_is_asked_more_rarely(waited_s: float, pause_s: float) -> None:
    policy = RetryPolicy(patience_s=86_400.0)
    assert policy.pause_s(UnreachableError("x"), 1000, waited_s, lambda: 1.0) == pause_s


def test_a_full_disk_is_told_as_such() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(DiskFullError), full_disk_means_disk_full(full), full.open("wb") as file:
        file.write(b"x")
