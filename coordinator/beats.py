"""Heartbeats in the ledger, at the price of one call: what ten thousand volunteers send most.

What always holds: `lua/beat.lua` takes only a beat about which there is nothing to decide (a known token that has not
run out, of a worker that is not banned; its own lease, granted, with the right fence; a round that takes submissions;
no delta of its shards accepted), and stores for it exactly what `leases.step` would have stored. Everything else it
leaves as it was, for `Ledger.heartbeat` to judge: the rules stand there, and only there.

Raises what `coordinator.valkey` raises.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator import ledger_keys as keys
from coordinator.people import SEEN_EVERY_S
from coordinator.valkey import Valkey
from rankup.protocol import Heartbeat


@dataclass(frozen=True)
class Taken:
    """A heartbeat that was taken as a matter of course: training goes on."""

    expires_at: float
    """When the lease runs out now, Unix seconds."""
    lease_s: float
    """How long the round's leases live without a heartbeat."""


async def take_beat(valkey: Valkey, token_hash: str, lease_id: str, beat: Heartbeat, now: float) -> Taken | None:
    """Keep the lease alive and note its progress; None, and nothing changed, where there is anything to decide."""
    found = await valkey.run(
        keys.BEAT_LUA,
        keys.PREFIX,
        token_hash,
        lease_id,
        str(beat.fence),
        repr(now),
        str(beat.step),
        str(SEEN_EVERY_S),
        *("" if said is None else repr(said) for said in (beat.loss, beat.tokens_per_s, beat.grad_norm, beat.energy_j)),
    )
    return None if found is None else Taken(float(found[0]), float(found[1]))
