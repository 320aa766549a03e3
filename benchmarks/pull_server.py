"""A server on loopback for benchmarks/pull.py: it counts what it sends, and sends no faster than it is told to.

It has two faces: a static web server over object storage as a folder (`/<key>`), and a hub of models over the folders
of versions, as `huggingface_hub` asks for them: `/api/models/ORG/NAME/revision/REV`, `/api/models/ORG/NAME/tree/REV`
and `/ORG/NAME/resolve/REV/FILE`.

What always holds: an answer has a length, an ETag and `Accept-Ranges`, and one range is honoured as RFC 9110 has it; a
byte counts when the kernel has taken it, so what was under way to a killed client counts as sent. Nothing is ever
written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

PIECE_BYTES: Final = 64 * 1024
SEND_BUFFER_BYTES: Final = 128 * 1024
"""Small, so that little is under way when a client is killed."""
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-(\d{0,18})$")


@dataclass
class Answer:
    """One answer with a body, while it is sent and after."""

    path: str
    start: int
    sent: int = 0
    ended: bool = False


class Pace:
    """Lets `bytes_per_s` pass, over all connections together; None: as fast as it goes."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, count: int) -> None:
        if self.bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            at = max(self._free_at, now)
            self._free_at = at + count / self.bytes_per_s
        if at > now:
            time.sleep(at - now)


class LocalServer:
    """Use it in a `with` block. `hub` names the folder of each (repository, revision)."""

    def __init__(self, store: Path, hub: Mapping[tuple[str, str], Path] | None = None) -> None:
        self.store, self.hub = store, dict(hub or {})
        self.pace = Pace()
        self._answers: list[Answer] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"local": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def reset(self, *, bytes_per_s: float | None = None) -> None:
        """Forget what was sent, and send at this pace from now on."""
        with self._lock:
            self._answers = []
        self.pace.bytes_per_s = bytes_per_s

    def answers(self) -> list[Answer]:
        with self._lock:
            return list(self._answers)

    def sent(self) -> int:
        """Bytes of all bodies since `reset`."""
        return sum(answer.sent for answer in self.answers())

    def settled(self) -> int:
        """`sent`, once no answer is under way any more."""
        while not all(answer.ended for answer in self.answers()):
            time.sleep(0.01)
        return self.sent()

    def begin(self, path: str, start: int) -> Answer:
        answer = Answer(path, start)
        with self._lock:
            self._answers.append(answer)
        return answer

    def __enter__(self) -> LocalServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    local: LocalServer

    def setup(self) -> None:
        super().setup()
        import socket

        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        with contextlib.suppress(ConnectionError, TimeoutError):
            found = self._find(path)
            if isinstance(found, bytes):
                self._send(found, path, {"Content-Type": "application/json"}, body)
            elif found is not None and found[0].is_file():
                self._send(found[0], path, found[1], body)
            else:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()

    def _find(self, path: str) -> bytes | tuple[Path, dict[str, str]] | None:
        parts = path.strip("/").split("/")
        store = self.local.store
        if not all(parts) or ".." in parts:
            return None
        match parts:
            case ["api", "models", org, name, "revision", revision]:
                return self._hub_info(f"{org}/{name}", revision)
            case ["api", "models", org, name, "tree", revision]:
                return self._hub_tree(f"{org}/{name}", revision)
            case [org, name, "resolve", revision, *rest] if rest:
                return self._hub_file(f"{org}/{name}", revision, "/".join(rest))
            case _:
                return store / "/".join(parts), {}

    def _hub_info(self, repository: str, revision: str) -> bytes | None:
        found = self._hub_folder(repository, revision)
        if found is None:
            return None
        folder, commit = found
        siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
        info = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "private": False}
        return json.dumps(info | {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}).encode()

    def _hub_tree(self, repository: str, revision: str) -> bytes | None:
        found = self._hub_folder(repository, revision)
        if found is None:
            return None
        files = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file).strip('"')}
            for file in sorted(found[0].iterdir())
        ]
        return json.dumps(files).encode()

    def _hub_file(self, repository: str, revision: str, name: str) -> tuple[Path, dict[str, str]] | None:
        found = self._hub_folder(repository, revision)
        if found is None:
            return None
        folder, commit = found
        return folder / name, {"X-Repo-Commit": commit}

    def _hub_folder(self, repository: str, revision: str) -> tuple[Path, str] | None:
        for (known, name), folder in self.local.hub.items():
            commit = hashlib.sha1(f"{known}@{name}".encode(), usedforsecurity=False).hexdigest()
            if known == repository and revision in (name, commit):
                return folder, commit
        return None

    def _send(self, content: Path | bytes, path: str, headers: Mapping[str, str], body: bool) -> None:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        asked = _RANGE.match(self.headers.get("Range", ""))
        start, end = 0, size
        if asked is not None:
            start, end = int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(200 if asked is None else 206)
        if asked is not None:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        for name, value in {"Accept-Ranges": "bytes", "ETag": _etag(content), **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            self._body(content, path, start, end)

    def _body(self, content: Path | bytes, path: str, start: int, end: int) -> None:
        answer = self.local.begin(path, start)
        try:
            with contextlib.ExitStack() as stack:
                file = None if isinstance(content, bytes) else stack.enter_context(content.open("rb", buffering=0))
                if file is not None:
                    file.seek(start)
                position = start
                while position < end:
                    count = min(PIECE_BYTES, end - position)
                    piece = content[position : position + count] if file is None else file.read(count)
                    self.local.pace.wait(len(piece))
                    self._write(piece, answer)
                    position += len(piece)
        finally:
            answer.ended = True

    def _write(self, piece: bytes, answer: Answer) -> None:
        rest = memoryview(piece)
        while rest:
            count = self.connection.send(rest)
            answer.sent += count
            rest = rest[count:]


_etags: dict[tuple[str, int, int], str] = {}


def _etag(content: Path | bytes) -> str:
    """The sha256 of the content, as a hub gives it for large files; remembered for each file."""
    if isinstance(content, bytes):
        return f'"{hashlib.sha256(content).hexdigest()}"'
    info = content.stat()
    key = (str(content), info.st_size, info.st_mtime_ns)
    if key not in _etags:
        with content.open("rb") as file:
            _etags[key] = f'"{hashlib.file_digest(file, "sha256").hexdigest()}"'
    return _etags[key]
