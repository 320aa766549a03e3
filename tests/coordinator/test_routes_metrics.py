"""`GET /metrics` of running gateways: who may read it, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from gateway_world import SHARDS, World, furnished_gateway
from pydantic import SecretStr
from test_metrics import samples

from coordinator import metrics

if TYPE_CHECKING:
    from conftest import ValkeyServer

SCRAPER = {"Authorization": "Bearer the-scraper"}


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings, changes={"metrics_token": SecretStr("the-scraper")}) as world:
        yield world


def scrape(world: World) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = world.http.get("/metrics", headers=SCRAPER)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answer.content)


def test_only_the_organiser_and_the_scraper_read_it_and_the_scraper_reads_nothing_else(world: World) -> None:
    ada = world.join()
    for headers, status in [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        (ada.auth, 403),
        (SCRAPER, 200),
        (world.organiser, 200),
    ]:
        assert world.http.get("/metrics", headers=headers).status_code == status
    assert (
        world.http.post("/v1/rounds", json={"model": "tiny", "dataset": "pydocs"}, headers=SCRAPER).status_code == 401
    )
    assert world.http.post("/v1/leases", json={}, headers=SCRAPER).status_code == 401


def test_without_a_token_for_metrics_an_empty_one_opens_nothing(valkey: ValkeyServer) -> None:
    with furnished_gateway(valkey.ledger_settings) as world:
        assert world.http.get("/metrics", headers={"Authorization": "Bearer"}).status_code == 401
        assert world.http.get("/metrics", headers=world.organiser).status_code == 200


def test_rounds_leases_queues_and_requests_are_shown(world: World) -> None:
    view = world.open_round()
    ada, bob = world.join("ada"), world.join("bob")
    world.hand_in(ada, world.claim(ada))
    world.claim(bob)
    assert world.http.post("/v1/leases/l-0000000000000000/heartbeat", json={"fence": 1}, headers=ada.auth).is_error
    assert world.http.get("/nobody/knows/this").status_code == 404
    found = scrape(world)
    name = (("model", "tiny"), ("round", view["round_id"]))
    leases = {"granted": 1, "submitted": 1, "accepted": 0, "rejected": 0}
    for state, number in leases.items():
        assert found["rankup_round_leases", (*name, ("state", state))] == number
    for state, number in {"free": SHARDS - 2, "held": 2, "accepted": 0}.items():
        assert found["rankup_round_shards", (*name, ("state", state))] == number
    assert found["rankup_round_state", (*name, ("state", "open"))] == 1
    assert found["rankup_model_latest_version", (("model", "tiny"),)] == 0
    assert found["rankup_object_storage_up", ()] == 1
    assert 0 < found["rankup_oldest_pending_submission_age_seconds", ()] < 60
    assert 0 < found["rankup_oldest_unfinished_round_age_seconds", ()] < 60
    assert found["rankup_last_report_timestamp_seconds", (("role", "gateway"),)] > 1e9

    def requests(route: str, method: str, status: str) -> float:
        labels = (("method", method), ("route", route), ("status", status))
        return found["rankup_http_requests_total", labels]

    assert requests("/v1/leases", "POST", "2xx") == 2
    assert requests("/v1/leases/{lease_id}/submit", "POST", "2xx") == 1
    assert requests("/v1/leases/{lease_id}/heartbeat", "POST", "4xx") == 1
    assert requests(metrics.UNMATCHED, "GET", "4xx") == 1
    refused = (("code", "not-found"), ("route", "/v1/leases/{lease_id}/heartbeat"))
    assert found["rankup_http_refusals_total", refused] == 1
    assert found["rankup_http_received_bytes_total", (("route", "/v1/leases/{lease_id}/submit"),)] > 300
    routes = {dict(labels)["route"] for (_, labels) in found if "route" in dict(labels)}
    assert not [route for route in routes if "l-" in route]


def test_every_replica_shows_the_same_totals_and_a_stopped_one_is_not_forgotten(valkey: ValkeyServer) -> None:
    changes = {"metrics_token": SecretStr("the-scraper")}
    where = (("method", "GET"), ("route", "/v1/info"), ("status", "2xx"))
    with furnished_gateway(valkey.ledger_settings, changes=changes) as first:
        with furnished_gateway(valkey.ledger_settings, changes=changes) as second:
            for world, times in ((first, 3), (second, 4)):
                for _ in range(times):
                    assert world.http.get("/v1/info").status_code == 200
            scrape(first)
            assert scrape(second)["rankup_http_requests_total", where] == 7
            assert scrape(first)["rankup_http_requests_total", where] == 7
            second.http.get("/v1/info")
        assert scrape(first)["rankup_http_requests_total", where] == 8


def test_without_a_ledger_there_is_no_page(own_valkey: ValkeyServer) -> None:
    with furnished_gateway(own_valkey.ledger_settings, changes={"metrics_token": SecretStr("the-scraper")}) as world:
        scrape(world)
        own_valkey.kill()
        assert world.http.get("/metrics", headers=SCRAPER).status_code == 503
        assert world.http.get("/v1/health").status_code == 200
        assert world.http.get("/v1/ready").status_code == 503
        own_valkey.start()
        missed = (("method", "GET"), ("route", "/metrics"), ("status", "5xx"))
        assert scrape(world)["rankup_http_requests_total", missed] == 1
        assert world.http.get("/v1/ready").status_code == 200
