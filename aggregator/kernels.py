"""Matrix products that torch adds to those of `rankup.products`: int8 on the processor, float64 and int8 on CUDA.

    int8           torch._int_mm on the processor: several times faster than float32, and silently wrong where the
                   processor lacks the instructions for it (additions that saturate at 16 bits)
    cuda-float64   the law's product on the GPU: integers below 2^53, so no order of additions can show, and TF32 does
                   not touch float64
    cuda-int8      torch._int_mm on the GPU, for sums below 2^31

What always holds: `available` gives only kernels that have proved themselves in this process, against int64 arithmetic
on worst cases (`is_exact`); a device only ever adds integers, every rounding stays with `rankup.exactsum` on the
processor. torch is loaded by the first call of `available`; without torch, numpy's kernels are what there is. This
module chooses nothing: `rankup.products` does, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from rankup.products import KERNELS, Kernel

log = structlog.get_logger(__name__)

SHAPES: Final = ((1, 1, 1), (3, 5, 7), (17, 33, 65), (40, 100, 24), (64, 257, 130), (200, 129, 72))
"""(n, k, m) of the random patterns: below, at and off the widths of vector registers and of packed panels."""
LARGE_SHAPES: Final = ((31, 1024, 2048), (576, 1000, 576), (1030, 4101, 300), (2048, 256, 520), (24, 133_144, 8))
"""Of the patterns whose product is known without another product; with the last, int8 sums come within 4072 of 2^31."""
_MULTIPLE: Final = 8
_ROWS_MIN: Final = 24


class TorchFloat64:
    """The float64 product on a torch device, exact for sums below 2^53."""

    dtype: Final = np.dtype(np.float64)
    operand_max: Final = 2**53
    limit: Final = 2**53

    def __init__(self, device: str, *, cost: float) -> None:
        self.name: Final = f"{device}-float64"
        self.cost: Final = cost
        self._device: Final = device

    def hold(self, right: NDArray[Any], /) -> Any:
        return _to(self._device, right)

    def multiply(self, left: NDArray[Any], right: Any, /) -> NDArray[Any]:
        return _from(_to(self._device, left) @ right)


class TorchInt8:
    """The int8 product with int32 sums on a torch device, exact below 2^31 where the device does what it should.

    Operands are padded with zeros to multiples of 8 and at least 24 rows: what CUDA demands, and on the processor it
    keeps to shapes that the self-test meets.
    """

    dtype: Final = np.dtype(np.int8)
    operand_max: Final = 127
    limit: Final = 2**31

    def __init__(self, device: str, *, cost: float) -> None:
        self.name: Final = "int8" if device == "cpu" else f"{device}-int8"
        self.cost: Final = cost
        self._device: Final = device

    def hold(self, right: NDArray[Any], /) -> Any:
        """The operand on the device, with its own width."""
        k, m = right.shape
        held = _to(self._device, _padded(right, _up(k), _up(m)))
        if self._device != "cpu":
            held = held.t().contiguous().t()  # by columns: the layout that every generation of GPUs multiplies
        return held, m

    def multiply(self, left: NDArray[Any], right: Any, /) -> NDArray[Any]:
        import torch

        held, m = right
        n, k = left.shape
        padded = _to(self._device, _padded(left, max(_ROWS_MIN, _up(n)), _up(k)))
        return _from(torch._int_mm(padded, held)[:n, :m])


def _up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _padded(matrix: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    if matrix.shape == (rows, columns):
        return matrix
    wide = np.zeros((rows, columns), dtype=matrix.dtype)
    wide[: matrix.shape[0], : matrix.shape[1]] = matrix
    return wide


def _to(device: str, matrix: NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(matrix)).to(device)


def _from(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


@lru_cache(maxsize=1)
def available() -> Sequence[Kernel]:
    """Every kernel that is exact in this process, numpy's first; tested once, at the first call (under a second).

    A kernel that fails its test, or that its device cannot run, is left out and logged.
    """
    try:
        import torch
    except ImportError:
        return KERNELS
    candidates: list[Kernel] = [TorchInt8("cpu", cost=0.1)]
    if torch.cuda.is_available():
        candidates += [TorchFloat64("cuda", cost=0.04), TorchInt8("cuda", cost=0.01)]
    proved = [kernel for kernel in candidates if is_exact(kernel)]
    for kernel in candidates:
        if kernel not in proved:
            log.warning("kernel-refused", kernel=kernel.name, remedy="none needed: the sum takes another kernel")
    return (*KERNELS, *proved)


def is_exact(kernel: Kernel, *, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> bool:
    """Whether the kernel gives int64's answer for worst cases within its limits: the largest operands everywhere with
    equal, alternating and random signs, random operands, odd and large shapes. False too where it cannot run at all.
    """
    try:
        for left, right, expected in _trials(kernel, shapes):
            found = kernel.multiply(left.astype(kernel.dtype), kernel.hold(right.astype(kernel.dtype)))
            if found.shape != expected.shape or not np.array_equal(found, expected):
                return False
    except RuntimeError:  # torch's word for "not on this device"
        return False
    return True


_Trial = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _trials(kernel: Kernel, shapes: Sequence[tuple[int, int, int]]) -> Iterator[_Trial]:
    """(left, right, left @ right) in int64, with sums just below the kernel's limit where its operands reach it."""
    rng = np.random.default_rng(0)
    for large, (n, k, m) in [*((False, shape) for shape in shapes), *((True, shape) for shape in LARGE_SHAPES)]:
        right_max = min(kernel.operand_max, 127, (kernel.limit - 1) // k)
        left_max = min(kernel.operand_max, (kernel.limit - 1) // (k * right_max))
        alternating = np.where(np.arange(k) % 2, 1, -1)
        for signs in (np.ones(k, dtype=np.int64), alternating, rng.choice([-1, 1], size=k)):
            # Signs that cancel in pairs make every partial sum as large as it gets: all products of an entry agree.
            rows, columns = rng.choice([-1, 1], size=(n, 1)), rng.choice([-1, 1], size=(1, m))
            left, right = left_max * rows * signs, right_max * signs[:, None] * columns
            yield left, right, rows * columns * (left_max * right_max * k)
        if not large:
            left = rng.integers(-left_max, left_max, size=(n, k), endpoint=True)
            right = rng.integers(-right_max, right_max, size=(k, m), endpoint=True)
            yield left, right, left @ right
            yield np.full_like(left, left_max), right, np.broadcast_to(left_max * right.sum(axis=0), (n, m))
