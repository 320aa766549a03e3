"""Part 1 of benchmarks/aggregate.py: CPU seconds of the ways to add many contributions to the linear layers of a model.

A child process makes the seven weights of one layer and all contributions to them, outside the clock, and then takes
the layer as often as asked; the best layer times their number is the model's time. The operands of one layer are
larger than the processor's nearest caches, so this is the time of different layers in turn.

`exact-*` and `fold-*` are the product's own functions. Every way ends with new float32 masters and starts with what it
is handed: int16 or int8 factors, float32 factors, or (`dgemm`) the float64 operands themselves.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from aggregate_run import MODELS, contribution, master, serve, shares
from numpy.typing import NDArray

from rankup.exactsum import Sum, fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.foldrows import Law, TensorTerm, TileHashes, fold_tiles
from rankup.products import KERNELS, Kernel
from rankup.records import TensorEntry

DENOMINATOR_LOG2: Final = 16
WAYS: Final = {
    "exact-int16": "exact, int16 deltas, weights by tokens",
    "exact-int8-equal": "exact, int8 deltas, equal weights",
    "exact-int8": "exact, int8 deltas, weights by tokens",
    "exact-int8-torch": "exact, int8 deltas, equal weights, torch's int8 kernel",
    "fold-int16": "the same as the first, with the hashes and the bfloat16 export of a version",
    "concatenated": "one float32 product of the concatenated factors (order-dependent)",
    "dgemm": "the bare float64 product of ready operands",
}
"""Way -> what it is, in the order of the table."""

Weight = tuple[NDArray[np.float32], list[tuple[Any, Any]]]
"""A master and the float32 factors of every contribution."""


class Timed:
    """A kernel of the product with a clock around its products; a little cheaper on paper, so that it is chosen."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.seconds = kernel, 0.0
        self.name, self.dtype, self.cost = kernel.name, kernel.dtype, kernel.cost * 0.99
        self.operand_max, self.limit = kernel.operand_max, kernel.limit

    def hold(self, right: NDArray[Any], /) -> Any:
        return self.kernel.hold(right)

    def multiply(self, left: NDArray[Any], right: Any, /) -> NDArray[Any]:
        started = time.process_time()
        product: NDArray[Any] = self.kernel.multiply(left, right)
        self.seconds += time.process_time() - started
        return product


def measure(model: str, way: str, contributions: int, rank: int, passes: int) -> dict[str, Any]:
    """CPU seconds of each pass over one layer, and how good the answer is."""
    shapes = list(MODELS[model].linear.values())
    weights: list[Weight] = [
        (
            master(*shape, seed=(0, place)),
            [contribution(*shape, rank, seed=(1, place, i)) for i in range(contributions)],
        )
        for place, shape in enumerate(shapes)
    ]
    coefficients = shares(contributions, equal=way.endswith(("-equal", "-torch")))
    kernels: Sequence[Kernel] = KERNELS
    if way.endswith("-torch"):
        from aggregator.kernels import available

        kernels = available()
    steps = [_prepared(way, weight, coefficients, kernels) for weight in weights]
    smallest = min(range(len(shapes)), key=lambda place: shapes[place][0] * shapes[place][1])
    steps[smallest]()
    seconds = []
    for _ in range(passes):
        started = time.process_time()
        for step in steps:
            step()
        seconds.append(time.process_time() - started)
    answer: dict[str, Any] = {"cpu_s": seconds, "versions": {"numpy": version("numpy")}}
    if way.startswith("exact"):
        answer |= _inside(way, weights, coefficients, kernels)
    if way != "dgemm":
        small = weights[smallest]
        result = steps[smallest]()
        backwards = _prepared(way, (small[0], small[1][::-1]), coefficients[::-1], kernels)()
        answer |= {"order_free": result.tobytes() == backwards.tobytes(), "error": error(small, coefficients, result)}
    return answer


def _prepared(
    way: str, weight: Weight, coefficients: Sequence[int], kernels: Sequence[Kernel]
) -> Callable[[], NDArray[Any]]:
    """What the clock is on for, with everything at hand that the way starts from."""
    old, pairs = weight
    scales = [np.float32(c / 2**DENOMINATOR_LOG2) for c in coefficients]
    if way == "concatenated":

        def concatenated() -> NDArray[Any]:
            left = np.concatenate([scale * b for scale, (b, _) in zip(scales, pairs, strict=True)], axis=1)
            result: NDArray[Any] = left @ np.concatenate([a for _, a in pairs])
            result += old
            return result

        return concatenated
    if way == "dgemm":
        left = np.concatenate([b for b, _ in pairs], axis=1).astype(np.float64)
        right = np.concatenate([a for _, a in pairs]).astype(np.float64)
        return lambda: left @ right
    terms = _terms(way, pairs, coefficients)
    if way.startswith("exact"):
        return lambda: fold_tensor(old, terms, DENOMINATOR_LOG2, kernels=kernels)
    raw = old.tobytes()
    digest = hashlib.sha256(raw).hexdigest()
    entry = TensorEntry(shape=old.shape, export_dtype="BF16", master=digest, export=digest, role="linear")

    def fold() -> NDArray[Any]:
        hashes, tiles = TileHashes(), []
        law = Law(DENOMINATOR_LOG2, kernels=kernels)
        changes = [TensorTerm(c, partial(_only, factors)) for c, factors in terms]
        for tile in fold_tiles("weight", entry, changes, law, master=lambda at, size: raw[at : at + size]):
            hashes.update(tile)
            tiles.append(tile.master)
        hashes.entry(old.shape, "BF16", "linear")
        return np.concatenate(tiles)

    return fold


def _only(factors: Factors, _: int) -> Factors:
    """The factors of a weight that is one slice."""
    return factors


def _terms(way: str, pairs: Sequence[tuple[Any, Any]], coefficients: Sequence[int]) -> list[tuple[int, Factors]]:
    wide = "int16" in way
    return [(c, quantise(b, a, bits=16 if wide else 8)) for c, (b, a) in zip(coefficients, pairs, strict=True)]


def _inside(
    way: str, weights: Sequence[Weight], coefficients: Sequence[int], kernels: Sequence[Kernel]
) -> dict[str, Any]:
    """Which kernels were chosen, and the share of the time that is their products."""
    timed = [Timed(kernel) for kernel in kernels]
    paths, seconds = set(), 0.0
    for old, pairs in weights:
        terms = _terms(way, pairs, coefficients)
        paths.add(Sum(terms, DENOMINATOR_LOG2, kernels=kernels).path)
        started = time.process_time()
        fold_tensor(old, terms, DENOMINATOR_LOG2, kernels=timed)
        seconds += time.process_time() - started
    return {"paths": sorted(paths), "product_share": sum(kernel.seconds for kernel in timed) / seconds}


def error(weight: Weight, coefficients: Sequence[int], result: NDArray[Any]) -> float:
    """|found - true| / |true| of what was added to a weight; true is the float64 sum of the float32 factors."""
    old, pairs = weight
    true = np.zeros(old.shape)
    for c, (b, a) in zip(coefficients, pairs, strict=True):
        true += (b.astype(np.float64) * (c / 2**DENOMINATOR_LOG2)) @ a.astype(np.float64)
    found = result.astype(np.float64) - old
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


if __name__ == "__main__":
    serve(measure)
