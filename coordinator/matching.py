"""Who gets what: from a volunteer and the open rounds to the leases that fit, best first, or to why there is none.

What always holds:
- nobody gets a lease of a round that is not for it: other models than it wishes for, a list that it is not on, less
  memory than the lowest tier, less time than one shard takes;
- a lease takes `lease_target_s`, as far as whole shards, `max_shards_per_lease` and the volunteer's own time allow; a
  volunteer whose speed at this model is unknown gets one shard;
- nobody takes more than an equal part of what is left (guided self-scheduling: Polychronopoulos & Kuck, "Guided
  self-scheduling", IEEE Trans. Computers C-36, 1987), so leases get shorter towards the end of a round and all end
  about together;
- of several rounds, the one with the fewest volunteers for its priority comes first, then the oldest.

Speeds are what the server saw of earlier leases, in tokens that contributed to the loss. No I/O, no clock here; that
two volunteers do not get one shard is `lua/claim.lua`'s to see to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.ledger_types import NoWork
from rankup.protocol import Standing, tier_of
from rankup.records import RoundRecord

GIB: Final = 2**30
ANY_NUMBER: Final = 2**31
"""Of shards: no limit."""


@dataclass(frozen=True)
class Seeker:
    """Who asks for work, and for what; by default somebody who takes anything and has nothing to show."""

    memory_bytes: int = 0
    """What a training may take."""
    available_s: float | None = None
    """How long it can work; None: for ever."""
    models: tuple[str, ...] = ()
    """Those that it wishes for; empty: any."""
    team: str = ""
    standing: Standing = Standing.MEMBER


@dataclass(frozen=True)
class Offer:
    """An open round as it is now. The `told_` sums are over all that was handed in."""

    record: RoundRecord
    paused: bool
    free: int
    """Shards that nobody has."""
    leased: int
    """Leases under way, and so volunteers."""
    told_tokens: int = 0
    told_seconds: float = 0.0
    told_shards: int = 0


@dataclass(frozen=True)
class Candidate:
    """A lease that would fit; what `lua/claim.lua` tries."""

    round_id: str
    shards: int
    """The most in one lease."""
    rank: int | None
    """Of the volunteer's tier, where that is not the recipe's."""
    shard_s: float
    """Seconds that this volunteer should need for one shard."""
    known: bool
    """Whether `shard_s` was measured."""
    copies: int
    fitting: int
    """The most shards that it has time for."""


def match(
    worker_id: str, seeker: Seeker, speeds: Mapping[str, float], offers: Sequence[Offer], idle: int
) -> tuple[Candidate, ...] | NoWork:
    """The leases to try, best first, or why none fits.

    speeds: model -> tokens per second of this volunteer, where they are known.
    idle: volunteers without work, this one among them or not.
    """
    if seeker.standing is not Standing.MEMBER:
        return NoWork("waiting", "The organiser has not let this volunteer in yet.")
    if not offers:
        return NoWork("no_round", "No round is open.")
    open_ones = [offer for offer in offers if not offer.paused]
    if not open_ones:
        paused = ", ".join(sorted(offer.record.request.model for offer in offers))
        return NoWork("paused", f"The organiser has paused the rounds that are open ({paused}).")
    found: list[tuple[float, float, Candidate]] = []
    refused: list[NoWork] = []
    for offer in open_ones:
        candidate = _fit(worker_id, seeker, speeds.get(offer.record.request.model), offer, idle)
        if isinstance(candidate, NoWork):
            refused.append(candidate)
        else:
            found.append((offer.leased / offer.record.request.priority, offer.record.opened_at, candidate))
    if not found:
        return min(refused, key=lambda refusal: _NEARNESS[refusal.why])
    return tuple(candidate for *_, candidate in sorted(found, key=lambda row: (row[0], row[1], row[2].round_id)))


_NEARNESS: Final = {"too_little_time": 0, "too_little_memory": 1, "not_listed": 2, "other_models": 3}
"""Of several refusals, the one that the volunteer can do most about is told."""


def _fit(worker_id: str, seeker: Seeker, speed: float | None, offer: Offer, idle: int) -> Candidate | NoWork:
    request = offer.record.request
    if seeker.models and request.model not in seeker.models:
        return NoWork("other_models", f"No open round trains {' or '.join(seeker.models)}.")
    if (request.workers or request.teams) and worker_id not in request.workers and seeker.team not in request.teams:
        return NoWork(
            "not_listed", f"The open round of {request.model} is for volunteers whom the organiser has named."
        )
    tier = tier_of(request.tiers, seeker.memory_bytes)
    if request.tiers and tier is None:
        needed = min(tier.min_memory_gib for tier in request.tiers)
        return NoWork(
            "too_little_memory",
            f"Training {request.model} takes {needed:g} GiB of memory; here are {seeker.memory_bytes / GIB:.1f}.",
        )
    shard_s = expected_shard_s(offer, speed)
    known = speed is not None
    fitting = ANY_NUMBER
    if seeker.available_s is not None and known and offer.told_shards:
        fitting = min(math.floor(seeker.available_s / shard_s), ANY_NUMBER)
        if fitting < 1:
            return NoWork(
                "too_little_time",
                f"One shard of {request.model} takes about {_minutes(shard_s)} here; "
                f"{_minutes(seeker.available_s)} are left until this machine stops.",
            )
    target = math.floor(min(request.lease_target_s / shard_s, request.max_shards_per_lease)) if known else 1
    fair = math.ceil(offer.free / (offer.leased + max(1, idle)))
    return Candidate(
        round_id=offer.record.round_id,
        shards=max(1, min(target, fair, fitting)),
        rank=tier.rank if tier is not None and tier.rank != request.recipe.rank else None,
        shard_s=shard_s,
        known=known,
        copies=request.copies,
        fitting=fitting,
    )


def expected_shard_s(offer: Offer, speed: float | None) -> float:
    """Seconds that one shard should take at `speed` tokens per second; unknown: as long as it took others, or the whole
    time of a lease. Never zero.

    Before anybody has told how many tokens a shard has, it is the most that the recipe lets through.
    """
    recipe = offer.record.request.recipe
    if speed is not None:
        most = recipe.steps * recipe.batch_size * recipe.max_tokens
        tokens = offer.told_tokens / offer.told_shards if offer.told_shards else most
        return max(tokens / speed, 1e-3)
    if offer.told_shards:
        return max(offer.told_seconds / offer.told_shards, 1e-3)
    return offer.record.request.lease_target_s


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
