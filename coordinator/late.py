"""Which round takes a delta whose own round has ended: a pure question about the rounds of a campaign.

A round takes late deltas of the rounds that its record names (`earlier_rounds`), as far as it knows their base; such
a delta counts for less there (docs/numerics.md). Between two rounds there is nobody to take one, but soon will be.

No I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.leases import TAKES_SUBMISSIONS
from coordinator.ledger_types import RoundStatus
from rankup.protocol import RoundState


def taker_of(round_id: str, base_manifest: str, unfinished: Iterable[RoundStatus]) -> RoundStatus | None:
    """The round that takes deltas of `round_id` trained on this base now; None where there is none.

    unfinished: every round that still owes something, ended ones whose campaign goes on among them.
    """
    for status in unfinished:
        record = status.record
        if (
            status.facts.state in TAKES_SUBMISSIONS
            and round_id in record.earlier_rounds
            and record.staleness(base_manifest) is not None
        ):
            return status
    return None


def opens_soon(round_id: str, unfinished: Iterable[RoundStatus]) -> bool:
    """Whether a round that takes deltas of `round_id` opens once a round that is under way has ended."""
    for status in unfinished:
        record, facts = status.record, status.facts
        more = facts.index + 1 < facts.repeat
        at_work = facts.state not in TAKES_SUBMISSIONS | {RoundState.DRAFT, RoundState.CANCELLED}
        reach = record.request.recipe.aggregation.max_staleness
        if more and at_work and round_id in (record.round_id, *record.earlier_rounds)[:reach]:
            return True
    return False
