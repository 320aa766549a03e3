"""What workers have earned: verdicts, credit, ratings, teams, the leaderboard.

What always holds: credit and ratings of one part of a version are stored together with the mark that they were, so
none is given twice, whoever is killed in between (`coordinator.people_settling` does it); a team has the credit that
workers earned while they were in it.

Verdicts are counted where they are stored (`ledger_keys.lease_writes`); this module reads them. Every method raises
what `coordinator.valkey` raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator import ledger_keys as keys
from coordinator import people_keys
from coordinator.ledger_types import Worker
from coordinator.people_keys import Score, parse_score, parse_worker, rating_field, rating_text
from coordinator.reputation import Rating, best_known, trust
from coordinator.valkey import Valkey
from rankup.membership import Person, TeamRow
from rankup.protocol import ContributorRow

TEAMS_SHOWN = 1_000


@dataclass(frozen=True)
class Gain:
    """What one part of a version changes in a worker's score."""

    settled: int = 0
    credit: int = 0
    """Below 0 where it is taken back."""
    unpublished: int = 0


@dataclass(frozen=True)
class Part:
    """Workers whose scores are changed together: at most a few hundred."""

    gains: Mapping[str, Gain]
    ratings: Mapping[str, Rating] = field(default_factory=dict)


class Scores:
    """The scores of one ledger."""

    def __init__(self, valkey: Valkey) -> None:
        self._valkey = valkey

    async def of(self, worker_ids: Sequence[str]) -> list[Score]:
        """The score of each; zeros where there is none."""
        rows = await self._valkey.read(*(["HGETALL", keys.worker_key(worker_id, "score")] for worker_id in worker_ids))
        return [parse_score(fields) for fields in rows]

    async def trust(self, worker_id: str, model: str) -> int:
        """Valid contributions in a row that audits of this model's rounds are drawn by: `reputation.trust`."""
        [score] = await self.of([worker_id])
        return trust(score.valid_in_a_row, score.ratings.get(model, best_known(score.ratings)))

    # -- what is shown -------------------------------------------------------------------------------------------------

    async def leaderboard(self, limit: int = 1000) -> list[ContributorRow]:
        """Workers with a verdict, by credit, then by accepted tokens."""
        by_credit, by_tokens = await self._valkey.read(
            ["ZREVRANGE", people_keys.CREDIT_BOARD, "0", str(limit - 1)],
            ["ZREVRANGE", keys.BOARD, "0", str(limit - 1)],
        )
        ids = list(dict.fromkeys([*by_credit, *by_tokens]))
        docs = await self._valkey.read(*(["HGET", keys.worker_key(worker_id), "doc"] for worker_id in ids))
        scores = await self.of(ids)
        rows = [
            _row(worker_id, parse_worker(doc) if doc else None, score)
            for worker_id, doc, score in zip(ids, docs, scores, strict=True)
        ]
        return sorted(rows, key=lambda row: (-row.credit, -row.tokens, row.worker_id))[:limit]

    async def teams(self) -> list[TeamRow]:
        """Teams by credit, then by members, then by name."""
        top, members = await self._valkey.read(
            ["ZREVRANGE", people_keys.TEAM_CREDIT, "0", str(TEAMS_SHOWN - 1)], ["HGETALL", people_keys.TEAM_MEMBERS]
        )
        # Asked for one by one: how members come with their scores differs between versions of the protocol.
        found = await self._valkey.read(*(["ZSCORE", people_keys.TEAM_CREDIT, team] for team in top))
        earned = {team: float(credit) for team, credit in zip(top, found, strict=True)}
        rows = [
            TeamRow(team=team, members=int(members.get(team, 0)), credit=earned.get(team, 0.0))
            for team in {*earned, *(name for name, count in members.items() if int(count) > 0)}
        ]
        return sorted(rows, key=lambda row: (-row.credit, -row.members, row.team))[:TEAMS_SHOWN]

    async def persons(self, workers: Sequence[tuple[Worker, float | None]]) -> list[Person]:
        """Workers, each with the time of its last call, as the organiser sees them."""
        scores = await self.of([worker.worker_id for worker, _ in workers])
        return [
            Person(
                **_row(worker.worker_id, worker, score).model_dump(),
                standing=worker.standing,
                note=worker.note,
                device=worker.device,
                enrolled_at=worker.enrolled_at,
                seen_at=seen_at,
                unpublished=score.unpublished,
                valid_in_a_row=score.valid_in_a_row,
            )
            for (worker, seen_at), score in zip(workers, scores, strict=True)
        ]

    # -- what is settled -----------------------------------------------------------------------------------------------

    async def settled(self, model: str) -> str | None:
        """How far the versions of a model are settled: a mark of `coordinator.people_settling`."""
        found: str | None = await self._valkey.call("HGET", people_keys.SETTLED, model)
        return found

    async def settle(self, model: str, part: Part, *, mark: str, after: str | None) -> bool:
        """Store a part of a version and `mark`; False where the mark before is not `after`."""
        writes = [["HSET", people_keys.SETTLED, model, mark], *await self._gain_writes(part.gains)]
        for worker_id, rating in part.ratings.items():
            writes.append(["HSET", keys.worker_key(worker_id, "score"), rating_field(model), rating_text(rating)])
        return await self._valkey.commit([["HGET", people_keys.SETTLED, model, after]], writes)

    async def unsettled_rounds(self, round_ids: Sequence[str]) -> list[str]:
        """Those of the rounds that `settle_round` was not called for."""
        known = await self._valkey.read(*(["SISMEMBER", people_keys.SETTLED_ROUNDS, one] for one in round_ids))
        return [round_id for round_id, found in zip(round_ids, known, strict=True) if not found]

    async def settle_round(self, round_id: str, gains: Mapping[str, Gain]) -> bool:
        """Store what a round without a version leaves; False where that was done before."""
        writes = [["SADD", people_keys.SETTLED_ROUNDS, round_id], *await self._gain_writes(gains)]
        return await self._valkey.commit([["SISMEMBER", people_keys.SETTLED_ROUNDS, round_id, "0"]], writes)

    async def _gain_writes(self, gains: Mapping[str, Gain]) -> list[keys.Row]:
        docs = await self._valkey.read(*(["HGET", keys.worker_key(worker_id), "doc"] for worker_id in gains))
        writes: list[keys.Row] = []
        for (worker_id, gain), doc in zip(gains.items(), docs, strict=True):
            key = keys.worker_key(worker_id, "score")
            counts = {"settled": gain.settled, "credit": gain.credit, "unpublished": gain.unpublished}
            writes += [["HINCRBY", key, name, str(count)] for name, count in counts.items() if count]
            if gain.credit:
                writes.append(["ZINCRBY", people_keys.CREDIT_BOARD, str(gain.credit), worker_id])
                if doc and (team := parse_worker(doc).team):
                    writes.append(["ZINCRBY", people_keys.TEAM_CREDIT, str(gain.credit), team])
        return writes


def _row(worker_id: str, worker: Worker | None, score: Score) -> ContributorRow:
    rating = best_known(score.ratings)
    return ContributorRow(
        worker_id=worker_id,
        name=worker.name if worker is not None else worker_id,
        team=worker.team if worker is not None else "",
        accepted=score.accepted,
        rejected=score.rejected,
        tokens=score.tokens,
        credit=float(score.credit),
        escrow=float(score.escrow),
        reputation=None if rating is None else round(rating.reputation, 3),
    )
