"""Every kernel against worst cases, and the sum over each of them against numpy's float64 product."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.kernels import TorchFloat64, TorchInt8, available, is_exact
from rankup.exactsum import Sum, Term, fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.products import DGEMM, KERNELS, SGEMM, NumpyKernel

pytest.importorskip("torch")
INT8 = TorchInt8("cpu", cost=-1e9)
FLOAT64 = TorchFloat64("cpu", cost=-1e9)
REPOSITORY = Path(__file__).resolve().parents[2]

needs_int8 = pytest.mark.skipif(not is_exact(INT8), reason="this processor adds int8 products with saturation")


def extremes(rank: int, *, d_out: int = 3, d_in: int = 5, signs: int = 1) -> Factors:
    b = np.full((d_out, rank), 127, dtype=np.int8)
    b[:, ::2] *= signs
    top, zero = np.full(rank, 127, dtype=np.int16), np.zeros(rank, dtype=np.int16)
    return Factors(b, zero, np.full((rank, d_in), 127, dtype=np.int8), zero, top, top)


# -- the self-test -----------------------------------------------------------------------------------------------------


class Saturating(TorchInt8):
    """What processors without the int8 instructions do: 128 is added to the left operand and taken back at the end, and
    products of unsigned and signed bytes are added in pairs that saturate at 16 bits."""

    def multiply(self, left: np.ndarray, right: Any, /) -> np.ndarray:
        held, m = right
        columns = held.numpy().astype(np.int64)[: left.shape[1]]
        shifted = left.astype(np.int64) + 128
        total = -128 * columns.sum(axis=0)[None, :].repeat(left.shape[0], axis=0)
        for k in range(0, left.shape[1], 2):
            total += np.clip(shifted[:, k : k + 2] @ columns[k : k + 2], -(2**15), 2**15 - 1)
        return total[:, :m].astype(np.int32)


class Broken(TorchInt8):
    def multiply(self, left: np.ndarray, right: Any, /) -> np.ndarray:
        raise RuntimeError("not implemented for this device")


class WithoutTail(TorchInt8):
    """Right where K is a multiple of 16, and without the last components elsewhere."""

    def multiply(self, left: np.ndarray, right: Any, /) -> np.ndarray:
        held, m = right
        k = left.shape[1] - left.shape[1] % 16
        product: np.ndarray = left[:, :k].astype(np.int32) @ held.numpy()[:k].astype(np.int32)
        return product[:, :m]


class AddsInFloat32(TorchInt8):
    """Right below 2^24."""

    def multiply(self, left: np.ndarray, right: Any, /) -> np.ndarray:
        held, m = right
        return left.astype(np.float32) @ held.numpy()[: left.shape[1], :m].astype(np.float32)


SMALL = ((3, 5, 7), (17, 33, 65), (40, 100, 24))


@pytest.mark.parametrize("kernel", [Saturating, Broken, WithoutTail, AddsInFloat32])
def test_a_wrong_kernel_does_not_pass(kernel: type[TorchInt8]) -> None:
    assert not is_exact(kernel("cpu", cost=0.1), shapes=SMALL)


def test_a_kernel_that_states_too_high_a_limit_does_not_pass() -> None:
    assert is_exact(SGEMM)
    assert is_exact(DGEMM)
    assert not is_exact(NumpyKernel("liar", np.dtype(np.float32), 2**26, 0.5))
    assert not is_exact(NumpyKernel("liar", np.dtype(np.float64), 2**55, 1.0))


def test_the_float64_product_of_torch_passes() -> None:
    assert is_exact(FLOAT64)


def test_numpys_kernels_are_always_there_and_every_other_has_passed() -> None:
    kernels = available()
    assert tuple(kernels[: len(KERNELS)]) == KERNELS
    assert all(is_exact(kernel) for kernel in kernels)
    assert ("int8" in {kernel.name for kernel in kernels}) == is_exact(INT8)


def test_torch_is_loaded_by_the_first_call_only() -> None:
    script = """
import sys
import aggregator.kernels
assert "torch" not in sys.modules
sys.modules["torch"] = None  # an import of it now fails
print([kernel.name for kernel in aggregator.kernels.available()])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['dgemm', 'sgemm']"


# -- the sum over them -------------------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("rank", [1, 3, 16, 65, 1041, 5000])
@pytest.mark.parametrize("signs", [1, -1])
def test_int8_adds_the_largest_mantissas_in_one_product(rank: int, signs: int) -> None:
    terms: list[Term] = [(1024, extremes(rank, signs=signs))]
    total = Sum(terms, 16, kernels=[INT8])
    assert total.path == "int8"
    assert total.delta().tobytes() == Sum(terms, 16, kernels=[DGEMM]).delta().tobytes()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([1024, -1024, 3 * 2**9, 7]), min_size=1, max_size=12),
    st.integers(0, 5),
    st.sampled_from([8, 16]),
)
def test_every_kernel_gives_the_same_bits(seed: int, weights: list[int], spread: int, bits: Any) -> None:
    rng = np.random.default_rng(seed)
    d_out, d_in = (int(n) for n in rng.integers(1, 90, size=2))
    terms: list[Term] = []
    for weight in weights:
        b, a = rng.normal(size=(d_out, 9)) * 2.0 ** rng.integers(-spread, 1, size=9), rng.normal(size=(9, d_in))
        terms.append((weight, quantise(b, a, bits=bits)))
    master = rng.normal(size=(d_out, d_in)).astype(np.float32)
    expected = fold_tensor(master, terms, 16, kernels=[DGEMM])
    kernels = [FLOAT64, INT8] if is_exact_here() else [FLOAT64]
    for kernel in kernels:
        path = Sum(terms, 16, kernels=[kernel]).path
        assert path == (kernel.name if bits == 8 or kernel is FLOAT64 else "dgemm")
        assert fold_tensor(master, terms, 16, kernels=[kernel]).tobytes() == expected.tobytes()
        assert fold_tensor(master, terms[::-1], 16, kernels=[kernel], row_tile=7).tobytes() == expected.tobytes()


def is_exact_here() -> bool:
    return any(kernel.name == "int8" for kernel in available())


@needs_int8
def test_int8_is_taken_where_it_is_cheapest_and_float64_where_units_differ() -> None:
    rng = np.random.default_rng(3)
    factors = [quantise(rng.normal(size=(30, 16)), rng.normal(size=(16, 20)), bits=8) for _ in range(64)]
    equal: list[Term] = [(1024, part) for part in factors]
    various: list[Term] = [(1001 + 2 * k, part) for k, part in enumerate(factors)]
    assert Sum(equal, 16, kernels=available()).path in ("int8", "cuda-int8", "cuda-float64")
    assert Sum(various, 16, kernels=available()).path in ("dgemm", "cuda-float64")
    expected = Sum(equal, 16, kernels=[DGEMM]).delta()
    assert Sum(equal, 16, kernels=available()).delta().tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["cuda-float64", "cuda-int8"])
def test_a_gpu_gives_the_bits_of_the_processor(name: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kernel = next(kernel for kernel in available() if kernel.name == name)
    terms: list[Term] = [(1024, extremes(1041, d_out=37, d_in=45)), (-1024, extremes(33, d_out=37, d_in=45))]
    expected = Sum(terms, 16, kernels=[DGEMM]).delta()
    assert Sum(terms, 16, kernels=[kernel]).path == name
    assert Sum(terms, 16, kernels=[kernel]).delta().tobytes() == expected.tobytes()
