"""Reputation: places from what was measured, ratings that separate cheats from the unlucky, trust that only shrinks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.audit import probability
from coordinator.reputation import GAME, NO_TRUST, Place, Rating, best_known, games, rate, standings_of, trust
from rankup.protocol import SubmitStatement
from rankup.records import Check, Cohort, Member, Receipt, Submission


def member(number: int, *, slope: float | None = None, loss: float | None = None, passed: bool = True) -> Member:
    checks = [Check(name="near_duplicate", passed=passed, value=0.5)]
    checks += [Check(name="descent", passed=True, value=slope)] if slope is not None else []
    checks += [Check(name="heldout", passed=True, value=loss)] if loss is not None else []
    return Member(contribution=f"{number:064x}", checks=tuple(checks), coefficient=1)


def cohort(*members: Member) -> Cohort:
    return Cohort(
        round_id="r1", rule="mean_by_tokens", denominator_log2=16, members=members, decided_at=1000.0, base_loss=3.0
    )


def refused(worker_id: str, check: str) -> Receipt:
    statement = SubmitStatement(
        round_id="r1",
        lease_id="l-1",
        fence=1,
        base_manifest="0" * 64,
        sha256="f" * 64,
        size_bytes=10,
        tokens=10,
        steps=1,
        first_loss=3.0,
        last_loss=2.0,
        seconds=1.0,
    )
    submission = Submission(
        statement=statement,
        signature="e" * 128,
        public_key="d" * 64,
        worker_id=worker_id,
        worker_name="Eve",
        shard=0,
        submitted_at=900.0,
    )
    checks = (Check(name="size", passed=True), Check(name=check, passed=False, value=0.1))
    return Receipt(submission=submission, accepted=False, reason="no", checks=checks, judged_at=950.0)


OWNERS = {f"{number:064x}": f"w-{number}" for number in range(10)}


def order(places: list[Place]) -> list[list[str]]:
    """Worker ids by place, those of a draw together."""
    keys = sorted({place.key for place in places})
    return [[place.worker_id for place in places if place.key == key] for key in keys]


ORDERS: dict[str, tuple[Cohort, list[Receipt], list[list[str]]]] = {
    "by slope, steepest first": (
        cohort(member(1, slope=0.1, loss=2.0), member(2, slope=0.3, loss=2.5)),
        [],
        [["w-2"], ["w-1"]],
    ),
    "by loss where a slope is missing": (
        cohort(member(1, loss=2.0), member(2, slope=0.3, loss=2.5)),
        [],
        [["w-1"], ["w-2"]],
    ),
    "left out after the worst, an audit last": (
        cohort(member(1, slope=-9.0), member(2, slope=0.3), member(3, slope=9.0, passed=False)),
        [refused("w-4", "audit")],
        [["w-2"], ["w-1"], ["w-3"], ["w-4"]],
    ),
    "a worker is as good as its worst": (
        cohort(member(1, slope=0.5), member(2, slope=0.3), member(3, slope=0.1)),
        [refused("w-1", "audit")],
        [["w-2"], ["w-3"], ["w-1"]],
    ),
    "bad luck is no shame": (
        cohort(member(1, slope=0.5), member(2, slope=0.3)),
        [refused("w-4", "round"), refused("w-5", "upload"), refused("w-6", "size")],
        [["w-1"], ["w-2"]],
    ),
    "nothing measured, nothing said": (cohort(member(1), member(2)), [], []),
    "alone": (cohort(member(1, slope=0.5)), [], []),
    "equal is a draw": (
        cohort(member(1, slope=0.5), member(2, slope=0.5), member(3, slope=0.1)),
        [],
        [["w-1", "w-2"], ["w-3"]],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_places_follow_from_what_was_measured(name: str) -> None:
    found, receipts, wanted = ORDERS[name]
    assert order(standings_of(found, OWNERS, receipts)) == wanted


@given(st.integers(0, 100))
def test_games_hold_everybody_once_and_are_small_and_mixed(count: int) -> None:
    places = [Place(f"w-{number}", (0, float(number))) for number in range(count)]
    dealt = games(places)
    assert sorted(place.worker_id for game in dealt for place in game) == sorted(one.worker_id for one in places)
    assert all(len(game) <= GAME for game in dealt)
    assert all(game[0].key[1] < len(dealt) for game in dealt)


def test_winning_raises_a_rating_losing_lowers_it_and_a_draw_of_equals_does_neither() -> None:
    won, lost = (rate({}, [Place("a", (0, 0.0)), Place("b", (0, 1.0))])[name] for name in "ab")
    assert won.reputation > 0 > lost.reputation
    drawn = rate({}, [Place("a", (0, 0.0)), Place("b", (0, 0.0))])
    assert drawn["a"].mu == pytest.approx(drawn["b"].mu)
    assert rate({}, [Place("a", (0, 0.0))]) == {}


def test_the_same_results_give_the_same_ratings() -> None:
    game = [Place(f"w-{number}", (0, float(number // 2))) for number in range(GAME)]
    first = rate({"w-3": Rating(20.0, 5.0)}, game)
    assert rate({"w-3": Rating(20.0, 5.0)}, game) == first


@pytest.mark.parametrize("seed", range(3))
def test_a_cheat_is_soon_audited_every_time_and_who_is_unlucky_never(seed: int) -> None:
    honest, cheats = [f"h-{number}" for number in range(22)], ["c-0", "c-1"]
    chance = random.Random(seed)
    ratings: dict[str, Rating] = {}
    for number in range(1, 25):
        keys = {name: (0, chance.random()) for name in honest} | dict.fromkeys(cheats, (1, 0.0))
        places = [Place(name, key) for name, key in sorted(keys.items(), key=lambda item: item[1])]
        for game in games(places):
            ratings |= rate(ratings, game)
        if number >= 4:
            assert all(probability(trust(1000, ratings[name])) == 1 for name in cheats)
        assert all(trust(1000, ratings[name]) > 100 for name in honest)
    assert sorted(ratings[name].reputation for name in honest)[len(honest) // 2] > 5


@given(st.integers(0, 10**6), st.none() | st.builds(Rating, st.floats(-100, 100), st.floats(0.1, 10)))
def test_trust_is_never_above_what_was_earned_and_falls_with_the_reputation(valid: int, rating: Rating | None) -> None:
    found = trust(valid, rating)
    assert 0 <= found <= valid
    if rating is None or rating.reputation >= 0:
        assert found == valid
    elif rating.reputation <= NO_TRUST:
        assert found == 0
    else:
        worse = Rating(rating.mu - 1.0, rating.sigma)
        assert trust(valid, worse) <= found


def test_the_best_known_rating_is_the_one_with_the_least_doubt() -> None:
    assert best_known({}) is None
    assert best_known({"a": Rating(30, 8), "b": Rating(10, 2), "c": Rating(20, 2)}) == Rating(10, 2)
    assert Rating().reputation == pytest.approx(0)
