"""What the gateway refuses: each bad request has its status and code, and none keeps the round from going on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from gateway_world import ORGANISER_TOKEN, Volunteer, World, furnished_gateway, sha256

from rankup.protocol import LeaseGrant, Problem
from rankup.signing import sign, verify

if TYPE_CHECKING:
    from conftest import ValkeyServer

DELTA = b"a good delta"
DIGEST = sha256(DELTA)


@dataclass
class Scene:
    """A round with one shard, which `ada` has leased, and a stranger who joined too."""

    world: World
    round_id: str
    ada: Volunteer
    lease: LeaseGrant
    eve: Volunteer

    def post(self, path: str, body: Any, who: Volunteer | None = None) -> httpx2.Response:
        headers = (who or self.ada).auth
        return self.world.http.post(path, json=body, headers=headers)

    def lease_post(self, action: str, body: Any, who: Volunteer | None = None) -> httpx2.Response:
        return self.post(f"/v1/leases/{self.lease.lease_id}/{action}", body, who)

    def submit(self, **changes: Any) -> httpx2.Response:
        return self.lease_post("submit", self.ada.submission(self.lease, DELTA, **changes))

    def create(self, **changes: Any) -> httpx2.Response:
        body = {"model": "tiny", "dataset": "pydocs", "shards": 1} | changes
        return self.world.http.post("/v1/rounds", json=body, headers=self.world.organiser)

    def raw(self, body: bytes | Iterator[bytes], path: str = "/v1/workers", **headers: str) -> httpx2.Response:
        sent = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return self.world.http.post(path, content=body, headers=sent)


@pytest.fixture(scope="module")
def served(shared_valkey: ValkeyServer) -> Iterator[World]:
    """One gateway for all rows: what a bad request leaves behind in it would show in the next ones."""
    with furnished_gateway(shared_valkey.ledger_settings) as world:
        yield world


@pytest.fixture
def scene(served: World, valkey: ValkeyServer) -> Scene:
    round_id = served.open_round(shards=1)["round_id"]
    ada = served.join("ada")
    return Scene(served, round_id, ada, served.claim(ada), served.join("eve"))


def other_round(scene: Scene, **changes: Any) -> httpx2.Response:
    """Ask for a round when no other one is in the way."""
    scene.world.http.post(f"/v1/rounds/{scene.round_id}/cancel", headers=scene.world.organiser)
    answer = scene.create(**changes)
    scene.round_id = scene.world.open_round(shards=1)["round_id"]
    scene.lease = scene.world.claim(scene.ada)
    return answer


def enrolment(scene: Scene, **changes: Any) -> httpx2.Response:
    return scene.world.http.post("/v1/workers", json=Volunteer("new").enrolment(time.time(), **changes))


def forged_enrolment(scene: Scene) -> httpx2.Response:
    body = Volunteer("new").enrolment(time.time())
    body["statement"]["name"] = "changed"
    return scene.world.http.post("/v1/workers", json=body)


def another_delta(scene: Scene) -> httpx2.Response:
    scene.world.hand_in(scene.ada, scene.lease, DELTA)
    return scene.lease_post("upload", {"fence": scene.lease.fence, "sha256": sha256(b"x"), "size_bytes": 1})


def signed_as_enrolment(scene: Scene) -> httpx2.Response:
    body = scene.ada.submission(scene.lease, DELTA)
    statement = next(iter(body.values()))
    from rankup.protocol import SubmitStatement

    body["signature"] = sign(scene.ada.key, "enrol", SubmitStatement(**statement))
    return scene.lease_post("submit", body)


def upload(scene: Scene, who: Volunteer | None = None, **changes: Any) -> httpx2.Response:
    body = {"fence": scene.lease.fence, "sha256": DIGEST, "size_bytes": len(DELTA)} | changes
    return scene.lease_post("upload", body, who)


def wrong_length_uploaded(scene: Scene) -> httpx2.Response:
    from rankup.versions import upload_key

    scene.world.store.put(upload_key(scene.lease.lease_id, DIGEST), DELTA + b"more")
    return scene.submit()


def trickle(size: int) -> Iterator[bytes]:
    """A body of unknown length: sent in chunks."""
    for _ in range(size // 1024):
        yield b" " * 1024


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


Act = Callable[[Scene], httpx2.Response]
REFUSALS: dict[str, tuple[int, str, Act]] = {
    # who calls
    "no token": (401, "unauthenticated", lambda s: s.world.http.post("/v1/leases")),
    "empty token": (
        401,
        "unauthenticated",
        lambda s: s.world.http.post("/v1/leases", headers={"Authorization": ""}),
    ),
    "unknown token": (401, "unauthenticated", lambda s: s.world.http.post("/v1/leases", headers=bearer("x" * 43))),
    "endless token": (401, "unauthenticated", lambda s: s.world.http.post("/v1/leases", headers=bearer("x" * 9000))),
    "token that is no text": (
        401,
        "unauthenticated",
        lambda s: s.world.http.post("/v1/leases", headers={b"Authorization": b"Bearer \xff\xfe\x80"}),
    ),
    "other scheme": (
        401,
        "unauthenticated",
        lambda s: s.world.http.post("/v1/leases", headers={"Authorization": "Basic YTpi"}),
    ),
    "organiser as worker": (403, "denied", lambda s: s.world.http.post("/v1/leases", headers=bearer(ORGANISER_TOKEN))),
    "worker as organiser": (403, "denied", lambda s: s.post(f"/v1/rounds/{s.round_id}/cancel", {})),
    "stranger as organiser": (
        401,
        "unauthenticated",
        lambda s: s.world.http.post("/v1/rounds", json={"model": "tiny", "dataset": "pydocs"}),
    ),
    # enrolment
    "wrong invite": (403, "denied", lambda s: enrolment(s, invite="guess")),
    "no invite": (403, "denied", lambda s: enrolment(s, invite="")),
    "invite in another alphabet": (403, "denied", lambda s: enrolment(s, invite="ключ")),
    "clock of yesterday": (400, "bad-input", lambda s: enrolment(s, issued_at=time.time() - 86_400)),
    "clock of tomorrow": (400, "bad-input", lambda s: enrolment(s, issued_at=time.time() + 86_400)),
    "future protocol": (400, "bad-input", lambda s: enrolment(s, protocol=2)),
    "changed after signing": (403, "denied", forged_enrolment),
    "enrolment without a key": (422, "bad-input", lambda s: s.post("/v1/workers", {"signature": "ab" * 64})),
    "name with a line break": (422, "bad-input", lambda s: enrolment(s, name="a\nb")),
    # bodies
    "no JSON": (400, "bad-input", lambda s: s.raw(b"{nope")),
    "no UTF-8": (400, "bad-input", lambda s: s.raw(b'{"statement": "\xff\xfe"}')),
    "empty body": (422, "bad-input", lambda s: s.raw(b"")),
    "JSON of another shape": (422, "bad-input", lambda s: s.raw(b"[]")),
    "deep JSON": (400, "bad-input", lambda s: s.raw(b"[" * 8000 + b"]" * 8000)),
    "endless number": (400, "bad-input", lambda s: s.raw(b'{"fence":' + b"9" * 6000 + b"}")),
    "not a number": (
        422,
        "bad-input",
        lambda s: s.world.http.post(
            f"/v1/leases/{s.lease.lease_id}/heartbeat",
            content=b'{"fence":%d,"loss":NaN}' % s.lease.fence,
            headers=s.ada.auth | {"Content-Type": "application/json"},
        ),
    ),
    "half a surrogate": (422, "bad-input", lambda s: s.raw(b'{"\\ud800":"\\ud800"}')),
    "form instead of JSON": (
        415,
        "bad-input",
        lambda s: s.raw(b"a=1", Content_Type="text/plain"),
    ),
    "body above the limit": (413, "too-large", lambda s: s.raw(b" " * 20_000)),
    "chunked body above the limit": (413, "too-large", lambda s: s.raw(trickle(32_768))),
    "body above the limit where none is read": (413, "too-large", lambda s: s.raw(b" " * 20_000, "/v1/health")),
    # addresses
    "unknown address": (404, "not-found", lambda s: s.world.http.get("/v1/nothing")),
    "wrong method": (405, "bad-input", lambda s: s.world.http.delete("/v1/rounds")),
    "unknown round": (404, "not-found", lambda s: s.world.http.get("/v1/rounds/none")),
    "round that cannot be": (422, "bad-input", lambda s: s.world.http.get("/v1/rounds/A%00B")),
    "unknown model": (404, "not-found", lambda s: s.world.http.get("/v1/models/none/latest")),
    "unknown version": (404, "not-found", lambda s: s.world.http.get("/v1/models/tiny/versions/7")),
    "negative version": (422, "bad-input", lambda s: s.world.http.get("/v1/models/tiny/versions/-1")),
    "huge version": (422, "bad-input", lambda s: s.world.http.get(f"/v1/models/tiny/versions/{'9' * 30}")),
    "unknown blob": (404, "not-found", lambda s: s.world.http.get(f"/v1/blobs/{'0' * 64}")),
    "blob by path": (404, "not-found", lambda s: s.world.http.get("/v1/blobs/..%2F..%2Fmodels")),
    # leases
    "unknown lease": (404, "not-found", lambda s: s.post("/v1/leases/l-none/heartbeat", {"fence": 1})),
    "heartbeat of another's lease": (403, "denied", lambda s: s.lease_post("heartbeat", {"fence": 1}, s.eve)),
    "heartbeat with another fence": (403, "denied", lambda s: s.lease_post("heartbeat", {"fence": 10**9})),
    "heartbeat without a fence": (422, "bad-input", lambda s: s.lease_post("heartbeat", {})),
    "return of another's lease": (403, "denied", lambda s: s.lease_post("return", {"fence": 1}, s.eve)),
    "look at another's lease": (
        403,
        "denied",
        lambda s: s.world.http.get(f"/v1/leases/{s.lease.lease_id}", headers=s.eve.auth),
    ),
    "unknown field": (422, "bad-input", lambda s: s.lease_post("heartbeat", {"fence": 1, "admin": True})),
    # uploads
    "ticket for another's lease": (403, "denied", lambda s: upload(s, s.eve)),
    "ticket with another fence": (403, "denied", lambda s: upload(s, fence=s.lease.fence + 1)),
    "ticket for too many bytes": (413, "too-large", lambda s: upload(s, size_bytes=s.lease.max_delta_bytes + 1)),
    "ticket for no bytes": (422, "bad-input", lambda s: upload(s, size_bytes=0)),
    "ticket with a path for a digest": (422, "bad-input", lambda s: upload(s, sha256="../" * 20)),
    "ticket for a second delta": (409, "wrong-state", another_delta),
    # submissions
    "submission without upload": (409, "wrong-state", lambda s: s.submit()),
    "submission of another length": (409, "wrong-state", wrong_length_uploaded),
    "submission of another's lease": (
        403,
        "denied",
        lambda s: s.lease_post("submit", s.eve.submission(s.lease, DELTA), s.eve),
    ),
    "submission signed by another": (403, "denied", lambda s: s.lease_post("submit", s.eve.submission(s.lease, DELTA))),
    "submission signed as something else": (403, "denied", signed_as_enrolment),
    "submission with another fence": (403, "denied", lambda s: s.submit(fence=s.lease.fence + 1)),
    "submission for another lease": (400, "bad-input", lambda s: s.submit(lease_id="l-other")),
    "submission for another round": (400, "bad-input", lambda s: s.submit(round_id="other")),
    "submission on another base": (400, "bad-input", lambda s: s.submit(base_manifest="0" * 64)),
    "submission of too many bytes": (413, "too-large", lambda s: s.submit(size_bytes=s.lease.max_delta_bytes + 1)),
    "submission of more tokens than there are": (400, "bad-input", lambda s: s.submit(tokens=2**40)),
    "submission of more steps than there are": (400, "bad-input", lambda s: s.submit(steps=10**6)),
    # rounds
    "round while one is open": (409, "wrong-state", lambda s: s.create()),
    "round of an unknown model": (404, "not-found", lambda s: s.create(model="none")),
    "round on an unknown dataset": (404, "not-found", lambda s: other_round(s, dataset="none")),
    "round of more shards than there are": (400, "bad-input", lambda s: other_round(s, shards=5)),
    "round of unknown layers": (400, "bad-input", lambda s: other_round(s, recipe={"target_modules": ["q_prj"]})),
    "round whose quorum cannot be met": (422, "bad-input", lambda s: s.create(quorum=9)),
    "round of rank 0": (422, "bad-input", lambda s: s.create(recipe={"rank": 0})),
    "close of an unknown round": (
        404,
        "not-found",
        lambda s: s.world.http.post("/v1/rounds/none/close", json={}, headers=s.world.organiser),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bad_request_is_refused_and_the_round_still_ends_well(scene: Scene, name: str) -> None:
    status, code, act = REFUSALS[name]
    answer = act(scene)
    problem = Problem.model_validate(answer.json())
    assert (answer.status_code, problem.status, problem.type.rsplit("/")[-1]) == (status, status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem.detail
    assert problem.remedy
    assert len(answer.content) < 8192
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert scene.world.hand_in(scene.ada, scene.lease, DELTA)["state"] == "submitted"
    assert scene.world.judge_all(scene.round_id) == "aggregating"


def test_a_validation_problem_names_the_fields_and_echoes_no_value(scene: Scene) -> None:
    answer = enrolment(scene, name="x" * 5000)
    problem = Problem.model_validate(answer.json())
    assert [error["field"] for error in problem.errors] == ["body.statement.name"]
    assert "xxxx" not in answer.text


def test_a_body_at_the_limit_is_read(scene: Scene) -> None:
    limit = scene.world.settings.max_body_bytes
    body = json.dumps(Volunteer("ada").enrolment(time.time())).encode()
    assert scene.raw(body + b" " * (limit - len(body))).status_code == 201
    assert scene.raw(body + b" " * (limit - len(body) + 1)).status_code == 413


def test_a_stored_submission_carries_what_checks_its_signature_again(scene: Scene) -> None:
    scene.world.hand_in(scene.ada, scene.lease, DELTA)
    [kept] = scene.world.with_ledger(lambda ledger: ledger.pending(scene.round_id))
    verify(kept.public_key, "submit", kept.statement, kept.signature)
    assert (kept.worker_name, kept.shard) == ("ada", scene.lease.shard)
