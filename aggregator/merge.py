"""The arithmetic of a merge: which weight each adapter gets, and the merged bytes of a stored tensor, tile by tile.

    new = dtype(float32(base + float32(sum of c_i / 2^30 · scaling_i · B_i A_i)))

The sum is exact in fixed point (`rankup.exactsum`): factors are split into two int16 slices each, which keeps B·A to
about 2^-29 of its components' maxima, and the coefficients c_i are integers. A parameter that adapters replace as a
whole (modules_to_save, trained biases) becomes (1 - sum w_i) base + sum w_i saved_i first, in float64, rounded once to
float32.

What always holds:
- adapters count in the order of their hashes, so the order in which they are named changes no bit;
- the size of the tiles, the BLAS and the number of threads change no bit of a merge with given coefficients;
- a tensor whose sum is zero keeps its bytes;
- every value that comes out is finite, or the tensor is named in an error.

Weights of the robust rules come from a Gram matrix in floating point; what is written down is the integers. It reads
the base and the adapters and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from aggregator import rules
from aggregator.adapters import Adapter
from aggregator.basemodel import BaseModel, decode, matrix_shape, row_tiles
from aggregator.layouts import Copy, Placement, Product, place
from aggregator.lowrank import gram_of
from rankup.bfloat16 import to_bfloat16
from rankup.errors import DeltaError, InputError, IntegrityError
from rankup.exactsum import Float32Array, Sum
from rankup.fixedpoint import Factors, Float64Array, quantise, split

DENOMINATOR_LOG2: Final = 30
WEIGHT_MAX: Final = 2**7
"""|weight · 2^30| <= 2^37, the largest coefficient of an exact sum."""
TILE_BYTES: Final = 8 * 1024 * 1024
"""Rows at once, as float32; a merge holds a few such tiles and the factors of one tensor."""
BYZANTINE_SHARE: Final = 0.25
"""The share of hostile adapters that a robust rule withstands."""

_T = TypeVar("_T")
Rule = Literal["sum", "mean", "multi_krum", "geometric_median", "centred_clipping"]


@dataclass(frozen=True)
class Blend:
    """How adapters are weighed against each other.

    rule: "sum" adds them, "mean" divides by their number, the others are robust (`aggregator.rules`).
    weights: one for each adapter, in the order that the adapters are given in; None is 1 each. Not with robust rules.
    clip: adapters whose delta is longer than this many median norms are scaled down to that; infinity clips nothing.
    """

    rule: Rule = "sum"
    weights: tuple[Fraction, ...] | None = None
    clip: float = math.inf

    def check(self, count: int) -> None:
        """Raise InputError unless this is a way to weigh `count` adapters."""
        if self.rule not in get_args(Rule):
            raise InputError(f"no rule {self.rule!r}", remedy=f"The rules are {', '.join(get_args(Rule))}.")
        if not self.clip > 0:
            raise InputError(f"a clip at {self.clip} times the median norm leaves nothing")
        if self.weights is None:
            return
        if self.rule not in ("sum", "mean"):
            raise InputError(
                f"the rule {self.rule} finds the weights itself",
                remedy="Leave --weights out, or use --rule sum or mean.",
            )
        if len(self.weights) != count:
            raise InputError(f"{len(self.weights)} weights for {count} adapters", remedy="Give one weight for each.")
        for weight in self.weights:
            if abs(weight) > WEIGHT_MAX:
                raise InputError(f"the weight {float(weight):g} is outside -{WEIGHT_MAX} … {WEIGHT_MAX}")


def parse_weights(text: str) -> tuple[Fraction, ...]:
    """ "0.7,0.3" -> exact decimals. Raises InputError: not a number, not finite."""
    weights = []
    for part in text.split(","):
        try:
            number = Decimal(part.strip()) if len(part) <= 64 else Decimal("NaN")
        except InvalidOperation:
            number = Decimal("NaN")
        if not number.is_finite() or abs(number) > WEIGHT_MAX or (number and number.adjusted() < -64):
            raise InputError(
                f"{part.strip()[:64]!r} is no weight", remedy=f"Write decimals up to ±{WEIGHT_MAX}: --weights 0.7,0.3"
            )
        weights.append(Fraction(number))
    return tuple(weights)


class Merge:
    """A base model and the adapters that go into it, in canonical order, with their integer coefficients.

    `coefficients` are over 2^30; where None is given they follow from `blend`. Raises InputError (an adapter does not
    fit the base, a blend that does not fit) and what reading the files raises.
    """

    def __init__(
        self, base: BaseModel, adapters: Sequence[Adapter], blend: Blend, *, coefficients: Sequence[int] | None = None
    ) -> None:
        if not adapters:
            raise InputError("a merge needs at least one adapter")
        blend.check(len(adapters))
        weights = blend.weights or (Fraction(1),) * len(adapters)
        ordered = sorted(
            zip(adapters, weights, strict=True), key=lambda one: (one[0].sha256, one[0].config_sha256, one[1])
        )
        self.base: Final = base
        self.blend: Final = blend
        self.adapters: Final = tuple(adapter for adapter, _ in ordered)
        self._weights = tuple(weight for _, weight in ordered)
        self.placements: Final[tuple[Placement, ...]] = tuple(place(base, adapter) for adapter in self.adapters)
        self._changes: Final = _by_tensor(self.placements)
        self.touched: Final = frozenset(self._changes)
        """Stored tensors that an adapter speaks of; those whose sum is zero keep their bytes."""
        self._coefficients = None if coefficients is None else tuple(coefficients)

    @property
    def warnings(self) -> tuple[str, ...]:
        found = [text for placement in self.placements for text in placement.warnings]
        if self.blend.rule not in ("sum", "mean") and len(self.adapters) < 3:
            found.append(f"{self.blend.rule} needs three adapters to know a majority; their mean is taken")
        return tuple(dict.fromkeys(found))

    @property
    def identities(self) -> list[tuple[str, str, str]]:
        """(hash of the weights, hash of the configuration, exact weight) of each adapter, in canonical order."""
        return [(a.sha256, a.config_sha256, str(w)) for a, w in zip(self.adapters, self._weights, strict=True)]

    # -- coefficients --------------------------------------------------------------------------------------------------

    @property
    def coefficients(self) -> tuple[int, ...]:
        """c_i of the adapters in canonical order: the weight is c_i / 2^30."""
        if self._coefficients is None:
            self._coefficients = self.find_coefficients()
        return self._coefficients

    def find_coefficients(self) -> tuple[int, ...]:
        """Decide the coefficients from the blend: weights are rounded to the nearest multiple of 2^-30, ties to even.

        Robust rules and the clip read all factors once. Raises what reading them raises.
        """
        count = len(self.adapters)
        unit = 1 << DENOMINATOR_LOG2
        if self.blend.rule in ("sum", "mean"):
            scales = [Fraction(1)] * count
            if math.isfinite(self.blend.clip):
                clipped = self._rule_weights("mean_by_tokens")  # the n-th part of each scale
                scales = [min(Fraction(1), Fraction(float(weight)) * count) for weight in clipped]
            share = Fraction(1, count if self.blend.rule == "mean" else 1)
            return tuple(round(w * s * share * unit) for w, s in zip(self._weights, scales, strict=True))
        return tuple(rules.integer_coefficients(self._rule_weights(self.blend.rule), DENOMINATOR_LOG2))

    def _rule_weights(self, rule: str) -> Float64Array:
        ones = [1] * len(self.adapters)
        return rules.weights(rule, self.gram(), ones, clip_norm_ratio=self.blend.clip, byzantine_share=BYZANTINE_SHARE)

    def gram(self) -> Float64Array:
        """(n, n) float64: inner products of the adapters' deltas, in canonical order, to about 1e-4 of themselves."""
        names: dict[str, _Stretch] = {}
        result = np.zeros((len(self.adapters), len(self.adapters)))
        for tensor, stretches in sorted(self._changes.items()):
            for stretch in stretches:
                if any(stretch.copies):
                    result += self._dense_gram(tensor, stretch)
                else:
                    names[f"{tensor}:{stretch.start}"] = stretch

        def factors(index: int, name: str) -> list[Factors]:
            products = names[name].products[index]
            return [self._factors(self.adapters[index], products, quantise)] if products else []

        sources = [lambda name, index=index: factors(index, name) for index in range(len(self.adapters))]
        return result + gram_of(sources, names)

    def _dense_gram(self, tensor: str, stretch: _Stretch) -> Float64Array:
        """The same for rows that an adapter replaces: no product of small factors, so row by row."""
        columns = matrix_shape(self.base.extent(tensor).shape)[1]
        result = np.zeros((len(self.adapters), len(self.adapters)))
        sides = [
            [(adapter.matrix(product.left), adapter.matrix(product.right)) for product in products]
            for adapter, products in zip(self.adapters, stretch.products, strict=True)
        ]
        for start, stop in row_tiles((stretch.stop - stretch.start, columns), TILE_BYTES // len(self.adapters)):
            dtype = self.base.extent(tensor).dtype
            base = decode(self.base.read(tensor, stretch.start + start, stretch.start + stop), dtype, columns)
            deltas = np.zeros((len(self.adapters), (stop - start) * columns))
            for index, adapter in enumerate(self.adapters):
                for left, right in sides[index]:
                    deltas[index] += (left[start:stop] @ right).reshape(-1)
                for copy in stretch.copies[index]:
                    saved = adapter.rows(copy.source, copy.row + start, copy.row + stop, columns)
                    deltas[index] += (saved - base.astype(np.float64)).reshape(-1)
            result += deltas @ deltas.T
        return result

    @staticmethod
    def _factors(adapter: Adapter, products: Sequence[Product], write: Any) -> Factors:
        """The products of one adapter for the same rows as one product, side by side, in fixed point."""
        left = np.concatenate([adapter.matrix(product.left) for product in products], axis=1)
        right = np.concatenate([adapter.matrix(product.right) for product in products], axis=0)
        try:
            factors: Factors = write(left, right)
        except DeltaError as exc:
            raise InputError(
                f"{exc.cause}, in what the adapter {adapter.name} adds to {products[0].tensor!r}",
                remedy="The training run diverged: take an earlier checkpoint, or leave this adapter out.",
            ) from exc
        return factors

    # -- tensors -------------------------------------------------------------------------------------------------------

    def tiles(self, tensor: str, tile_bytes: int = TILE_BYTES) -> Iterator[tuple[bytes, bytes]]:
        """(base's bytes, merged bytes) of a tensor from its first row to its last, some rows at a time.

        Raises InputError or IntegrityError that name the tensor: a value that is not finite, or that leaves the dtype.
        """
        extent = self.base.extent(tensor)
        columns = matrix_shape(extent.shape)[1]
        for stretch in self._changes[tensor]:
            total = self._sum(stretch)
            copies = [
                (coefficient, adapter, copy)
                for coefficient, adapter, own in zip(self.coefficients, self.adapters, stretch.copies, strict=True)
                for copy in own
                if coefficient
            ]
            for start, stop in row_tiles((stretch.stop - stretch.start, columns), tile_bytes):
                data = self.base.read(tensor, stretch.start + start, stretch.start + stop)
                if total is None and not copies:
                    yield data, data
                    continue
                master = decode(data, extent.dtype, columns)
                new = _replaced(master, copies, start, stop) if copies else master
                if total is not None:
                    new = _added(new, total, slice(start, stop), tensor)
                yield data, _encode(new, extent.dtype, tensor, master)

    def _sum(self, stretch: _Stretch) -> Sum | None:
        """The exact sum for one stretch; None where nothing is added."""
        terms = [
            (coefficient, self._factors(adapter, products, split))
            for coefficient, adapter, products in zip(self.coefficients, self.adapters, stretch.products, strict=True)
            if coefficient and products
        ]
        total = Sum(terms, DENOMINATOR_LOG2) if terms else None
        return None if total is None or total.is_zero else total


@dataclass(frozen=True)
class _Stretch:
    """Rows `start` to `stop` of a stored tensor, and what each adapter does to them."""

    start: int
    stop: int
    products: tuple[tuple[Product, ...], ...]
    copies: tuple[tuple[Copy, ...], ...]


def _by_tensor(placements: Sequence[Placement]) -> Mapping[str, tuple[_Stretch, ...]]:
    """Changes by stored tensor. Stretches are the base's own (a whole tensor, or one expert), so they never overlap."""
    products: dict[str, dict[tuple[int, int], list[list[Product]]]] = {}
    copies: dict[str, dict[tuple[int, int], list[list[Copy]]]] = {}
    for index, placement in enumerate(placements):
        for product in placement.products:
            _slot(products, product.tensor, (product.start, product.stop), len(placements))[index].append(product)
        for copy in placement.copies:
            _slot(copies, copy.tensor, (copy.start, copy.stop), len(placements))[index].append(copy)
    nothing: tuple[tuple[()], ...] = ((),) * len(placements)
    return {
        tensor: tuple(
            _Stretch(
                *rows,
                tuple(map(tuple, products.get(tensor, {}).get(rows, nothing))),
                tuple(map(tuple, copies.get(tensor, {}).get(rows, nothing))),
            )
            for rows in sorted({*products.get(tensor, {}), *copies.get(tensor, {})})
        )
        for tensor in {*products, *copies}
    }


def _slot(
    table: dict[str, dict[tuple[int, int], list[list[_T]]]], tensor: str, rows: tuple[int, int], count: int
) -> list[list[_T]]:
    return table.setdefault(tensor, {}).setdefault(rows, [[] for _ in range(count)])


def _replaced(master: Float32Array, copies: Sequence[tuple[int, Adapter, Copy]], start: int, stop: int) -> Float32Array:
    """(1 - sum w) master + sum w · saved, in float64, rounded once to float32."""
    unit = 1 << DENOMINATOR_LOG2
    kept = unit - sum(coefficient for coefficient, _, _ in copies)
    mixed = master.astype(np.float64)
    mixed *= kept / unit
    for coefficient, adapter, copy in copies:
        saved = adapter.rows(copy.source, copy.row + start, copy.row + stop, master.shape[1])
        mixed += saved.astype(np.float64) * (coefficient / unit)
    with np.errstate(over="ignore", under="ignore"):
        return mixed.astype(np.float32)


def _added(master: Float32Array, total: Sum, rows: slice, tensor: str) -> Float32Array:
    try:
        delta = total.delta(rows)
    except DeltaError as exc:
        raise InputError(
            f"the sum of the adapters leaves float32 in {tensor!r}", remedy="Use smaller weights, or --clip."
        ) from exc
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(master + delta)


def _encode(values: Float32Array, dtype: str, tensor: str, master: Float32Array) -> bytes:
    """float32 -> stored bytes, rounded once to nearest even; everything finite."""
    encoded: npt.NDArray[Any] = np.ascontiguousarray(values)
    if dtype == "BF16":
        encoded = to_bfloat16(encoded)
        finite = bool(((encoded & 0x7F80) != 0x7F80).all())
    else:
        with np.errstate(over="ignore", under="ignore"):
            encoded = encoded.astype({"F32": "<f4", "F16": "<f2"}[dtype], copy=False)
        finite = bool(np.isfinite(encoded).all())
    if not finite:
        if not np.isfinite(master).all():
            raise IntegrityError(f"the base model holds a value that is not finite in {tensor!r}")
        raise InputError(
            f"a merged value of {tensor!r} leaves the range of {dtype}",
            remedy="Use smaller weights, or --clip, or a base model in a wider format.",
        )
    return encoded.tobytes()
