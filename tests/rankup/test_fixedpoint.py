"""The arithmetic law against an oracle that knows only Python integers and fractions."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup import bfloat16, exactsum
from rankup.bfloat16 import from_bfloat16, to_bfloat16
from rankup.errors import DeltaError, InputError, IntegrityError, SetupError
from rankup.exactsum import COEFFICIENT_MAX, Term, exact_sum, fold_tensor, grid_exponent
from rankup.fixedpoint import EXPONENT_MAX, EXPONENT_MIN, MANTISSA_MAX, Factors, dequantise, quantise

REPOSITORY = Path(__file__).resolve().parents[2]


# -- the oracle --------------------------------------------------------------------------------------------------------


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def components(terms: Sequence[Term], denominator_log2: int) -> list[tuple[list[Fraction], list[int], int]]:
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
    parts = components(terms, denominator_log2)
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
    b: np.ndarray, a: np.ndarray, b_exp: Sequence[int] | None = None, a_exp: Sequence[int] | None = None
) -> Factors:
    rank = b.shape[1]
    return Factors(
        b=b.astype(np.int16),
        b_exp=np.array([0] * rank if b_exp is None else b_exp, dtype=np.int16),
        a=a.astype(np.int16),
        a_exp=np.array([0] * rank if a_exp is None else a_exp, dtype=np.int16),
        b_max=np.abs(b).max(axis=0).astype(np.int16),
        a_max=np.abs(a).max(axis=1).astype(np.int16),
    )


def gaussian_terms(seed: int, *, d_out: int, d_in: int, ranks: Sequence[int]) -> list[Term]:
    rng = np.random.default_rng(seed)
    return [
        (
            int(rng.integers(1, 2**16)),
            quantise(
                (rng.normal(size=(d_out, rank)) * 2.0 ** rng.integers(-12, 3, size=rank)).astype(np.float32),
                rng.normal(size=(rank, d_in)).astype(np.float32),
            ),
        )
        for rank in ranks
    ]


def check_against_oracle(terms: Sequence[Term], denominator_log2: int) -> None:
    expected = oracle_sum(terms, denominator_log2)
    if expected is None:
        assert grid_exponent(terms, denominator_log2) is None
        return
    x, grid = exact_sum(terms, denominator_log2)
    assert grid == expected[1] == grid_exponent(terms, denominator_log2)
    assert x.tolist() == expected[0]
    assert not np.signbit(x[x == 0]).any()


# -- strategies --------------------------------------------------------------------------------------------------------

mantissas = st.one_of(
    st.sampled_from([0, 1, -1, 2, MANTISSA_MAX, -MANTISSA_MAX]), st.integers(-MANTISSA_MAX, MANTISSA_MAX)
)
wide_exponents = st.one_of(
    st.sampled_from([EXPONENT_MIN, EXPONENT_MAX, 0, -20, -30]), st.integers(EXPONENT_MIN, EXPONENT_MAX)
)
usual_exponents = st.integers(-35, -15)
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


# -- the sum -----------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(sums())
def test_the_sum_is_that_of_python_integers(case: tuple[list[Term], int]) -> None:
    check_against_oracle(*case)


@settings(max_examples=200, deadline=None)
@given(sums(usual_exponents))
def test_the_sum_is_that_of_python_integers_for_usual_exponents(case: tuple[list[Term], int]) -> None:
    check_against_oracle(*case)


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
    check_against_oracle(*WORST_CASES[name])


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
    monkeypatch.setattr(exactsum, "TOTAL_RANK_MAX", 5)
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


@pytest.mark.parametrize("row_tile", [1, 7, 64, 10_000])
@pytest.mark.parametrize("rank_tile", [1, 5, 1024])
def test_tiles_of_rows_and_of_rank_do_not_show(row_tile: int, rank_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = gaussian_terms(2, d_out=50, d_in=33, ranks=[4, 9, 1, 16])
    master = np.random.default_rng(3).normal(size=(50, 33)).astype(np.float32)
    expected = fold_tensor(master, terms, 16)
    monkeypatch.setattr(exactsum, "_RANK_TILE", rank_tile)
    assert fold_tensor(master, terms, 16, row_tile=row_tile).tobytes() == expected.tobytes()


def test_one_concatenated_product_equals_products_one_by_one_and_in_any_order() -> None:
    terms = gaussian_terms(4, d_out=64, d_in=48, ranks=[8] * 20)
    x, grid = exact_sum(terms, 16)
    plan = exactsum._plan(terms, 16)
    assert plan is not None
    for parts in (plan.parts, plan.parts[::-1]):
        total = np.zeros_like(x)
        for part in parts:
            alone = exactsum._Plan(grid=grid, d_out=64, d_in=48, parts=(part,))
            total = exactsum._sum(alone, slice(None)) + total
        assert total.tobytes() == x.tobytes()


FOLD_SCRIPT = """
import hashlib, numpy as np
from test_fixedpoint import gaussian_terms
from rankup.exactsum import fold_tensor
master = np.random.default_rng(5).normal(size=(512, 640)).astype(np.float32)
folded = fold_tensor(master, gaussian_terms(6, d_out=512, d_in=640, ranks=[16] * 20), 16)
print(hashlib.sha256(folded.tobytes()).hexdigest())
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
    assert len(digests) == 1


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


