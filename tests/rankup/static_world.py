"""A bucket laid out as a plain folder, and a static web server over a folder, with habits that such servers have."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rankup.store import MemoryStore

PAGE = b"<!doctype html><title>not here</title>"


def lay_out(store: MemoryStore, folder: Path) -> Path:
    """Every object as the file of its key."""
    for found in store.scan(""):
        path = folder / found.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(found.key, max_bytes=2**30))
    return folder


@dataclass
class Site:
    """A running server; `habits` may be changed while it runs."""

    folder: Path
    url: str = ""
    ranges: bool = True
    missing: int = 404
    """What it answers for a file that is not there; 200: with a page."""
    encoding: str = ""
    moved: bool = False
    """Everything has moved to another path of this server."""
    down: bool = False
    cut_after: int | None = None
    """Break off the next answer after so many bytes."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        site = self.site
        if site.cut_after is not None:
            body, site.cut_after = body[: site.cut_after], None
            self.close_connection = True
        self.wfile.write(body)

    def do_GET(self) -> None:
        site, wanted = self.site, self.headers.get("Range")
        site.requests.append((self.path, wanted))
        if site.down:
            self.answer(503, b"")
            return
        if site.moved and not self.path.startswith("/moved/"):
            self.answer(301, b"", Location=f"/moved{self.path}")
            return
        path = site.folder / self.path.removeprefix("/moved").lstrip("/")
        if not path.is_file():
            self.answer(site.missing, PAGE, Content_Type="text/html; charset=utf-8")
            return
        data = path.read_bytes()
        headers = {"Content_Encoding": site.encoding} if site.encoding else {}
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        if match is None or not site.ranges:
            self.answer(200, data, **headers)
        elif int(match[1]) >= len(data):
            self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
        else:
            start = int(match[1])
            self.answer(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **headers)


@contextmanager
def serve_folder(folder: Path) -> Iterator[Site]:
    """The folder on a free port of this machine."""
    site = Site(folder)
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
