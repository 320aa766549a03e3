"""The arithmetic law: the exact sum of fixed-point products, and the two roundings that make a new float32 master.

A delta of one weight is a product B·A of `rankup.fixedpoint.Factors`. `fold_tensor` adds a weighted sum of such
products to a float32 master. The derivation and the proofs are in docs/numerics.md; in short, for rank components k
with integer columns beta_k = c·b_k, integer rows alpha_k and exponents eb_k, ea_k:

    M    = sum over k of max|beta_k| 2^eb_k · max|alpha_k| 2^ea_k          exactly, in integers
    G    = the smallest integer with M < 2^(G+52)                          one grid 2^G for the whole tensor
    beta'= round_half_even(beta_k · 2^(eb_k + ea_k - G))                   one exact product and one rounding
    X    = sum over k of beta'_k ⊗ alpha_k                                 exact in any kernel (`rankup.products`)
    new  = float32(master + float32(X · 2^G))                              two roundings, nearest even

What always holds:
- every product and every partial sum of X is an integer below 2^53, so X has the same bits with any BLAS that adds the
  products in any order, any number of threads, any tiling, fused multiply-add or not, any order of contributions, and
  with any kernel;
- X holds no negative zero (a BLAS may start from 0 or from the first product, and the sign of zero would tell);
- nothing on this path depends on the processor's rounding flags: it refuses to run where they are not the defaults of
  IEEE 754.

It does not choose coefficients, read files or know about models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import DeltaError, InputError, IntegrityError, SetupError
from rankup.fixedpoint import Float64Array
from rankup.products import COEFFICIENT_MAX, GRID_BITS, KERNELS, Chunk, Kernel, Plan, Term, choose, plan

__all__ = ["COEFFICIENT_MAX", "KERNELS", "Kernel", "Sum", "Term", "exact_sum", "fold_tensor", "grid_exponent"]

Float32Array: TypeAlias = npt.NDArray[np.float32]

_LINES_BYTES: Final = 64 * 2**20
_LEFT_BYTES: Final = 64 * 2**20
_TILE_BYTES: Final = 16 * 2**20
_ROWS_MAX: Final = 2048
_ROWS_MIN: Final = 64
_COLUMNS_MIN: Final = 512
_COLUMNS_MAX: Final = 2048
_BLOCK: Final = 2**15
"""Entries that are scaled, added up and rounded together: they stay in the processor's cache."""


def grid_exponent(terms: Sequence[Term], denominator_log2: int) -> int | None:
    """G of the sum of `terms`: its multiples of 2^G are exact in float64. None where every component is zero.

    Raises InputError (coefficient or denominator out of range), DeltaError (shapes differ, total rank too large).
    """
    planned = plan(terms, denominator_log2)
    return None if planned is None else planned.grid


class Sum:
    """The exact sum of c · B·A / 2^denominator_log2 over `terms`, read by rows.

    `kernels` are the ways that the products may take; the cheapest that is exact for these terms is chosen. They change
    the time, never a bit. The rows of A are converted once where that fits 64 MiB. Threads may share a sum.

    Raises InputError (no terms, coefficient or denominator out of range), DeltaError (shapes differ, total rank too
    large).
    """

    def __init__(self, terms: Sequence[Term], denominator_log2: int, *, kernels: Sequence[Kernel] = KERNELS) -> None:
        if not terms:
            raise InputError("a sum without terms has no shape")
        self.shape: Final = (terms[0][1].d_out, terms[0][1].d_in)
        planned = plan(terms, denominator_log2)
        self._products: Final = None if planned is None else _Products(planned, kernels)

    @property
    def is_zero(self) -> bool:
        """True where every component is zero; a master then keeps its bits."""
        return self._products is None

    @property
    def grid(self) -> int | None:
        """G: every entry is a multiple of 2^G. None where the sum is zero."""
        return None if self._products is None else self._products.plan.grid

    @property
    def path(self) -> str:
        """The name of the chosen kernel; "zero" where there is nothing to multiply."""
        return "zero" if self._products is None else self._products.kernel.name

    def delta(self, rows: slice = slice(None)) -> Float32Array:
        """These rows of the sum: (n, d_in) float32, rounded once to nearest even, subnormals kept, no -0.0 from a zero.

        Raises DeltaError (the sum leaves float32), SetupError (this process does not round as IEEE 754 says),
        InputError (`rows` has a step).
        """
        wanted = _in_order(rows, self.shape[0])
        if self._products is None:
            return np.zeros((len(wanted), self.shape[1]), dtype=np.float32)
        _require_ieee_rounding()
        result = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        with np.errstate(over="ignore", under="ignore"):
            for place, entries in self._products.blocks(wanted):
                _cast(entries, result[place])
        if self._products.plan.grid + GRID_BITS + 1 > 127 and not np.isfinite(result).all():
            raise _leaves_float32()
        return result


