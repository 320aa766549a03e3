"""Measuring the way to the server: who may, how much, how slowly, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx2
import pytest
from gateway_world import RATE_LIMITS, serve

from coordinator.access import GatewayDeps
from coordinator.gateway import create_app
from coordinator.ledger import Ledger
from coordinator.link import Sink, filler
from rankup.errors import BusyError, TooLargeError
from rankup.protocol import MAX_LINK_BYTES, LinkMeasured, Problem
from rankup.settings import CoordinatorSettings
from rankup.store import MemoryStore


async def no_ledger() -> Ledger:
    raise AssertionError("measuring needs no ledger")


@dataclass
class World:
    http: httpx2.Client
    store: MemoryStore


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    settings = CoordinatorSettings(**dict.fromkeys(RATE_LIMITS, 0))  # type: ignore[arg-type]
    store = MemoryStore()
    app = create_app(GatewayDeps(no_ledger, store, settings, "d7" * 32, time.time))
    with serve(app) as url, httpx2.Client(base_url=url, timeout=20) as http:
        yield World(http, store)


@pytest.mark.parametrize("size_bytes", [0, 1, 70_000, MAX_LINK_BYTES])
def test_bytes_are_counted_without_a_token_and_not_kept(world: World, size_bytes: int) -> None:
    answer = world.http.put("/v1/link", content=bytes(size_bytes))
    assert answer.status_code == 200
    told = LinkMeasured.model_validate_json(answer.content)
    assert told.size_bytes == size_bytes
    assert 0.0 <= told.seconds < 5.0
    assert list(world.store.list("")) == []


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks without an end in sight"])
def test_more_than_a_measurement_needs_is_refused_and_the_connection_closed(world: World, announced: bool) -> None:
    data = bytes(MAX_LINK_BYTES + 1)
    answer = world.http.put("/v1/link", content=data if announced else iter([data[:-1], data[-1:]]))
    assert answer.status_code == 413
    assert Problem.model_validate_json(answer.content).type.endswith("/too-large")
    assert answer.headers["connection"] == "close"


def test_an_announced_excess_is_refused_before_a_byte_of_it_is_sent(world: World) -> None:
    address = world.http.base_url
    with socket.create_connection((address.host, address.port or 80), timeout=5) as raw:
        raw.sendall(f"PUT /v1/link HTTP/1.1\r\nHost: x\r\nContent-Length: {MAX_LINK_BYTES + 1}\r\n\r\n".encode())
        assert raw.recv(64).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("size_bytes", [1, 65_536, MAX_LINK_BYTES])
def test_so_many_bytes_come_down_as_were_asked_for(world: World, size_bytes: int) -> None:
    answer = world.http.get("/v1/link", params={"size": size_bytes})
    assert (answer.status_code, answer.content) == (200, filler()[:size_bytes])


@pytest.mark.parametrize("size", ["0", "-1", str(MAX_LINK_BYTES + 1), "many", ""])
def test_nobody_is_sent_more_or_less_than_that(world: World, size: str) -> None:
    assert world.http.get("/v1/link", params={"size": size}).status_code == 422


def test_what_is_sent_cannot_be_made_shorter_on_the_way() -> None:
    import zlib

    assert len(zlib.compress(filler())) > 0.99 * MAX_LINK_BYTES


async def pieces(*waits: float, size_bytes: int = 10) -> AsyncIterator[bytes]:
    for wait_s in waits:
        await asyncio.sleep(wait_s)
        yield bytes(size_bytes)


def test_the_time_is_that_from_the_first_bytes_to_the_last() -> None:
    told = asyncio.run(Sink().swallow(pieces(0.1, 0.0, 0.05)))
    assert told.size_bytes == 30
    assert 0.04 < told.seconds < 0.1


SLOW = {"silent": (0.0, 60.0), "silent from the start": (60.0,), "never done": (0.03,) * 1000}


@pytest.mark.parametrize("name", SLOW)
def test_who_is_too_slow_is_cut_off_and_gives_its_place_back(name: str) -> None:
    async def scene() -> None:
        sink = Sink(silence_s=0.1, longest_s=0.3, max_senders=1)
        with pytest.raises(TimeoutError):
            await sink.swallow(pieces(*SLOW[name]))
        assert (await sink.swallow(pieces(0.0))).size_bytes == 10

    asyncio.run(scene())


def test_only_so_many_send_at_a_time() -> None:
    async def scene() -> None:
        sink = Sink(max_senders=2)
        others = [asyncio.create_task(sink.swallow(pieces(0.0, 0.2))) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError):
            await sink.swallow(pieces(0.0))
        assert [told.size_bytes for told in await asyncio.gather(*others)] == [20, 20]

    asyncio.run(scene())


def test_a_body_is_left_at_the_first_byte_too_many() -> None:
    taken = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            taken.append(1)
            yield bytes(MAX_LINK_BYTES // 4)

    with pytest.raises(TooLargeError):
        asyncio.run(Sink().swallow(endless()))
    assert len(taken) == 5
