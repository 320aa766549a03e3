"""Leases that fit, over real HTTP: several shards, tiers, reasons, pauses, and a delta that comes after its round."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from gateway_world import SHARDS, World, furnished_gateway, make_manifest, publish, sha256

from coordinator.ledger import Ledger
from coordinator.opening import open_round
from coordinator.rounds import Evaluated, Folded, Published, Tick
from rankup.protocol import ClaimAnswer, LeaseGrant
from rankup.records import Evaluation

if TYPE_CHECKING:
    from conftest import ValkeyServer
    from gateway_world import Volunteer

GIB = 2**30


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings) as made:
        yield made


def ask(world: World, volunteer: Volunteer, **wish: Any) -> ClaimAnswer:
    answer = world.http.post("/v1/leases", json=wish, headers=volunteer.auth)
    assert answer.status_code == 200, answer.text
    return ClaimAnswer.model_validate(answer.json())


def granted(world: World, volunteer: Volunteer, **wish: Any) -> LeaseGrant:
    lease = ask(world, volunteer, **wish).lease
    assert lease is not None
    return lease


def test_a_volunteer_whose_speed_is_known_gets_as_many_shards_as_fill_the_time(world: World) -> None:
    """100 tokens in 1 s for its first shard: two shards in the 2 s that a lease should take."""
    round_id = world.open_round(lease_target_s=2)["round_id"]
    ada = world.join()
    first = granted(world, ada)
    assert (first.shards, len(first.shard_links)) == (1, 1)
    world.hand_in(ada, first, b"one")
    wide = granted(world, ada)
    assert (wide.shard, wide.shards) == (1, 2)
    card = world.http.get("/v1/datasets").json()["datasets"][0]
    assert [link.sha256 for link in wide.shard_links] == [blob["sha256"] for blob in card["shards"][1:3]]
    assert all(link.sha256 in link.url for link in wide.shard_links)
    url = f"/v1/leases/{wide.lease_id}/submit"
    world.upload(wide, b"two")
    steps = wide.recipe.steps
    for too_many in ({"steps": 2 * steps + 1}, {"tokens": 2 * steps * wide.recipe.batch_size * 128 + 1}):
        answer = world.http.post(url, json=ada.submission(wide, b"two", **too_many), headers=ada.auth)
        assert (answer.status_code, "the lease has 50 steps" in answer.json()["detail"]) == (400, True)
    answer = world.http.post(url, json=ada.submission(wide, b"two", steps=2 * steps), headers=ada.auth)
    assert (answer.status_code, answer.json()["shards"]) == (202, 2)
    world.judge_all(round_id)
    view = world.http.get(f"/v1/rounds/{round_id}").json()
    assert (view["accepted"], view["contributions"], view["free"]) == (3, 2, SHARDS - 3)


def test_a_volunteer_with_less_memory_trains_a_lower_rank_with_the_same_scaling(world: World) -> None:
    tiers = [{"min_memory_gib": 4, "rank": 2}, {"min_memory_gib": 8, "rank": 8}]
    world.open_round(tiers=tiers)
    small, big, tiny = world.join("small"), world.join("big"), world.join("tiny")
    low, full = granted(world, small, memory_bytes=5 * GIB), granted(world, big, memory_bytes=8 * GIB)
    assert (low.recipe.rank, low.recipe.alpha, {target.rank for target in low.targets.values()}) == (2, 4.0, {2})
    assert (full.recipe.rank, full.recipe.alpha, {target.rank for target in full.targets.values()}) == (8, 16.0, {8})
    assert low.max_delta_bytes < full.max_delta_bytes
    refused = ask(world, tiny, memory_bytes=GIB)
    assert (refused.lease, refused.why) == (None, "too_little_memory")
    assert "takes 4 GiB of memory; here are 1.0" in refused.reason
    assert refused.retry_after_s > world.settings.poll_s
    world.hand_in(small, low)
    [kept] = world.with_ledger(lambda ledger: ledger.pending(low.round_id))
    assert kept.rank == 2


def test_without_a_wish_the_memory_of_the_enrolment_counts(world: World) -> None:
    world.open_round(tiers=[{"min_memory_gib": 4, "rank": 2}])
    ada = world.join()
    assert ask(world, ada).why == "too_little_memory"


REASONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another model": ({}, {"models": ["big"]}, "other_models"),
    "other people": ({"workers": ["w-somebody"]}, {}, "not_listed"),
}


@pytest.mark.parametrize(("request_", "wish", "why"), REASONS.values(), ids=REASONS)
def test_who_gets_no_lease_is_told_why(world: World, request_: dict[str, Any], wish: dict[str, Any], why: str) -> None:
    ada = world.join()
    assert ask(world, ada).why == "no_round"
    world.open_round(**request_)
    assert ask(world, ada, **wish).why == why


@pytest.mark.parametrize(
    "wish", [{"models": ["../x"]}, {"memory_bytes": -1}, {"available_s": "NaN"}, {"rank": 1}, {"models": ["m"] * 65}]
)
def test_a_wish_that_makes_no_sense_is_refused(world: World, wish: dict[str, Any]) -> None:
    assert world.http.post("/v1/leases", json=wish, headers=world.join().auth).status_code == 422


def test_volunteers_report_and_ask_less_often_the_more_there_are(valkey: ValkeyServer) -> None:
    changes = {"heartbeat_s": 1.0, "beats_per_s": 0.1, "poll_s": 1.0, "polls_per_s": 0.5}
    with furnished_gateway(valkey.ledger_settings, changes=changes) as world:
        world.open_round(shards=2)
        people = [world.join(name) for name in ("ada", "bob", "cy", "di")]
        leases = [granted(world, who) for who in people[:2]]
        time.sleep(2.1)  # The number of live leases may be two seconds old.
        lease = leases[0]
        url = f"/v1/leases/{lease.lease_id}/heartbeat"
        beat = world.http.post(url, json={"fence": lease.fence}, headers=people[0].auth).json()
        assert (beat["go_on"], beat["heartbeat_s"]) == (True, 20.0)
        for _ in range(2):
            pauses = [ask(world, who).retry_after_s for who in people[2:]]
        assert pauses == [4.0, 4.0]


def test_a_delta_that_comes_after_its_round_is_taken_by_the_next_one(world: World) -> None:
    request = {"shards": 2, "quorum": 1, "repeat": 2, "grace_s": 0, "recipe": {"aggregation": {"max_staleness": 1}}}
    first = world.open_round(**request)["round_id"]
    ada, bob = world.join("ada"), world.join("bob")
    late, lease = granted(world, ada), granted(world, bob)
    world.hand_in(bob, lease)
    assert world.judge_all(first) == "aggregating"
    asked = {"fence": late.fence, "sha256": sha256(b"late"), "size_bytes": 4}
    ticket = world.http.post(f"/v1/leases/{late.lease_id}/upload", json=asked, headers=ada.auth)
    assert (ticket.status_code, ticket.json()["type"].rsplit("/")[-1]) == (429, "not-yet")
    assert int(ticket.headers["retry-after"]) >= 1
    second = world.with_ledger(lambda ledger: _publish_and_go_on(world, ledger, first))
    view = world.hand_in(ada, late, b"late")
    assert (view["state"], view["round_id"]) == ("submitted", second)
    again = world.http.post(
        f"/v1/leases/{late.lease_id}/submit", json=ada.submission(late, b"late"), headers=ada.auth
    ).json()
    assert again == view
    world.judge_all(second)
    view = world.http.get(f"/v1/rounds/{second}").json()
    assert (view["accepted"], view["contributions"], view["free"]) == (0, 1, 2)


def test_a_delta_that_comes_after_its_campaign_is_refused(world: World) -> None:
    first = world.open_round(shards=2, quorum=1, grace_s=0)["round_id"]
    ada, bob = world.join("ada"), world.join("bob")
    late, lease = granted(world, ada), granted(world, bob)
    world.hand_in(bob, lease)
    world.judge_all(first)
    asked = {"fence": late.fence, "sha256": sha256(b"late"), "size_bytes": 4}
    ticket = world.http.post(f"/v1/leases/{late.lease_id}/upload", json=asked, headers=ada.auth)
    assert (ticket.status_code, "no round takes its delta" in ticket.json()["detail"]) == (409, True)


async def _publish_and_go_on(world: World, ledger: Ledger, round_id: str) -> str:
    """Version 1 appears, the round that made it ends, and the next one opens; its id."""
    now = time.time()
    record = await ledger.record(round_id)
    publish(world.store, world.publisher, make_manifest(1, record.base_manifest, 3.1))
    await ledger.apply(round_id, Tick(), now)
    await ledger.apply(round_id, Folded("d" * 64), now)
    await ledger.apply(round_id, Evaluated(Evaluation(heldout_loss=3.1, examples=4, tokens=40)), now)
    await ledger.apply(round_id, Published(1), now)
    following = await open_round(ledger, world.store, record.request, index=1, previous=record, now=now)
    return following.round_id
