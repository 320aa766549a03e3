"""The arithmetic law: fixed-point factors, their exact sum, and the two roundings that make a new float32 master.

A delta of one weight is a product B·A. `quantise` writes both factors as int16 mantissas with one power-of-two
exponent per rank component. `fold_tensor` adds a weighted sum of such products to a float32 master. The derivation and
the proofs are in docs/numerics.md; in short, for rank components k with integer columns beta_k = c·b_k, integer rows
alpha_k and exponents eb_k, ea_k:

    M    = sum over k of max|beta_k| 2^eb_k · max|alpha_k| 2^ea_k          exactly, in Python integers
    G    = the smallest integer with M < 2^(G+52)                          one grid 2^G for the whole tensor
    beta'= round_half_even(beta_k · 2^(eb_k + ea_k - G))                   in integers
    X    = sum over k of beta'_k ⊗ alpha_k                                 in float64, exact
    new  = float32(master + float32(X · 2^G))                              two roundings, nearest even

What always holds:
- every product and every partial sum of X is an integer below 2^53, so X has the same bits with any BLAS that adds the
  products in any order, any number of threads, any tiling, fused multiply-add or not, any order of contributions;
- X holds no negative zero (a BLAS may start from 0 or from the first product, and the sign of zero would tell);
- nothing on this path depends on the processor's rounding flags: `fold_tensor` refuses to run where they are not the
  defaults of IEEE 754.

It does not choose coefficients, read files or know about models.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import DeltaError, InputError, IntegrityError, SetupError

Int16Array: TypeAlias = npt.NDArray[np.int16]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Uint16Array: TypeAlias = npt.NDArray[np.uint16]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]

MANTISSA_MAX: Final = 32767
"""Mantissas are symmetric: -32768 is no mantissa."""
EXPONENT_MIN: Final = -200
"""Below float32's smallest subnormal, 2^-149 = 16384 · 2^-163: every float32 factor fits."""
EXPONENT_MAX: Final = 100
"""A factor above 32767 · 2^100 is a diverged training run."""
COEFFICIENT_MAX: Final = 2**46
"""|c · mantissa| stays below 2^61, inside int64. A manifest allows less (2^31)."""
DENOMINATOR_LOG2_MAX: Final = 30
TOTAL_RANK_MAX: Final = 2**37
"""Rank components in one sum: half a grid step each, times 32767, is then below 2^51."""

_GRID_BITS: Final = 52
_TILE_BYTES: Final = 32 * 2**20
_ROW_TILE: Final = 2048
_RANK_TILE: Final = 1024
_BFLOAT16_TILE: Final = 2**18