class _Products:
    """The products of one plan, block by block.

    Columns go in bands whose lines (the right operands, rows of A) fit the memory for them, bands in panels, rows in
    tiles; a product is one tile times one panel.
    """

    def __init__(self, planned: Plan, kernels: Sequence[Kernel]) -> None:
        self.plan: Final[Plan] = planned
        kernel, chunks = choose(planned, kernels)
        self.kernel: Final[Kernel] = kernel
        self._chunks: Final[Sequence[Chunk]] = chunks
        columns = range(planned.parts[0][0].d_in)
        width = max(_COLUMNS_MIN, _LINES_BYTES // (kernel.dtype.itemsize * planned.rank))
        self._bands: Final = [columns[start : start + width] for start in columns[::width]]
        row_bytes = min(_COLUMNS_MAX, width, len(columns)) * max(8, 4 * len(chunks))  # float64, or 32 bits a chunk
        fitting = min(_ROWS_MAX, _TILE_BYTES // row_bytes, _LEFT_BYTES // (8 * planned.rank))
        self._row_tile: Final = max(_ROWS_MIN, fitting)

    def blocks(self, rows: range, row_tile: int | None = None) -> Iterator[tuple[tuple[slice, slice], Float64Array]]:
        """The exact entries of some rows, a few at a time: ((rows counted from the first, columns), entries).

        A zero may have a sign. The array is used again for the next block.
        """
        for band in self._bands:
            lines = self._all_lines if len(self._bands) == 1 else self._lines(band)
            step = row_tile or self._row_tile
            for start in range(0, len(rows), step):
                tile = rows[start : start + step]
                lefts = self._lefts(slice(tile.start, tile.stop))
                for columns, rights in lines:
                    products = [self.kernel.multiply(left, right) for left, right in zip(lefts, rights, strict=True)]
                    for block, entries in self._entries(products):
                        yield (slice(start + block.start, start + block.stop), columns), entries

    @cached_property
    def _all_lines(self) -> list[tuple[slice, list[Any]]]:
        return self._lines(self._bands[0])

    def _lines(self, band: range) -> list[tuple[slice, list[Any]]]:
        """For every panel of a band, the right operand of every chunk, held by the kernel."""
        panels: list[tuple[slice, list[Any]]] = []
        for start in band[::_COLUMNS_MAX]:
            columns = slice(start, min(start + _COLUMNS_MAX, band.stop))
            parts = [f.a[:, columns] if live is None else f.a[live, columns] for f, live in self.plan.parts]
            mantissas, dtype = np.concatenate(parts, axis=0), self.kernel.dtype
            chosen = (mantissas if chunk.order is None else mantissas[chunk.order] for chunk in self._chunks)
            panels.append((columns, [self.kernel.hold(lines.astype(dtype)) for lines in chosen]))
        return panels

    def _lefts(self, rows: slice) -> list[npt.NDArray[Any]]:
        """For some rows, the left operand of every chunk: their mantissas, scaled and rounded as the chunk says."""
        parts = [f.b[rows] if live is None else f.b[rows][:, live] for f, live in self.plan.parts]
        mantissas, dtype = np.concatenate(parts, axis=1), self.kernel.dtype
        lefts = []
        for chunk in self._chunks:
            left = (mantissas if chunk.order is None else mantissas[:, chunk.order]).astype(dtype)
            if (chunk.scale != 1.0).any():
                left *= chunk.scale.astype(dtype)
            if chunk.rounds:
                np.rint(left, out=left)
            lefts.append(left)
        return lefts

    def _entries(self, products: Sequence[npt.NDArray[Any]]) -> Iterator[tuple[slice, Float64Array]]:
        """(rows, sum over the chunks of unit · product), in blocks that stay in the processor's cache."""
        height, width = products[0].shape
        step = max(1, _BLOCK // width)
        total, addend = np.empty((2, min(step, height), width))
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            entries, room = total[: rows.stop - start], addend[: rows.stop - start]
            np.multiply(products[0][rows], self._chunks[0].unit, out=entries, dtype=np.float64)
            for product, chunk in zip(products[1:], self._chunks[1:], strict=True):
                entries += np.multiply(product[rows], chunk.unit, out=room, dtype=np.float64)
            yield rows, entries


def _cast(entries: Float64Array, out: Float32Array) -> None:
    """float64 -> float32, the one rounding. Adding +0.0 takes the sign off a zero and changes nothing else."""
    np.add(entries, 0.0, out=out, dtype=np.float64, casting="same_kind")


def _in_order(rows: slice, d_out: int) -> range:
    start, stop, step = rows.indices(d_out)
    if step != 1:
        raise InputError(f"the rows of a sum are read in order, not in steps of {step}")
    return range(start, max(start, stop))


def exact_sum(
    terms: Sequence[Term],
    denominator_log2: int,
    rows: slice = slice(None),
    *,
    kernels: Sequence[Kernel] = KERNELS,
) -> tuple[Float64Array, int]:
    """Rows of the sum of c · B·A / 2^denominator_log2 as integers X on the grid: the sum is X · 2^G.

    Returns X (rows, d_in) float64, integers below 2^53 without negative zero, and G, which is that of the whole tensor
    whatever `rows` is (0 where nothing is to be added). Raises what `Sum` raises, SetupError as `Sum.delta` does.
    """
    total = Sum(terms, denominator_log2, kernels=kernels)
    wanted = _in_order(rows, total.shape[0])
    result = np.zeros((len(wanted), total.shape[1]))
    if total._products is None:
        return result, 0
    _require_ieee_rounding()
    grid = total._products.plan.grid
    for place, entries in total._products.blocks(wanted):
        result[place] += entries * math.ldexp(1.0, -grid)
    return result, grid


# -- the fold ----------------------------------------------------------------------------------------------------------


def fold_tensor(
    master: Float32Array,
    terms: Sequence[Term],
    denominator_log2: int,
    *,
    row_tile: int | None = None,
    kernels: Sequence[Kernel] = KERNELS,
) -> Float32Array:
    """master + sum of c · B·A / 2^denominator_log2: the sum exact, rounded once to float32, then added in float32.

    master: (d_out, d_in) float32, left as it is; returns a new array of the same shape. Both roundings are to nearest
    even and keep subnormals. Where every term is zero the bits are those of `master`; otherwise a master of -0.0
    becomes +0.0 where nothing is added, since -0.0 + 0.0 is +0.0. `row_tile` (rows at once; by default at most 2048
    and 16 MiB of float64) and `kernels` change memory and time, never the result.

    Raises InputError (master is no float32 matrix), DeltaError (shapes do not fit, or the sum leaves float32),
    IntegrityError (the master is not finite), SetupError (this process does not round as IEEE 754 says).
    """
    if master.dtype != np.float32 or master.ndim != 2:
        raise InputError(f"a master must be a float32 matrix, not {master.dtype} of shape {master.shape}")
    if row_tile is not None and row_tile < 1:
        raise InputError(f"a tile of {row_tile} rows is empty")
    total = Sum(terms, denominator_log2, kernels=kernels) if terms else None
    if total is None or total._products is None:
        return np.array(master, order="C", copy=True)
    if master.shape != total.shape:
        raise DeltaError(f"a delta of shape {total.shape} does not fit a weight of shape {master.shape}")
    _require_ieee_rounding()
    result = np.empty(master.shape, dtype=np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for place, entries in total._products.blocks(range(total.shape[0]), row_tile):
            _cast(entries, result[place])
            np.add(master[place], result[place], out=result[place])
            if not np.isfinite(result[place]).all():
                if not np.isfinite(master[place]).all():
                    raise IntegrityError("the master holds a value that is not finite")
                raise _leaves_float32()
    return result


def _leaves_float32() -> DeltaError:
    return DeltaError(
        "the sum of the contributions leaves the range of float32",
        remedy="Reject the contribution with the largest norm and fold again.",
    )


_HALVES: Final = (0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.75, -0.75, 2.0**51 + 0.5, 2.0**51 + 1.5, -(2.0**51) - 1.5)
_WHOLE: Final = (0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 1.0, -1.0, 2.0**51, 2.0**51 + 2, -(2.0**51) - 2)


def _require_ieee_rounding() -> None:
    """Refuse flush-to-zero and directed rounding, which a library may have switched on for the whole thread.

    Rounding to integers, casting to float32 and adding float32 are the only inexact steps of the fold, and all three
    run in the calling thread.
    """
    wide = np.array([2.0**-149, 3 * 2.0**-150, 1 + 2.0**-24, 1 + 3 * 2.0**-24, -1 - 2.0**-24, -1 - 3 * 2.0**-24])
    with np.errstate(under="ignore"):
        cast = wide.astype(np.float32)
        added = cast[:2] + cast[:1]
    bits = [*cast.view(np.uint32).tolist(), *added.view(np.uint32).tolist()]
    whole = np.rint(np.array([*_HALVES, *_HALVES])).tolist()  # longer than a vector register, with a tail
    if bits != [1, 2, 0x3F800000, 0x3F800002, 0xBF800000, 0xBF800002, 2, 3] or whole != [*_WHOLE, *_WHOLE]:
        raise SetupError(
            "this process flushes subnormal numbers to zero or does not round to nearest even",
            remedy="Fold in a fresh process, without libraries built with -ffast-math or torch.set_flush_denormal.",
        )
