"""The number format: what quantising and splitting keep, and what is no fixed-point factor."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from integer_oracle import gaussian_terms, power

from rankup.errors import DeltaError
from rankup.fixedpoint import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    MANTISSA_MAX,
    MANTISSA_MAX_INT8,
    Factors,
    dequantise,
    quantise,
    split,
)

LIMITS: dict[Literal[8, 16], int] = {16: MANTISSA_MAX, 8: MANTISSA_MAX_INT8}


EDGES = [
    32767.0, 32767.4999, 32767.5, 32768.0, 32766.5, 16384.0, 16383.9, 1.0, 2.0**-149, 3 * 2.0**-149, 2.0**-160,
    2.0**-184, 2.0**-215, 2.0**-250, 32767 * 2.0**100,
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.sampled_from(EDGES),
        st.floats(0, 32767 * 2.0**100),
        st.integers(1, 2**40).map(lambda n: n / 2**11),
        st.sampled_from([126.5, 127.0, 127.4999, 127.5, 128.0, 63.5, 127 * 2.0**100]),
    ),
    st.sampled_from([8, 16]),
)
def test_the_exponent_is_the_smallest_whose_mantissas_fit(value: float, bits: Literal[8, 16]) -> None:
    limit = LIMITS[bits]
    assume(value <= limit * 2.0**EXPONENT_MAX)
    factors = quantise(np.array([[value], [-value / 3]]), np.array([[-value, value / 2]]), bits=bits)
    assert factors.mantissa_max == limit
    exact = Fraction(value)
    for mantissas_, exponent, maximum in (
        (factors.b[:, 0], int(factors.b_exp[0]), int(factors.b_max[0])),
        (factors.a[0], int(factors.a_exp[0]), int(factors.a_max[0])),
    ):
        assert maximum == max(abs(int(m)) for m in mantissas_)
        if maximum == 0:
            assert exponent == 0
            assert round(exact / power(EXPONENT_MIN)) == 0
        else:
            assert maximum == round(exact / power(exponent))
            assert maximum <= limit
            assert exponent == EXPONENT_MIN or round(exact / power(exponent - 1)) > limit
    factors.verify()


@pytest.mark.parametrize("bits", [8, 16])
def test_quantising_what_was_quantised_changes_nothing(bits: Literal[8, 16]) -> None:
    rng = np.random.default_rng(9)
    b, a = rng.normal(size=(40, 6)) * 10.0 ** rng.integers(-40, 30, size=6), rng.normal(size=(6, 30))
    first = quantise(b, a, bits=bits)
    second = quantise(*dequantise(first), bits=bits)
    for field in ("b", "b_exp", "a", "a_exp", "b_max", "a_max"):
        assert np.array_equal(getattr(first, field), getattr(second, field)), field


def test_a_zero_component_has_exponent_and_mantissas_zero() -> None:
    factors = quantise(np.zeros((3, 2), dtype=np.float32), np.ones((2, 4), dtype=np.float32))
    assert factors.b_exp.tolist() == [0, 0]
    assert not factors.b.any()
    assert factors.is_zero


def test_int8_factors_are_half_the_bytes_and_lose_about_a_hundredth() -> None:
    rng = np.random.default_rng(15)
    b, a = rng.normal(size=(512, 16)), rng.normal(size=(16, 384))
    factors = quantise(b, a, bits=8)
    assert (factors.b.dtype, factors.a.dtype, factors.b_max.dtype) == (np.int8, np.int8, np.int16)
    b_back, a_back = dequantise(factors)
    error = np.linalg.norm(b_back @ a_back - b @ a) / np.linalg.norm(b @ a)
    assert 1e-3 < error < 2.5e-2


# -- two slices --------------------------------------------------------------------------------------------------------


def product_error(b: np.ndarray, a: np.ndarray, factors: Factors) -> tuple[Fraction, Fraction]:
    """(largest error of an entry of the product, sum over k of max|B[:, k]| · max|A[k, :]|), both exactly."""
    left, right = ([[Fraction(float(x)) for x in row] for row in matrix] for matrix in dequantise(factors))
    worst = Fraction(0)
    for i in range(b.shape[0]):
        for j in range(a.shape[1]):
            exact = sum(Fraction(float(b[i, k])) * Fraction(float(a[k, j])) for k in range(b.shape[1]))
            worst = max(worst, abs(sum(left[i][k] * right[k][j] for k in range(factors.rank)) - exact))
    maxima = zip(np.abs(b).max(axis=0).tolist(), np.abs(a).max(axis=1).tolist(), strict=True)
    return worst, sum((Fraction(x) * Fraction(y) for x, y in maxima), Fraction(0))


SPLIT_ERROR = Fraction(1, 2**29) * (1 + Fraction(1, 2**13))
values_of_float32 = st.one_of(
    st.floats(-(2.0**40), 2.0**40, width=32),
    st.sampled_from([32767.5, 16383.5, 16384.49, 1.0, -1.0, 1 / 3, 2.0**-149]),
    st.integers(-(2**24), 2**24).map(float),
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.data())
def test_a_split_product_is_within_2_to_the_minus_29_of_its_maxima(rank: int, data: st.DataObject) -> None:
    b = np.array(data.draw(st.lists(values_of_float32, min_size=3 * rank, max_size=3 * rank)), dtype=np.float32)
    a = np.array(data.draw(st.lists(values_of_float32, min_size=2 * rank, max_size=2 * rank)), dtype=np.float32)
    b, a = b.reshape(3, rank), a.reshape(rank, 2)
    factors = split(b, a)
    factors.verify()
    assert factors.rank == 4 * rank
    error, maxima = product_error(b, a, factors)
    floor = power(EXPONENT_MIN - 1) * sum(Fraction(float(x)) for x in (*np.abs(b).max(axis=0), *np.abs(a).max(axis=1)))
    assert error <= SPLIT_ERROR * maxima + 2 * floor


def test_one_slice_is_outside_the_bound_of_two() -> None:
    rng = np.random.default_rng(16)
    b, a = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    error, maxima = product_error(b, a, quantise(b, a))
    assert error > SPLIT_ERROR * maxima
    error, maxima = product_error(b, a, split(b, a))
    assert error <= SPLIT_ERROR * maxima


def test_a_split_of_what_one_slice_holds_has_no_other_live_component() -> None:
    rng = np.random.default_rng(17)
    b, a = dequantise(quantise(rng.normal(size=(5, 3)), rng.normal(size=(3, 4))))
    factors = split(b, a)
    assert ((factors.b_max > 0) & (factors.a_max > 0)).tolist() == [True] * 3 + [False] * 9
    b_back, a_back = dequantise(factors)
    assert np.array_equal(b_back[:, :3], b)
    assert np.array_equal(a_back[:3], a)


# -- what is refused ---------------------------------------------------------------------------------------------------


REFUSED_FACTORS = {
    "NaN in B": (np.array([[np.nan], [1.0]]), np.ones((1, 2))),
    "minus infinity in A": (np.ones((2, 1)), np.array([[-np.inf, 1.0]])),
    "above the largest exponent": (np.array([[32767.5 * 2.0**EXPONENT_MAX]]), np.ones((1, 1))),
    "ranks differ": (np.ones((2, 3)), np.ones((2, 3))),
    "no rank": (np.ones((2, 0)), np.ones((0, 3))),
    "a vector": (np.ones(2), np.ones((1, 3))),
}


@pytest.mark.parametrize("name", REFUSED_FACTORS)
def test_factors_that_have_no_fixed_point_form_are_refused(name: str) -> None:
    for write in (quantise, split, partial(quantise, bits=8)):
        with pytest.raises(DeltaError):
            write(*REFUSED_FACTORS[name])


@pytest.mark.parametrize("bits", [8, 16])
def test_values_outside_the_format_do_not_verify(bits: Literal[8, 16]) -> None:
    rng = np.random.default_rng(18)
    factors = quantise(rng.normal(size=(4, 2)), rng.normal(size=(2, 3)), bits=bits)
    factors.verify()
    lowest = factors.b.copy()
    lowest[1, 1] = np.iinfo(lowest.dtype).min
    with pytest.raises(DeltaError, match=f"B holds the mantissa -{LIMITS[bits] + 1}"):
        replace(factors, b=lowest).verify()
    with pytest.raises(DeltaError, match="maxima of A"):
        replace(factors, a_max=factors.a_max + np.int16(1)).verify()
    for exponent in (EXPONENT_MIN - 1, EXPONENT_MAX + 1):
        with pytest.raises(DeltaError, match="exponent of A"):
            replace(factors, a_exp=np.full(2, exponent, dtype=np.int16)).verify()


def test_mantissas_are_both_int16_or_both_int8_and_scales_int16() -> None:
    wide, narrow = (quantise(np.ones((4, 2)), np.ones((2, 3)), bits=bits) for bits in LIMITS)
    for field, array in {"b": narrow.b, "a": narrow.a, "b_exp": wide.b_exp.astype(np.int8)}.items():
        with pytest.raises(DeltaError, match="int16"):
            replace(wide, **{field: array})
    with pytest.raises(DeltaError, match="one rank"):
        replace(wide, b_max=wide.b_max[:1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_relative_error_of_a_gaussian_product_is_below_2e_4(dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(10)
    b, a = rng.normal(size=(512, 16)).astype(dtype) / 64, rng.normal(size=(16, 384)).astype(dtype)
    exact = b.astype(np.float64) @ a.astype(np.float64)
    b_back, a_back = dequantise(quantise(b, a))
    assert np.linalg.norm(b_back @ a_back - exact) / np.linalg.norm(exact) < 2e-4


def test_the_entry_bound_is_above_every_entry_and_far_above_a_product_that_cancels() -> None:
    factors = gaussian_terms(11, d_out=20, d_in=10, ranks=[5])[0][1]
    b, a = dequantise(factors)
    assert np.abs(b @ a).max() <= factors.entry_bound
    cancelling = quantise(np.array([[1e9, -1e9, 1.0]]), np.ones((3, 2)))
    b, a = dequantise(cancelling)
    assert np.linalg.norm(b @ a) < 2
    assert cancelling.entry_bound > 1e9