@dataclass(frozen=True, eq=False)
class Factors:
    """B·A of one weight in fixed point: B[:, k] = b[:, k] · 2^b_exp[k], A[k, :] = a[k, :] · 2^a_exp[k].

    Shapes and types are checked here (DeltaError); values by `verify`. `quantise` and the delta reader only give
    factors that pass it, and the exactness of the sum rests on that.
    """

    b: Int16Array
    """(d_out, r)"""
    b_exp: Int16Array
    """(r,)"""
    a: Int16Array
    """(r, d_in)"""
    a_exp: Int16Array
    """(r,)"""
    b_max: Int16Array
    """(r,): max over rows of |b[:, k]|"""
    a_max: Int16Array
    """(r,): max over columns of |a[k, :]|"""

    def __post_init__(self) -> None:
        arrays = (self.b, self.b_exp, self.a, self.a_exp, self.b_max, self.a_max)
        if any(array.dtype != np.int16 for array in arrays):
            raise DeltaError("factors are not int16")
        if self.b.ndim != 2 or self.a.ndim != 2 or 0 in self.b.shape or 0 in self.a.shape:
            raise DeltaError(f"factors of shapes {self.b.shape} and {self.a.shape} are not two non-empty matrices")
        rank = self.b.shape[1]
        if self.a.shape[0] != rank or any(array.shape != (rank,) for array in (*arrays[3:], self.b_exp)):
            raise DeltaError(f"factors of shapes {self.b.shape} and {self.a.shape} with scales do not share one rank")

    @property
    def rank(self) -> int:
        return int(self.b.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.b.shape[0])

    @property
    def d_in(self) -> int:
        return int(self.a.shape[1])

    @cached_property
    def entry_bound(self) -> float:
        """Upper bound of |B·A| in every entry: sum over k of max|B[:, k]| · max|A[k, :]|.

        A bound far above the norm of B·A means that components cancel each other. Such a delta would coarsen the grid
        of everybody's sum, so admission should compare the two.
        """
        bounds = self.b_max.astype(np.float64) * self.a_max.astype(np.float64)
        return float(np.sum(np.ldexp(bounds, self.b_exp.astype(np.int32) + self.a_exp.astype(np.int32))))

    @property
    def is_zero(self) -> bool:
        """True where no component has both a non-zero column and a non-zero row, so that B·A is zero."""
        return not bool(np.any((self.b_max > 0) & (self.a_max > 0)))

    def verify(self) -> None:
        """Check every value: mantissas within ±32767, exponents in range, the maxima those of the data.

        Raises DeltaError that says which array is wrong.
        """
        for label, mantissas, axis, stated in (("B", self.b, 0, self.b_max), ("A", self.a, 1, self.a_max)):
            low, high = mantissas.min(axis=axis), mantissas.max(axis=axis)
            if int(low.min()) < -MANTISSA_MAX:
                raise DeltaError(f"{label} holds the mantissa -32768")
            if not np.array_equal(np.maximum(high, -low), stated):
                raise DeltaError(f"the stated maxima of {label} are not those of its mantissas")
        for label, exponents in (("B", self.b_exp), ("A", self.a_exp)):
            if int(exponents.min()) < EXPONENT_MIN or int(exponents.max()) > EXPONENT_MAX:
                raise DeltaError(f"an exponent of {label} is outside {EXPONENT_MIN}..{EXPONENT_MAX}")


Term: TypeAlias = tuple[int, Factors]
"""Integer coefficient (over 2^denominator_log2) and the factors that it weighs."""


# -- quantisation ------------------------------------------------------------------------------------------------------


def quantise(b: npt.NDArray[Any], a: npt.NDArray[Any]) -> Factors:
    """Write the product B·A in fixed point.

    b: (d_out, r), a: (r, d_in), floating point of any width; scaling factors belong into b before. Each component's
    exponent is the smallest e with round_half_even(max|x| / 2^e) <= 32767, at least EXPONENT_MIN; a component that is
    zero, or rounds to zero there, has exponent 0 and mantissas 0. The relative error of the product is about 6e-5 on
    gaussian factors (docs/numerics.md).

    Raises DeltaError: a value is not finite, a factor is above 32767 · 2^EXPONENT_MAX, shapes do not fit.
    """
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or 0 in b.shape or 0 in a.shape:
        raise DeltaError(f"factors of shapes {b.shape} and {a.shape} do not make a product")
    columns, b_exp, b_max = _quantise_rows(b.T, "B")
    rows, a_exp, a_max = _quantise_rows(a, "A")
    return Factors(b=np.ascontiguousarray(columns.T), b_exp=b_exp, a=rows, a_exp=a_exp, b_max=b_max, a_max=a_max)


