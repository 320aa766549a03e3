"""Low-rank mathematics against dense float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import lowrank
from aggregator.lowrank import cosines, gram, gram_of, inner_product, product_norm
from rankup.errors import InputError
from rankup.fixedpoint import Factors, dequantise, quantise


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


def dense_gram(products: Sequence[Factors]) -> np.ndarray:
    flat = np.array([dense(product).ravel() for product in products])
    return np.asarray(flat @ flat.T)


def distances(matrix: np.ndarray) -> np.ndarray:
    squares = np.diagonal(matrix)[:, None] + np.diagonal(matrix)[None, :] - 2 * matrix
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def assert_gram(found: np.ndarray, expected: np.ndarray) -> None:
    """Symmetric, not negative on the diagonal, and within the accuracy that `gram` states."""
    np.testing.assert_array_equal(found, found.T)
    assert (np.diagonal(found) >= 0).all()
    scale = np.diagonal(expected)[:, None] + np.diagonal(expected)[None, :]
    assert (np.abs(found - expected) <= 1e-6 * scale).all()


@given(st.integers(0, 2**32), shapes, st.integers(1, 7), st.booleans())
@settings(deadline=None)
def test_the_gram_matrix_is_that_of_the_dense_matrices_whatever_the_ranks(
    seed: int, shape: tuple[int, int, int], count: int, narrow: bool
) -> None:
    rng = np.random.default_rng(seed)
    d_out, d_in, most = shape
    products = []
    for _ in range(count):
        rank = int(rng.integers(1, most + 1))
        b, a = rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in)) * 10.0 ** rng.integers(-9, 9)
        products.append(quantise(b, a, bits=8 if narrow else 16))
    assert_gram(gram(products), dense_gram(products))


def test_blocks_of_contributions_and_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    products = [random_factors(seed, 37, 23, 1 + seed % 5) for seed in range(9)]
    whole = gram(products)
    monkeypatch.setattr(lowrank, "BLOCK_COMPONENTS", 6)
    monkeypatch.setattr(lowrank, "CHUNK_COLUMNS", 5)
    assert_gram(gram(products), dense_gram(products))
    np.testing.assert_allclose(gram(products), whole, rtol=1e-6, atol=1e-6 * whole.max())


def test_distances_at_the_size_of_a_model_are_right_to_a_hundred_thousandth_of_themselves() -> None:
    """Contributions of a common part, as honest ones have it, at cosines of about 0.5."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((5632, 4)), rng.standard_normal((4, 2048))
    products = [
        quantise(np.hstack([b, rng.standard_normal((5632, 4))]), np.vstack([a, rng.standard_normal((4, 2048))]))
        for _ in range(6)
    ]
    exact = np.array([[inner_product(left, right) for right in products] for left in products])
    places = np.triu_indices(6, 1)
    np.testing.assert_allclose(distances(gram(products))[places], distances(exact)[places], rtol=1e-5)


@given(st.integers(0, 2**32), st.integers(1, 5))
@settings(deadline=None)
def test_other_factors_of_the_same_product_change_nothing_but_rounding(seed: int, rank: int) -> None:
    """B -> B R, A -> R^-1 A with a badly scaled R: an attacker's way to look small or large in the factors."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((12, rank)), rng.standard_normal((rank, 9))
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0] * 10.0 ** rng.integers(-6, 6, rank)
    plain, turned = quantise(b, a), quantise(b @ turn, np.linalg.inv(turn) @ a)
    other = random_factors(seed + 1, 12, 9, 3)
    found = gram([plain, turned, other])
    norm, distance = math.sqrt(found[0, 0]), distances(found)
    assert distance[0, 1] <= 1e-2 * norm
    assert distance[0, 2] == pytest.approx(distance[1, 2], rel=2e-3)


def test_factors_that_cancel_each_other_do_not_blur_the_gram_matrix() -> None:
    """B = [x, x + small], A = [y; -y]: components 10^4 times longer than their product, which float32 would lose."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((64, 1)), rng.standard_normal((1, 48))
    cancelling = [
        quantise(np.hstack([x, x + 1e-4 * rng.standard_normal((64, 1))]), np.vstack([1e4 * y, -1e4 * y]))
        for _ in range(3)
    ]
    products = [random_factors(2, 64, 48, 2), *cancelling]
    assert_gram(gram(products), dense_gram(products))
    nothing = quantise(np.hstack([x, x]), np.vstack([y, -y]))
    assert 0 <= gram([products[0], nothing])[1, 1] < 1e-20


