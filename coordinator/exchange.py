"""One request and its answer, as they are counted and logged.

What always holds: exactly one `request` event and one count for each request, whatever became of it; a request appears
by its route template, never by its path, query or body; who only asks whether the server is well, and a heartbeat that
went well, is logged at debug level, so that ten thousand volunteers do not fill the log.
"""

from __future__ import annotations

import re
import time
from typing import Final

import structlog
from starlette.types import Message, Receive, Scope, Send

from coordinator.metrics import (
    METHODS,
    OTHER,
    RECEIVED_BYTES,
    REFUSALS,
    REQUEST_SECONDS,
    REQUESTS,
    SENT_BYTES,
    UNMATCHED,
    Tally,
    error_code,
    status_class,
)
from rankup.problems import MEDIA_TYPE

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
"""What a caller may give as the id of its request."""
QUIET: Final = frozenset({"/v1/health", "/v1/ready", "/metrics", "/board.json", "/v1/leases/{lease_id}/heartbeat"})
_CODE: Final = re.compile(rb'"type":"[^"]*/([a-z-]{1,32})"')

log = structlog.get_logger(__name__)


class Exchange:
    """Wraps `receive` and `send` of one request; `finish` when the application has returned."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, tally: Tally) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._tally = tally
        self._started_at = time.perf_counter()
        self._received_bytes = 0
        self._sent_bytes = 0
        self._status: int | None = None
        self._refused = False
        self._code = ""

    async def receive(self) -> Message:
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._refused = any(
                name.lower() == b"content-type" and value.startswith(MEDIA_TYPE.encode())
                for name, value in message.get("headers", ())
            )
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self._sent_bytes += len(body)
            if self._refused and not self._code and (found := _CODE.search(body)):
                self._code = error_code(found[1].decode())
        await self._send(message)

    def finish(self, *, broken: bool = False) -> None:
        """Count and log; `broken`: the answer ended in the middle."""
        route = getattr(self._scope.get("route"), "path", None) or UNMATCHED
        method = self._scope["method"] if self._scope["method"] in METHODS else OTHER
        seconds = time.perf_counter() - self._started_at
        status = status_class(self._status)
        self._tally.add(REQUESTS, route, method, status)
        self._tally.observe(REQUEST_SECONDS, route, method, value=seconds)
        self._tally.add(RECEIVED_BYTES, route, amount=self._received_bytes)
        self._tally.add(SENT_BYTES, route, amount=self._sent_bytes)
        if self._code:
            self._tally.add(REFUSALS, route, self._code)
        write = log.info
        if status == "5xx" or broken:
            write = log.warning
        elif status in ("2xx", "3xx") and route in QUIET:
            write = log.debug
        facts = {"code": self._code} if self._code else {}
        if broken:
            facts["outcome"] = "broken off"
        write(
            "request",
            method=method,
            route=route,
            status=self._status,
            duration_ms=round(seconds * 1000, 3),
            received_bytes=self._received_bytes,
            sent_bytes=self._sent_bytes,
            **facts,
        )
