"""Fixed-point factors: B·A of one weight as integer mantissas with one power-of-two exponent per rank component.

Three ways to write floating-point factors, by what they cost and lose (docs/numerics.md derives the errors):

    quantise(b, a)           int16      relative error of the product about 6e-5 on gaussian factors
    quantise(b, a, bits=8)   int8       half the bytes, about 1.5e-2
    split(b, a)              int16, rank 4r: B·A to about 2^-29 of its components' maxima, below what float32 shows

What always holds: what these functions and the delta reader give passes `Factors.verify`, and the exactness of
`rankup.exactsum` rests on that. This module does not sum, choose coefficients or read files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import DeltaError

Int16Array: TypeAlias = npt.NDArray[np.int16]
MantissaArray: TypeAlias = npt.NDArray[np.int16] | npt.NDArray[np.int8]
Float64Array: TypeAlias = npt.NDArray[np.float64]

MANTISSA_MAX: Final = 32767
"""Mantissas are symmetric: -32768 is no mantissa."""
MANTISSA_MAX_INT8: Final = 127
"""Of int8 factors; -128 is no mantissa."""
EXPONENT_MIN: Final = -200
"""Below float32's smallest subnormal, 2^-149 = 16384 · 2^-163: every float32 factor fits."""
EXPONENT_MAX: Final = 100
"""A factor above 32767 · 2^100 is a diverged training run."""


@dataclass(frozen=True, eq=False)
class Factors:
    """B·A of one weight in fixed point: B[:, k] = b[:, k] · 2^b_exp[k], A[k, :] = a[k, :] · 2^a_exp[k].

    Both mantissa matrices are int16, or both int8; everything else is int16. Shapes and types are checked here
    (DeltaError), values by `verify`.
    """

    b: MantissaArray
    """(d_out, r)"""
    b_exp: Int16Array
    """(r,)"""
    a: MantissaArray
    """(r, d_in)"""
    a_exp: Int16Array
    """(r,)"""
    b_max: Int16Array
    """(r,): max over rows of |b[:, k]|"""
    a_max: Int16Array
    """(r,): max over columns of |a[k, :]|"""

    def __post_init__(self) -> None:
        if self.b.dtype != self.a.dtype or self.b.dtype not in (np.int16, np.int8):
            raise DeltaError(f"mantissas of {self.b.dtype} and {self.a.dtype} are not both int16 or both int8")
        scales = (self.b_exp, self.a_exp, self.b_max, self.a_max)
        if any(array.dtype != np.int16 for array in scales):
            raise DeltaError("the exponents and maxima of factors are not int16")
        if self.b.ndim != 2 or self.a.ndim != 2 or 0 in self.b.shape or 0 in self.a.shape:
            raise DeltaError(f"factors of shapes {self.b.shape} and {self.a.shape} are not two non-empty matrices")
        rank = self.b.shape[1]
        if self.a.shape[0] != rank or any(array.shape != (rank,) for array in scales):
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

    @property
    def mantissa_max(self) -> int:
        """The largest |mantissa| that the type allows: 32767, or 127 for int8."""
        return MANTISSA_MAX if self.b.dtype == np.int16 else MANTISSA_MAX_INT8

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
        """Check every value: mantissas within ±`mantissa_max`, exponents in range, the maxima those of the data.

        Raises DeltaError that says which array is wrong.
        """
        for label, mantissas, axis, stated in (("B", self.b, 0, self.b_max), ("A", self.a, 1, self.a_max)):
            low, high = mantissas.min(axis=axis), mantissas.max(axis=axis)
            if int(low.min()) < -self.mantissa_max:
                raise DeltaError(f"{label} holds the mantissa {-self.mantissa_max - 1}")
            if not np.array_equal(np.maximum(high, -low), stated):
                raise DeltaError(f"the stated maxima of {label} are not those of its mantissas")
        for label, exponents in (("B", self.b_exp), ("A", self.a_exp)):
            if int(exponents.min()) < EXPONENT_MIN or int(exponents.max()) > EXPONENT_MAX:
                raise DeltaError(f"an exponent of {label} is outside {EXPONENT_MIN}..{EXPONENT_MAX}")


# -- quantisation ------------------------------------------------------------------------------------------------------