def _quantise_rows(values: npt.NDArray[Any], label: str) -> tuple[Int16Array, Int16Array, Int16Array]:
    """values: (r, d) -> mantissas (r, d), exponents (r,), maxima of |mantissa| (r,)."""
    x = np.asarray(values, dtype=np.float64)
    largest = np.maximum(x.max(axis=1), -x.min(axis=1))
    if not np.isfinite(largest).all():
        raise DeltaError(
            f"{label} holds a value that is not finite",
            remedy="The training run diverged: lower the learning rate or the gradient norm of the recipe.",
        )
    fraction, power = np.frexp(largest)  # largest = fraction · 2^power with fraction in [0.5, 1)
    exponents = power.astype(np.int64) - 15
    exponents += np.rint(fraction * 2.0**15) > MANTISSA_MAX
    exponents = np.maximum(exponents, EXPONENT_MIN)
    exponents[largest == 0] = 0
    if int(exponents.max()) > EXPONENT_MAX:
        raise DeltaError(
            f"{label} holds a value above 32767 · 2^{EXPONENT_MAX}",
            remedy="The training run diverged: lower the learning rate or the gradient norm of the recipe.",
        )
    mantissas = np.rint(x * np.ldexp(1.0, -exponents.astype(np.int32))[:, None]).astype(np.int16)
    maxima = np.abs(mantissas).max(axis=1)
    exponents[maxima == 0] = 0
    return mantissas, exponents.astype(np.int16), maxima


def dequantise(factors: Factors) -> tuple[Float64Array, Float64Array]:
    """The factors as float64, exactly: B (d_out, r), A (r, d_in)."""
    b = np.ldexp(factors.b.astype(np.float64), factors.b_exp.astype(np.int32)[None, :])
    a = np.ldexp(factors.a.astype(np.float64), factors.a_exp.astype(np.int32)[:, None])
    return b, a


# -- the exact sum -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """The live components of one term, with the shift of each onto the grid."""

    coefficient: int
    b: Int16Array  # (d_out, r)
    a: Int16Array  # (r, d_in)
    live: npt.NDArray[np.intp]  # (n,) components with a non-zero column and a non-zero row
    shift: Int64Array  # (n,) s = G - ea - eb: right if positive, left if not


@dataclass(frozen=True, eq=False)
class _Plan:
    grid: int
    d_out: int
    d_in: int
    parts: tuple[_Part, ...]


def _plan(terms: Sequence[Term], denominator_log2: int) -> _Plan | None:
    """Choose the grid from the maxima alone; None where nothing is to be added."""
    if not 0 <= denominator_log2 <= DENOMINATOR_LOG2_MAX:
        raise InputError(f"denominator 2^{denominator_log2} is outside 2^0..2^{DENOMINATOR_LOG2_MAX}")
    if len({(factors.d_out, factors.d_in) for _, factors in terms}) > 1:
        raise DeltaError("the terms of one sum belong to weights of different shapes")
    if sum(factors.rank for _, factors in terms) > TOTAL_RANK_MAX:
        raise DeltaError(
            f"the sum has more than {TOTAL_RANK_MAX} rank components: it would not be exact",
            remedy="Close the round with fewer contributions or a lower rank.",
        )
    drafts: list[tuple[int, Factors, npt.NDArray[np.intp], Int64Array]] = []
    bounds: list[tuple[int, int]] = []  # (integer, exponent) of each component's share of M
    for coefficient, factors in terms:
        c = operator.index(coefficient)
        if abs(c) > COEFFICIENT_MAX:
            raise InputError(f"coefficient {c} is outside ±{COEFFICIENT_MAX}")
        live = np.flatnonzero((factors.b_max > 0) & (factors.a_max > 0)) if c else np.empty(0, dtype=np.intp)
        if not live.size:
            continue
        exponents = factors.b_exp[live].astype(np.int64) + factors.a_exp[live].astype(np.int64) - denominator_log2
        maxima = factors.b_max[live].astype(np.int64) * factors.a_max[live].astype(np.int64)
        drafts.append((c, factors, live, exponents))
        bounds.extend((abs(c) * m, e) for m, e in zip(maxima.tolist(), exponents.tolist(), strict=True))
    if not bounds:
        return None
    lowest = min(exponent for _, exponent in bounds)
    total = sum(integer << (exponent - lowest) for integer, exponent in bounds)
    grid = total.bit_length() + lowest - _GRID_BITS  # 2^(grid+51) <= M < 2^(grid+52)
    parts = tuple(_Part(c, factors.b, factors.a, live, grid - exponents) for c, factors, live, exponents in drafts)
    return _Plan(grid=grid, d_out=drafts[0][1].d_out, d_in=drafts[0][1].d_in, parts=parts)