# -- quantisation ------------------------------------------------------------------------------------------------------


def largest_fits(value: Fraction, exponent: int) -> bool:
    return round(value / power(exponent)) <= MANTISSA_MAX


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
    )
)
def test_the_exponent_is_the_smallest_whose_mantissas_fit(value: float) -> None:
    factors = quantise(np.array([[value], [-value / 3]]), np.array([[-value, value / 2]]))
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
            assert largest_fits(exact, exponent)
            assert exponent == EXPONENT_MIN or not largest_fits(exact, exponent - 1)
    factors.verify()


def test_quantising_what_was_quantised_changes_nothing() -> None:
    rng = np.random.default_rng(9)
    first = quantise(rng.normal(size=(40, 6)) * 10.0 ** rng.integers(-40, 30, size=6), rng.normal(size=(6, 30)))
    second = quantise(*dequantise(first))
    for field in ("b", "b_exp", "a", "a_exp", "b_max", "a_max"):
        assert np.array_equal(getattr(first, field), getattr(second, field)), field


def test_a_zero_component_has_exponent_and_mantissas_zero() -> None:
    factors = quantise(np.zeros((3, 2), dtype=np.float32), np.ones((2, 4), dtype=np.float32))
    assert factors.b_exp.tolist() == [0, 0]
    assert not factors.b.any()
    assert factors.is_zero


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
    with pytest.raises(DeltaError):
        quantise(*REFUSED_FACTORS[name])


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


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


def test_bfloat16_is_that_of_torch_for_every_upper_half_and_every_kind_of_tie() -> None:
    torch = pytest.importorskip("torch")
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (upper[:, None] | lower[None, :]).view(np.float32)
    finite_or_infinite = ~np.isnan(values)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = to_bfloat16(values)
    assert found.shape == values.shape
    assert np.array_equal(found[finite_or_infinite], expected[finite_or_infinite])
    back = from_bfloat16(found)
    assert np.isnan(back[~finite_or_infinite]).all()
    assert (found[~finite_or_infinite] & 0x40).all()
    assert np.array_equal(np.signbit(back), np.signbit(values))


def test_bfloat16_back_and_forth_changes_nothing_and_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(12).normal(size=(37, 29)).astype(np.float32)
    bits = to_bfloat16(values.T)
    assert bits.tobytes() == to_bfloat16(from_bfloat16(bits)).tobytes()
    monkeypatch.setattr(bfloat16, "_TILE", 10)
    assert to_bfloat16(values.T).tobytes() == bits.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)])
def test_bfloat16_keeps_the_shape(shape: tuple[int, ...]) -> None:
    assert to_bfloat16(np.ones(shape, dtype=np.float32)).shape == shape
    assert from_bfloat16(np.zeros(shape, dtype=np.uint16)).shape == shape


def test_bfloat16_of_other_types_is_refused() -> None:
    with pytest.raises(InputError):
        to_bfloat16(np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(InputError):
        from_bfloat16(np.ones(2, dtype=np.int16))
