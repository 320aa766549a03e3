"""Rounds over HTTP, as the organiser and everybody else sees them: pause, close, several campaigns, who is at work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from gateway_world import ORGANISER_TOKEN, World, furnished_gateway, make_manifest, publish, sha256
from typer.testing import CliRunner

from rankup.cli import app
from rankup.protocol import RoundRequest

if TYPE_CHECKING:
    from conftest import ValkeyServer


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings) as made:
        yield made


def tell(world: World, round_id: str, action: str, **body: Any) -> dict[str, Any]:
    answer = world.http.post(f"/v1/rounds/{round_id}/{action}", json=body, headers=world.organiser)
    assert answer.status_code == 200, answer.text
    view: dict[str, Any] = answer.json()
    return view


def claim(world: World, volunteer: Any) -> dict[str, Any]:
    answer: dict[str, Any] = world.http.post("/v1/leases", json={}, headers=volunteer.auth).json()
    return answer


def test_a_paused_round_grants_nothing_and_takes_what_is_handed_in(world: World) -> None:
    round_id = world.open_round(max_shards_per_lease=1)["round_id"]
    ada, grace = world.join("ada"), world.join("grace")
    lease = world.claim(ada)
    assert tell(world, round_id, "pause")["paused"]
    assert claim(world, grace)["lease"] is None
    beat = world.http.post(
        f"/v1/leases/{lease.lease_id}/heartbeat", json={"fence": lease.fence, "step": 1}, headers=ada.auth
    )
    assert beat.json()["go_on"]
    world.hand_in(ada, lease)
    assert world.judge_all(round_id) == "open"
    assert not tell(world, round_id, "resume")["paused"]
    assert claim(world, grace)["lease"]["round_id"] == round_id
    assert world.http.get(f"/v1/rounds/{round_id}").json()["accepted"] == 1


def test_closing_waits_for_who_is_training(world: World) -> None:
    round_id = world.open_round(max_shards_per_lease=1)["round_id"]
    ada, grace = world.join("ada"), world.join("grace")
    world.hand_in(ada, world.claim(ada))
    world.judge_all(round_id)
    lease = world.claim(grace)
    assert tell(world, round_id, "close")["state"] == "closing"
    world.hand_in(grace, lease, b"another delta")
    assert world.judge_all(round_id) == "aggregating"
    assert world.http.get(f"/v1/rounds/{round_id}").json()["contributions"] == 2


def test_closing_now_does_not_wait_for_training(world: World) -> None:
    round_id = world.open_round(max_shards_per_lease=1)["round_id"]
    ada, grace = world.join("ada"), world.join("grace")
    world.hand_in(ada, world.claim(ada))
    world.judge_all(round_id)
    world.claim(grace)
    assert tell(world, round_id, "close", grace=False)["state"] == "aggregating"
    # It is closed already: ending the campaign is all that is left to do.
    view = tell(world, round_id, "close", last=True)
    assert (view["state"], view["repeat"]) == ("aggregating", 1)
    assert world.http.post(f"/v1/rounds/{round_id}/close", json={}, headers=world.organiser).status_code == 409


def test_the_last_round_of_a_campaign_can_be_any(world: World) -> None:
    round_id = world.open_round(repeat=9)["round_id"]
    view = tell(world, round_id, "last")
    assert (view["state"], view["index"], view["repeat"]) == ("open", 0, 1)


def test_only_the_organiser_changes_a_round(world: World) -> None:
    round_id, worker = world.open_round()["round_id"], world.join()
    for action in ("pause", "resume", "close", "last", "cancel"):
        path = f"/v1/rounds/{round_id}/{action}"
        assert world.http.post(path, json={}).status_code == 401
        assert world.http.post(path, json={}, headers=worker.auth).status_code == 403
        assert world.http.post(f"/v1/rounds/none/{action}", json={}, headers=world.organiser).status_code == 404
    view = world.http.get(f"/v1/rounds/{round_id}").json()
    assert (view["state"], view["paused"]) == ("open", False)


def test_a_model_has_one_campaign_at_a_time_and_a_server_many(world: World) -> None:
    publish(world.store, world.publisher, make_manifest(0, None, model="other"))
    first = world.open_round()["round_id"]
    other = world.open_round(model="other")["round_id"]
    request = RoundRequest(model="tiny", dataset="pydocs").model_dump(mode="json")
    refused = world.http.post("/v1/rounds", json=request, headers=world.organiser)
    assert refused.status_code == 409
    assert first in refused.json()["detail"]
    assert f"rankup round cancel {first}" in refused.json()["remedy"]
    tell(world, first, "cancel")
    assert world.open_round()["model"] == "tiny"
    assert world.http.get(f"/v1/rounds/{other}").json()["state"] == "open"


def test_of_many_who_open_a_campaign_of_one_model_at_a_time_one_does(world: World) -> None:
    request = RoundRequest(model="tiny", dataset="pydocs").model_dump(mode="json")

    def open_it(_: int) -> int:
        return world.http.post("/v1/rounds", json=request, headers=world.organiser).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(open_it, range(8)))
    assert statuses[0] == 201
    assert set(statuses[1:]) <= {409, 429}
    assert len(world.http.get("/v1/rounds").json()["rounds"]) == 1


def test_a_round_says_under_which_licence_its_contributions_are_given(world: World) -> None:
    view = world.open_round()
    assert view["licence"] == "apache-2.0"  # The model's.
    tell(world, view["round_id"], "cancel")
    assert world.open_round(licence="CC-BY-4.0")["licence"] == "CC-BY-4.0"


def test_everybody_sees_who_is_training_by_name_and_progress_alone(world: World) -> None:
    round_id = world.open_round(max_shards_per_lease=1, recipe={"steps": 20})["round_id"]
    ada = world.join("ada")
    lease = world.claim(ada)
    beat = {"fence": lease.fence, "step": 5, "loss": 2.5, "tokens_per_s": 40.0}
    world.http.post(f"/v1/leases/{lease.lease_id}/heartbeat", json=beat, headers=ada.auth)
    told = world.http.get(f"/v1/rounds/{round_id}/leases")
    (row,) = told.json()["leases"]
    assert (row["name"], row["step"], row["steps"]) == ("ada", 5, 20)
    assert (row["loss"], row["tokens_per_s"]) == (2.5, 40.0)
    assert row["granted_at"] <= row["seen_at"] <= row["done_at"]
    for secret in (ada.worker_id, ada.token, lease.lease_id):
        assert secret not in told.text
    assert world.http.get("/v1/rounds/none/leases").status_code == 404
    page = world.http.get("/").text
    assert "ada" in page
    assert "step 5/20" in page
    tell(world, round_id, "pause")
    assert 'class="state paused"' in world.http.get("/").text


def test_the_commands_of_the_organiser_do_what_they_say(world: World) -> None:
    first = world.open_round(max_shards_per_lease=1, repeat=3)["round_id"]
    env = {"RANKUP_SERVER": str(world.http.base_url), "RANKUP_ORGANISER_TOKEN": ORGANISER_TOKEN}

    def rankup(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["round", *arguments, "--json"], env=env)
        assert result.exit_code == 0, result.output
        told: dict[str, Any] = json.loads(result.stdout)
        return told

    assert rankup("pause", first)["paused"]
    assert "paused" in CliRunner().invoke(app, ["round", "list"], env=env).stdout
    assert not rankup("resume", first)["paused"]
    ada, grace = world.join("ada"), world.join("grace")
    world.hand_in(ada, world.claim(ada))
    world.judge_all(first)
    world.claim(grace)
    view = rankup("close", first, "--last")
    assert (view["state"], view["repeat"]) == ("closing", 1)
    assert rankup("close", first, "--now")["state"] == "aggregating"
    shown = CliRunner().invoke(app, ["round", "show", first], env=env)
    assert json.loads(shown.stdout)["state"] == "aggregating"
    assert rankup("cancel", first)["state"] == "cancelled"
    watched = CliRunner().invoke(app, ["round", "watch", first], env=env)
    assert watched.exit_code == 0
    assert f"{first}: cancelled" in watched.stdout


def test_a_round_says_what_work_on_it_takes_and_how_long_a_shard_took(world: World) -> None:
    tiers = [{"min_memory_gib": 6, "rank": 2}, {"min_memory_gib": 12, "rank": 4}]
    recipe = {"rank": 4, "mantissa_bits": 8}
    made = world.open_round(shards=2, tiers=tiers, recipe=recipe, lease_target_s=600, teams=["harbour"])
    assert (made["tiers"], made["listed"], made["lease_target_s"], made["shard_s"]) == (tiers, True, 600.0, None)
    # Two linear layers of 8 x 8 at rank 4, a byte a number.
    shapes = make_manifest(0, None).targets()
    assert made["delta_bytes"] == sum(4 * (target.d_out + target.d_in) for target in shapes.values() if target.d_in > 1)
    assert made["shard_bytes"] > 0
    world.http.post(f"/v1/rounds/{made['round_id']}/cancel", json={}, headers=world.organiser)

    open_to_all = world.open_round(shards=2)
    for name, seconds in (("ada", 10.0), ("grace", 30.0)):
        volunteer = world.join(name)
        lease = world.claim(volunteer)
        delta = f"a delta of {name}".encode()
        ticket = {"fence": lease.fence, "sha256": sha256(delta), "size_bytes": len(delta)}
        world.http.post(f"/v1/leases/{lease.lease_id}/upload", json=ticket, headers=volunteer.auth)
        world.upload(lease, delta)
        said = volunteer.submission(lease, delta, seconds=seconds)
        answer = world.http.post(f"/v1/leases/{lease.lease_id}/submit", json=said, headers=volunteer.auth)
        assert answer.status_code == 202, answer.text
    assert world.http.get(f"/v1/rounds/{open_to_all['round_id']}").json()["shard_s"] == 20.0