def grid_exponent(terms: Sequence[Term], denominator_log2: int) -> int | None:
    """G of the sum of `terms`: its multiples of 2^G are exact in float64. None where every component is zero.

    Raises InputError (coefficient or denominator out of range), DeltaError (shapes differ, total rank too large).
    """
    plan = _plan(terms, denominator_log2)
    return None if plan is None else plan.grid


def exact_sum(terms: Sequence[Term], denominator_log2: int, rows: slice = slice(None)) -> tuple[Float64Array, int]:
    """Rows of the sum of c · B·A / 2^denominator_log2 as integers X on the grid: the sum is X · 2^G.

    Returns X (rows, d_in) float64, integers below 2^53 without negative zero, and G, which is that of the whole tensor
    whatever `rows` is (0 where nothing is to be added). Raises what `grid_exponent` raises, and InputError without
    terms: the shape would be unknown.
    """
    if not terms:
        raise InputError("a sum without terms has no shape")
    plan = _plan(terms, denominator_log2)
    if plan is None:
        start, stop, step = rows.indices(terms[0][1].d_out)
        return np.zeros((len(range(start, stop, step)), terms[0][1].d_in)), 0
    return _sum(plan, rows), plan.grid


def _sum(plan: _Plan, rows: slice) -> Float64Array:
    """Add the products in pieces along the rank that bound the memory; exact, so the pieces do not show."""
    x = np.zeros((len(range(*rows.indices(plan.d_out))), plan.d_in))
    columns: list[Float64Array] = []
    lines: list[Float64Array] = []
    widest, width = min(_RANK_TILE, max(16, _TILE_BYTES // (8 * plan.d_in))), 0
    for part in plan.parts:
        for start in range(0, part.live.size, widest):
            piece = slice(start, start + widest)
            live = part.live[piece]
            if width + live.size > widest:
                x += np.concatenate(columns, axis=1) @ np.concatenate(lines, axis=0)
                columns, lines, width = [], [], 0
            beta = part.b[rows, :][:, live].astype(np.int64) * part.coefficient
            columns.append(_shift_half_even(beta, part.shift[piece]).astype(np.float64))
            lines.append(part.a[live, :].astype(np.float64))
            width += live.size
    if width:
        x += np.concatenate(columns, axis=1) @ np.concatenate(lines, axis=0)
    return x


def _shift_half_even(values: Int64Array, shift: Int64Array) -> Int64Array:
    """values (n, r) / 2^shift (r,), rounded half to even, in integers; |values| < 2^61."""
    right = np.clip(shift, 0, 62)  # 2^61 / 2^62 already rounds to zero
    left = np.clip(-shift, 0, None)
    quotient = values >> right
    remainder = values - (quotient << right)
    half = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), np.iinfo(np.int64).max)
    quotient += (remainder > half) | ((remainder == half) & ((quotient & 1) == 1))
    return quotient << left


# -- the fold ----------------------------------------------------------------------------------------------------------


