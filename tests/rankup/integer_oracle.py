"""What the law should give, from Python's integers and fractions alone; factors and kernels to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from rankup.exactsum import KERNELS, Kernel, Term, exact_sum, grid_exponent
from rankup.fixedpoint import Factors, quantise
from rankup.products import DGEMM, NumpyKernel

EAGER_SGEMM = NumpyKernel("sgemm", np.dtype(np.float32), 2**24, -1e9)
"""float32 wherever it is exact, however many products it takes."""
EVERY_KERNEL = ([DGEMM], [EAGER_SGEMM])


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def live_components(terms: Sequence[Term], denominator_log2: int) -> list[tuple[list[Fraction], list[int], int]]:
    """(column of c·b·2^eb/2^p, row of a, exponent of a) of every component that is not zero."""
    found = []
    for coefficient, factors in terms:
        for k in range(factors.rank):
            scale = coefficient * power(int(factors.b_exp[k]) - denominator_log2)
            column = [int(value) * scale for value in factors.b[:, k]]
            row = [int(value) for value in factors.a[k, :]]
            if any(column) and any(row):
                found.append((column, row, int(factors.a_exp[k])))
    return found


def oracle_sum(terms: Sequence[Term], denominator_log2: int) -> tuple[list[list[int]], int] | None:
    """X and G, from the definition."""
    parts = live_components(terms, denominator_log2)
    if not parts:
        return None
    bound = sum(max(map(abs, column)) * max(map(abs, row)) * power(e) for column, row, e in parts)
    grid = bound.numerator.bit_length() - bound.denominator.bit_length() - 52 - 2
    while bound >= power(grid + 52):
        grid += 1
    assert bound >= power(grid + 51)
    d_out, d_in = terms[0][1].d_out, terms[0][1].d_in
    x = [[0] * d_in for _ in range(d_out)]
    reach = [[0] * d_in for _ in range(d_out)]
    for column, row, exponent in parts:
        for i, value in enumerate(column):
            beta = round(value * power(exponent - grid))  # Fraction rounds half to even
            for j, alpha in enumerate(row):
                x[i][j] += beta * alpha
                reach[i][j] += abs(beta * alpha)
    assert max(map(max, reach)) < 2**53
    return x, grid


def oracle_float32(value: Fraction) -> Fraction | None:
    """Nearest float32, ties to even; None where that is infinite."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < power(exponent):
        exponent -= 1
    unit = power(max(exponent - 23, -149))
    rounded = round(value / unit) * unit
    return rounded if abs(rounded) < power(128) else None


def make_factors(
    b: np.ndarray,
    a: np.ndarray,
    b_exp: Sequence[int] | None = None,
    a_exp: Sequence[int] | None = None,
    dtype: type[np.int16] | type[np.int8] = np.int16,
) -> Factors:
    """Factors of given mantissas and exponents (0 unless given)."""
    rank = b.shape[1]
    return Factors(
        b=b.astype(dtype),
        b_exp=np.array([0] * rank if b_exp is None else b_exp, dtype=np.int16),
        a=a.astype(dtype),
        a_exp=np.array([0] * rank if a_exp is None else a_exp, dtype=np.int16),
        b_max=np.abs(b).max(axis=0).astype(np.int16),
        a_max=np.abs(a).max(axis=1).astype(np.int16),
    )


def gaussian_terms(seed: int, *, d_out: int, d_in: int, ranks: Sequence[int], bits: Literal[8, 16] = 16) -> list[Term]:
    """Random contributions with coefficients below 2^16 and components of different sizes."""
    rng = np.random.default_rng(seed)
    return [
        (
            int(rng.integers(1, 2**16)),
            quantise(
                (rng.normal(size=(d_out, rank)) * 2.0 ** rng.integers(-12, 3, size=rank)).astype(np.float32),
                rng.normal(size=(rank, d_in)).astype(np.float32),
                bits=bits,
            ),
        )
        for rank in ranks
    ]


def check_against_oracle(terms: Sequence[Term], denominator_log2: int, *, kernels: Sequence[Kernel] = KERNELS) -> None:
    """X and G of `exact_sum` are those of the definition, without negative zero."""
    expected = oracle_sum(terms, denominator_log2)
    if expected is None:
        assert grid_exponent(terms, denominator_log2) is None
        return
    x, grid = exact_sum(terms, denominator_log2, kernels=kernels)
    assert grid == expected[1] == grid_exponent(terms, denominator_log2)
    assert x.tolist() == expected[0]
    assert not np.signbit(x[x == 0]).any()


class OneByOne:
    """A product that adds one component after the other, in an order of its own."""

    name, dtype, operand_max, limit, cost = "one-by-one", np.dtype(np.float64), 2**53, 2**53, -1.0

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def hold(self, right: np.ndarray, /) -> np.ndarray:
        return right

    def multiply(self, left: np.ndarray, right: Any, /) -> np.ndarray:
        order = np.random.default_rng(self.seed).permutation(left.shape[1])
        result = left[:, order[:1]] * right[order[0]]  # starts from a product: its zeros may be negative
        for k in order[1:]:
            result += left[:, k : k + 1] * right[k]
        return result
