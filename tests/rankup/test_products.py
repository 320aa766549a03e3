"""Which kernel a sum takes, up to which edge, and that the choice never shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_oracle import EAGER_SGEMM, EVERY_KERNEL, OneByOne, check_against_oracle, make_factors

from rankup.exactsum import Sum, Term, exact_sum, fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.products import SGEMM, NumpyKernel, choose, plan


def int8_extremes(rank: int, *, signs: int = 1, b_exp: Sequence[int] | None = None) -> Factors:
    """(2, rank) · (rank, 2) with every mantissa at ±127; the first entry of the product has only equal signs."""
    b = np.full((2, rank), 127)
    b[1, ::2] *= signs
    return make_factors(b, np.full((rank, 2), 127), b_exp, None, np.int8)


def test_float32_takes_int8_factors_up_to_the_edge_of_2_24_in_one_product() -> None:
    widest = (2**24 - 1) // 127**2
    assert widest == 1040
    for rank, chunks in ((widest, 1), (widest + 1, 2), (3 * widest, 3)):
        for signs in (1, -1):
            terms: list[Term] = [(1024, int8_extremes(rank, signs=signs))]
            planned = plan(terms, 16)
            assert planned is not None
            kernel, found = choose(planned, [SGEMM])
            assert (kernel.name, len(found)) == ("sgemm", chunks)
            check_against_oracle(terms, 16, kernels=[SGEMM])


def test_a_kernel_that_states_too_high_a_limit_gives_a_wrong_sum() -> None:
    terms: list[Term] = [(1024, int8_extremes(1041))]
    liar = NumpyKernel("liar", np.dtype(np.float32), 2**26, -1e9)
    assert Sum(terms, 16, kernels=[liar]).path == "liar"
    assert exact_sum(terms, 16, kernels=[liar])[0].tolist() != exact_sum(terms, 16)[0].tolist()


def test_powers_of_two_between_units_go_into_the_mantissas_as_far_as_they_fit() -> None:
    close = [(-1) ** k * 1024 * 2 ** (k % 3) for k in range(4)]
    terms: list[Term] = [(c, int8_extremes(24, b_exp=[-(k % 4) for k in range(24)])) for c in close]
    planned = plan(terms, 16)
    assert planned is not None
    kernel, chunks = choose(planned, [EAGER_SGEMM])
    assert (kernel.name, len(chunks)) == ("sgemm", 1)
    assert sorted({abs(scale) for scale in chunks[0].scale.tolist()}) == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    check_against_oracle(terms, 16, kernels=[EAGER_SGEMM])
    for chunk in choose(planned, [NumpyKernel("narrow", np.dtype(np.float32), 2**21, -1e9)])[1]:
        assert chunk.order is not None
        assert (np.abs(chunk.scale) * planned.b_max[chunk.order] * planned.a_max[chunk.order]).sum() < 2**21


@pytest.mark.parametrize(
    ("terms", "path"),
    [
        ([(1024, int8_extremes(16))] * 64, "sgemm"),
        ([(-1024, int8_extremes(16)), (1024, int8_extremes(16, signs=-1))] * 32, "sgemm"),
        ([(1024, int8_extremes(1, signs=-1))], "sgemm"),
        ([(1001 + 2 * k, int8_extremes(16)) for k in range(64)], "dgemm"),  # 64 units: too narrow to be worth it
        ([(1024, make_factors(np.full((2, 16), 32767), np.full((16, 2), 32767)))] * 64, "dgemm"),
        ([(1024, make_factors(np.full((2, 16), 11), np.full((16, 2), 9)))] * 64, "sgemm"),  # int16, but small
        ([(1, int8_extremes(2, b_exp=[0, -60]))], "dgemm"),  # the grid rounds the small one
        ([(0, int8_extremes(2))], "zero"),
    ],
)  # fmt: skip
def test_the_path_is_the_cheapest_that_is_exact(terms: list[Term], path: str) -> None:
    assert Sum(terms, 16).path == path
    check_against_oracle(terms, 16)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([1024, -1024, 3 * 2**9, 5 * 2**8]), min_size=1, max_size=20),
    st.integers(0, 6),
)
def test_every_path_gives_the_same_bits(seed: int, weights: list[int], spread: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 40, size=2))
    terms: list[Term] = []
    for weight in weights:
        b, a = rng.normal(size=(shape[0], 7)), rng.normal(size=(7, shape[1]))
        terms.append((weight, quantise(b * 2.0 ** rng.integers(-spread, 1, size=7), a, bits=8)))
    master = rng.normal(size=shape).astype(np.float32)
    assert Sum(terms, 16, kernels=[EAGER_SGEMM]).path == "sgemm"
    folded = {fold_tensor(master, terms, 16, kernels=kernels).tobytes() for kernels in (*EVERY_KERNEL, [OneByOne(1)])}
    assert len(folded) == 1
