"""What was good once, for somebody, or in smaller numbers, and is refused now: others' leases, tokens that are worth
nothing any more, signed messages and addresses that are used again, and too much of anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from gateway_world import Volunteer, World, furnished_gateway, sha256

from rankup.problems import MEDIA_TYPE
from rankup.protocol import LeaseGrant, Problem

if TYPE_CHECKING:
    from conftest import ValkeyServer

DELTA = b"a good delta"
DAY_S = 86_400.0
LIMITS = {"enrols": 1, "claims": 2, "heartbeats": 2, "deliveries": 3, "requests": 40, "refusals": 2}


@dataclass
class Clock:
    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@dataclass
class Scene:
    """A round of two shards; ada has a lease, a ticket and a signed submission, and eve has seen all of them."""

    world: World
    clock: Clock
    round_id: str
    ada: Volunteer
    lease: LeaseGrant
    eve: Volunteer
    ticket: str = ""
    submission: dict[str, Any] = field(default_factory=dict)

    def post(self, path: str, body: Any, who: Volunteer | None = None) -> httpx2.Response:
        return self.world.http.post(path, json=body, headers=(who or self.ada).auth)

    def act(self, action: str, body: Any, who: Volunteer | None = None, *, lease: str = "") -> httpx2.Response:
        return self.post(f"/v1/leases/{lease or self.lease.lease_id}/{action}", body, who)

    def organise(self, path: str, body: Any = None) -> None:
        answer = self.world.http.post(path, json=body or {}, headers=self.world.organiser)
        assert answer.is_success, answer.text

    @property
    def asked(self) -> dict[str, Any]:
        return {"fence": self.lease.fence, "sha256": sha256(DELTA), "size_bytes": len(DELTA)}

    def put(self, body: bytes = DELTA) -> httpx2.Response:
        return self.world.http.put("/" + self.ticket, content=body)

    def hand_in(self) -> None:
        assert self.put().status_code == 204
        assert self.act("submit", self.submission).status_code == 202

    def judged(self, *, accepted: bool) -> None:
        self.hand_in()
        self.world.judge_all(self.round_id, accepted=accepted)


@pytest.fixture(scope="module")
def served(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Clock]]:
    clock, folder = Clock(), tmp_path_factory.mktemp("spool")
    changes = {"transfer": "proxied", "spool_dir": folder}
    with furnished_gateway(shared_valkey.ledger_settings, clock=clock, changes=changes) as world:
        yield world, clock


@pytest.fixture
def scene(served: tuple[World, Clock], valkey: ValkeyServer) -> Scene:
    world, clock = served
    clock.ahead_s = 0.0
    round_id = world.open_round(shards=2, quorum=2)["round_id"]
    ada, eve = world.join("ada"), world.join("eve")
    made = Scene(world, clock, round_id, ada, world.claim(ada), eve)
    made.ticket = made.act("upload", made.asked).json()["url"]
    made.submission = ada.submission(made.lease, DELTA)
    return made


def after(
    prepare: Callable[[Scene], Any], then: Callable[[Scene], httpx2.Response]
) -> Callable[[Scene], httpx2.Response]:
    def act(scene: Scene) -> httpx2.Response:
        prepare(scene)
        return then(scene)

    return act


def later(seconds: float) -> Callable[[Scene], None]:
    return lambda scene: setattr(scene.clock, "ahead_s", seconds)


def ban(scene: Scene) -> None:
    scene.organise(f"/v1/people/{scene.ada.worker_id}/ban", {"reason": "the deltas are noise"})


def claim(scene: Scene) -> httpx2.Response:
    return scene.post("/v1/leases", {})


def enrol_again(scene: Scene) -> httpx2.Response:
    return scene.world.http.post("/v1/workers", json=scene.ada.enrolment(scene.clock()))


def with_eves_own_lease(scene: Scene) -> httpx2.Response:
    """Ada's delta and statement, for the lease that eve has."""
    own = scene.world.claim(scene.eve)
    return scene.act("submit", scene.submission, scene.eve, lease=own.lease_id)


def signed_again_by_eve(scene: Scene) -> httpx2.Response:
    """Ada's bytes, which she has handed in, under eve's own lease and signature."""
    scene.hand_in()
    own = scene.world.claim(scene.eve)
    ticket = scene.act(
        "upload", {"fence": own.fence, "sha256": sha256(DELTA), "size_bytes": len(DELTA)}, scene.eve, lease=own.lease_id
    )
    scene.world.http.put("/" + ticket.json()["url"], content=DELTA)
    return scene.act("submit", scene.eve.submission(own, DELTA), scene.eve, lease=own.lease_id)


