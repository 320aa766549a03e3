"""Claiming in the ledger: look at the open rounds, match, and lease what is still there in one script.

What always holds:
- a shard is in as many live leases as the round allows copies, and in a second one only while no shard is free and the
  second worker should be done before the first (`lua/claim.lua`);
- a worker that lost an answer asks again and gets the lease that it holds; beside one whose delta it delivers it gets
  another, and never a third;
- what the survey saw may be outdated a moment later: the script grants nothing of a round that closed meanwhile.

Who fits what is `coordinator.matching`; how soon to ask again is `coordinator.pace`. Raises what `coordinator.valkey`
raises.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger_types import NoWork
from coordinator.matching import Candidate, Offer, Seeker, match
from coordinator.pace import IDLE_S
from coordinator.valkey import Valkey
from rankup.records import RoundRecord

CENSUS_S: Final = 2.0
"""How long the number of live leases is good for."""

LoadRecords = Callable[[Sequence[str]], Awaitable[list[RoundRecord]]]


@dataclass(frozen=True)
class Survey:
    """What there is to do, as one moment showed it."""

    offers: tuple[Offer, ...]
    speeds: dict[str, float]
    """Model -> tokens per second of the worker who asked."""
    idle: int
    """Volunteers without work."""
    live: int
    """Leases under way in all rounds."""


class Claims:
    """The part of one ledger that hands out leases."""

    def __init__(self, valkey: Valkey, load_records: LoadRecords) -> None:
        self._valkey = valkey
        self._load_records = load_records
        self._census: tuple[float, int] | None = None

    async def claim(self, worker_id: str, now: float, seeker: Seeker, delivering: str = "") -> Lease | NoWork:
        """A lease that fits, or the one that this worker holds already, or why there is none. `delivering`: the lease
        whose delta is on its way; it is not handed out again."""
        survey = await self.survey(worker_id, now)
        found = match(worker_id, seeker, survey.speeds, survey.offers, survey.idle)
        candidates = () if isinstance(found, NoWork) else found
        reply = await self._valkey.run(
            keys.CLAIM_LUA,
            keys.PREFIX,
            worker_id,
            new_lease_id(),
            f"{now:.6f}",
            json.dumps([_wire(candidate) for candidate in candidates]),
            repr(now - IDLE_S),
            delivering,
        )
        if reply[0] == 1:
            return keys.parse_lease(dict(zip(reply[1::2], reply[2::2], strict=True)))
        if reply[0] == -1:
            return NoWork("busy", "You have two leases already: the next one comes when one is handed in.", survey.idle)
        if isinstance(found, NoWork):
            return replace(found, idle=survey.idle)
        return NoWork("all_handed_out", f"All shards are handed out{_back(reply[1], now)}.", survey.idle)

    async def survey(self, worker_id: str, now: float) -> Survey:
        """The open rounds, and what is known of a worker, at one moment."""
        reply = await self._valkey.run(keys.SURVEY_LUA, keys.PREFIX, worker_id, repr(now - IDLE_S))
        idle, live, score, rows = reply
        self._census = now, live
        records = await self._load_records([row[0] for row in rows])
        offers = tuple(
            Offer(record, not granting, free, leased, int(tokens), float(seconds), int(shards))
            for record, (_, granting, free, leased, tokens, seconds, shards) in zip(records, rows, strict=True)
        )
        fields = dict(zip(score[::2], score[1::2], strict=True))
        speeds = {name.removeprefix(keys.SPEED): float(fields[name]) for name in fields if name.startswith(keys.SPEED)}
        return Survey(offers, speeds, idle, live)

    async def live(self, now: float) -> int:
        """Leases under way in all rounds, as they were at most `CENSUS_S` ago."""
        if self._census is None or not 0 <= now - self._census[0] < CENSUS_S:
            await self.survey("", now)
        return self._census[1] if self._census is not None else 0


def new_lease_id() -> str:
    """A name that nobody guesses or meets twice."""
    return f"l-{secrets.token_hex(8)}"


def _wire(candidate: Candidate) -> dict[str, object]:
    return {
        "round": candidate.round_id,
        "shards": candidate.shards,
        "rank": candidate.rank or 0,
        "shard_s": candidate.shard_s,
        "known": candidate.known,
        "copies": candidate.copies,
        "fitting": candidate.fitting,
    }


def _back(soonest: str, now: float) -> str:
    if not soonest:
        return " and wait for their verdicts"
    minutes = max(0.0, float(soonest) - now) / 60
    return "; the next one is expected back " + (f"in about {minutes:.0f} min" if minutes >= 1 else "at any moment")