def fold_tensor(
    master: Float32Array, terms: Sequence[Term], denominator_log2: int, *, row_tile: int | None = None
) -> Float32Array:
    """master + sum of c · B·A / 2^denominator_log2: the sum exact, rounded once to float32, then added in float32.

    master: (d_out, d_in) float32, left as it is; returns a new array of the same shape. Both roundings are to nearest
    even and keep subnormals. Where every term is zero the bits are those of `master`; otherwise a master of -0.0
    becomes +0.0 where nothing is added, since -0.0 + 0.0 is +0.0. `row_tile` (rows at once; by default at most 2048
    and 32 MiB of float64) changes the memory, never the result.

    Raises InputError (master is no float32 matrix), DeltaError (shapes do not fit, or the sum leaves float32),
    IntegrityError (the master is not finite), SetupError (this process does not round as IEEE 754 says).
    """
    if master.dtype != np.float32 or master.ndim != 2:
        raise InputError(f"a master must be a float32 matrix, not {master.dtype} of shape {master.shape}")
    plan = _plan(terms, denominator_log2)
    if plan is None:
        return np.array(master, order="C", copy=True)
    if master.shape != (plan.d_out, plan.d_in):
        raise DeltaError(f"a delta of shape {(plan.d_out, plan.d_in)} does not fit a weight of shape {master.shape}")
    _require_ieee_rounding()
    unit = math.ldexp(1.0, plan.grid)  # |grid| < 600: X · unit is exact and never subnormal in float64
    result = np.empty(master.shape, dtype=np.float32)
    for rows in _row_tiles(plan, row_tile):
        x = _sum(plan, rows)
        x *= unit
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.add(master[rows], x.astype(np.float32), out=result[rows])
        if not np.isfinite(result[rows]).all():
            if not np.isfinite(master[rows]).all():
                raise IntegrityError("the master holds a value that is not finite")
            raise DeltaError(
                "the sum of the contributions leaves the range of float32",
                remedy="Reject the contribution with the largest norm and fold again.",
            )
    return result


def _row_tiles(plan: _Plan, row_tile: int | None) -> Iterator[slice]:
    step = row_tile if row_tile is not None else min(_ROW_TILE, max(1, _TILE_BYTES // (8 * plan.d_in)))
    if step < 1:
        raise InputError(f"a tile of {step} rows is empty")
    for start in range(0, plan.d_out, step):
        yield slice(start, min(start + step, plan.d_out))


def _require_ieee_rounding() -> None:
    """Refuse flush-to-zero and directed rounding, which a library may have switched on for the whole thread.

    Casting and adding float32 are the only inexact steps of the fold, and both run in the calling thread.
    """
    wide = np.array([2.0**-149, 3 * 2.0**-150, 1 + 2.0**-24, 1 + 3 * 2.0**-24, -1 - 2.0**-24, -1 - 3 * 2.0**-24])
    with np.errstate(under="ignore"):
        cast = wide.astype(np.float32)
        added = cast[:2] + cast[:1]
    bits = [*cast.view(np.uint32).tolist(), *added.view(np.uint32).tolist()]
    if bits != [1, 2, 0x3F800000, 0x3F800002, 0xBF800000, 0xBF800002, 2, 3]:
        raise SetupError(
            "this process flushes subnormal numbers to zero or does not round to nearest even",
            remedy="Fold in a fresh process, without libraries built with -ffast-math or torch.set_flush_denormal.",
        )


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


def to_bfloat16(values: Float32Array) -> Uint16Array:
    """float32 of any shape -> bfloat16 bit patterns, round to nearest even, in integer arithmetic.

    Infinities stay, too large values become infinite, subnormals are kept, a NaN stays a NaN with its sign and upper
    payload and is made quiet. Raises InputError where `values` is not float32.
    """
    if values.dtype != np.float32:
        raise InputError(f"bfloat16 is made from float32, not from {values.dtype}")
    source = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    result = np.empty(source.shape, dtype=np.uint16)
    for start in range(0, source.size, _BFLOAT16_TILE):
        bits = source[start : start + _BFLOAT16_TILE]
        target = result[start : start + _BFLOAT16_TILE]
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        target[:] = rounded
        magnitude = bits & np.uint32(0x7FFFFFFF)
        if int(magnitude.max()) > 0x7F800000:
            nan = magnitude > np.uint32(0x7F800000)
            target[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return result.reshape(values.shape)


def from_bfloat16(bits: Uint16Array) -> Float32Array:
    """bfloat16 bit patterns of any shape -> float32, exactly. Raises InputError where `bits` is not uint16."""
    if bits.dtype != np.uint16:
        raise InputError(f"bfloat16 bit patterns are uint16, not {bits.dtype}")
    wide: npt.NDArray[np.uint32] = np.ascontiguousarray(bits).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32).reshape(bits.shape)