REFUSALS: dict[str, tuple[int, str, Callable[[Scene], httpx2.Response]]] = {
    # somebody else's
    "a heartbeat of another's lease": (403, "denied", lambda s: s.act("heartbeat", {"fence": s.lease.fence}, s.eve)),
    "a return of another's lease": (403, "denied", lambda s: s.act("return", {"fence": s.lease.fence}, s.eve)),
    "a ticket for another's lease": (403, "denied", lambda s: s.act("upload", s.asked, s.eve)),
    "another's submission, told by eve": (403, "denied", lambda s: s.act("submit", s.submission, s.eve)),
    "another's submission for a lease of her own": (400, "bad-input", with_eves_own_lease),
    "another's delta for a lease of her own": (403, "denied", signed_again_by_eve),
    # tokens
    "a token that was revoked": (
        401,
        "unauthenticated",
        after(lambda s: s.organise(f"/v1/people/{s.ada.worker_id}/revoke"), claim),
    ),
    "a token that was changed": (401, "unauthenticated", after(lambda s: s.post("/v1/workers/me/token", {}), claim)),
    "a token before its worker enrolled again": (401, "unauthenticated", after(enrol_again, claim)),
    "a token that has run out": (401, "unauthenticated", after(later(400 * DAY_S), claim)),
    "a banned worker's claim": (403, "denied", after(ban, claim)),
    "a banned worker's heartbeat": (403, "denied", after(ban, lambda s: s.act("heartbeat", {"fence": s.lease.fence}))),
    "a banned worker's submission": (403, "denied", after(ban, lambda s: s.act("submit", s.submission))),
    "a banned worker's enrolment": (403, "denied", after(ban, enrol_again)),
    # addresses and messages, used again
    "a ticket that has run out": (403, "denied", after(later(3_700), lambda s: s.put())),
    "a ticket after its delta was accepted": (
        403,
        "denied",
        after(lambda s: s.judged(accepted=True), lambda s: s.put()),
    ),
    "a ticket after its delta was rejected": (
        403,
        "denied",
        after(lambda s: s.judged(accepted=False), lambda s: s.put()),
    ),
    "a ticket for other bytes": (400, "bad-input", lambda s: s.put(DELTA[::-1])),
    "a ticket for more bytes": (413, "too-large", lambda s: s.put(DELTA + b"!")),
    "an enrolment of yesterday": (
        400,
        "bad-input",
        after(later(DAY_S), lambda s: s.world.http.post("/v1/workers", json=s.ada.enrolment(time.time()))),
    ),
    "a heartbeat after the delta was handed in": (
        409,
        "wrong-state",
        after(Scene.hand_in, lambda s: s.act("heartbeat", {"fence": s.lease.fence})),
    ),
    "a second delta": (
        409,
        "wrong-state",
        after(Scene.hand_in, lambda s: s.act("upload", s.asked | {"sha256": sha256(b"another"), "size_bytes": 7})),
    ),
    "an old fence": (403, "denied", lambda s: s.act("heartbeat", {"fence": s.lease.fence - 1})),
    # nobody's
    "an unknown lease": (404, "not-found", lambda s: s.act("heartbeat", {"fence": 1}, lease="l-0000000000000000")),
    "an unknown round": (404, "not-found", lambda s: s.world.http.get("/v1/rounds/tiny-r9999-000000/leases")),
    "an unknown worker": (
        404,
        "not-found",
        lambda s: s.world.http.post("/v1/people/w-0000/ban", json={"reason": "x"}, headers=s.world.organiser),
    ),
    "an unknown invite": (
        404,
        "not-found",
        lambda s: s.world.http.post("/v1/invites/i-0000/withdraw", json={}, headers=s.world.organiser),
    ),
    # of the wrong kind
    "a form": (
        415,
        "bad-input",
        lambda s: s.world.http.post("/v1/workers", data={"name": "ada"}),
    ),
    "XML": (
        415,
        "bad-input",
        lambda s: s.world.http.post("/v1/workers", content=b"<a/>", headers={"Content-Type": "application/xml"}),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_good_no_more_is_refused_with_the_right_code(scene: Scene, name: str) -> None:
    status, code, act = REFUSALS[name]
    check_problem(act(scene), status, code)


def check_problem(answer: httpx2.Response, status: int, code: str) -> Problem:
    assert answer.headers["content-type"] == MEDIA_TYPE, answer.text
    problem = Problem.model_validate_json(answer.content)
    assert (answer.status_code, problem.status, problem.type.rpartition("/")[2]) == (status, status, code), problem
    assert problem.remedy
    return problem


def test_a_ticket_may_be_used_again_until_the_verdict(scene: Scene) -> None:
    """An answer that was lost is no reason to lose a delta."""
    assert [scene.put().status_code for _ in range(2)] == [204, 204]
    scene.hand_in()


def beat(scene: Scene) -> httpx2.Response:
    return scene.act("heartbeat", {"fence": scene.lease.fence})


TOO_MANY: dict[str, Callable[[Scene], httpx2.Response]] = {
    # each is called twice as often as its limit allows
    "enrols": lambda s: s.world.http.post("/v1/workers", json=Volunteer("new").enrolment(time.time())),
    "claims": claim,
    "heartbeats": beat,
    "deliveries": lambda s: s.act("upload", s.asked),
    "requests": lambda s: s.world.http.get("/v1/rounds"),
    "refusals": lambda s: s.world.http.post("/v1/leases", json={}, headers={"Authorization": "Bearer nobody"}),
}


@pytest.mark.parametrize("kind", TOO_MANY)
def test_too_many_of_a_kind_are_refused_with_a_time_to_come_back(
    valkey: ValkeyServer, tmp_path: Path, kind: str
) -> None:
    changes = {"transfer": "proxied", "spool_dir": tmp_path}
    with furnished_gateway(valkey.ledger_settings, changes=changes) as patient:
        round_id = patient.open_round(shards=2)["round_id"]
        ada = patient.join("ada")
        lease = patient.claim(ada)
    limited = changes | {f"{kind}_per_min": LIMITS[kind]}
    with furnished_gateway(valkey.ledger_settings, changes=limited) as world:
        scene = Scene(world, Clock(), round_id, ada, lease, ada)
        answers = [TOO_MANY[kind](scene) for _ in range(2 * LIMITS[kind])]
    fine, late = answers[: LIMITS[kind]], answers[LIMITS[kind] :]
    assert {answer.status_code for answer in fine} <= {200, 201, 401}
    for answer in late:
        problem = check_problem(answer, 429, "busy")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert problem.retry_after_s is not None