def quantise(b: npt.NDArray[Any], a: npt.NDArray[Any], *, bits: Literal[8, 16] = 16) -> Factors:
    """Write the product B·A in fixed point, with mantissas of 16 or 8 bits.

    b: (d_out, r), a: (r, d_in), floating point of any width; scaling factors belong into b before. Each component's
    exponent is the smallest e with round_half_even(max|x| / 2^e) <= 32767 (127 for 8 bits), at least EXPONENT_MIN; a
    component that is zero, or rounds to zero there, has exponent 0 and mantissas 0. A vector of n numbers is the
    product of its (n, 1) column and the (1, 1) matrix of one.

    Raises DeltaError: a value is not finite or above 32767 · 2^EXPONENT_MAX (127 · 2^EXPONENT_MAX), shapes do not fit.
    """
    _require_product(b, a)
    columns, b_exp, b_max = _quantise_rows(np.asarray(b.T, dtype=np.float64), bits, "B")
    rows, a_exp, a_max = _quantise_rows(np.asarray(a, dtype=np.float64), bits, "A")
    return Factors(b=np.ascontiguousarray(columns.T), b_exp=b_exp, a=rows, a_exp=a_exp, b_max=b_max, a_max=a_max)


def split(b: npt.NDArray[Any], a: npt.NDArray[Any]) -> Factors:
    """Write B·A with two int16 slices a factor, for factors that must not lose what float32 shows.

    b: (d_out, r), a: (r, d_in), floating point of any width. B = B' + B" where B' is B in fixed point and B" the rest
    in fixed point, each value within 2^-30 of its component's maximum (2^-201 where the exponent is at its end); A
    likewise. The result has rank 4r, in the order B'A', B'A", B"A', B"A", and an entry of its product is within about
    2^-29 of the sum over k of max|B[:, k]| · max|A[k, :]|. Slices that are zero, such as B" of bfloat16 values near
    each other, cost bytes but no time in a sum. The method is that of Ozaki et al. 2012 (docs/numerics.md).

    Raises what `quantise` raises.
    """
    _require_product(b, a)
    b_slices = _slices(np.asarray(b.T, dtype=np.float64), "B")
    a_slices = _slices(np.asarray(a, dtype=np.float64), "A")
    pairs = [(left, right) for left in b_slices for right in a_slices]
    columns, b_exp, b_max = (np.concatenate([left[i] for left, _ in pairs]) for i in range(3))
    rows, a_exp, a_max = (np.concatenate([right[i] for _, right in pairs]) for i in range(3))
    return Factors(b=np.ascontiguousarray(columns.T), b_exp=b_exp, a=rows, a_exp=a_exp, b_max=b_max, a_max=a_max)


def _require_product(b: npt.NDArray[Any], a: npt.NDArray[Any]) -> None:
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or 0 in b.shape or 0 in a.shape:
        raise DeltaError(f"factors of shapes {b.shape} and {a.shape} do not make a product")


_Rows: TypeAlias = tuple[npt.NDArray[Any], Int16Array, Int16Array]


def _slices(x: Float64Array, label: str) -> tuple[_Rows, _Rows]:
    high = _quantise_rows(x, 16, label)
    # Exact: the rest is a multiple of x's last place and no larger than x.
    rest = x - np.ldexp(high[0].astype(np.float64), high[1].astype(np.int32)[:, None])
    return high, _quantise_rows(rest, 16, label)


def _quantise_rows(x: Float64Array, bits: Literal[8, 16], label: str) -> _Rows:
    """x: (r, d) -> mantissas (r, d), exponents (r,), maxima of |mantissa| (r,)."""
    limit, dtype = (MANTISSA_MAX, np.int16) if bits == 16 else (MANTISSA_MAX_INT8, np.int8)
    largest = np.maximum(x.max(axis=1), -x.min(axis=1))
    if not np.isfinite(largest).all():
        raise DeltaError(
            f"{label} holds a value that is not finite",
            remedy="The training run diverged: lower the learning rate or the gradient norm of the recipe.",
        )
    fraction, power = np.frexp(largest)  # largest = fraction · 2^power with fraction in [0.5, 1)
    exponents = power.astype(np.int64) - (bits - 1)
    exponents += np.rint(fraction * 2.0 ** (bits - 1)) > limit
    exponents = np.maximum(exponents, EXPONENT_MIN)
    exponents[largest == 0] = 0
    if int(exponents.max()) > EXPONENT_MAX:
        raise DeltaError(
            f"{label} holds a value above {limit} · 2^{EXPONENT_MAX}",
            remedy="The training run diverged: lower the learning rate or the gradient norm of the recipe.",
        )
    mantissas = np.rint(x * np.ldexp(1.0, -exponents.astype(np.int32))[:, None]).astype(dtype)
    maxima = np.abs(mantissas).max(axis=1).astype(np.int16)
    exponents[maxima == 0] = 0
    return mantissas, exponents.astype(np.int16), maxima


def dequantise(factors: Factors) -> tuple[Float64Array, Float64Array]:
    """The factors as float64, exactly: B (d_out, r), A (r, d_in)."""
    b = np.ldexp(factors.b.astype(np.float64), factors.b_exp.astype(np.int32)[None, :])
    a = np.ldexp(factors.a.astype(np.float64), factors.a_exp.astype(np.int32)[:, None])
    return b, a
