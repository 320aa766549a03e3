"""Low-rank mathematics against dense float64, and the laws of integer coefficients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.lowrank import coefficients, gram, inner_product, product_norm
from rankup.errors import InputError
from rankup.fixedpoint import Factors, dequantise, quantise

DENOMINATOR_LOG2 = 16


def random_factors(seed: int, d_out: int, d_in: int, rank: int) -> Factors:
    rng = np.random.default_rng(seed)
    return quantise(rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in)))


def dense(factors: Factors) -> np.ndarray:
    b, a = dequantise(factors)
    return b @ a


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 16))


@given(st.integers(0, 2**32), shapes)
def test_the_norm_of_a_product_is_that_of_the_dense_matrix(seed: int, shape: tuple[int, int, int]) -> None:
    factors = random_factors(seed, *shape)
    assert product_norm(factors) == pytest.approx(np.linalg.norm(dense(factors)), rel=1e-10)


@given(st.integers(0, 2**32), shapes, st.integers(1, 8))
def test_the_inner_product_is_that_of_the_dense_matrices(seed: int, shape: tuple[int, int, int], other: int) -> None:
    d_out, d_in, rank = shape
    left, right = random_factors(seed, d_out, d_in, rank), random_factors(seed + 1, d_out, d_in, other)
    scale = product_norm(left) * product_norm(right)
    assert inner_product(left, right) == pytest.approx(np.sum(dense(left) * dense(right)), abs=1e-9 * scale + 1e-300)


def test_the_gram_matrix_is_symmetric_and_gives_distances() -> None:
    products = [random_factors(seed, 9, 7, 3) for seed in range(4)]
    matrix = gram(products)
    np.testing.assert_array_equal(matrix, matrix.T)
    distance = np.linalg.norm(dense(products[1]) - dense(products[2]))
    assert math.sqrt(matrix[1, 1] + matrix[2, 2] - 2 * matrix[1, 2]) == pytest.approx(distance)
    assert math.sqrt(matrix[3, 3]) == pytest.approx(product_norm(products[3]))


def test_factors_that_cancel_each_other_do_not_hide_their_product() -> None:
    """B = [x, x + tiny], A = [y; -y]: huge factors, tiny product; the plain trace formula would lose it."""
    x = np.full((8, 1), 1024.0)
    tiny = np.zeros((8, 1))
    tiny[0] = 2.0**-4
    factors = quantise(np.hstack([x, x + tiny]), np.vstack([np.full((1, 8), 1024.0), np.full((1, 8), -1024.0)]))
    assert product_norm(factors) == pytest.approx(np.linalg.norm(dense(factors)), rel=1e-6)


def test_products_of_different_shapes_have_no_inner_product() -> None:
    with pytest.raises(InputError):
        inner_product(random_factors(0, 3, 4, 2), random_factors(0, 4, 3, 2))


norms = st.floats(1e-6, 1e6)
tokens = st.integers(1, 10**9)
cohorts = st.lists(st.tuples(norms, tokens), min_size=1, max_size=20)


@given(st.lists(tokens, min_size=1, max_size=40), st.integers(0, 30))
def test_weights_sum_to_exactly_one_when_nothing_is_clipped(counts: list[int], log2: int) -> None:
    weights = coefficients([1.0] * len(counts), counts, 1.5, log2)
    assert sum(weights) == 2**log2
    for weight, count in zip(weights, counts, strict=True):
        assert abs(weight - count * 2**log2 / sum(counts)) < 1 + 1e-6


@given(cohorts, st.randoms(use_true_random=False))
def test_the_order_of_contributions_does_not_matter(cohort: list[tuple[float, int]], random: object) -> None:
    shuffled = list(cohort)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def outcome(members: list[tuple[float, int]]) -> list[tuple[float, int, int]]:
        weights = coefficients([norm for norm, _ in members], [count for _, count in members], 1.5, DENOMINATOR_LOG2)
        return sorted((*member, weight) for member, weight in zip(members, weights, strict=True))

    assert outcome(cohort) == outcome(shuffled)


@given(cohorts, st.integers(-20, 20), st.integers(1, 1000))
def test_units_of_norm_and_tokens_do_not_matter(cohort: list[tuple[float, int]], shift: int, factor: int) -> None:
    sizes, counts = [norm for norm, _ in cohort], [count for _, count in cohort]
    plain = coefficients(sizes, counts, 1.5, DENOMINATOR_LOG2)
    scaled = coefficients([n * 2.0**shift for n in sizes], [c * factor for c in counts], 1.5, DENOMINATOR_LOG2)
    assert plain == scaled


@given(cohorts, st.floats(1, 4))
@settings(max_examples=200)
def test_no_contribution_moves_the_weights_further_than_the_clip_allows(
    cohort: list[tuple[float, int]], ratio: float
) -> None:
    sizes, counts = [norm for norm, _ in cohort], [count for _, count in cohort]
    weights = coefficients(sizes, counts, ratio, DENOMINATOR_LOG2)
    limit = ratio * float(np.median(sizes))
    free = coefficients([1.0] * len(counts), counts, 1.0, DENOMINATOR_LOG2)
    assert sum(weights) <= 2**DENOMINATOR_LOG2
    for weight, size, share in zip(weights, sizes, free, strict=True):
        assert weight * size <= (share + 1) * limit * (1 + 1e-9)


CASES = {
    # 300 of 600 tokens are half of 65536; norm 6 against a limit of 1.5 * 1 is a quarter of that.
    "one of three is four times too long": ([1.0, 6.0, 1.0], [150, 300, 150], [16384, 8192, 16384]),
    "one alone is never clipped": ([1e6], [7], [65536]),
    "thirds: the one unit that is left goes to the smaller norm": ([1.2, 1.0, 1.1], [5, 5, 5], [21845, 21846, 21845]),
    "a tiny share may round to nothing": ([1.0, 1.0], [1, 10**9], [0, 65536]),
}


@pytest.mark.parametrize(("sizes", "counts", "expected"), CASES.values(), ids=CASES.keys())
def test_coefficients_of_named_cohorts(sizes: list[float], counts: list[int], expected: list[int]) -> None:
    assert coefficients(sizes, counts, 1.5, DENOMINATOR_LOG2) == expected


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([], []), ([1.0], [1, 2]), ([0.0], [1]), ([math.inf], [1]), ([math.nan], [1]), ([1.0], [0])],
    ids=["none", "lengths differ", "zero norm", "infinite norm", "no number", "no tokens"],
)
def test_senseless_cohorts_are_refused(sizes: list[float], counts: list[int]) -> None:
    with pytest.raises(InputError):
        coefficients(sizes, counts, 1.5, DENOMINATOR_LOG2)
