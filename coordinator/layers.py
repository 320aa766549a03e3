"""The two ASGI layers that see every request before the application does.

What always holds:
- a body is counted while it streams in, and nothing of one above the limit is parsed (`BodyLimit`), unless its route
  counts for itself;
- every answer carries the request's id and the security headers, every request is counted and logged once with that id,
  and an exception that nobody foresaw is logged with it and answered with 500 (`Envelope`).

They know nothing of routes, tokens or messages.
"""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import Callable, Mapping

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.exchange import REQUEST_ID, Exchange
from coordinator.metrics import Tally
from coordinator.problems import from_error, printable, problem_response
from rankup.errors import InputError, RankupError, TooLargeError

BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive; a request that trickles in would hold a slot of the replica."""
MAX_ECHO_CHARS = 80

SECURITY_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}

log = structlog.get_logger(__name__)


def _none(_: Scope) -> bool:
    return False


class BodyLimit:
    """Reads a body whole before the application sees it, and refuses it as soon as it passes `max_bytes`.

    Bodies of `/v1` are small, so holding one costs at most `max_bytes` of memory. Requests for which `streams` is true
    pass untouched: their routes bound size and time themselves.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        timeout_s: float = BODY_TIMEOUT_S,
        streams: Callable[[Scope], bool] = _none,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._streams(scope):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        await self._refuse(scope, receive, send)
                        return
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            late = problem_response(
                status=408,
                code=InputError.code,
                title="The body did not arrive",
                detail=f"The body took longer than {self._timeout_s:g} s to arrive.",
                remedy="Send the request again over a better connection.",
                headers={"Connection": "close"},
            )
            await late(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = TooLargeError(
            f"The body is larger than {self._max_bytes} bytes.",
            remedy="Send less; deltas go to the address in an upload ticket, not to the gateway.",
        )
        await from_error(error)(scope, receive, send)


class Envelope:
    """Outermost layer: the request's id, its counts and log line, security headers, and 500 for what nobody foresaw.

    The id is the caller's `X-Request-Id` where that is a short plain word, so that a proxy in front and the caller find
    the same line; otherwise a fresh one. It comes back as `X-Request-Id` and as `Rankup-Request-Id`.
    """

    def __init__(self, app: ASGIApp, *, tally: Tally | None = None) -> None:
        self._app = app
        self._tally = tally if tally is not None else Tally()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = request_id
                headers["Rankup-Request-Id"] = request_id
            await send(message)

        exchange = Exchange(scope, receive, send_with_headers, self._tally)
        broken = False
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except Exception as exc:  # The last place that can turn a fault into an answer.
                # As text: a renderer that prints local variables would print tokens.
                log.error(
                    "request_crashed",
                    method=scope["method"],
                    path=printable(scope["path"], MAX_ECHO_CHARS),
                    trace="".join(traceback.format_exception(exc)),
                )
                if started:
                    broken = True
                    raise
                response = problem_response(
                    status=500,
                    code=RankupError.code,
                    title="The coordinator failed",
                    detail="The coordinator met a fault that it did not foresee; it is in its log.",
                    remedy=f"Try again once; if it stays, tell the organiser the request id {request_id}.",
                )
                await response(scope, exchange.receive, exchange.send)
            finally:
                exchange.finish(broken=broken)
                # Bound by whoever found out who calls; it must not stay with the next request of this task.
                structlog.contextvars.unbind_contextvars("worker_id")
