"""Fixed-point factors: B·A of one weight as int16 mantissas with one power-of-two exponent per rank component.

`quantise` makes them from floating point. `rankup.exactsum` adds them up; docs/numerics.md has the derivation and the
error of the format.

What always holds: `quantise` and the delta reader only give factors that pass `Factors.verify`, and the exactness of
the sum rests on that. It does not sum, choose coefficients or read files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import DeltaError

Int16Array: TypeAlias = npt.NDArray[np.int16]
Float64Array: TypeAlias = npt.NDArray[np.float64]

MANTISSA_MAX: Final = 32767
"""Mantissas are symmetric: -32768 is no mantissa."""
EXPONENT_MIN: Final = -200
"""Below float32's smallest subnormal, 2^-149 = 16384 · 2^-163: every float32 factor fits."""
EXPONENT_MAX: Final = 100
"""A factor above 32767 · 2^100 is a diverged training run."""


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
