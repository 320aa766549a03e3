"""Reputation: how a contributor's work compares with that of the others, by what the rounds measured of it.

    standings_of(cohort, worker_of, refused)  who did better than whom in one round
    games(standings)                          the same in small groups, which is what is rated
    rate(ratings, game)                       new ratings (Plackett-Luce, as openskill computes it)
    trust(valid_in_a_row, rating)             how far admission may rely on a worker

Workers are ranked by the slope of the held-out loss along their delta (the check "descent"), which does not depend on
how much they trained; where it was not measured for all, by the held-out loss itself. Whoever a check of the cohort
left out comes after them, and whoever failed a check of admission, an audit above all, comes last. A worker with
several contributions is ranked by its worst one.

A rating is a normal distribution: mu the estimate, sigma its uncertainty (Weng and Lin, "A Bayesian Approximation
Method for Online Ranking", JMLR 12, 2011). Reputation is mu - 3 sigma, and begins at 0. In 60 simulated campaigns of 40
rounds with 8 to 54 contributors, whoever always came last was below -12.5 after 4 to 7 rounds; nobody whose place was
chance was ever below -10.1, or below 0 at the end.

What always holds: everything is a function of its arguments, so the same records give the same ratings. The only module
that imports openskill. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankup.records import Check, Cohort, Member, Receipt

MU: Final = 25.0
SIGMA: Final = 25.0 / 3.0
GAME: Final = 8
"""Contributors that are rated together: the cost of a rating grows with the square of it."""
NO_TRUST: Final = -1.5 * SIGMA
"""At this reputation every contribution is audited."""
HONEST_REFUSALS: Final = frozenset({"upload", "size", "round"})
"""Checks of admission that bad luck fails as well."""


@dataclass(frozen=True)
class Rating:
    mu: float = MU
    sigma: float = SIGMA

    @property
    def reputation(self) -> float:
        """Lower bound of the estimate: mu - 3 sigma."""
        return self.mu - 3.0 * self.sigma


@dataclass(frozen=True)
class Place:
    """A worker's place in a round; a smaller key is better, equal keys are a draw."""

    worker_id: str
    key: tuple[int, float]


def standings_of(cohort: Cohort, worker_of: Mapping[str, str], refused: Iterable[Receipt] = ()) -> list[Place]:
    """The places of a round, best first; empty where nothing was measured that tells one from another.

    `worker_of` is contribution -> worker id; `refused` are receipts of contributions that admission did not accept.
    """
    by_slope = all(_value(member, "descent") is not None for member in cohort.members if _passed(member))
    worst: dict[str, tuple[int, float]] = {}

    def put(worker_id: str, key: tuple[int, float]) -> None:
        worst[worker_id] = max(worst.get(worker_id, key), key)

    for member in cohort.members:
        worker_id = worker_of.get(member.contribution)
        if worker_id is not None:
            put(worker_id, _key(member, by_slope=by_slope))
    for receipt in refused:
        if not receipt.accepted and any(_blames(check) for check in receipt.checks):
            put(receipt.submission.worker_id, (2, 0.0))
    if len(set(worst.values())) < 2:
        return []
    return [Place(worker_id, key) for worker_id, key in sorted(worst.items(), key=lambda item: (item[1], item[0]))]


def _key(member: Member, *, by_slope: bool) -> tuple[int, float]:
    if not _passed(member):
        return 1, 0.0
    if by_slope:
        return 0, -(_value(member, "descent") or 0.0)
    return 0, _value(member, "heldout") or 0.0


def _passed(member: Member) -> bool:
    return all(check.passed for check in member.checks)


def _value(member: Member, name: str) -> float | None:
    return next((check.value for check in member.checks if check.name == name), None)


def _blames(check: Check) -> bool:
    return not check.passed and check.name not in HONEST_REFUSALS


def games(standings: Sequence[Place]) -> list[list[Place]]:
    """The same places dealt out like cards into groups of at most `GAME`, so that each has good and bad ones."""
    count = -(-len(standings) // GAME)
    return [list(standings[number::count]) for number in range(count)]


def rate(ratings: Mapping[str, Rating], game: Sequence[Place]) -> dict[str, Rating]:
    """Worker id -> its rating after one game; who is not in `ratings` is a newcomer. Fewer than two change nothing."""
    if len(game) < 2:
        return {}
    model = _model()
    before = [ratings.get(place.worker_id, Rating()) for place in game]
    ranks = [sum(other.key < place.key for other in game) for place in game]
    teams = [[model.rating(mu=rating.mu, sigma=rating.sigma)] for rating in before]
    after = model.rate(teams, ranks=ranks)
    return {place.worker_id: Rating(one.mu, one.sigma) for place, [one] in zip(game, after, strict=True)}


def _model() -> Any:
    from openskill.models import PlackettLuce

    return PlackettLuce(mu=MU, sigma=SIGMA)


def trust(valid_in_a_row: int, rating: Rating | None) -> int:
    """How many valid contributions in a row a worker is treated as having, where audits are drawn (`aggregator.audit`).

    All of them down to a reputation of 0; fewer and fewer below; none from `NO_TRUST` on, so that everything is
    audited. A good reputation adds nothing: it is earned in the company of others, an audit is not.
    """
    if rating is None or rating.reputation >= 0.0:
        return valid_in_a_row
    return int(valid_in_a_row * max(0.0, 1.0 - rating.reputation / NO_TRUST))


def best_known(ratings: Mapping[str, Rating]) -> Rating | None:
    """Of a worker's ratings, by model, the one with the least uncertainty; None without any."""
    return min(ratings.items(), key=lambda item: (item[1].sigma, item[0]))[1] if ratings else None
