"""The two layers in front of the application, driven message by message."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from coordinator.layers import BodyLimit, Envelope

LIMIT = 10


async def echo(_: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body that it read."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def drive(app: Any, messages: list[Message], headers: list[tuple[bytes, bytes]] | None = None) -> list[Message]:
    """Feed `messages`, then silence; give what was sent."""
    sent: list[Message] = []
    waiting = list(messages)

    async def receive() -> Message:
        if waiting:
            return waiting.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("never")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": headers or []}
    asyncio.run(app(scope, receive, send))
    return sent


def chunk(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


CASES: dict[str, tuple[list[Message], list[tuple[bytes, bytes]], int]] = {
    "nothing": ([chunk(b"")], [], 200),
    "at the limit": ([chunk(b"x" * 10)], [], 200),
    "at the limit in pieces": ([chunk(b"x", True)] * 9 + [chunk(b"x")], [], 200),
    "one above": ([chunk(b"x" * 11)], [], 413),
    "one above in pieces": ([chunk(b"x", True)] * 10 + [chunk(b"x")], [], 413),
    "announced above the limit": ([], [(b"content-length", b"11")], 413),
    "announced beyond every number": ([chunk(b"x" * 11)], [(b"content-length", b"9" * 5000)], 413),
    "announced small, sent large": ([chunk(b"x" * 11)], [(b"content-length", b"2")], 413),
    "announced in no digits": ([chunk(b"x")], [(b"content-length", "²".encode())], 200),
    "never finished": ([chunk(b"x", True)], [], 408),
}


@pytest.mark.parametrize("name", CASES)
def test_a_body_is_counted_while_it_arrives(name: str) -> None:
    messages, headers, status = CASES[name]
    sent = drive(BodyLimit(echo, max_bytes=LIMIT, timeout_s=0.05), messages, headers)
    assert sent[0]["status"] == status
    body = b"".join(message.get("body", b"") for message in sent)
    if status == 200:
        assert body == b"".join(message["body"] for message in messages)
    else:
        assert json.loads(body)["status"] == status


def test_a_client_that_hangs_up_gets_no_answer_and_reaches_no_route() -> None:
    reached = []

    async def app(*_: Any) -> None:
        reached.append(True)

    assert drive(BodyLimit(app, max_bytes=LIMIT), [chunk(b"x", True), {"type": "http.disconnect"}]) == []
    assert reached == []


def test_a_crash_becomes_500_with_the_id_that_its_log_line_has() -> None:
    async def app(*_: Any) -> None:
        raise RuntimeError("password is swordfish")

    start, body = drive(Envelope(app), [])
    headers = dict(start["headers"])
    assert start["status"] == 500
    assert b"swordfish" not in body["body"]
    assert headers[b"rankup-request-id"] in body["body"]
    assert headers[b"x-frame-options"] == b"DENY"


def test_a_crash_after_the_answer_began_is_left_to_the_server() -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        drive(Envelope(app), [])
