"""The gateway as Ray Serve runs it, over real Valkey and S3."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from gateway_world import INVITE, ORGANISER_TOKEN, SHARDS, Volunteer, World, add_dataset, make_manifest, publish, sha256
from pydantic import SecretStr

from rankup.protocol import LeaseGrant
from rankup.settings import CoordinatorSettings
from rankup.signing import generate_private_key, load_private_key, public_key_hex, save_private_key
from rankup.store import open_store

if TYPE_CHECKING:
    from conftest import ValkeyServer

    from coordinator.cluster import Cluster
    from rankup.local import LocalServices

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def port(ray_cluster: Cluster) -> int:
    """Where Serve listens; it is started once a cluster."""
    from coordinator.cluster import start_serve

    with socket.create_server(("127.0.0.1", 0)) as probe:
        free: int = probe.getsockname()[1]
    start_serve("127.0.0.1", free)
    return free


@pytest.fixture
def world(port: int, local_services: LocalServices, valkey: ValkeyServer, tmp_path: Path) -> Iterator[World]:
    from coordinator.serving import deploy_gateway, remove_gateway

    key_file = tmp_path / "publisher.key"
    save_private_key(key_file, generate_private_key())
    settings = CoordinatorSettings(
        port=port,
        invite=SecretStr(INVITE),
        organiser_token=SecretStr(ORGANISER_TOKEN),
        publisher_key_file=key_file,
        max_body_bytes=16_384,
    )
    store = open_store(local_services.store_settings)
    store.ensure_bucket()
    deploy_gateway(local_services.store_settings, valkey.ledger_settings, settings)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        yield World(http, store, settings, load_private_key(key_file), valkey.ledger_settings)
    remove_gateway()


def put_by_ticket(world: World, lease: LeaseGrant, auth: dict[str, str], delta: bytes) -> httpx2.Response:
    asked = {"fence": lease.fence, "sha256": sha256(delta), "size_bytes": len(delta)}
    ticket = world.http.post(f"/v1/leases/{lease.lease_id}/upload", json=asked, headers=auth).json()
    return httpx2.put(ticket["url"], content=delta, headers=ticket["headers"])


def test_a_round_goes_through_serve_valkey_and_s3(world: World) -> None:
    assert world.http.get("/v1/ready").json() == {"status": "ok"}
    assert world.http.get("/v1/info").json()["publisher_key"] == public_key_hex(world.publisher)
    publish(world.store, world.publisher, make_manifest(0, None, 3.4, model="served"))
    card = add_dataset(world.store, "served-rows")
    request = {"model": "served", "dataset": "served-rows", "shards": SHARDS}
    opened = world.http.post("/v1/rounds", json=request, headers=world.organiser)
    assert opened.status_code == 201, opened.text
    ada = world.join()
    lease = world.claim(ada)
    shard = httpx2.get(lease.shard_links[0].url).content
    assert sha256(shard) == lease.shard_links[0].sha256
    assert world.http.get(f"/v1/blobs/{card.shards[0].sha256}", follow_redirects=True).content
    assert put_by_ticket(world, lease, ada.auth, b"a delta").status_code == 200
    url = f"/v1/leases/{lease.lease_id}/submit"
    assert world.http.post(url, json=ada.submission(lease, b"a delta"), headers=ada.auth).status_code == 202
    assert world.http.post("/v1/workers", content=b" " * 20_000).status_code == 413
    assert world.http.get("/v1/nothing").headers["content-type"] == "application/problem+json"
    assert "served" in world.http.get("/").text
    assert world.judge_all(opened.json()["round_id"]) == "open"
    metrics = world.http.get("/metrics", headers=world.organiser).text
    assert 'rankup_http_requests_total{method="POST",route="/v1/leases/{lease_id}/submit",status="2xx"} 1.0' in metrics
    # Refused before anybody looked for its route.
    assert 'rankup_http_requests_total{method="POST",route="unmatched",status="4xx"} 1.0' in metrics
    assert world.http.get("/metrics").status_code == 401


def test_a_gateway_that_is_taken_down_finishes_what_is_under_way_and_lets_nobody_in(world: World) -> None:
    from coordinator.serving import remove_gateway

    body = json.dumps(Volunteer().enrolment(time.time())).encode()

    def slowly() -> Iterator[bytes]:
        for start in range(0, len(body), len(body) // 5 + 1):
            yield body[start : start + len(body) // 5 + 1]
            time.sleep(0.3)

    headers = {"Content-Type": "application/json"}
    with ThreadPoolExecutor(1) as beside:
        enrolling = beside.submit(world.http.post, "/v1/workers", content=slowly(), headers=headers)
        time.sleep(0.5)
        remove_gateway()
        assert enrolling.result(30).status_code == 201
    after = world.http.get("/v1/ready")
    assert after.status_code == 404
    assert after.headers["content-type"] != "application/problem+json"
