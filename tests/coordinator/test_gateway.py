"""The gateway over real HTTP: the honest way through a round, and what readers get."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from gateway_world import (
    SHARDS,
    World,
    add_dataset,
    furnished_gateway,
    gateway,
    make_manifest,
    publish,
    sha256,
)
from pydantic import SecretStr

from coordinator.catalogue import Catalogue
from coordinator.grants import delta_bound_bytes, seed_of
from coordinator.openapi import EXAMPLES
from rankup.protocol import LeaseState, Problem, RoundView, ServerInfo, VersionView
from rankup.records import Evaluation
from rankup.settings import LedgerSettings, StoreSettings
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, S3Store
from rankup.versions import manifest_digest, manifest_key, open_envelope, upload_key

if TYPE_CHECKING:
    from conftest import ValkeyServer


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings) as made:
        yield made


def test_a_volunteer_goes_from_joining_to_a_verdict(world: World) -> None:
    view = RoundView.model_validate(world.open_round(shards=1))
    assert (view.state, view.shards, view.base_version) == ("open", 1, 0)
    ada = world.join()
    lease = world.claim(ada)
    assert lease.round_id == view.round_id
    assert lease.seed == seed_of(view.round_id, lease.lease_id)
    assert set(lease.targets) == {"layers.0.q_proj.weight", "layers.0.up_proj.weight"}
    assert lease.max_delta_bytes == delta_bound_bytes(lease.targets)
    beat = world.http.post(
        f"/v1/leases/{lease.lease_id}/heartbeat", json={"fence": lease.fence, "step": 3, "loss": 2.9}, headers=ada.auth
    ).json()
    assert beat["go_on"] is True
    assert world.hand_in(ada, lease)["state"] == "submitted"
    assert world.judge_all(view.round_id) == "aggregating"
    seen = world.http.get(f"/v1/leases/{lease.lease_id}", headers=ada.auth).json()
    assert (seen["state"], seen["verdict"]) == ("accepted", "accepted")
    [row] = world.http.get("/v1/leaderboard").json()["rows"]
    assert (row["worker_id"], row["name"], row["accepted"], row["rejected"]) == (ada.worker_id, "ada", 1, 0)
    assert (row["tokens"], row["escrow"], row["credit"], row["reputation"]) == (100, 100.0, 0.0, None)
    mine = world.http.get("/v1/contributions", headers=ada.auth).json()["contributions"]
    assert [row["lease_id"] for row in mine] == [lease.lease_id]


def test_submitting_twice_is_one_submission_also_after_the_verdict_and_without_the_upload(world: World) -> None:
    round_id = world.open_round()["round_id"]
    ada = world.join()
    lease = world.claim(ada)
    world.hand_in(ada, lease, b"delta")
    again = ada.submission(lease, b"delta")
    url = f"/v1/leases/{lease.lease_id}/submit"
    assert world.http.post(url, json=again, headers=ada.auth).json()["state"] == LeaseState.SUBMITTED
    world.judge_all(round_id)
    world.store.delete(upload_key(lease.lease_id, sha256(b"delta")))
    answer = world.http.post(url, json=again, headers=ada.auth)
    assert (answer.status_code, answer.json()["state"]) == (202, LeaseState.ACCEPTED)
    assert world.http.get("/v1/leaderboard").json()["rows"][0]["accepted"] == 1


@pytest.mark.parametrize(("max_staleness", "status"), [(0, 400), (1, 202)])
def test_a_delta_of_the_version_before_is_welcome_where_the_recipe_says_so(
    world: World, max_staleness: int, status: int
) -> None:
    _, older, _ = open_envelope(world.store.get(manifest_key("tiny", 0), max_bytes=10**6), publisher_key=None)
    publish(world.store, world.publisher, make_manifest(1, older))
    world.open_round(recipe={"aggregation": {"max_staleness": max_staleness}})
    ada = world.join()
    lease = world.claim(ada)
    assert lease.base_version == 1
    world.upload(lease, b"delta")
    said = ada.submission(lease, b"delta", base_manifest=older)
    answer = world.http.post(f"/v1/leases/{lease.lease_id}/submit", json=said, headers=ada.auth)
    assert answer.status_code == status, answer.text


def test_a_ticket_signs_length_and_hash_and_says_when_the_bytes_are_there(world: World) -> None:
    world.open_round()
    ada = world.join()
    lease = world.claim(ada)
    asked = {"fence": lease.fence, "sha256": sha256(b"delta"), "size_bytes": 5}
    url = f"/v1/leases/{lease.lease_id}/upload"
    ticket = world.http.post(url, json=asked, headers=ada.auth).json()
    assert ticket["headers"]["Content-Length"] == "5"
    assert ticket["already_there"] is False
    world.upload(lease, b"delta")
    assert world.http.post(url, json=asked, headers=ada.auth).json()["already_there"] is True


def test_joining_again_replaces_the_token_and_keeps_the_worker(world: World) -> None:
    ada = world.join()
    answer = world.http.post("/v1/workers", json=ada.enrolment(time.time())).json()
    assert answer["worker_id"] == ada.worker_id
    assert world.http.get("/v1/contributions", headers=ada.auth).status_code == 401
    renewed = {"Authorization": f"Bearer {answer['token']}"}
    assert world.http.get("/v1/contributions", headers=renewed).status_code == 200


def test_a_returned_shard_goes_to_the_next_worker_and_finished_work_is_still_welcome(world: World) -> None:
    world.open_round(shards=1)
    ada, bob = world.join("ada"), world.join("bob")
    lease = world.claim(ada)
    refused = world.http.post("/v1/leases", json={}, headers=bob.auth).json()
    assert refused["lease"] is None
    assert refused["retry_after_s"] == world.settings.poll_s
    world.http.post(f"/v1/leases/{lease.lease_id}/return", json={"fence": lease.fence}, headers=ada.auth)
    later = world.claim(bob)
    assert later.fence > lease.fence
    assert world.hand_in(ada, lease, b"late")["state"] == "submitted"


def test_rounds_of_one_model_come_one_after_another(world: World) -> None:
    first = world.open_round()["round_id"]
    request = {"model": "tiny", "dataset": "pydocs", "shards": 1}
    refused = world.http.post("/v1/rounds", json=request, headers=world.organiser)
    assert (refused.status_code, first in refused.json()["remedy"]) == (409, True)
    assert world.http.post(f"/v1/rounds/{first}/cancel", headers=world.organiser).json()["state"] == "cancelled"
    assert world.open_round()["round_id"] != first
    assert [row["state"] for row in world.http.get("/v1/rounds").json()["rounds"]] == ["open", "cancelled"]


def test_closing_a_round_with_nothing_accepted_ends_it(world: World) -> None:
    round_id = world.open_round()["round_id"]
    url = f"/v1/rounds/{round_id}/close"
    assert world.http.post(url, json={}, headers=world.organiser).json()["state"] == "cancelled"
    assert world.http.post(url, json={}, headers=world.organiser).status_code == 409


def test_info_tells_key_models_and_limits(world: World) -> None:
    info = ServerInfo.model_validate(world.http.get("/v1/info").json())
    assert info.publisher_key == public_key_hex(world.publisher)
    assert (info.models, info.invite_needed) == (("tiny",), True)


def test_versions_are_listed_newest_first_and_none_above_the_pointer(world: World) -> None:
    digest = world.http.get("/v1/models/tiny/latest").json()["manifest"]
    second = make_manifest(1, digest, 3.1)
    publish(world.store, world.publisher, second)
    time.sleep(1.1)  # The pointer may be cached for a second.
    rows = [VersionView.model_validate(row) for row in world.http.get("/v1/models/tiny/versions").json()["versions"]]
    assert [(row.version, row.latest, row.heldout_loss) for row in rows] == [(1, True, 3.1), (0, False, 3.4)]
    assert [row["version"] for row in world.http.get("/v1/models/tiny/versions?limit=1").json()["versions"]] == [1]


def test_a_base_that_was_never_measured_is_shown_with_what_its_first_round_measured_of_it() -> None:
    store, key = MemoryStore(), parse_private_key(generate_private_key())
    base = make_manifest(0, None, None)
    publish(store, key, base)
    first = make_manifest(1, manifest_digest(base), 3.1)
    measured = Evaluation(heldout_loss=3.1, parent_heldout_loss=3.4, examples=4, tokens=40)
    publish(store, key, first.model_copy(update={"evaluation": measured}))
    rows = Catalogue(store, public_key_hex(key), clock=time.monotonic).versions("tiny", limit=10)
    assert [(row.version, row.heldout_loss) for row in rows] == [(1, 3.1), (0, 3.4)]


def test_a_version_is_served_as_the_bytes_that_were_signed(world: World) -> None:
    answer = world.http.get("/v1/models/tiny/versions/0")
    manifest, _, _ = open_envelope(answer.content, publisher_key=public_key_hex(world.publisher))
    assert manifest.version == 0
    assert answer.headers["etag"] == f'"{sha256(answer.content)}"'
    assert "immutable" in answer.headers["cache-control"]
    again = world.http.get("/v1/models/tiny/versions/0", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert world.http.head("/v1/models/tiny/versions/0").status_code == 200


def test_a_forged_manifest_is_a_fault_of_the_server_and_is_not_served(world: World) -> None:
    stranger = world.join().key
    publish(world.store, stranger, make_manifest(0, None, model="forged"))
    answer = world.http.get("/v1/models/forged/versions/0")
    assert (answer.status_code, answer.json()["type"].rsplit("/")[-1]) == (500, "integrity")
    assert "memory" not in answer.text


def test_blobs_are_redirected_to_and_nothing_outside_blobs_is(world: World) -> None:
    card = world.http.get("/v1/datasets").json()["datasets"][0]
    for method in ("GET", "HEAD"):
        answer = world.http.request(method, f"/v1/blobs/{card['shards'][0]['sha256']}", follow_redirects=False)
        assert answer.status_code == 307
        assert card["shards"][0]["sha256"] in answer.headers["location"]
    assert world.http.get(f"/v1/blobs/{card['heldout']['sha256']}").status_code == 404


def test_every_answer_carries_security_headers_and_a_request_id(world: World) -> None:
    for path in ("/v1/health", "/v1/nothing", "/v1/models/none/latest", "/"):
        headers = world.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert len(headers["rankup-request-id"]) == 16


def test_the_description_shows_an_example_and_the_refusals_of_every_post(world: World) -> None:
    schema = world.http.get("/v1/openapi.json").json()
    for path, example in EXAMPLES.items():
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert type(example).model_validate_json(json.dumps(body["example"])) == example
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if path != "/v1/health":
                assert "application/problem+json" in operation["responses"]["503"]["content"], (method, path)
    assert "Problem" in schema["components"]["schemas"]
    assert "HTTPValidationError" not in json.dumps(schema)


def test_health_answers_and_ready_fails_while_valkey_is_away() -> None:
    with gateway(LedgerSettings(url=SecretStr("unix:///nonexistent/valkey.sock"), timeout_s=0.2)) as world:
        assert world.http.get("/v1/health").json() == {"status": "ok"}
        answer = world.http.get("/v1/ready")
        problem = Problem.model_validate(answer.json())
        assert (answer.status_code, problem.type.rsplit("/")[-1]) == (503, "unreachable")
        assert int(answer.headers["retry-after"]) >= 1
        assert "valkey.sock" not in answer.text
        assert "cannot be read" in world.http.get("/").text


def test_ready_answers_ok_with_both_servers(world: World) -> None:
    assert world.http.get("/v1/ready").json() == {"status": "ok"}


def test_a_valkey_that_goes_away_and_comes_back_costs_503_and_nothing_else(own_valkey: ValkeyServer) -> None:
    with furnished_gateway(own_valkey.ledger_settings) as world:
        world.open_round(shards=1)
        ada = world.join()
        lease = world.claim(ada)
        own_valkey.kill()
        answer = world.http.post(f"/v1/leases/{lease.lease_id}/heartbeat", json={"fence": 1}, headers=ada.auth)
        assert (answer.status_code, answer.json()["type"].rsplit("/")[-1]) == (503, "unreachable")
        assert "v.sock" not in answer.text
        own_valkey.start()
        assert world.hand_in(ada, lease)["state"] == "submitted"


def test_an_object_storage_that_is_away_is_503_with_retry_after(valkey: ValkeyServer) -> None:
    settings = StoreSettings(endpoint_url="http://127.0.0.1:9", access_key="a", secret_key=SecretStr("b"))
    with gateway(valkey.ledger_settings, store=S3Store(settings)) as world:
        for path in ("/v1/models/tiny/latest", f"/v1/blobs/{'0' * 64}"):
            answer = world.http.get(path)
            assert (answer.status_code, answer.json()["type"].rsplit("/")[-1]) == (503, "unreachable")
            assert int(answer.headers["retry-after"]) >= 1
            assert "127.0.0.1:9" not in answer.text


class BrokenStore(MemoryStore):
    """Fails as no error of the tree does."""

    def list(self, prefix: str) -> Iterator[str]:
        raise RuntimeError("secret-host:9000 exploded")


def test_an_unforeseen_fault_is_500_without_its_text(valkey: ValkeyServer) -> None:
    with gateway(valkey.ledger_settings, store=BrokenStore()) as world:
        answer = world.http.get("/v1/models")
        assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
        assert "secret-host" not in answer.text
        assert answer.headers["rankup-request-id"] in answer.json()["remedy"]


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "\u202egnp.exe", "a\u0301" * 20, "' onmouseover='x", "{{ 7*7 }}"],
    ids=["markup", "direction", "stacked accents", "quotes", "template"],
)
def test_hostile_names_reach_the_page_as_harmless_text(world: World, name: str) -> None:
    round_id = world.open_round()["round_id"]
    mallory = world.join(name)
    world.hand_in(mallory, world.claim(mallory))
    world.judge_all(round_id)
    for text in (world.http.get("/").text, world.http.get("/board.json").json()["html"]):
        assert mallory.worker_id in text
        assert "<script>alert" not in text
        assert "\u202e" not in text
        assert "onmouseover='" not in text
        assert "<bdi>49" not in text


def test_the_page_loads_nothing_from_elsewhere_and_refreshes_by_json(world: World) -> None:
    add_dataset(world.store, "second")
    world.open_round()
    page = world.http.get("/")
    policy = page.headers["content-security-policy"]
    nonce = policy.split("style-src 'nonce-")[1].split("'")[0]
    assert page.text.count(f'nonce="{nonce}"') == 2
    assert "http://" not in page.text.replace(str(world.http.base_url).rstrip("/"), "")
    assert "https://" not in page.text
    update: dict[str, Any] = world.http.get("/board.json").json()
    assert update["html"].strip() in page.text
    assert f"rankup worker join {str(world.http.base_url).rstrip('/')}" in page.text
    assert world.http.get("/", headers={"Host": "evil'\"><b>"}).text.count("evil") == 0
    assert (
        world.http.get(f"/v1/rounds/{world.http.get('/v1/rounds').json()['rounds'][0]['round_id']}").json()["shards"]
        == SHARDS
    )
