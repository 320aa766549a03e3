"""The reading part of the gateway, and the object store it redirects to, as real HTTP servers with faults to inject.

`gateway` answers pointers, envelopes and, for blobs, a redirect to `objects`, which listens on another port and serves
Range requests. Both write down every request that they get.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from history import History

from rankup.errors import NotFoundError
from rankup.versions import manifest_key, pointer_key


@dataclass
class Faults:
    """What goes wrong. Counters are used up; None and 0 mean that nothing does."""

    cut_after: int | None = None
    """Close each connection after this many bytes of a blob."""
    cuts: int = 10**9
    ignore_range: bool = False
    wrong_bytes: int = 0
    """So many answers with a blob have one byte flipped."""
    too_long: int = 0
    hide_length: bool = False
    """The end of a blob is the end of the connection."""
    truncate: bool = False
    """Objects are one byte shorter than they should be, and the server says so."""
    unavailable: int = 0
    """So many requests to the gateway get 503."""
    expired_links: int = 0
    hang_after: int | None = None
    """After this many bytes of blobs, answers stall until `release` is set: a good moment to kill the reader."""


@dataclass
class Served:
    """Two running servers and what they saw."""

    history: History
    url: str = ""
    objects_url: str = ""
    faults: Faults = field(default_factory=Faults)
    blob_bytes: int = 0
    gateway_requests: list[tuple[str, str | None]] = field(default_factory=list)
    object_requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """Path, Authorization and Range of each."""
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spend(self, name: str) -> bool:
        """Use up one of a fault's counter."""
        with self.lock:
            left = getattr(self.faults, name)
            if left:
                setattr(self.faults, name, left - 1)
            return bool(left)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


class _Gateway(_Handler):
    def do_GET(self) -> None:
        served = self.served
        served.gateway_requests.append((self.path, self.headers.get("Authorization")))
        if served.spend("unavailable"):
            self.answer(503, b"starting")
        elif match := re.fullmatch(r"/v1/models/([\w.-]+)/latest", self.path):
            self.stored(pointer_key(match[1]))
        elif match := re.fullmatch(r"/v1/models/([\w.-]+)/versions/(\d+)", self.path):
            self.stored(manifest_key(match[1], int(match[2])))
        elif match := re.fullmatch(r"/v1/blobs/([0-9a-f]{64})", self.path):
            link = f"{served.objects_url}/{match[1]}" + ("?expired" if served.spend("expired_links") else "")
            self.answer(307, b"", Location=link)
        else:
            self.answer(404, b"no such page")

    def stored(self, key: str) -> None:
        try:
            self.answer(200, self.served.history.store.get(key, max_bytes=2**30))
        except NotFoundError:
            body = b'{"type":"https://x/not-found","title":"t","status":404,"detail":"no such version","remedy":"look"}'
            self.answer(404, body, Content_Type="application/problem+json")


class _Objects(_Handler):
    def do_GET(self) -> None:
        served, faults = self.served, self.served.faults
        wanted = self.headers.get("Range")
        served.object_requests.append((self.path, self.headers.get("Authorization"), wanted))
        if self.path.endswith("?expired"):
            self.answer(403, b"<Error>Request has expired</Error>")
            return
        digest = self.path.lstrip("/")
        try:
            data = served.history.store.get(f"blobs/sha256/{digest[:2]}/{digest}", max_bytes=2**30)
        except NotFoundError:
            self.answer(404, b"")
            return
        if faults.truncate:
            data = data[:-1]
        if served.spend("too_long"):
            data += b"more"
        if served.spend("wrong_bytes"):
            data = bytes([data[0] ^ 1]) + data[1:]
        start = 0
        if wanted and not faults.ignore_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            if start >= len(data):
                self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
                return
        self.send_response(206 if start else 200)
        if start:
            total = "*" if faults.hide_length else str(len(data))
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{total}")
        if faults.hide_length:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.send_blob(data[start:])

    def send_blob(self, rest: bytes) -> None:
        served, faults = self.served, self.served.faults
        sent = 0
        for position in range(0, len(rest), 16384):
            piece = rest[position : position + 16384]
            if faults.cut_after is not None and sent + len(piece) > faults.cut_after and served.spend("cuts"):
                piece = piece[: max(0, faults.cut_after - sent)]
                self.wfile.write(piece)
                served.blob_bytes += len(piece)
                self.close_connection = True
                return
            if faults.hang_after is not None and served.blob_bytes + len(piece) > faults.hang_after:
                self.wfile.flush()
                served.stalled.set()
                served.release.wait(30)
                self.close_connection = True
                return
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            sent += len(piece)
            with served.lock:
                served.blob_bytes += len(piece)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Readers that are killed or that hang up are what these tests are about."""


@contextmanager
def serve(history: History) -> Iterator[Served]:
    """Both servers on free ports of this machine."""
    served = Served(history)
    servers = []
    for base in (_Gateway, _Objects):
        handler = type(base.__name__, (base,), {"served": served})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    served.url, served.objects_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield served
    finally:
        served.release.set()
        for server in servers:
            server.shutdown()
            server.server_close()
