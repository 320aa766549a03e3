"""A volunteer whose server lost its ledger in the middle of a training, over real HTTP: token, voucher, delta."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from gateway_world import World, furnished_gateway, sha256
from pydantic import SecretStr

from coordinator import rebuild
from coordinator.vouchers import VoucherSigner
from rankup.protocol import LeaseGrant
from rankup.signing import public_key_hex
from rankup.versions import round_key

if TYPE_CHECKING:
    from conftest import ValkeyServer
    from gateway_world import Volunteer

DELTA = b"a good delta"


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings) as made:
        yield made


def lose(valkey: ValkeyServer, world: World, *, restored: bool = True) -> None:
    """Valkey is emptied; `restored`: and what object storage has is brought back."""
    valkey.client().flushall()
    if restored:
        found = rebuild.plan(world.store, public_key_hex(world.publisher))
        world.with_ledger(lambda ledger: rebuild.restore(ledger, world.store, found, time.time()))


def join_again(world: World, volunteer: Volunteer) -> None:
    """As a worker does whose token is unknown."""
    assert world.http.get("/v1/contributions", headers=volunteer.auth).status_code == 401
    answer = world.http.post("/v1/workers", json=volunteer.enrolment(time.time()))
    assert (answer.status_code, answer.json()["worker_id"]) == (201, volunteer.worker_id)
    volunteer.token = answer.json()["token"]


def beat(world: World, volunteer: Volunteer, lease: LeaseGrant) -> tuple[int, dict[str, Any]]:
    said = {"fence": lease.fence, "step": 3}
    answer = world.http.post(f"/v1/leases/{lease.lease_id}/heartbeat", json=said, headers=volunteer.auth)
    return answer.status_code, answer.json()


def restore(world: World, volunteer: Volunteer, lease_id: str, voucher: str) -> tuple[int, dict[str, Any]]:
    answer = world.http.post(f"/v1/leases/{lease_id}/restore", json={"voucher": voucher}, headers=volunteer.auth)
    return answer.status_code, answer.json()


def test_a_training_outlives_the_loss_of_the_ledger(valkey: ValkeyServer, world: World) -> None:
    round_id = world.open_round()["round_id"]
    ada, bob = world.join("ada"), world.join("bob")
    lease = world.claim(ada)
    lose(valkey, world)
    join_again(world, ada)
    assert beat(world, ada, lease)[0] == 404
    status, view = restore(world, ada, lease.lease_id, lease.voucher)
    assert (status, view["state"], view["fence"], view["shard"]) == (200, "granted", lease.fence, lease.shard)
    assert restore(world, ada, lease.lease_id, lease.voucher) == (200, view)
    assert (beat(world, ada, lease)[1]["go_on"], restore(world, ada, lease.lease_id, lease.voucher)[1]["step"]) == (
        True,
        3,
    )
    again = world.claim(ada)
    assert (again.lease_id, again.seed, again.voucher) == (lease.lease_id, lease.seed, lease.voucher)
    join_again(world, bob)
    assert world.claim(bob).shard != lease.shard
    assert world.hand_in(ada, lease, DELTA)["state"] == "submitted"
    world.judge_all(round_id)
    status, view = restore(world, ada, lease.lease_id, lease.voucher)
    assert (status, view["state"], view["contribution"]) == (200, "accepted", sha256(DELTA))
    assert world.http.get(f"/v1/rounds/{round_id}").json()["accepted"] == 1


def test_a_delta_that_was_handed_in_before_the_loss_is_not_taken_up_as_a_lease(
    valkey: ValkeyServer, world: World
) -> None:
    world.open_round()
    ada = world.join()
    lease = world.claim(ada)
    world.hand_in(ada, lease, DELTA)
    lose(valkey, world)
    join_again(world, ada)
    status, view = restore(world, ada, lease.lease_id, lease.voucher)
    assert (status, view["state"], view["contribution"]) == (200, "submitted", sha256(DELTA))
    assert world.hand_in(ada, lease, DELTA) == view


def test_a_voucher_is_good_for_its_own_lease_in_its_own_workers_hands(valkey: ValkeyServer, world: World) -> None:
    world.open_round()
    ada, bob = world.join("ada"), world.join("bob")
    lease, other = world.claim(ada), world.claim(bob)
    lose(valkey, world)
    join_again(world, ada)
    join_again(world, bob)
    text, _, signature = lease.voucher.partition(".")
    wrong = {
        "another worker's": (bob, lease.lease_id, lease.voucher),
        "of another lease": (ada, lease.lease_id, other.voucher),
        "under another name": (bob, lease.lease_id, other.voucher),
        "other words": (ada, lease.lease_id, f"{other.voucher.partition('.')[0]}.{signature}"),
        "another signature": (ada, lease.lease_id, f"{text}.{'0' * 64}"),
        "of another server": (ada, lease.lease_id, foreign(world, lease)),
    }
    for what, (who, lease_id, voucher) in wrong.items():
        assert (what, restore(world, who, lease_id, voucher)[0]) == (what, 403)
    for voucher in ("", "x", "a.b", "é." + "0" * 64, "a" * 1025 + "." + "0" * 64):
        assert restore(world, ada, lease.lease_id, voucher)[0] == 422
    assert valkey.client().exists(f"rk1:lease:{lease.lease_id}") == 0
    assert world.http.post(f"/v1/leases/{lease.lease_id}/restore", json={"voucher": lease.voucher}).status_code == 401
    assert restore(world, ada, lease.lease_id, lease.voucher)[0] == 200
    assert restore(world, bob, lease.lease_id, lease.voucher)[0] == 403


def foreign(world: World, lease: LeaseGrant) -> str:
    here = VoucherSigner(world.settings.organiser_token.get_secret_value())
    return VoucherSigner("another organiser").write(here.read(lease.voucher))


def test_a_lease_whose_round_is_over_is_refused(valkey: ValkeyServer, world: World) -> None:
    round_id = world.open_round()["round_id"]
    ada = world.join()
    lease = world.claim(ada)
    lose(valkey, world)
    assert world.http.post(f"/v1/rounds/{round_id}/cancel", headers=world.organiser).status_code == 200
    join_again(world, ada)
    status, problem = restore(world, ada, lease.lease_id, lease.voucher)
    assert (status, problem["type"].rpartition("/")[2]) == (409, "wrong-state")
    assert "cancelled: it takes no more deltas" in problem["detail"]


def test_before_the_ledger_is_restored_the_voucher_is_to_come_again(valkey: ValkeyServer, world: World) -> None:
    world.open_round()
    ada = world.join()
    lease = world.claim(ada)
    lose(valkey, world, restored=False)
    join_again(world, ada)
    status, problem = restore(world, ada, lease.lease_id, lease.voucher)
    assert (status, problem["type"].rpartition("/")[2], problem["retry_after_s"]) == (429, "not-yet", 15.0)
    assert "is being restored" in problem["detail"]
    lose(valkey, world)
    join_again(world, ada)
    assert restore(world, ada, lease.lease_id, lease.voucher)[0] == 200


def test_a_lease_of_a_round_that_nobody_has_any_more_is_unknown(valkey: ValkeyServer, world: World) -> None:
    round_id = world.open_round()["round_id"]
    ada = world.join()
    lease = world.claim(ada)
    lose(valkey, world, restored=False)
    world.store.delete(round_key(round_id))
    join_again(world, ada)
    assert restore(world, ada, lease.lease_id, lease.voucher)[0] == 404


def test_vouchers_count_as_claims_do(valkey: ValkeyServer) -> None:
    with furnished_gateway(valkey.ledger_settings, changes={"claims_per_min": 3}) as world:
        world.open_round()
        ada = world.join()
        lease = world.claim(ada)
        codes = [restore(world, ada, lease.lease_id, lease.voucher)[0] for _ in range(3)]
        assert codes == [200, 200, 429]


def test_without_an_organisers_token_there_are_no_vouchers(valkey: ValkeyServer) -> None:
    with furnished_gateway(valkey.ledger_settings) as world:
        world.open_round()
    with furnished_gateway(valkey.ledger_settings, changes={"organiser_token": SecretStr("")}) as world:
        ada = world.join()
        lease = world.claim(ada)
        assert lease.voucher == ""
        voucher = f"e30.{'0' * 64}"
        assert restore(world, ada, lease.lease_id, voucher)[0] == 403
