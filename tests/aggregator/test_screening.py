"""Copies and harmful contributions are left out, honest cohorts are not, and the order of arrival does not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.screening import MAD_FLOOR, Candidate, Verdict, screen, screened_weights
from rankup.errors import InputError, StateError
from rankup.recipe import MAX_LOSS_MADS
from rankup.records import Check


def candidate(number: int, *, at: float = 0.0, loss: float | None = None) -> Candidate:
    return Candidate(contribution=f"{number:064x}", tokens=100, submitted_at=at, norm=1.0, loss=loss)


def with_losses(*losses: float | None) -> list[Candidate]:
    return [candidate(number, loss=loss) for number, loss in enumerate(losses)]


def unlike(count: int) -> np.ndarray:
    """The Gram matrix of contributions at right angles."""
    return np.eye(count)


def failed(verdicts: list[Verdict], check: str) -> list[int]:
    return [
        place
        for place, verdict in enumerate(verdicts)
        if any(found.name == check and not found.passed for found in verdict.checks)
    ]


# -- near duplicates ---------------------------------------------------------------------------------------------------


def test_of_copies_the_earliest_counts_and_a_rescaled_copy_is_a_copy() -> None:
    x = np.array([[2.0, 0.1], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    cohort = [candidate(0, at=30), candidate(1, at=40), candidate(2, at=20), candidate(3, at=50)]
    verdicts = screen(cohort, x @ x.T)
    assert failed(verdicts, "near_duplicate") == [0]
    check = verdicts[0].checks[0]
    assert check.value == pytest.approx(2 / math.hypot(2, 0.1))
    assert cohort[2].contribution[:12] in check.detail


def test_contributions_of_the_same_second_are_ordered_by_digest() -> None:
    verdicts = screen([candidate(7), candidate(3), candidate(5)], np.ones((3, 3)))
    assert failed(verdicts, "near_duplicate") == [0, 2]


def test_a_chain_of_likenesses_does_not_drop_its_far_end() -> None:
    """A ~ B and B ~ C, but A and C are apart: B is a copy of A, and C is not a copy of anything that counts."""
    angle = math.acos(0.985)
    x = np.array([[math.cos(turn), math.sin(turn)] for turn in (0, angle, 2 * angle)])
    verdicts = screen([candidate(number, at=number) for number in range(3)], x @ x.T)
    assert failed(verdicts, "near_duplicate") == [1]


def test_without_a_limit_copies_count() -> None:
    assert all(verdict.passed for verdict in screen([candidate(0), candidate(1)], np.ones((2, 2)), max_cosine=None))


# -- descent -----------------------------------------------------------------------------------------------------------

DESCENTS = {
    # median 1.0, so 0.25 is the least.
    "one goes uphill": ((1.0, 1.2, 0.8, 1.0, -0.5), [4]),
    "one hardly moves": ((1.0, 1.2, 0.8, 1.0, 0.2), [4]),
    "a quarter is enough": ((1.0, 1.2, 0.8, 1.0, 0.26), []),
    "where most go uphill nobody is judged": ((-1.0, -1.2, 0.8, -1.0, 0.1), []),
    "three say nothing about each other": ((1.0, 1.0, -9.0), []),
    "what is not finite fails in any cohort": ((1.0, math.nan), [1]),
    "what was not measured is not judged": ((1.0, 1.2, 0.8, 1.0, None), []),
}


@pytest.mark.parametrize(("descents", "expected"), DESCENTS.values(), ids=DESCENTS.keys())
@pytest.mark.parametrize("norm", [1.0, 8.0])
def test_descents_of_named_cohorts_are_judged_by_the_unit_of_norm(
    descents: tuple[float | None, ...], expected: list[int], norm: float
) -> None:
    cohort = [
        replace(candidate(place), norm=norm, descent=None if value is None else norm * value)
        for place, value in enumerate(descents)
    ]
    verdicts = screen(cohort, unlike(len(cohort)))
    assert failed(verdicts, "descent") == expected
    assert all(verdict.passed for verdict in screen(cohort, unlike(len(cohort)), min_descent=None))


# -- held-out loss -----------------------------------------------------------------------------------------------------

COHORTS = {
    # median 2.0; MAD of (0.1, 0, 0.1, 0.2, 1.0) is 0.1; limit 2.4.
    "one is far above the others": ((1.9, 2.0, 2.1, 2.2, 3.0), [4]),
    "just above four deviations": ((1.9, 2.0, 2.1, 1.8, 2.41), [4]),
    "just below four deviations": ((1.9, 2.0, 2.1, 1.8, 2.39), []),
    "far below the others is welcome": ((2.0, 2.0, 2.1, 2.1, 0.5), []),
    # The floor: 0.002 of the base's 3.0, four times: 0.024.
    "almost equal losses": ((2.0, 2.0001, 2.0002, 2.0003, 2.021), []),
    "above the floor": ((2.0, 2.0001, 2.0002, 2.0003, 2.025), [4]),
    "three say nothing about each other": ((2.0, 2.0, 9.0), []),
    "four do": ((2.0, 2.0, 2.0, 9.0), [3]),
    "what is not finite fails in any cohort": ((2.0, math.nan), [1]),
    "what is not finite does not move the median": ((2.0, 2.0, 2.0, 2.0, math.inf, math.inf, math.nan), [4, 5, 6]),
    "what was not measured is not judged": ((2.0, 2.0, 2.0, 2.0, None, 9.0), [5]),
}


@pytest.mark.parametrize(("losses", "expected"), COHORTS.values(), ids=COHORTS.keys())
def test_held_out_losses_of_named_cohorts(losses: tuple[float | None, ...], expected: list[int]) -> None:
    verdicts = screen(with_losses(*losses), unlike(len(losses)), base_loss=3.0)
    assert failed(verdicts, "heldout") == expected
    for verdict, loss in zip(verdicts, losses, strict=True):
        found = [check.value for check in verdict.checks if check.name == "heldout"]
        assert found == ([] if loss is None else [loss if math.isfinite(loss) else None])


SHARDS = {
    # 16 shards reach 2.70, one shard 3.00; the base is at 3.40, so the limit is 0.0272 above the median.
    "each size beside its like": ([(16, 2.7)] * 6 + [(1, 3.0)] * 4, []),
    "a bad one among the small": ([(16, 2.7)] * 6 + [(1, 3.0)] * 4 + [(1, 3.1)], [10]),
    "a large one that did the work of a small one": ([(16, 2.7)] * 6 + [(1, 3.0)] * 4 + [(16, 3.0)], [10]),
    "two small ones and one that is worse than the base": ([(16, 2.7)] * 6 + [(1, 3.0), (1, 3.3), (1, 3.41)], [8]),
    "a size of its own beside the smaller ones": ([(1, 3.0)] * 5 + [(16, 2.7), (8, 3.2)], [6]),
    "half as many shards are alike": ([(16, 2.7)] * 3 + [(9, 2.72)] * 2 + [(1, 3.0)] * 9 + [(16, 2.8)], [14]),
}


@pytest.mark.parametrize(("cohort", "expected"), SHARDS.values(), ids=SHARDS.keys())
def test_losses_are_compared_with_those_of_as_many_shards(cohort: list[tuple[int, float]], expected: list[int]) -> None:
    candidates = [replace(candidate(n, loss=loss), shards=shards) for n, (shards, loss) in enumerate(cohort)]
    assert failed(screen(candidates, unlike(len(cohort)), base_loss=3.4), "heldout") == expected


def test_copies_of_a_bad_contribution_do_not_move_the_median() -> None:
    losses = (2.0, 2.0, 2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    gram = unlike(9)
    gram[4:, 4:] = 1.0
    verdicts = screen(with_losses(*losses), gram, base_loss=3.0)
    assert [place for place, verdict in enumerate(verdicts) if verdict.passed] == [0, 1, 2, 3]


def test_without_a_limit_losses_do_not_matter() -> None:
    verdicts = screen(with_losses(1.0, 1.0, 1.0, 1.0, 99.0), unlike(5), base_loss=1.0, max_loss_mads=None)
    assert all(verdict.passed for verdict in verdicts)


def test_honest_cohorts_of_noisy_losses_lose_few_members() -> None:
    rng = np.random.default_rng(0)
    kept = rejected = 0
    for _ in range(300):
        losses = 2.9 + 0.03 * rng.standard_normal(20)
        verdicts = screen(with_losses(*losses), unlike(20), base_loss=3.4)
        rejected += len(failed(verdicts, "heldout"))
        kept += sum(verdict.passed for verdict in verdicts)
    assert rejected / (kept + rejected) < 0.05


# -- laws --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 10), st.data())
@settings(deadline=None)
def test_the_order_of_the_cohort_does_not_matter(seed: int, count: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 2))
    losses = [float(loss) for loss in 2 + 0.1 * rng.standard_exponential(count)]
    cohort = [candidate(number, at=float(rng.integers(0, 3)), loss=losses[number]) for number in range(count)]
    order = data.draw(st.permutations(range(count)))
    plain = screen(cohort, x @ x.T, base_loss=2.0)
    assert [verdict.contribution for verdict in plain] == [member.contribution for member in cohort]
    moved = screen([cohort[place] for place in order], x[order] @ x[order].T, base_loss=2.0)
    assert [verdict.passed for verdict in moved] == [plain[place].passed for place in order]


@given(st.integers(0, 2**32), st.integers(4, 12), st.floats(0.1, 10))
@settings(deadline=None)
def test_units_of_loss_do_not_matter_and_better_is_never_punished(seed: int, count: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    losses = [float(loss) for loss in 2 + rng.standard_normal(count) * 10.0 ** rng.integers(-5, 0)]
    plain = screen(with_losses(*losses), unlike(count), base_loss=2.5)
    scaled = screen(with_losses(*(loss * unit for loss in losses)), unlike(count), base_loss=2.5 * unit)
    limit = float(np.median(losses)) + MAX_LOSS_MADS * max(
        float(np.median(np.abs(np.array(losses) - np.median(losses)))), MAD_FLOOR * 2.5
    )
    for verdict, other, loss in zip(plain, scaled, losses, strict=True):
        assert verdict.passed or loss > limit - 1e-9
        if abs(loss - limit) > 1e-9:
            assert verdict.passed == other.passed == (loss < limit)


# -- weights -----------------------------------------------------------------------------------------------------------


def verdict(number: int, *, passed: bool) -> Verdict:
    return Verdict(f"{number:064x}", (Check(name="heldout", passed=True), Check(name="near_duplicate", passed=passed)))


def test_who_fails_gets_no_weight_and_the_others_are_weighed_as_if_it_were_not_there() -> None:
    verdicts = [verdict(0, passed=True), verdict(1, passed=False), verdict(2, passed=True)]
    gram = np.diag([1.0, 1e6, 1.0])
    found = screened_weights(
        verdicts, gram, [1, 1000, 3], rule="mean_by_tokens", clip_norm_ratio=1.5, byzantine_share=0.3
    )
    assert list(found) == [0.25, 0.0, 0.75]


def test_nobody_left_is_an_error_for_the_caller() -> None:
    with pytest.raises(StateError):
        screened_weights(
            [verdict(0, passed=False)], np.eye(1), [1], rule="multi_krum", clip_norm_ratio=1.5, byzantine_share=0.3
        )


@pytest.mark.parametrize(
    ("cohort", "gram", "base_loss"),
    [
        ([candidate(0)], np.eye(2), None),
        ([candidate(0), replace(candidate(0), tokens=1)], np.eye(2), None),
        ([candidate(0)], np.eye(1), math.nan),
    ],
    ids=["sizes differ", "one digest twice", "the base has no loss"],
)
def test_senseless_cohorts_are_not_screened(cohort: list[Candidate], gram: np.ndarray, base_loss: float | None) -> None:
    with pytest.raises(InputError):
        screen(cohort, gram, base_loss=base_loss)
