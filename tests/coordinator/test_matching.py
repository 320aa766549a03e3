from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_world import NOW, record

from coordinator.ledger_types import NoWork
from coordinator.matching import ANY_NUMBER, GIB, Candidate, Offer, Seeker, expected_shard_s, match
from rankup.protocol import Standing
from rankup.recipe import Recipe

RECIPE = Recipe(rank=8, steps=10, batch_size=4, max_tokens=100)
MOST_TOKENS = 4_000
TIERS = ({"min_memory_gib": 4, "rank": 2}, {"min_memory_gib": 16, "rank": 8}, {"min_memory_gib": 8, "rank": 4})


def offer(round_id: str = "r1", *, free: int = 1000, leased: int = 0, paused: bool = False, **about: Any) -> Offer:
    """A round whose shards have 1,000 tokens and took others 100 s, unless `told` is 0."""
    told = about.pop("told", 4)
    wanted: dict[str, Any] = {"recipe": RECIPE, "lease_target_s": 1200} | about
    return Offer(
        record(round_id, shards=10, **wanted), paused, free, leased, told * 1000, told * 100.0, told_shards=told
    )


def one(seeker: Seeker = Seeker(), *, speed: float | None = None, idle: int = 0, **about: Any) -> Candidate:  # noqa: B008
    speeds = {} if speed is None else {"tiny": speed}
    found = match("w-1", seeker, speeds, [offer(**about)], idle)
    assert not isinstance(found, NoWork), found
    return found[0]


def refused(seeker: Seeker, *offers: Offer, speed: float | None = None) -> NoWork:
    found = match("w-1", seeker, {} if speed is None else {"tiny": speed}, offers, 0)
    assert isinstance(found, NoWork)
    return found


# 1,000 tokens a shard: at 10 tokens/s a shard takes 100 s, and 12 shards take the 1,200 s that a lease should.
SIZES = {
    "nobody knows how fast it is": ({"speed": None}, 1),
    "twelve shards fill the time": ({"speed": 10.0}, 12),
    "half as fast, half as many": ({"speed": 5.0}, 6),
    "a shard that takes longer than the target": ({"speed": 0.1}, 1),
    "very fast: the most of one lease": ({"speed": 1e9}, 16),
    "the round's own most": ({"speed": 1e9, "max_shards_per_lease": 256}, 256),
    "a shorter target": ({"speed": 10.0, "lease_target_s": 250}, 2),
    "nothing told yet: as if every token counted": ({"speed": 10.0, "told": 0}, 3),
    "equal part among those at work and itself": ({"speed": 10.0, "free": 20, "leased": 3}, 5),
    "equal part, rounded up": ({"speed": 10.0, "free": 21, "leased": 3}, 6),
    "equal part among those without work too": ({"speed": 10.0, "free": 20, "leased": 3, "idle": 7}, 2),
    "less time than the target": ({"seeker": Seeker(available_s=350), "speed": 10.0}, 3),
    "more time than the target": ({"seeker": Seeker(available_s=9_999), "speed": 10.0}, 12),
    "nothing free: a copy may have any size": ({"speed": 10.0, "free": 0}, 1),
}


@pytest.mark.parametrize(("about", "shards"), SIZES.values(), ids=SIZES)
def test_a_lease_fills_its_time(about: dict[str, Any], shards: int) -> None:
    assert one(**about).shards == shards


TIER_CASES = {"the highest that fits": (16, None), "the middle one": (15.9, 4), "the lowest": (4, 2)}


@pytest.mark.parametrize(("gib", "rank"), TIER_CASES.values(), ids=TIER_CASES)
def test_memory_decides_the_rank(gib: float, rank: int | None) -> None:
    assert one(Seeker(memory_bytes=int(gib * GIB)), tiers=TIERS).rank == rank


def test_without_tiers_memory_does_not_matter() -> None:
    assert one(Seeker()).rank is None


REFUSALS = {
    "no round": ("no_round", Seeker(), []),
    "not let in": ("waiting", Seeker(standing=Standing.WAITING), [offer()]),
    "all paused": ("paused", Seeker(), [offer(paused=True)]),
    "other models": ("other_models", Seeker(models=("big",)), [offer()]),
    "other workers": ("not_listed", Seeker(), [offer(workers=("w-2",))]),
    "other team": ("not_listed", Seeker(team="blue"), [offer(teams=("red",), workers=("w-2",))]),
    "little memory": ("too_little_memory", Seeker(memory_bytes=2 * GIB), [offer(tiers=TIERS)]),
    "little time": ("too_little_time", Seeker(available_s=99), [offer()]),
    "what can be helped is told first": (
        "too_little_time",
        Seeker(available_s=99),
        [offer("r1", workers=("w-2",)), offer("r2", tiers=TIERS), offer("r3")],
    ),
}


