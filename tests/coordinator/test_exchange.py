"""The one log line and the counts of each request, through the layers that every request passes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import structlog
from fastapi import FastAPI
from structlog.testing import LogCapture

from coordinator.layers import Envelope
from coordinator.metrics import Tally
from coordinator.problems import install_handlers
from rankup.errors import StateError


@pytest.fixture
def logged() -> Iterator[LogCapture]:
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    yield capture
    structlog.configure(**before)


def application(tally: Tally) -> FastAPI:
    app = FastAPI()
    install_handlers(app)

    @app.post("/v1/things/{name}")
    async def thing(name: str, body: dict[str, Any]) -> dict[str, str]:
        structlog.contextvars.bind_contextvars(worker_id="w-1")
        if name == "gone":
            raise StateError("no")
        if name == "broken":
            raise RuntimeError("swordfish")
        return {"name": "ok"}

    @app.get("/v1/health")
    async def health() -> dict[str, str]:
        return {}

    app.add_middleware(Envelope, tally=tally)
    return app


def call(tally: Tally, method: str, path: str, **more: Any) -> httpx2.Response:
    async def go() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=application(tally), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.request(method, path, **more)

    return asyncio.run(go())


CASES: dict[str, tuple[str, str, int, str, str, str]] = {
    "answered": ("POST", "/v1/things/cup", 200, "/v1/things/{name}", "info", ""),
    "refused": ("POST", "/v1/things/gone", 409, "/v1/things/{name}", "info", "wrong-state"),
    "crashed": ("POST", "/v1/things/broken", 500, "/v1/things/{name}", "warning", "error"),
    "unknown address": ("GET", "/v1/secret-123", 404, "unmatched", "info", "not-found"),
    "wrong method": ("DELETE", "/v1/things/cup", 405, "/v1/things/{name}", "info", "bad-input"),
    "a method nobody knows": ("BREW", "/v1/things/cup", 405, "/v1/things/{name}", "info", "bad-input"),
    "quiet": ("GET", "/v1/health", 200, "/v1/health", "debug", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_each_request_is_logged_and_counted_once_by_its_template(name: str, logged: LogCapture) -> None:
    method, path, status, route, level, code = CASES[name]
    tally = Tally()
    answer = call(tally, method, path, json={"a": 1} if method == "POST" else None)
    assert answer.status_code == status
    [event] = [entry for entry in logged.entries if entry["event"] == "request"]
    assert (event["route"], event["status"], event["log_level"]) == (route, status, level)
    assert event.get("code", "") == code
    assert event["request_id"] == answer.headers["x-request-id"] == answer.headers["rankup-request-id"]
    assert event["duration_ms"] >= 0
    assert event.get("worker_id") == ("w-1" if route == "/v1/things/{name}" and method == "POST" else None)
    assert "secret-123" not in str(event)
    counted = tally.take()
    shown = method if method != "BREW" else "other"
    assert counted["rankup_http_requests_total", route, shown, f"{status // 100}xx"] == 1
    assert counted["rankup_http_sent_bytes_total", route] == len(answer.content)
    assert counted["rankup_http_received_bytes_total", route] == (len(b'{"a":1}') if method == "POST" else 0)
    assert sum(value for cell, value in counted.items() if cell[0] == "rankup_http_refusals_total") == bool(code)
    assert structlog.contextvars.get_contextvars() == {}


IDS = {
    "a plain word": ("req-1.A_b", True),
    "a long word": ("a" * 64, True),
    "too long": ("a" * 65, False),
    "two lines": ("a\tb", False),
    "leading dash": ("-a", False),
    "empty": ("", False),
    "not ASCII": ("ä", False),
}


@pytest.mark.parametrize("name", IDS)
def test_the_id_of_a_request_is_the_callers_if_it_is_a_plain_word(name: str, logged: LogCapture) -> None:
    given, taken = IDS[name]
    answer = call(Tally(), "GET", "/v1/health", headers={"X-Request-Id": given.encode()})
    assert (answer.headers["x-request-id"] == given) == taken
    assert [entry["request_id"] for entry in logged.entries] == [answer.headers["x-request-id"]]


def test_who_hangs_up_is_counted_as_closed(logged: LogCapture) -> None:
    tally = Tally()

    async def silent(*_: Any) -> None:
        return

    async def nothing(*_: Any) -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    asyncio.run(Envelope(silent, tally=tally)(scope, nothing, nothing))
    assert tally.take()["rankup_http_requests_total", "unmatched", "GET", "closed"] == 1
    assert logged.entries[0]["status"] is None


def test_an_answer_that_breaks_off_is_logged_as_such(logged: LogCapture) -> None:
    tally = Tally()

    async def breaking(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    async def nothing(*_: Any) -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    with pytest.raises(RuntimeError):
        asyncio.run(Envelope(breaking, tally=tally)(scope, nothing, nothing))
    assert logged.entries[-1]["outcome"] == "broken off"
    assert logged.entries[-1]["log_level"] == "warning"