def test_components_of_very_different_sizes_stay_apart() -> None:
    """Exponents far outside float32's range on their own."""
    b, a = np.ones((4, 2)), np.ones((2, 3))
    products = [quantise(b * 2.0**-150, a * 2.0**100), quantise(b * 2.0**100, a * 2.0**-150)]
    np.testing.assert_allclose(gram(products), np.full((2, 2), 48.0) * 2.0**-100, rtol=1e-6)


def test_a_whole_delta_is_the_sum_over_its_weights_and_slices() -> None:
    deltas: list[dict[str, tuple[Factors, ...]]] = [
        {"q": (random_factors(1, 6, 5, 2),), "experts": tuple(random_factors(10 + e, 4, 3, 2) for e in range(3))},
        {"q": (random_factors(2, 6, 5, 4),)},
        {"experts": tuple(random_factors(20 + e, 4, 3, 1) for e in range(3)), "norm": (random_factors(3, 7, 1, 1),)},
    ]
    sizes = {"experts": 3 * 12, "norm": 7, "q": 30}

    def flat(delta: dict[str, tuple[Factors, ...]]) -> np.ndarray:
        parts = [
            np.concatenate([dense(part).ravel() for part in delta[name]]) if name in delta else np.zeros(size)
            for name, size in sizes.items()
        ]
        return np.concatenate(parts)

    vectors = np.array([flat(delta) for delta in deltas])
    found = gram_of([lambda name, delta=delta: delta.get(name, ()) for delta in deltas], sorted(sizes))
    np.testing.assert_allclose(found, vectors @ vectors.T, rtol=1e-6, atol=1e-6 * np.max(vectors @ vectors.T))


def test_cosines_are_between_minus_one_and_one_and_zero_beside_a_zero() -> None:
    x = np.array([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    expected = np.array([[1, 1, -1, 0, 0.5**0.5], [1, 1, -1, 0, 0.5**0.5], [-1, -1, 1, 0, -(0.5**0.5)]])
    np.testing.assert_allclose(cosines(x @ x.T)[:3], expected, atol=1e-15)
    assert not cosines(x @ x.T)[3].any()


def test_factors_that_cancel_each_other_do_not_hide_their_product() -> None:
    """B = [x, x + tiny], A = [y; -y]: huge factors, tiny product; the plain trace formula would lose it."""
    x = np.full((8, 1), 1024.0)
    tiny = np.zeros((8, 1))
    tiny[0] = 2.0**-4
    factors = quantise(np.hstack([x, x + tiny]), np.vstack([np.full((1, 8), 1024.0), np.full((1, 8), -1024.0)]))
    assert product_norm(factors) == pytest.approx(np.linalg.norm(dense(factors)), rel=1e-6)


def test_products_of_different_shapes_have_no_inner_product() -> None:
    left, right = random_factors(0, 3, 4, 2), random_factors(0, 4, 3, 2)
    with pytest.raises(InputError):
        inner_product(left, right)
    with pytest.raises(InputError):
        gram([left, right])


def test_deltas_with_different_numbers_of_slices_have_no_gram_matrix() -> None:
    one, two = (random_factors(0, 3, 4, 2),), (random_factors(0, 3, 4, 2), random_factors(1, 3, 4, 2))
    with pytest.raises(InputError):
        gram_of([lambda _: one, lambda _: two], ["experts"])