@pytest.mark.parametrize(("why", "seeker", "offers"), REFUSALS.values(), ids=REFUSALS)
def test_who_gets_nothing_is_told_why(why: str, seeker: Seeker, offers: list[Offer]) -> None:
    found = refused(seeker, *offers, speed=10.0)
    assert found.why == why
    assert found.reason.endswith(".")


def test_too_little_memory_and_time_come_with_numbers() -> None:
    assert "takes 4 GiB of memory; here are 2.0" in refused(Seeker(memory_bytes=2 * GIB), offer(tiers=TIERS)).reason
    little = refused(Seeker(available_s=80), offer(), speed=0.5)
    assert "takes about 33 min here; 80 s are left" in little.reason


@pytest.mark.parametrize(
    "about", [{"workers": ("w-1",)}, {"teams": ("red",)}, {"workers": ("w-2",), "teams": ("blue", "red")}]
)
def test_who_is_listed_or_in_a_listed_team_takes_part(about: dict[str, Any]) -> None:
    assert one(Seeker(team="red"), **about).round_id == "r1"


def test_time_is_no_reason_before_speed_is_known() -> None:
    assert one(Seeker(available_s=1.0)).fitting == ANY_NUMBER
    assert one(Seeker(available_s=1.0), speed=10.0, told=0).fitting == ANY_NUMBER


def test_the_round_with_the_fewest_volunteers_for_its_priority_comes_first_then_the_oldest() -> None:
    older = offer("r5", leased=2)
    older = Offer(older.record.model_copy(update={"opened_at": NOW - 1}), False, 10, 2)
    offers = [
        offer("r1", leased=3),
        offer("r2", leased=9, priority=9),
        offer("r3", leased=2),
        older,
        offer("r6", paused=True),
    ]
    found = match("w-1", Seeker(), {}, offers, 0)
    assert not isinstance(found, NoWork)
    assert [candidate.round_id for candidate in found] == ["r2", "r5", "r3", "r1"]


EXPECTED = {
    "measured": ({"told": 2}, 10.0, 100.0),
    "speed without tokens": ({"told": 0}, 10.0, MOST_TOKENS / 10),
    "as long as it took others": ({"told": 2}, None, 100.0),
    "the whole lease": ({"told": 0}, None, 1200.0),
}


@pytest.mark.parametrize(("about", "speed", "seconds"), EXPECTED.values(), ids=EXPECTED)
def test_how_long_a_shard_should_take(about: dict[str, Any], speed: float | None, seconds: float) -> None:
    assert expected_shard_s(offer(**about), speed) == seconds
    assert one(speed=speed, **about).shard_s == seconds
    assert one(speed=speed, **about).known is (speed is not None)


@given(
    speed=st.none() | st.floats(1e-6, 1e12),
    free=st.integers(0, 10_000),
    leased=st.integers(0, 10_000),
    idle=st.integers(0, 10_000),
    told=st.integers(0, 100),
    available_s=st.none() | st.floats(0, 1e7),
)
def test_a_lease_is_never_more_than_its_time_its_part_or_its_most(
    speed: float | None, free: int, leased: int, idle: int, told: int, available_s: float | None
) -> None:
    place = offer(free=free, leased=leased, told=told)
    found = match("w-1", Seeker(available_s=available_s), {} if speed is None else {"tiny": speed}, [place], idle)
    if isinstance(found, NoWork):
        assert (found.why, available_s is not None) == ("too_little_time", True)
        return
    [candidate] = found
    assert 1 <= candidate.shards <= 16
    if candidate.shards > 1:
        assert candidate.shards <= math.ceil(free / (leased + max(1, idle)))
        assert candidate.shards * candidate.shard_s <= 1200 * (1 + 1e-9)
    if candidate.fitting < ANY_NUMBER and available_s is not None:
        assert candidate.shards * candidate.shard_s <= available_s * (1 + 1e-9)
