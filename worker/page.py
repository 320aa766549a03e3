"""A page for the owner of the machine, served on 127.0.0.1 while the agent runs: what it does, orders, limits.

    GET  /?code=…   a code of `worker.pagekey` becomes a cookie      GET /page.css, /page.js   the same for everybody
    GET  /          the page                                         GET /scene    `Scene`, what the page shows
    GET  /limits    words for each limit                             POST /order   `control.Request` in, `Reply` out

What always holds:
- the name asked for is that of this address (so no other site can point its own name here), whoever asks brings code or
  cookie, and an order comes from the page itself (`Origin`, JSON, cookie of the same site only);
- a GET changes nothing; no path leads to a file: the three files of the page are read at the start;
- a request takes at most `MAX_REQUEST_BYTES` and `DEADLINE_S`, and there are at most `MAX_CONNECTIONS` at a time: what
  is more is closed, and the agent's work waits for none of them;
- the page loads nothing from elsewhere and no other site may show it in a frame (Content-Security-Policy).

It stands on http.server, since nothing else that the worker installs serves HTTP; the dangerous parts of that module
(files, CGI) are not used. Orders are those of the control socket, carried out by the same `worker.desk`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple

from pydantic import BaseModel, RootModel, ValidationError

from rankup.errors import SetupError
from rankup.message import Answer
from worker.control import MAX_REQUEST_BYTES, Reply, Request
from worker.limitwords import LIMIT_WORDS, LimitWords
from worker.pagekey import Door, open_key
from worker.status import Status

MAX_CONNECTIONS = 16
DEADLINE_S = 10.0
_TRIES = 20
"""Ports that are tried, from the wanted one on, before any free one is taken."""
_LOOK_S = 0.2
_COOKIE_S = 90 * 86400
_HTML, _CSS, _JS = "text/html; charset=utf-8", "text/css; charset=utf-8", "text/javascript; charset=utf-8"
_JSON = "application/json"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_ENTERED = '<!doctype html><meta http-equiv="refresh" content="0;url=/"><title>Rankup</title>'
"""Not a redirect: a browser that came from another program would send it without the new cookie."""


class Scene(Answer):
    """What the page shows."""

    status: Status
    curve: tuple[tuple[int, float], ...] = ()
    """(step, loss) of the present training."""
    journal: tuple[str, ...] = ()
    """The last lines, the oldest first."""


class _Words(RootModel[tuple[LimitWords, ...]]):
    pass


class _Content(NamedTuple):
    kind: str
    body: bytes


class PageServer:
    """Serves the page from entering the `with` block to leaving it; `obey` and `show` run in its threads.

    `port`: the first that is tried; 0: any. Making it raises `SetupError` where no port or no key can be had.
    """

    def __init__(self, home: Path, port: int, obey: Callable[[Request], Reply], show: Callable[[], Scene]) -> None:
        folder = files("worker") / "web"
        contents = {
            path: _Content(kind, (folder / name).read_bytes())
            for path, name, kind in (
                ("/", "page.html", _HTML),
                ("/page.css", "page.css", _CSS),
                ("/page.js", "page.js", _JS),
            )
        }
        key = open_key(home)
        self._server = _bound(port)
        self._server.open_for(Door(key, self.port), contents, obey, show)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        """Where it is, without a code."""
        return page_address(self.port)

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=_LOOK_S):
            pass  # so that the thread does not sleep on
        self._thread.join()
        self._server.server_close()
        self._server.close_older_than(0.0)

    def _run(self) -> None:
        while not self._over.is_set():
            self._server.handle_request()
            self._server.close_older_than(DEADLINE_S)


def page_address(port: int, code: str = "") -> str:
    """The address of the page, with a code that opens it."""
    return f"http://127.0.0.1:{port}/" + (f"?code={code}" if code else "")


def _bound(port: int) -> _Server:
    error: OSError | None = None
    for candidate in (*range(port, min(port + _TRIES, 65536)), 0) if port else (0,):
        try:
            return _Server(("127.0.0.1", candidate), _Handler)
        except OSError as exc:
            error = exc
    raise SetupError(f"no port can be had for the page: {error}", remedy='RANKUP_WORKER_PAGE_PORT="off" does without.')


class _Server(ThreadingMixIn, TCPServer):
    """A thread a connection, each of which is closed in time."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 2 * MAX_CONNECTIONS
    timeout = _LOOK_S
    door: Door
    contents: dict[str, _Content]
    obey: Callable[[Request], Reply]
    show: Callable[[], Scene]

    def __init__(self, *arguments: Any) -> None:
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        super().__init__(*arguments)

    def open_for(
        self,
        door: Door,
        contents: dict[str, _Content],
        obey: Callable[[Request], Reply],
        show: Callable[[], Scene],
    ) -> None:
        self.door, self.contents, self.obey, self.show = door, contents, obey, show

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                self._open[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def close_older_than(self, seconds: float) -> None:
        """End connections, whatever their threads wait for."""
        now = time.monotonic()
        with self._lock:
            for connection, began in self._open.items():
                if now - began >= seconds:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who leaves early, or a worker that ends meanwhile: nothing to tell anybody."""


class _Handler(BaseHTTPRequestHandler):
    """One request; then the connection ends."""

    server: _Server
    server_version, sys_version = "rankup", ""
    timeout = DEADLINE_S

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        code = query.removeprefix("code=") if path == "/" and query.startswith("code=") else ""
        if not self._is_host():
            self._refuse(HTTPStatus.FORBIDDEN, "This address is not the one of the page.")
        elif path in ("/page.css", "/page.js"):
            self._send(self.server.contents[path])
        elif code and self.server.door.open_with(code):
            door = self.server.door
            cookie = f"{door.cookie_name}={door.cookie}; Max-Age={_COOKIE_S}; Path=/; HttpOnly; SameSite=Strict"
            self._send(_Content(_HTML, _ENTERED.encode()), cookie=cookie)
        elif not self._has_cookie():
            self._refuse(HTTPStatus.UNAUTHORIZED, "Open this page with `rankup worker page --open`, once per browser.")
        elif path == "/":
            self._send(self.server.contents["/"])
        elif path == "/scene":
            self._send_json(self.server.show())
        elif path == "/limits":
            self._send_json(_Words(LIMIT_WORDS))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")

    def do_POST(self) -> None:
        body = self._body()
        if not self._is_host() or self._only("Origin") != f"http://{self._only('Host')}":
            self._refuse(HTTPStatus.FORBIDDEN, "Orders are given on the page itself.")
        elif not self._has_cookie():
            self._refuse(HTTPStatus.UNAUTHORIZED, "Open the page with `rankup worker page --open` first.")
        elif self.path != "/order":
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such order.")
        elif self._only("Content-Type") != _JSON:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "An order is JSON.")
        elif len(body) > MAX_REQUEST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"An order has at most {MAX_REQUEST_BYTES} bytes.")
        else:
            try:
                request = Request.model_validate_json(body)
            except ValidationError as exc:
                self._refuse(HTTPStatus.BAD_REQUEST, f"This is not an order: {exc.errors()[0]['msg']}")
                return
            self._send_json(self.server.obey(request))

    def _body(self) -> bytes:
        """The body, of which no more is read than shows that it is too long; empty where its length is not said."""
        length = self._only("Content-Length") or ""
        if not (length.isascii() and length.isdecimal() and len(length) < 10):
            return b""
        return self.rfile.read(min(int(length), MAX_REQUEST_BYTES + 1))

    # -- who asks ----------------------------------------------------------------------------------------------------

    def _only(self, header: str) -> str | None:
        """The header's value; None where it is not there exactly once."""
        values = self.headers.get_all(header, [])
        return str(values[0]) if len(values) == 1 else None

    def _is_host(self) -> bool:
        port = self.server.server_address[1]
        return self._only("Host") in (f"127.0.0.1:{port}", f"localhost:{port}")

    def _has_cookie(self) -> bool:
        # Other programs on this machine may have set cookies for this name that no strict parser takes.
        door = self.server.door
        pairs = (part.strip().partition("=") for part in (self._only("Cookie") or "").split(";"))
        return any(name == door.cookie_name and door.is_cookie(value) for name, _, value in pairs)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _refuse(self, status: HTTPStatus, words: str) -> None:
        self._send(_Content("text/plain; charset=utf-8", f"{words}\n".encode()), status)

    def _send_json(self, answer: BaseModel) -> None:
        self._send(_Content(_JSON, answer.model_dump_json().encode()))

    def _send(self, content: _Content, status: HTTPStatus = HTTPStatus.OK, *, cookie: str = "") -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if cookie:
            self.send_header("Set-Cookie", cookie)
        self.send_header("Content-Type", content.kind)
        self.send_header("Content-Length", str(len(content.body)))
        self.end_headers()
        self.wfile.write(content.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: wrong methods, headers without end."""
        self._refuse(HTTPStatus(code), "This is not a request that the page answers.")

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - named by http.server
        """Nobody reads it."""
