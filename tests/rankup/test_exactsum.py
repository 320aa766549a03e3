"""The arithmetic law against an oracle that knows only Python integers and fractions."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_oracle import (
    EVERY_KERNEL,
    OneByOne,
    check_against_oracle,
    gaussian_terms,
    make_factors,
    oracle_float32,
    oracle_sum,
    power,
)

from rankup import exactsum, products
from rankup.errors import DeltaError, InputError, IntegrityError, SetupError
from rankup.exactsum import COEFFICIENT_MAX, Sum, Term, exact_sum, fold_tensor, grid_exponent
from rankup.fixedpoint import EXPONENT_MAX, EXPONENT_MIN, MANTISSA_MAX, Factors, quantise
from rankup.products import DGEMM

REPOSITORY = Path(__file__).resolve().parents[2]

# -- strategies --------------------------------------------------------------------------------------------------------

mantissas = st.one_of(
    st.sampled_from([0, 1, -1, 2, MANTISSA_MAX, -MANTISSA_MAX]), st.integers(-MANTISSA_MAX, MANTISSA_MAX)
)
wide_exponents = st.one_of(
    st.sampled_from([EXPONENT_MIN, EXPONENT_MAX, 0, -20, -30]), st.integers(EXPONENT_MIN, EXPONENT_MAX)
)
usual_exponents = st.integers(-35, -15)
int8_mantissas = st.one_of(st.sampled_from([0, 1, -1, 127, -127]), st.integers(-127, 127))
coefficients = st.one_of(
    st.sampled_from([0, 1, -1, 2**16, 2**31, COEFFICIENT_MAX, -COEFFICIENT_MAX]),
    st.integers(-COEFFICIENT_MAX, COEFFICIENT_MAX),
    st.integers(0, 2**16),
)


@st.composite
def sums(draw: st.DrawFn, exponents: st.SearchStrategy[int] = wide_exponents) -> tuple[list[Term], int]:
    d_out, d_in = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    terms: list[Term] = []
    for rank in draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)):
        b = draw(st.lists(mantissas, min_size=d_out * rank, max_size=d_out * rank))
        a = draw(st.lists(mantissas, min_size=d_in * rank, max_size=d_in * rank))
        factors = make_factors(
            np.array(b).reshape(d_out, rank),
            np.array(a).reshape(rank, d_in),
            draw(st.lists(exponents, min_size=rank, max_size=rank)),
            draw(st.lists(exponents, min_size=rank, max_size=rank)),
        )
        terms.append((draw(coefficients), factors))
    return terms, draw(st.sampled_from([0, 1, 16, 30]))


@st.composite
def int8_sums(draw: st.DrawFn) -> tuple[list[Term], int]:
    """Sums that the grid seldom rounds: close exponents, coefficients that share odd parts; int16 among them."""
    d_out, d_in = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    odd = draw(st.sampled_from([1, 3, 2**20 + 1, 2**35 + 1]))
    terms: list[Term] = []
    for rank in draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)):
        dtype, values = draw(st.sampled_from([(np.int8, int8_mantissas)] * 4 + [(np.int16, mantissas)]))
        factors = make_factors(
            np.array(draw(st.lists(values, min_size=d_out * rank, max_size=d_out * rank))).reshape(d_out, rank),
            np.array(draw(st.lists(values, min_size=d_in * rank, max_size=d_in * rank))).reshape(rank, d_in),
            draw(st.lists(st.integers(-30, -24), min_size=rank, max_size=rank)),
            draw(st.lists(st.integers(-30, -24), min_size=rank, max_size=rank)),
            dtype,
        )
        terms.append((draw(st.sampled_from([odd, -odd, 2 * odd, 1024, -1, 0, 5])), factors))
    return terms, draw(st.sampled_from([0, 1, 16, 30]))


# -- the sum -----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(sums())
def test_the_sum_is_that_of_python_integers(case: tuple[list[Term], int]) -> None:
    for kernels in EVERY_KERNEL:
        check_against_oracle(*case, kernels=kernels)


@settings(max_examples=200, deadline=None)
@given(sums(usual_exponents))
def test_the_sum_is_that_of_python_integers_for_usual_exponents(case: tuple[list[Term], int]) -> None:
    for kernels in EVERY_KERNEL:
        check_against_oracle(*case, kernels=kernels)


@settings(max_examples=300, deadline=None)
@given(int8_sums())
def test_int8_and_mixed_factors_have_the_same_sum_on_every_path(case: tuple[list[Term], int]) -> None:
    for kernels in EVERY_KERNEL:
        check_against_oracle(*case, kernels=kernels)


ONES = np.ones((2, 1), dtype=np.int64)
WORST_CASES: dict[str, tuple[list[Term], int]] = {
    "largest mantissas, one component": ([(1, make_factors(ONES * 32767, ONES.T * 32767))], 0),
    "largest mantissas, coefficient 2^16": ([(2**16, make_factors(ONES * -32767, ONES.T * 32767))], 16),
    "largest coefficient": ([(COEFFICIENT_MAX, make_factors(ONES * 32767, ONES.T * -32767))], 30),
    "smallest product": ([(1, make_factors(ONES, ONES.T, [EXPONENT_MIN], [EXPONENT_MIN]))], 30),
    "largest product": ([(COEFFICIENT_MAX, make_factors(ONES * 32767, ONES.T * 32767, [100], [100]))], 0),
    "both ends of the exponents": (
        [
            (1, make_factors(ONES * 32767, ONES.T * 32767, [EXPONENT_MAX], [EXPONENT_MAX])),
            (2**16, make_factors(ONES * 32767, ONES.T * 32767, [EXPONENT_MIN], [EXPONENT_MIN])),
        ],
        16,
    ),
    "ties on the grid, up and down": (
        [
            (1, make_factors(ONES * 16384, ONES.T, [38], [0])),
            *((c, make_factors(np.array([[n], [-n]]), ONES.T, [-1], [0])) for c in (1, 3) for n in (1, 3, 5, 7)),
        ],
        0,
    ),
    "a bound that is a power of two": ([(1, make_factors(ONES * 16384, ONES.T * 16384))], 0),
}


@pytest.mark.parametrize("name", WORST_CASES)
def test_worst_cases_are_exact(name: str) -> None:
    for kernels in EVERY_KERNEL:
        check_against_oracle(*WORST_CASES[name], kernels=kernels)


@pytest.mark.parametrize("signs", ["same", "mixed"])
@pytest.mark.parametrize("spread", [0, 40])
def test_rank_above_1024_with_every_mantissa_at_its_limit_is_exact(signs: str, spread: int) -> None:
    rng = random.Random(7)
    rank, terms = 275, []
    for coefficient in (1, 40_000, 2**16, 2**16):
        sign = np.array([rng.choice([-1, 1]) if signs == "mixed" else 1 for _ in range(4 * rank)])
        terms.append(
            (
                coefficient,
                make_factors(
                    32767 * sign[: 2 * rank].reshape(2, rank),
                    32767 * sign[2 * rank :].reshape(rank, 2),
                    [rng.randint(-20 - spread, -20) for _ in range(rank)],
                    [rng.randint(-20 - spread, -20) for _ in range(rank)],
                ),
            )
        )
    check_against_oracle(terms, 16)


def test_a_sum_of_rows_is_on_the_grid_of_the_whole_tensor() -> None:
    terms = gaussian_terms(1, d_out=12, d_in=5, ranks=[3, 4])
    whole, grid = exact_sum(terms, 16)
    part, part_grid = exact_sum(terms, 16, slice(4, 9))
    assert part_grid == grid
    assert np.array_equal(part, whole[4:9])


def test_nothing_to_add_has_no_grid() -> None:
    zero = make_factors(np.zeros((2, 1)), np.ones((1, 3)))
    alive = make_factors(np.ones((2, 1)), np.ones((1, 3)))
    assert grid_exponent([], 16) is None
    assert grid_exponent([(5, zero), (0, alive)], 16) is None
    x, _ = exact_sum([(5, zero), (0, alive)], 16, slice(1, 2))
    assert x.tolist() == [[0.0, 0.0, 0.0]]


def test_sums_that_break_the_law_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = make_factors(np.ones((2, 3)), np.ones((3, 2)))
    other = make_factors(np.ones((2, 3)), np.ones((3, 4)))
    with pytest.raises(InputError, match="coefficient"):
        grid_exponent([(COEFFICIENT_MAX + 1, factors)], 16)
    for denominator_log2 in (-1, 31):
        with pytest.raises(InputError, match="denominator"):
            grid_exponent([(1, factors)], denominator_log2)
    with pytest.raises(DeltaError, match="different shapes"):
        grid_exponent([(1, factors), (1, other)], 16)
    with pytest.raises(InputError, match="no shape"):
        exact_sum([], 16)
    monkeypatch.setattr(products, "TOTAL_RANK_MAX", 5)
    with pytest.raises(DeltaError, match="rank components"):
        grid_exponent([(1, factors), (1, factors)], 16)


# -- independence of how it is computed --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sums(usual_exponents), st.randoms(use_true_random=False))
def test_the_order_of_contributions_and_components_does_not_show(
    case: tuple[list[Term], int], rng: random.Random
) -> None:
    terms, denominator_log2 = case
    shuffled = list(terms)
    rng.shuffle(shuffled)
    permuted: list[Term] = []
    for coefficient, f in shuffled:
        order = rng.sample(range(f.rank), f.rank)
        permuted.append(
            (
                coefficient,
                Factors(f.b[:, order], f.b_exp[order], f.a[order], f.a_exp[order], f.b_max[order], f.a_max[order]),
            )
        )
    expected, grid = exact_sum(terms, denominator_log2)
    found, found_grid = exact_sum(permuted, denominator_log2)
    assert found_grid == grid
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("row_tile", [1, 7, 64, 10_000, None])
@pytest.mark.parametrize(("columns", "block"), [(1, 1), (5, 40), (512, 2**15)])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiles_of_rows_and_of_columns_do_not_show(
    row_tile: int | None, columns: int, block: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = gaussian_terms(2, d_out=50, d_in=33, ranks=[4, 9, 1, 16], bits=bits)
    master = np.random.default_rng(3).normal(size=(50, 33)).astype(np.float32)
    expected = fold_tensor(master, terms, 16, kernels=[DGEMM])
    monkeypatch.setattr(exactsum, "_COLUMNS_MIN", columns)
    monkeypatch.setattr(exactsum, "_COLUMNS_MAX", 3)
    monkeypatch.setattr(exactsum, "_LINES_BYTES", 1)
    monkeypatch.setattr(exactsum, "_LEFT_BYTES", 1)
    monkeypatch.setattr(exactsum, "_ROWS_MIN", 3)
    monkeypatch.setattr(exactsum, "_BLOCK", block)
    for kernels in EVERY_KERNEL:
        assert fold_tensor(master, terms, 16, row_tile=row_tile, kernels=kernels).tobytes() == expected.tobytes()


def test_products_added_one_by_one_in_any_order_are_the_concatenated_product() -> None:
    terms = gaussian_terms(4, d_out=64, d_in=48, ranks=[8] * 20)
    expected, grid = exact_sum(terms, 16)
    for seed in range(3):
        assert Sum(terms, 16, kernels=[OneByOne(seed)]).path == "one-by-one"
        found, found_grid = exact_sum(terms, 16, kernels=[OneByOne(seed)])
        assert found_grid == grid
        assert found.tobytes() == expected.tobytes()


def test_a_negative_zero_of_a_kernel_does_not_reach_the_sum() -> None:
    terms: list[Term] = [(1, make_factors(np.array([[-5]]), np.array([[0, 3]])))]
    raw = OneByOne(0).multiply(np.array([[-5.0]]), np.array([[0.0, 3.0]]))
    assert np.signbit(raw[0, 0])
    assert not np.signbit(Sum(terms, 0, kernels=[OneByOne(0)]).delta()[0, 0])


FOLD_SCRIPT = """
import hashlib, numpy as np
from integer_oracle import gaussian_terms
from rankup.exactsum import Sum, fold_tensor
master = np.random.default_rng(5).normal(size=(512, 640)).astype(np.float32)
for bits in (8, 16):
    terms = [(3 * 2**10, factors) for _, factors in gaussian_terms(6, d_out=512, d_in=640, ranks=[16] * 20, bits=bits)]
    print(Sum(terms, 16).path, hashlib.sha256(fold_tensor(master, terms, 16).tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_number_of_threads_and_the_kernel_of_the_blas_do_not_show() -> None:
    digests = set()
    for threads, kernel in (("1", ""), ("2", ""), ("2", "Nehalem"), ("1", "Haswell")):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}",
        }
        if kernel:
            environment["OPENBLAS_CORETYPE"] = kernel
        done = subprocess.run(
            [sys.executable, "-c", FOLD_SCRIPT],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    (digest,) = digests
    assert digest.startswith("sgemm ")
    assert "dgemm " in digest


# -- rows of the sum ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(sums(st.one_of(wide_exponents, st.integers(-90, -60))))
def test_a_delta_is_the_sum_rounded_once_to_nearest_even(case: tuple[list[Term], int]) -> None:
    terms, denominator_log2 = case
    total = Sum(terms, denominator_log2)
    expected = oracle_sum(terms, denominator_log2)
    assert total.shape == (terms[0][1].d_out, terms[0][1].d_in)
    assert total.is_zero == (expected is None)
    if expected is None:
        assert total.grid is None
        assert total.path == "zero"
        assert total.delta().tobytes() == np.zeros(total.shape, dtype=np.float32).tobytes()
        return
    x, grid = expected
    assert total.grid == grid
    rounded = [oracle_float32(integer * power(grid)) for row in x for integer in row]
    if None in rounded:
        with pytest.raises(DeltaError, match="range of float32"):
            total.delta()
    else:
        found = total.delta()
        assert [Fraction(value) for value in found.reshape(-1).tolist()] == rounded
        assert not np.signbit(found[np.array(x) == 0]).any()


def test_a_delta_is_read_by_rows_and_the_whole_is_its_rows() -> None:
    total = Sum(gaussian_terms(13, d_out=23, d_in=9, ranks=[3, 2]), 16)
    whole = total.delta()
    pieces = [total.delta(slice(start, start + 5)) for start in range(0, 23, 5)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    assert total.delta(slice(7, 7)).shape == (0, 9)
    with pytest.raises(InputError, match="in order"):
        total.delta(slice(None, None, 2))
    with pytest.raises(InputError, match="no shape"):
        Sum([], 16)


def test_a_vector_is_the_product_of_its_column_and_one() -> None:
    rng = np.random.default_rng(14)
    vectors = [rng.normal(size=(37, 1)) for _ in range(5)]
    terms = [(1000 + k, quantise(vector, np.ones((1, 1)))) for k, vector in enumerate(vectors)]
    check_against_oracle(terms, 16)
    wanted = sum(c / 2**16 * vector for (c, _), vector in zip(terms, vectors, strict=True))
    np.testing.assert_allclose(Sum(terms, 16).delta(), wanted, rtol=0, atol=1e-5)


# -- the fold ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(sums(st.one_of(wide_exponents, st.integers(-90, -60))), st.data())
def test_the_fold_rounds_twice_to_nearest_even(case: tuple[list[Term], int], data: st.DataObject) -> None:
    terms, denominator_log2 = case
    shape = terms[0][1].d_out, terms[0][1].d_in
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    flat = data.draw(st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    master = np.array(flat, dtype=np.float32).reshape(shape)
    expected = oracle_sum(terms, denominator_log2)
    if expected is None:
        assert fold_tensor(master, terms, denominator_log2).tobytes() == master.tobytes()
        return
    x, grid = expected
    results: list[Fraction | None] = []
    for row, line in zip(x, master.tolist(), strict=True):
        for integer, weight in zip(row, line, strict=True):
            delta = oracle_float32(integer * power(grid))
            results.append(None if delta is None else oracle_float32(Fraction(weight) + delta))
    if None in results:
        with pytest.raises(DeltaError, match="range of float32"):
            fold_tensor(master, terms, denominator_log2)
    else:
        folded = fold_tensor(master, terms, denominator_log2)
        assert [Fraction(value) for value in folded.reshape(-1).tolist()] == results


def test_no_terms_leave_every_bit_as_it_was() -> None:
    master = np.array([[-0.0, 1e-45], [np.inf, 1.0]], dtype=np.float32)
    for terms in ([], [(0, make_factors(np.ones((2, 1)), np.ones((1, 2))))]):
        folded = fold_tensor(master, terms, 16)
        assert folded.tobytes() == master.tobytes()
        assert folded is not master
        assert not np.shares_memory(folded, master)


def test_a_negative_zero_becomes_positive_where_a_live_delta_adds_nothing() -> None:
    master = np.array([[-0.0, -0.0]], dtype=np.float32)
    factors = make_factors(np.array([[-5]]), np.array([[0, 3]]))
    folded = fold_tensor(master, [(1, factors)], 0)
    assert folded.tolist() == [[0.0, -15.0]]
    assert not np.signbit(folded[0, 0])


def test_the_master_is_left_as_it_is() -> None:
    terms = gaussian_terms(8, d_out=6, d_in=5, ranks=[2])
    master = np.ones((6, 5), dtype=np.float32)
    master.flags.writeable = False
    assert not np.array_equal(fold_tensor(master, terms, 16), master)


def test_folds_that_cannot_be_right_are_refused() -> None:
    terms: list[Term] = [(1, make_factors(np.ones((2, 1)), np.ones((1, 2))))]
    huge: list[Term] = [(1, make_factors(np.ones((2, 1)), np.ones((1, 2)), [EXPONENT_MAX], [EXPONENT_MAX]))]
    ones = np.ones((2, 2), dtype=np.float32)
    with pytest.raises(InputError, match="float32 matrix"):
        fold_tensor(ones.astype(np.float64), terms, 0)
    with pytest.raises(DeltaError, match="does not fit"):
        fold_tensor(np.ones((2, 3), dtype=np.float32), terms, 0)
    with pytest.raises(DeltaError, match="range of float32"):
        fold_tensor(ones, huge, 0)
    with pytest.raises(IntegrityError, match="master"):
        fold_tensor(np.full((2, 2), np.nan, dtype=np.float32), terms, 0)
    with pytest.raises(InputError, match="empty"):
        fold_tensor(ones, terms, 0, row_tile=0)


@contextmanager
def rounding_upwards() -> Iterator[None]:
    library = ctypes.CDLL(None)
    if platform.machine() not in ("x86_64", "AMD64") or library.fesetround(0x800):
        pytest.skip("the rounding direction of this processor is set in another way")
    try:
        yield
    finally:
        library.fesetround(0)


def test_a_thread_that_rounds_in_one_direction_may_not_sum() -> None:
    total = Sum([(1, make_factors(np.ones((2, 1)), np.ones((1, 2))))], 0)
    with rounding_upwards(), pytest.raises(SetupError, match="nearest even"):
        total.delta()
    assert total.delta().tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_rint_that_does_not_go_to_even_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    terms: list[Term] = [(1, make_factors(np.ones((2, 1)), np.ones((1, 2))))]
    monkeypatch.setattr(exactsum.np, "rint", lambda values: np.floor(values + 0.5))
    with pytest.raises(SetupError, match="nearest even"):
        exact_sum(terms, 0)


def test_a_thread_that_flushes_subnormals_may_not_fold() -> None:
    torch = pytest.importorskip("torch")
    terms: list[Term] = [(1, make_factors(np.ones((2, 1)), np.ones((1, 2))))]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(SetupError, match="subnormal"):
            fold_tensor(np.ones((2, 2), dtype=np.float32), terms, 0)
    finally:
        torch.set_flush_denormal(False)
    fold_tensor(np.ones((2, 2), dtype=np.float32), terms, 0)
