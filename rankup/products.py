"""Which matrix products make an exact sum: the grid, and the kernels that can prove they add up without rounding.

`plan` numbers the rank components of all terms and chooses the grid 2^G of the whole tensor from their maxima.
`choose` then says which kernel multiplies which components:

    whole    beta' on the grid times alpha, in float64: what the law says, always possible (sums below 2^53)
    chunks   components with one unit c · 2^e share a product of their bare mantissas, in a faster and narrower kernel
             (float32: sums below 2^24; int8: below 2^31), and the products are added up in float64 with their units

What always holds: a chosen chunk is within the limit of its kernel, whatever the order of its additions, and chunks are
taken only where the grid rounds no component, so both ways give the same X (docs/numerics.md has the proofs). This
module looks at maxima and exponents only, never at mantissas.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import DeltaError, InputError
from rankup.fixedpoint import Factors, Float64Array

Int64Array: TypeAlias = npt.NDArray[np.int64]
IndexArray: TypeAlias = npt.NDArray[np.intp]
Term: TypeAlias = tuple[int, Factors]
"""Integer coefficient (over 2^denominator_log2) and the factors that it weighs."""

COEFFICIENT_MAX: Final = 2**37
"""|c · mantissa| stays below 2^52, so that float64 holds it. A manifest allows less (2^31)."""
DENOMINATOR_LOG2_MAX: Final = 30
TOTAL_RANK_MAX: Final = 2**32
"""Rank components in one sum: products of maxima add up below 2^62, and half a grid step each stays below 2^46."""
GRID_BITS: Final = 52

_EXACT_FLOAT64: Final = 2**53
_PASS_COST: Final = 30.0
"""Adding one more product to a sum takes the time of about so many rank components of the float64 product."""


# -- kernels -----------------------------------------------------------------------------------------------------------


class Kernel(Protocol):
    """One way to multiply matrices of integers, exact as long as the numbers stay below its limits."""

    @property
    def name(self) -> str:
        """For logs: "dgemm", "sgemm", "int8" …"""

    @property
    def dtype(self) -> np.dtype[Any]:
        """What both operands are given in."""

    @property
    def operand_max(self) -> int:
        """Largest |element| of an operand."""

    @property
    def limit(self) -> int:
        """A product L·R is exact where the sum over k of max|L[:, k]| · max|R[k, :]| is below this."""

    @property
    def cost(self) -> float:
        """Time of one rank component, as a share of what it takes in float64 on the processor."""

    def hold(self, right: npt.NDArray[Any], /) -> Any:
        """Keep a right operand (k, m) for many products; it may move to the memory of a device."""

    def multiply(self, left: npt.NDArray[Any], right: Any, /) -> npt.NDArray[Any]:
        """left (n, k) times what `hold` gave for (k, m): a new array (n, m) of a real type that holds it exactly."""


@dataclass(frozen=True)
class NumpyKernel:
    """numpy's matrix product in one floating-point type: exact for sums below 2^(digits of the type)."""

    name: str
    dtype: np.dtype[Any]
    limit: int
    cost: float

    @property
    def operand_max(self) -> int:
        return self.limit

    def hold(self, right: npt.NDArray[Any], /) -> npt.NDArray[Any]:
        return right

    def multiply(self, left: npt.NDArray[Any], right: npt.NDArray[Any], /) -> npt.NDArray[Any]:
        product: npt.NDArray[Any] = left @ right
        return product


DGEMM: Final = NumpyKernel("dgemm", np.dtype(np.float64), _EXACT_FLOAT64, 1.0)
SGEMM: Final = NumpyKernel("sgemm", np.dtype(np.float32), 2**24, 0.5)
KERNELS: Final[tuple[Kernel, ...]] = (DGEMM, SGEMM)
"""What numpy alone can do."""


# -- the components and their grid -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """The R live components of a sum, in the order of the terms, and the grid, which follows from their maxima."""

    parts: tuple[tuple[Factors, IndexArray | None], ...]
    """Factors and which of their components are live; None means all."""
    coefficient: Int64Array
    """(R,): c, not zero"""
    exponent: Int64Array
    """(R,): ea + eb - p"""
    b_max: Int64Array
    """(R,): at least 1"""
    a_max: Int64Array
    """(R,): at least 1"""
    grid: int
    """G"""

    @property
    def rank(self) -> int:
        """R"""
        return int(self.exponent.size)

    @cached_property
    def unit(self) -> tuple[Int64Array, Int64Array]:
        """|c| · 2^exponent as an odd number and a power of two, both (R,)."""
        lowest_bit = (self.coefficient & -self.coefficient).astype(np.float64)
        zeros = np.frexp(lowest_bit)[1].astype(np.int64) - 1
        return np.abs(self.coefficient) >> zeros, self.exponent + zeros

    @cached_property
    def rounds(self) -> bool:
        """True where some unit is no multiple of 2^G, so that the grid may round its component."""
        return bool((self.unit[1] < self.grid).any())


