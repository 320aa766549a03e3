"""The loss curve of a lease stays small and true."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.history import MAX_POINTS, LossCurve


def test_a_short_training_is_shown_step_by_step() -> None:
    curve = LossCurve()
    for step in range(1, 6):
        curve.add(step, 10.0 / step)
    assert curve.points() == tuple((step, 10.0 / step) for step in range(1, 6))


@given(st.integers(1, 20 * MAX_POINTS), st.integers(1, 7))
def test_whatever_the_length_the_points_are_few_and_weigh_every_step_alike(steps: int, first: int) -> None:
    curve = LossCurve()
    for step in range(first, first + steps):
        curve.add(step, float(step))
    points = curve.points()
    assert 1 <= len(points) <= MAX_POINTS
    assert points[-1][0] == first + steps - 1
    ends = [first - 1, *(step for step, _ in points)]
    for before, (end, mean) in zip(ends, points, strict=False):
        assert mean == pytest.approx((before + 1 + end) / 2)
    widths = [end - before for before, end in pairwise(ends)]
    assert len(set(widths[:-1])) <= 1


def test_steps_that_are_computed_again_replace_what_they_computed_first() -> None:
    curve = LossCurve()
    for step in (1, 2, 3, 4, 5):
        curve.add(step, 1.0)
    for step in (3, 4):
        curve.add(step, 2.0)
    assert curve.points() == ((1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0))
