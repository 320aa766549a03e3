"""The outer step: against exact fractions rounded once an operation, and its rules about zeros and infinities."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.errors import DeltaError, IntegrityError, SetupError
from rankup.outer import outer_step
from rankup.recipe import PLAIN_SUM, OuterStep

NESTEROV = OuterStep(learning_rate=0.75, momentum=0.875)
SGD = PLAIN_SUM

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_one = st.floats(-4.0, 4.0, width=32)
numbers = st.one_of(finite, near_one)
steps = st.builds(
    OuterStep,
    learning_rate=st.integers(1, 16 * 256).map(lambda n: n / 256),
    momentum=st.integers(0, 255).map(lambda n: n / 256),
)


class LeavesFloat32Error(Exception):
    """The oracle's infinity."""


def fl(value: Fraction) -> Fraction:
    """The float32 next to `value`, ties to even, as IEEE 754 defines it."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    ulp = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(value / ulp) * ulp
    if abs(rounded) >= 2**128:
        raise LeavesFloat32Error
    return rounded


def oracle(w: float, d: float, m: float, step: OuterStep) -> tuple[Fraction, Fraction | None]:
    """One entry of the step in exact arithmetic, rounded after each operation."""
    weight, delta, momentum = Fraction(w), Fraction(d), Fraction(m)
    beta, rate = Fraction(step.momentum), Fraction(step.learning_rate)
    update, new = delta, None
    if beta:
        new = fl(fl(beta * momentum) + delta)
        update = fl(delta + fl(beta * new))
    return fl(weight + fl(rate * update)), new


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


@given(numbers, numbers, numbers, steps)
def test_every_operation_is_rounded_on_its_own(w: float, d: float, m: float, step: OuterStep) -> None:
    try:
        expected_weight, expected_momentum = oracle(w, d, m, step)
    except LeavesFloat32Error:
        with pytest.raises(DeltaError, match="out of the range"):
            outer_step(row(w), row(d), row(m), step)
        return
    weight, momentum = outer_step(row(w), row(d), row(m), step)
    assert Fraction(float(weight[0, 0])) == expected_weight
    if expected_momentum is None:
        assert momentum is None
    else:
        assert momentum is not None
        assert Fraction(float(momentum[0, 0])) == expected_momentum


@given(numbers, numbers, steps)
def test_what_is_not_there_counts_as_plus_zero(w: float, x: float, step: OuterStep) -> None:
    for delta, momentum in ((None, row(x)), (row(x), None)):
        if delta is None and not step.keeps_state:
            continue
        try:
            found = outer_step(row(w), delta, momentum, step)
        except DeltaError:
            continue
        full = outer_step(row(w), row(0) if delta is None else delta, row(0) if momentum is None else momentum, step)
        for one, other in zip(found, full, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.tobytes() == other.tobytes()


def test_the_plain_sum_is_one_addition() -> None:
    rng = np.random.default_rng(0)
    w, d = rng.standard_normal((2, 50, 70)).astype(np.float32)
    weight, momentum = outer_step(w, d, None, SGD)
    assert momentum is None
    assert weight.tobytes() == (w + d).tobytes()


def test_a_fused_multiply_add_would_give_another_number() -> None:
    u = 1 + 2.0**-23
    weight, _ = outer_step(row(-0.75), row(u), None, OuterStep(learning_rate=0.75, momentum=0))
    assert weight[0, 0] == 2.0**-23
    assert np.float32(0.75 * u - 0.75) != weight[0, 0]


@pytest.mark.parametrize(
    ("w", "d", "m", "step", "weight", "momentum"),
    [
        (-0.0, 0.0, None, SGD, "+0", None),
        (-0.0, -0.0, None, SGD, "-0", None),
        (-0.0, None, None, SGD, "-0", None),
        (0.0, -0.0, None, SGD, "+0", None),
        (-0.0, -0.0, None, NESTEROV, "+0", "+0"),
        (-0.0, -0.0, -0.0, NESTEROV, "-0", "-0"),
        (-0.0, None, -0.0, NESTEROV, "+0", "+0"),
        (-0.0, 1.0, -1 / 0.875, NESTEROV, "0.75", "+0"),
        (-0.0, -0.0, -(2.0**-149), OuterStep(learning_rate=1, momentum=0.25), "-0", "-0"),
        (-0.0, None, -(2.0**-149), OuterStep(learning_rate=1, momentum=0.25), "+0", "+0"),
    ],
)
def test_the_sign_of_a_zero_is_defined(
    w: float, d: float | None, m: float | None, step: OuterStep, weight: str, momentum: str | None
) -> None:
    found = outer_step(row(w), None if d is None else row(d), None if m is None else row(m), step)
    assert [None if x is None else f"{x[0, 0]:+g}".replace("+0.75", "0.75") for x in found] == [weight, momentum]


def test_without_a_sum_and_without_a_state_every_bit_stays() -> None:
    odd = np.array([[0x7FC12345, 0xFF800000, 0x80000000, 1]], dtype=np.uint32).view(np.float32)
    weight, momentum = outer_step(odd, None, row(1, 1, 1, 1), SGD)
    assert weight.tobytes() == odd.tobytes()
    assert momentum is None


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_rows_may_be_stepped_apart(cut: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, d, m = rng.standard_normal((3, 10, 9)).astype(np.float32)
    whole = outer_step(w, d, m, NESTEROV)
    parts = [outer_step(w[r], d[r], m[r], NESTEROV) for r in (slice(0, cut), slice(cut, 10))]
    for side in range(2):
        joined = np.concatenate([part[side] for part in parts])  # type: ignore[misc]
        assert joined.tobytes() == whole[side].tobytes()  # type: ignore[union-attr]


def test_many_numbers_are_stepped_like_one() -> None:
    rng = np.random.default_rng(0)
    w, d, m = rng.standard_normal((3, 3, 50_000)).astype(np.float32)
    weight, momentum = outer_step(w, d, m, NESTEROV)
    beta, rate = np.float32(0.875), np.float32(0.75)
    expected = beta * m + d
    assert momentum is not None
    assert momentum.tobytes() == expected.tobytes()
    assert weight.tobytes() == (w + rate * (d + beta * expected)).tobytes()


def test_the_operands_are_left_as_they_are() -> None:
    w, d, m = row(1, 2), row(3, 4), row(5, 6)
    outer_step(w, d, m, NESTEROV)
    assert (w.tolist(), d.tolist(), m.tolist()) == ([[1, 2]], [[3, 4]], [[5, 6]])


BIG = 3e38


@pytest.mark.parametrize(
    ("w", "d", "m", "step", "error", "words"),
    [
        (float("nan"), 1.0, None, SGD, IntegrityError, "the master"),
        (float("inf"), 1.0, 1.0, NESTEROV, IntegrityError, "the master"),
        (1.0, 1.0, float("inf"), NESTEROV, IntegrityError, "the momentum"),
        (1.0, None, float("nan"), NESTEROV, IntegrityError, "the momentum"),
        (BIG, BIG, None, SGD, DeltaError, "takes the master"),
        (1.0, BIG, BIG, NESTEROV, DeltaError, "takes the momentum"),
        (1.0, BIG, None, NESTEROV, DeltaError, "takes the master"),
        (1.0, BIG, None, OuterStep(learning_rate=2, momentum=0), DeltaError, "takes the master"),
    ],
)
def test_nothing_infinite_comes_out(
    w: float, d: float | None, m: float | None, step: OuterStep, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        outer_step(row(w), None if d is None else row(d), None if m is None else row(m), step)


def test_a_momentum_is_ignored_where_none_is_kept() -> None:
    weight, momentum = outer_step(row(1), row(2), row(float("nan")), SGD)
    assert (weight.tolist(), momentum) == ([[3]], None)


@contextmanager
def rounding(mode: int) -> Iterator[None]:
    """Another rounding direction for this thread (fesetround)."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    before = libm.fegetround()
    if libm.fesetround(mode):
        pytest.skip("this processor has no such rounding direction")
    try:
        yield
    finally:
        libm.fesetround(before)


@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00], ids=["down", "up", "to zero"])
def test_a_thread_that_rounds_in_one_direction_may_not_step(mode: int) -> None:
    with rounding(mode), pytest.raises(SetupError, match="nearest even"):
        outer_step(row(1), None, row(1), NESTEROV)
    outer_step(row(1), None, row(1), NESTEROV)


def test_a_thread_that_flushes_subnormals_may_not_step() -> None:
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(SetupError, match="subnormal"):
            outer_step(row(1), None, row(1), NESTEROV)
    finally:
        torch.set_flush_denormal(False)
