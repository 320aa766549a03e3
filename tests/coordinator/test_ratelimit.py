"""Rate limits: who is counted as whom, what is refused, and that counting costs little time and memory."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from coordinator import ratelimit
from coordinator.metrics import RATE_LIMITED, Tally
from coordinator.ratelimit import Limiter, RateLimit, client_address, counted_as, kind_of, parse_networks
from rankup.protocol import Problem
from rankup.settings import CoordinatorSettings


def scope(
    path: str = "/v1/leases", *, method: str = "POST", token: str = "", address: str = "192.0.2.1", forwarded: str = ""
) -> dict[str, Any]:
    headers = [(b"host", b"example")]
    headers += [(b"authorization", token.encode())] if token else []
    headers += [(b"x-forwarded-for", forwarded.encode())] if forwarded else []
    return {"type": "http", "method": method, "path": path, "headers": headers, "client": (address, 4000)}


class World:
    """A gateway of nothing but the layer: answers `status` to what gets through."""

    def __init__(self, status: int = 200, **per_min: int) -> None:
        kinds = ("enrols", "claims", "heartbeats", "deliveries", "links", "requests", "refusals")
        settings = CoordinatorSettings(
            **{f"{kind}_per_min": per_min.get(kind, 0) for kind in kinds},  # type: ignore[arg-type]
            trusted_proxies=("10.0.0.0/8", "fd00::/8"),
        )
        self.status = status
        self.tally = Tally()
        self.layer = RateLimit(self._app, settings=settings, tally=self.tally)
        self.sent: list[dict[str, Any]] = []

    async def _app(self, _scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": []})

    def call(self, **about: Any) -> int:
        self.sent = []

        async def receive() -> dict[str, Any]:
            raise AssertionError("a body was read")

        async def send(message: Any) -> None:
            self.sent.append(message)

        asyncio.run(self.layer(scope(**about), receive, send))
        status: int = self.sent[0]["status"]
        return status


KINDS = {
    ("POST", "/v1/workers"): "enrol",
    ("GET", "/v1/workers"): "request",
    ("POST", "/v1/workers/me/token"): "request",
    ("POST", "/v1/leases"): "claim",
    ("POST", "/v1/leases/l-1/heartbeat"): "heartbeat",
    ("POST", "/v1/leases/l-1/restore"): "claim",
    ("POST", "/v1/leases/l-1/submit"): "delivery",
    ("GET", "/v1/leases/l-1"): "delivery",
    ("GET", "/v1/leaderboard"): "request",
    ("PUT", "/v1/link"): "link",
    ("GET", "/v1/link"): "link",
    ("GET", "/v1/health"): None,
    ("GET", "/v1/ready"): None,
    ("GET", "/metrics"): None,
}


@pytest.mark.parametrize("header", [" ", "Bearer", "Bearer ", "\t", "\xff\xfe"])
def test_a_header_that_is_no_token_is_no_trouble(header: str) -> None:
    assert World(claims=1).call(token=header) == 200


@pytest.mark.parametrize(("method", "path"), KINDS)
def test_calls_are_told_apart(method: str, path: str) -> None:
    assert kind_of(method, path) == KINDS[method, path]


ADDRESSES = {
    "no proxy: the header says nothing": ({"forwarded": "198.51.100.9"}, "192.0.2.1"),
    "behind a proxy": ({"address": "10.0.0.1", "forwarded": "198.51.100.9"}, "198.51.100.9"),
    "behind two": ({"address": "10.0.0.1", "forwarded": "198.51.100.9, 10.0.0.2"}, "198.51.100.9"),
    "a caller that writes the header itself": (
        {"address": "10.0.0.1", "forwarded": "203.0.113.1, 198.51.100.9"},
        "198.51.100.9",
    ),
    "a proxy that says nothing": ({"address": "10.0.0.1"}, "10.0.0.1"),
    "a proxy that says nonsense": ({"address": "10.0.0.1", "forwarded": "somebody"}, "10.0.0.1"),
    "only proxies": ({"address": "10.0.0.1", "forwarded": "10.0.0.3, 10.0.0.2"}, "10.0.0.3"),
    "a proxy over IPv6": ({"address": "fd00::1", "forwarded": "2001:db8::7"}, "2001:db8::7"),
    "a unix socket": ({"address": ""}, ""),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_the_address_is_what_trusted_proxies_say_of_it(name: str) -> None:
    about, wanted = ADDRESSES[name]
    assert client_address(scope(**about), parse_networks(("10.0.0.0/8", "fd00::/8"))) == wanted


def test_a_long_header_is_read_from_its_end_only() -> None:
    found = client_address(scope(address="10.0.0.1", forwarded="10.9.9.9, " * 5000), parse_networks(("10.0.0.0/8",)))
    assert found in ("10.9.9.9", "10.0.0.1")


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_a_home_counts_as_one_whatever_address_it_takes(address: str, wanted: str) -> None:
    assert counted_as(address) == wanted


def test_above_the_limit_a_call_is_refused_unread_with_a_time_to_come_back() -> None:
    world = World(enrols=3)
    assert [world.call(path="/v1/workers") for _ in range(5)] == [200, 200, 200, 429, 429]
    headers = dict(world.sent[0]["headers"])
    assert 1 <= int(headers[b"retry-after"]) <= 61
    problem = Problem.model_validate_json(world.sent[1]["body"])
    assert (problem.status, problem.type.rpartition("/")[2]) == (429, "busy")
    assert problem.retry_after_s is not None
    assert world.tally.take() == {(RATE_LIMITED.name, "enrol"): 2.0}
    assert world.call(path="/v1/workers", address="192.0.2.2") == 200


def test_workers_behind_one_address_do_not_share_a_limit_and_one_worker_has_one_however_it_writes_its_token() -> None:
    world = World(claims=2)
    assert [world.call(token=f"Bearer worker-{number}") for number in range(6)] == [200] * 6
    spellings = ["Bearer ada", "bearer  ada", "BEARER   ada "]
    assert [world.call(token=spelling) for spelling in spellings] == [200, 200, 429]
    assert world.call(token="Bearer ada", address="198.51.100.1") == 429


def test_who_makes_tokens_up_is_stopped_by_address_and_does_not_stop_others() -> None:
    world = World(status=401, claims=100, refusals=3)
    assert [world.call(token=f"Bearer made-up-{number}") for number in range(5)] == [401, 401, 401, 429, 429]
    assert world.call(token="Bearer made-up", address="192.0.2.9") == 401
    # An old token does not keep anybody from getting a new one.
    assert world.call(path="/v1/workers", token="Bearer made-up") == 401
    assert world.tally.take() == {(RATE_LIMITED.name, "refusal"): 2.0}


def test_zero_is_no_limit() -> None:
    world = World()
    assert {world.call(path="/v1/workers") for _ in range(200)} == {200}


def test_memory_is_bounded_whoever_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratelimit, "MAX_KEYS", 500)
    limiter = Limiter({"claim": 5})
    for number in range(2_000):
        assert limiter.hit("claim", f"#{number}") is None
        assert len(limiter._storage.storage) <= 502
    monkeypatch.setattr(ratelimit, "SWEEP_S", 0.0)
    later = time.time() + 600
    monkeypatch.setattr("limits.storage.memory.time.time", lambda: later)
    limiter.hit("claim", "#later")
    assert len(limiter._storage.storage) <= 2


def test_a_limit_costs_microseconds_with_thousands_of_callers() -> None:
    world = World(claims=1000, heartbeats=1000, refusals=1000)
    calls = [scope("/v1/leases/l-1/heartbeat", token=f"Bearer {number}") for number in range(2_000)]

    async def drive() -> float:
        async def nothing(*_: Any) -> Any:
            return None

        best = 1.0
        for _ in range(3):
            began = time.perf_counter()
            for one in calls:
                await world.layer(one, nothing, nothing)
            best = min(best, (time.perf_counter() - began) / len(calls))
        return best

    assert asyncio.run(drive()) < 250e-6  # About 20 on a quiet machine.
