"""A heartbeat that is a matter of course is stored as `leases.step` would; any other changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_world import LEASE_S, NOW, claim, connected, receipt, record, submission, worker

from coordinator import leases
from coordinator import ledger_keys as keys
from coordinator.ledger import Ledger
from coordinator.rounds import Cancel
from rankup.protocol import Heartbeat, Standing

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

TOKEN = "a" * 64
OTHER_TOKEN = "b" * 64
MEASURED = st.none() | st.floats(0, 1e6)


async def furnished(ledger: Ledger) -> None:
    await ledger.create_round(record(shards=4), NOW)
    await ledger.people.enrol(worker(1), TOKEN, NOW + 1000)
    await ledger.people.enrol(worker(2), OTHER_TOKEN)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.integers(1, 4),
    expected_s=st.floats(0, 1e5),
    done=st.integers(0, 100),
    step=st.integers(0, 100),
    loss=MEASURED,
    tokens_per_s=MEASURED,
    grad_norm=MEASURED,
    energy_j=MEASURED,
    pause_s=st.floats(0, 900),
)
def test_a_beat_is_stored_as_the_machine_of_leases_has_it(
    valkey: ValkeyServer,
    shards: int,
    expected_s: float,
    done: int,
    step: int,
    loss: float | None,
    tokens_per_s: float | None,
    grad_norm: float | None,
    energy_j: float | None,
    pause_s: float,
) -> None:
    valkey.client().flushall()
    now = NOW + pause_s

    async def run() -> None:
        async with connected(valkey.ledger_settings) as ledger:
            await furnished(ledger)
            granted, commands = leases.grant(
                lease_id="l-1",
                fence=7,
                round_id="r1",
                shard=0,
                shards=shards,
                worker_id="w-1",
                now=NOW,
                lease_s=LEASE_S,
                expected_s=expected_s,
            )
            granted = replace(granted, step=done)
            assert await ledger.valkey.commit([], keys.lease_writes(granted, commands))
            before = await ledger.lease("l-1")
            measured = {"loss": loss, "tokens_per_s": tokens_per_s, "grad_norm": grad_norm, "energy_j": energy_j}
            said = Heartbeat.model_validate({"fence": 7, "step": step, **measured})
            steps = (await ledger.record("r1")).request.recipe.steps * shards
            event = leases.Beat(7, LEASE_S, steps, step, **measured)
            expected, (extended,) = leases.step(before, event, now)
            assert isinstance(extended, leases.ExtendExpiry)

            taken = await ledger.take_beat(TOKEN, "l-1", said, now)
            assert taken is not None
            assert (taken.expires_at, taken.lease_s) == (expected.expires_at, LEASE_S)
            assert await ledger.lease("l-1") == replace(expected, rev=before.rev + 1)
            for part, score in (("expiry", extended.expires_at), ("eta", extended.ends_at)):
                found = await ledger.valkey.call("ZSCORE", keys.round_key("r1", part), "l-1")
                assert float(found) == score

    asyncio.run(run())


async def _nothing(_: Ledger, __: leases.Lease) -> None:
    return


async def _ban(ledger: Ledger, _: leases.Lease) -> None:
    await ledger.people.set_standing("w-1", Standing.BANNED, NOW)


async def _revoke(ledger: Ledger, _: leases.Lease) -> None:
    await ledger.people.revoke_token("w-1")


async def _hand_in(ledger: Ledger, lease: leases.Lease) -> None:
    await ledger.submit(lease.lease_id, "w-1", submission(lease), NOW)


async def _return(ledger: Ledger, lease: leases.Lease) -> None:
    await ledger.give_back(lease.lease_id, "w-1", lease.fence, "", NOW)


async def _reap(ledger: Ledger, _: leases.Lease) -> None:
    assert await ledger.reap("r1", NOW + LEASE_S + 1)


async def _cancel(ledger: Ledger, _: leases.Lease) -> None:
    await ledger.apply("r1", Cancel("enough"), NOW)


async def _settle(ledger: Ledger, lease: leases.Lease) -> None:
    """Somebody else's late delta of the same shard is accepted."""
    other, _ = leases.grant(
        lease_id="l-2", fence=0, round_id="r1", shard=lease.shard, worker_id="w-2", now=NOW, lease_s=LEASE_S
    )
    late = replace(other, state=leases.LeaseState.EXPIRED)
    assert await ledger.valkey.commit([], keys.lease_writes(late, ()))
    late = await ledger.submit("l-2", "w-2", submission(late, digest="c" * 64), NOW)
    verdict = receipt(late).model_copy(update={"submission": submission(late, digest="c" * 64)})
    await ledger.judge("l-2", verdict, NOW)


CASES: dict[str, tuple[Callable[[Ledger, leases.Lease], Awaitable[None]], dict[str, object]]] = {
    "nobody knows the token": (_nothing, {"token": "f" * 64}),
    "the token has run out": (_nothing, {"now": NOW + 1000}),
    "the token was revoked": (_revoke, {}),
    "the worker is banned": (_ban, {}),
    "somebody else's lease": (_nothing, {"token": OTHER_TOKEN}),
    "no such lease": (_nothing, {"lease_id": "l-9"}),
    "another fence": (_nothing, {"fence": 99}),
    "handed in": (_hand_in, {}),
    "returned": (_return, {}),
    "expired": (_reap, {}),
    "the round was cancelled": (_cancel, {}),
    "the shard has its delta": (_settle, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_beat_that_needs_a_decision_changes_nothing(valkey: ValkeyServer, case: str) -> None:
    happens, given_ = CASES[case]

    def everything() -> dict[str, bytes]:
        client = valkey.client()
        return {key: client.dump(key) for key in sorted(client.scan_iter("*"))}

    async def run() -> None:
        async with connected(valkey.ledger_settings) as ledger:
            await furnished(ledger)
            lease = await claim(ledger, "w-1")
            await happens(ledger, lease)
            about = {"token": TOKEN, "lease_id": lease.lease_id, "fence": lease.fence, "now": NOW + 1} | given_
            before = everything()
            said = Heartbeat(fence=int(str(about["fence"])), step=1)
            found = await ledger.take_beat(str(about["token"]), str(about["lease_id"]), said, float(str(about["now"])))
            assert found is None
            assert everything() == before

    asyncio.run(run())
