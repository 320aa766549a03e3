"""The arithmetic law: the exact sum of fixed-point products, and the two roundings that make a new float32 master.

A delta of one weight is a product B·A of `rankup.fixedpoint.Factors`. `fold_tensor` adds a weighted sum of such
products to a float32 master. The derivation and the proofs are in docs/numerics.md; in short, for rank components k
with integer columns beta_k = c·b_k, integer rows alpha_k and exponents eb_k, ea_k:

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
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import DeltaError, InputError, IntegrityError, SetupError
from rankup.fixedpoint import Factors, Float64Array, Int16Array

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]

COEFFICIENT_MAX: Final = 2**46
"""|c · mantissa| stays below 2^61, inside int64. A manifest allows less (2^31)."""
DENOMINATOR_LOG2_MAX: Final = 30
TOTAL_RANK_MAX: Final = 2**37
"""Rank components in one sum: half a grid step each, times 32767, is then below 2^51."""

_GRID_BITS: Final = 52
_TILE_BYTES: Final = 32 * 2**20
_ROW_TILE: Final = 2048
_RANK_TILE: Final = 1024


Term: TypeAlias = tuple[int, Factors]
"""Integer coefficient (over 2^denominator_log2) and the factors that it weighs."""


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
