"""What the ledger hands out besides leases: workers, the answer that there is no work, heartbeats' answers, rounds.

All are frozen values of one moment; changing what they stand for goes through `coordinator.ledger`. No I/O here.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.leases import Lease
from coordinator.rounds import RoundFacts
from rankup.protocol import DeviceProfile, NoWorkCode, RoundView, Standing
from rankup.records import RoundRecord
from rankup.targets import expected_delta_bytes


@dataclass(frozen=True)
class Worker:
    """A volunteer's machine as it enrolled."""

    worker_id: str
    name: str
    public_key: str
    device: DeviceProfile
    enrolled_at: float
    team: str = ""
    standing: Standing = Standing.MEMBER
    note: str = ""
    """Why it is banned."""


@dataclass(frozen=True)
class NoWork:
    """Why there is no lease, for programs and in plain words."""

    why: NoWorkCode
    reason: str
    idle: int = 0
    """Volunteers who were told so lately."""


@dataclass(frozen=True)
class Pulse:
    """What a heartbeat learns: the lease, and whether training it further can be of use."""

    lease: Lease
    go_on: bool
    reason: str


@dataclass(frozen=True)
class RoundStatus:
    """A round as it is now: what was fixed when it opened, and what the machine knows, counts included."""

    record: RoundRecord
    facts: RoundFacts
    rev: int
    shard_s: float | None = None
    """Seconds of training that a shard took, on the mean of what was handed in; None: nothing was."""

    def view(self) -> RoundView:
        """The round as everybody may see it."""
        record, facts, counts = self.record, self.facts, self.facts.counts
        return RoundView(
            round_id=record.round_id,
            model=record.request.model,
            dataset=record.request.dataset,
            state=facts.state,
            paused=facts.paused,
            reason=facts.failure or facts.reason,
            index=record.index,
            repeat=facts.repeat,
            base_version=record.base_version,
            base_manifest=record.base_manifest,
            recipe=record.request.recipe,
            shards=facts.shards,
            quorum=facts.quorum,
            min_contributions=facts.min_contributions,
            deadline_at=facts.deadline_at,
            opened_at=facts.opened_at,
            closed_at=facts.closed_at,
            free=counts.free,
            leased=counts.leased,
            submitted=counts.submitted,
            accepted=counts.accepted,
            contributions=counts.contributions,
            rejected=counts.rejected,
            licence=record.request.licence,
            teacher=record.teacher,
            tiers=record.request.tiers,
            listed=bool(record.request.workers or record.request.teams),
            lease_target_s=record.request.lease_target_s,
            shard_s=self.shard_s,
            delta_bytes=expected_delta_bytes(record.targets, record.request.recipe.mantissa_bits),
            shard_bytes=max((shard.size_bytes for shard in record.shards), default=0),
            published_version=facts.published_version,
            heldout_loss=facts.heldout_loss,
            parent_heldout_loss=facts.parent_heldout_loss,
        )