def plan(terms: Sequence[Term], denominator_log2: int) -> Plan | None:
    """Number the live components and choose the grid; None where every component is zero.

    Raises InputError (coefficient or denominator out of range), DeltaError (shapes differ, total rank too large).
    """
    if not 0 <= denominator_log2 <= DENOMINATOR_LOG2_MAX:
        raise InputError(f"denominator 2^{denominator_log2} is outside 2^0..2^{DENOMINATOR_LOG2_MAX}")
    if len({(factors.d_out, factors.d_in) for _, factors in terms}) > 1:
        raise DeltaError("the terms of one sum belong to weights of different shapes")
    if sum(factors.rank for _, factors in terms) > TOTAL_RANK_MAX:
        raise DeltaError(
            f"the sum has more than {TOTAL_RANK_MAX} rank components: it would not be exact",
            remedy="Close the round with fewer contributions or a lower rank.",
        )
    used = [(c, factors) for c, factors in ((operator.index(c), factors) for c, factors in terms) if c]
    worst = max((abs(c) for c, _ in used), default=0)
    if worst > COEFFICIENT_MAX:
        raise InputError(f"a coefficient of magnitude {worst} is above {COEFFICIENT_MAX}")
    if not used:
        return None
    ranks = [factors.rank for _, factors in used]
    coefficient = np.repeat(np.array([c for c, _ in used], dtype=np.int64), ranks)
    exponent = np.concatenate([factors.b_exp for _, factors in used]).astype(np.int64)
    exponent += np.concatenate([factors.a_exp for _, factors in used])
    exponent -= denominator_log2
    b_max = np.concatenate([factors.b_max for _, factors in used]).astype(np.int64)
    a_max = np.concatenate([factors.a_max for _, factors in used]).astype(np.int64)
    live = (b_max > 0) & (a_max > 0)
    parts: list[tuple[Factors, IndexArray | None]] = []
    for (_, factors), alive in zip(used, np.split(live, np.cumsum(ranks)[:-1]), strict=True):
        if alive.all():
            parts.append((factors, None))
        elif alive.any():
            parts.append((factors, np.flatnonzero(alive)))
    if not parts:
        return None
    coefficient, exponent, b_max, a_max = coefficient[live], exponent[live], b_max[live], a_max[live]
    return Plan(tuple(parts), coefficient, exponent, b_max, a_max, _grid(np.abs(coefficient), exponent, b_max * a_max))


def _grid(coefficient: Int64Array, exponent: Int64Array, maxima: Int64Array) -> int:
    """G for M = sum of coefficient · maxima · 2^exponent: int64 among equal units, Python's integers beyond."""
    order = np.lexsort((coefficient, exponent))
    coefficient, exponent, maxima = coefficient[order], exponent[order], maxima[order]
    new = np.flatnonzero((np.diff(coefficient) != 0) | (np.diff(exponent) != 0)) + 1
    starts = np.concatenate([np.zeros(1, dtype=np.intp), new])
    lowest = int(exponent[0])
    total = 0
    for c, m, e in zip(
        coefficient[starts].tolist(), np.add.reduceat(maxima, starts).tolist(), exponent[starts].tolist(), strict=True
    ):
        total += (c * m) << (e - lowest)
    return int(total).bit_length() + lowest - GRID_BITS  # 2^(grid+51) <= M < 2^(grid+52)


# -- one product, or several -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chunk:
    """K components that one kernel adds up exactly: unit · sum over k of (scale_k · b_k) ⊗ a_k."""

    order: IndexArray | None
    """(K,): which components of the plan; None means all"""
    scale: Float64Array
    """(K,)"""
    rounds: bool
    """Whether scale_k · b_k is to be rounded to an integer, half to even."""
    unit: float


def choose(plan: Plan, kernels: Sequence[Kernel]) -> tuple[Kernel, list[Chunk]]:
    """The cheapest kernel that is exact for this sum, and its chunks; "dgemm" is always among the candidates."""
    chosen: tuple[Kernel, list[Chunk]] = (DGEMM, _whole(plan))
    least = _cost(*chosen, plan.rank)
    for kernel in sorted(kernels, key=lambda kernel: -kernel.limit):
        fewer_than = (least - kernel.cost * plan.rank) / _PASS_COST
        chunks = _whole(plan) if kernel.limit >= _EXACT_FLOAT64 else _cut(plan, kernel, fewer_than)
        if chunks is not None and len(chunks) < fewer_than:
            chosen, least = (kernel, chunks), _cost(kernel, chunks, plan.rank)
    return chosen


def _cost(kernel: Kernel, chunks: Sequence[Chunk], rank: int) -> float:
    return kernel.cost * rank + _PASS_COST * len(chunks)


def _whole(plan: Plan) -> list[Chunk]:
    """One product, as the law writes it: beta' on the grid, below 2^53 with every partial sum."""
    scale = np.ldexp(plan.coefficient.astype(np.float64), (plan.exponent - plan.grid).astype(np.int32))
    return [Chunk(None, scale, plan.rounds, math.ldexp(1.0, plan.grid))]


def _cut(plan: Plan, kernel: Kernel, fewer_than: float) -> list[Chunk] | None:
    """Chunks of components by unit; None where that is not exact, or not in fewer than so many chunks.

    A component whose unit is 2^n times that of its chunk takes 2^n into its column, as far as the kernel's limits go.
    """
    if plan.rounds or max(int(plan.b_max.max()), int(plan.a_max.max())) > kernel.operand_max:
        return None
    odd, power = plan.unit
    order = np.lexsort((power, odd))
    odd, power, b_max = odd[order], power[order], plan.b_max[order].astype(np.float64)
    reach = b_max * plan.a_max[order]
    sign = np.sign(plan.coefficient[order]).astype(np.float64)
    chunks: list[Chunk] = []
    start = 0
    while start < order.size:
        if len(chunks) + 1 >= fewer_than:
            return None
        group = slice(start, int(np.searchsorted(odd, odd[start], side="right")))
        fold = np.ldexp(1.0, np.minimum(power[group] - power[start], 64).astype(np.int32))
        # A running sum that float64 rounds is far above every limit.
        fits = (np.cumsum(reach[group] * fold) < kernel.limit) & (b_max[group] * fold <= kernel.operand_max)
        width = fits.size if fits.all() else int(np.argmin(fits))
        if not width:
            return None
        chunk = slice(start, start + width)
        unit = math.ldexp(float(odd[start]), int(power[start]))
        chunks.append(Chunk(order[chunk], sign[chunk] * fold[:width], False, unit))
        start += width
    return chunks
