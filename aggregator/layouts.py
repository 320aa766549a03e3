"""Where an adapter lands in a base model: the stored tensors that it changes, row by row, and which factors they take.

    linear, parameter (m, k)       delta = B A                               B (m, r), A (r, k)
    Conv1D (stored transposed)     delta = (B A)'                            B (k, r), A (r, m)
    embedding                      delta = (B A)'                            B (width, r), A (r, vocabulary)
    experts, parameter (E, m, k)   delta_e = B[:, e::E] A[e r:(e+1) r]       B (m, r E), A (r E, k); or its transpose

(peft: `Linear`, `Embedding` and `ParamWrapper.get_delta_weight` in tuners/lora/layer.py.)

What always holds: a shape decides before a setting does, a square one that could be read both ways is decided by what
is known of the model or refused, and every pair and every whole parameter of the adapter finds its place or is refused.
It reads values only where two tensors have to be compared, and adds nothing up.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from aggregator.adapters import Adapter, Operand, Pair
from aggregator.basemodel import HEADS, BaseModel, Parameter, decode, matrix_shape, row_tiles
from rankup.errors import InputError

MERGEABLE: Final = ("F32", "F16", "BF16")
CONV1D_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_LEAVES: Final = ("c_attn", "c_proj", "c_fc", "q_attn")
_IN_OUT_EXPERTS: Final = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Models whose experts are stored (E, in, out)."""
_SWAPPING_PEFT: Final = (0, 21)
"""From this version on peft is known to take the other experts as (E, out, in)."""
_BASE_REMEDY: Final = "Give the base model that the adapter was trained on."


@dataclass(frozen=True)
class Product:
    """left · right is added to rows `start` to `stop` of `tensor`; left (stop - start, r), right (r, columns)."""

    tensor: str
    start: int
    stop: int
    left: Operand
    right: Operand


@dataclass(frozen=True)
class Copy:
    """Rows `start` to `stop` of `tensor` become the adapter's tensor `source` from its row `row` on."""

    tensor: str
    start: int
    stop: int
    source: str
    row: int


@dataclass
class Placement:
    """All that one adapter does to the base model, and what its user should know about it."""

    products: list[Product] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scalings: set[float] = field(default_factory=set)


def place(base: BaseModel, adapter: Adapter) -> Placement:
    """Find the place of every tensor of the adapter.

    Raises InputError: the base has no such parameter, a shape does not fit, or a reading is not certain.
    """
    placement = Placement()
    modules: dict[str, list[Pair]] = {}
    for pair in adapter.pairs:
        if pair.kind == "linear":
            modules.setdefault(pair.module, []).append(pair)
    placed: list[tuple[str, Pair, Parameter]] = []
    for pair in adapter.pairs:
        if pair.kind == "embedding":
            placed.append((pair.module, pair, _parameter(base, adapter, f"{pair.module}.weight")))
        elif pair.kind == "bias":
            placed.append((pair.module, pair, _parameter(base, adapter, f"{pair.module}.bias")))
    for module, pairs in modules.items():
        placed.extend(_of_module(base, adapter, module, pairs))
    for key, pair, parameter in _without_tied(base, adapter, placed, placement):
        _add_products(base, adapter, key, pair, parameter, placement)
    _add_copies(base, adapter, placement)
    touched = {product.tensor for product in placement.products} | {copy.tensor for copy in placement.copies}
    for stored in sorted(touched):
        dtype = base.extent(stored).dtype
        if dtype not in MERGEABLE:
            raise InputError(
                f"the base stores {stored!r} as {dtype}; only {', '.join(MERGEABLE)} can be merged into",
                remedy="Save the base model in bfloat16 or float32.",
            )
    return placement


def _parameter(base: BaseModel, adapter: Adapter, name: str) -> Parameter:
    if parameter := base.parameter(name):
        return parameter
    trained_on = adapter.config.get("base_model_name_or_path")
    said = f" It says that it was trained on {str(trained_on)[:128]!r}." if trained_on else ""
    said += " If it was this one, save the base again with the transformers that trained it: names differ by version."
    raise InputError(
        f"the adapter {adapter.name} changes {name!r}, which the base model {base.name} does not have",
        remedy=_BASE_REMEDY + said,
    )


def _of_module(
    base: BaseModel, adapter: Adapter, module: str, pairs: Sequence[Pair]
) -> Iterator[tuple[str, Pair, Parameter]]:
    """(name for patterns, pair, parameter) of the pairs of one module: its weight, or its targeted parameters."""
    targets = adapter.config.get("target_parameters") or []
    leaves = dict.fromkeys(target.rpartition(".")[2] for target in targets if f".{module}.".endswith(_tail(target)))
    options = {leaf: found for leaf in leaves if (found := base.parameter(f"{module}.{leaf}"))}
    if not options:
        if len(pairs) > 1 or pairs[0].depth:
            raise InputError(f"the adapter {adapter.name} wraps {module!r} more than once without target_parameters")
        yield module, pairs[0], _parameter(base, adapter, f"{module}.weight")
        return
    inner_first = sorted(pairs, key=lambda pair: -pair.depth)
    orders = itertools.permutations(options) if len(options) == len(inner_first) <= 4 else ()
    fitting = [
        order
        for order in orders
        if all(_fits(adapter, pair, options[leaf].shape) for pair, leaf in zip(inner_first, order, strict=True))
    ]
    if len(fitting) != 1:
        raise InputError(
            f"the adapter {adapter.name} wraps {module!r} {len(inner_first)} times: which of its parameters "
            f"({', '.join(options)}) is which cannot be told",
            remedy="Merge it with peft's merge_and_unload.",
        )
    for pair, leaf in zip(inner_first, fitting[0], strict=True):
        yield f"{module}.{leaf}", pair, options[leaf]


def _tail(target: str) -> str:
    """What the name of the module of `target`, between dots, must end with."""
    module = target.rpartition(".")[0]
    return f".{module}." if module else "."


def _orientations(adapter: Adapter, pair: Pair, shape: Sequence[int]) -> tuple[bool, bool]:
    """(B A fits, its transpose fits), for a parameter (m, k) or (E, m, k), from the shapes alone."""
    (rank, d_in), d_out = adapter.shape(pair.a), adapter.shape(pair.b)[0]
    if len(shape) not in (2, 3) or (len(shape) == 3 and rank % shape[0]):
        return False, False
    return (d_out, d_in) == tuple(shape[-2:]), (d_in, d_out) == tuple(shape[-2:])


def _fits(adapter: Adapter, pair: Pair, shape: Sequence[int]) -> bool:
    plain, transposed = _orientations(adapter, pair, shape)
    return plain or (transposed and len(shape) == 3)


def _is_transposed(base: BaseModel, adapter: Adapter, pair: Pair, shape: Sequence[int]) -> bool:
    plain, transposed = _orientations(adapter, pair, shape)
    if pair.kind == "embedding":
        plain = False
    elif len(shape) == 2:
        conv1d = pair.module.rpartition(".")[2] in CONV1D_LEAVES and base.has_type(CONV1D_MODELS)
        if transposed and not conv1d and (not adapter.config.get("fan_in_fan_out") or base.has_type(CONV1D_MODELS)):
            transposed = False
        plain = plain and not transposed
    elif plain and transposed:
        if base.has_type(_IN_OUT_EXPERTS):
            return True
        if _version(adapter.config.get("peft_version")) < _SWAPPING_PEFT:
            raise InputError(
                f"the experts {pair.module!r} are square, and the adapter {adapter.name} comes from a peft that may "
                "have taken them either way",
                remedy="Merge it with the peft that trained it, or load and save it with peft 0.21 or later.",
            )
        return False
    if not plain and not transposed:
        factors = f"B {adapter.shape(pair.b)} and A {adapter.shape(pair.a)}"
        resized = " The vocabulary may have been resized." if pair.kind == "embedding" else ""
        raise InputError(
            f"the adapter {adapter.name} does not fit: {factors} of {pair.module!r} make no {tuple(shape)}",
            remedy=_BASE_REMEDY + resized,
        )
    return transposed


def _version(text: object) -> tuple[int, ...]:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    return tuple(map(int, found.groups())) if found else (0, 0)


def _add_products(
    base: BaseModel, adapter: Adapter, key: str, pair: Pair, parameter: Parameter, placement: Placement
) -> None:
    shape = parameter.shape
    count = shape[0] if len(shape) == 3 else 1
    rank = adapter.shape(pair.a)[0] // count
    scale = adapter.scaling(key, rank)
    placement.scalings.add(scale)
    if pair.kind == "bias":
        if adapter.shape(pair.b) != shape:
            raise InputError(f"the bias {pair.b!r} of the adapter {adapter.name} does not fit {shape}")
        left = Operand(pair.b, scale=scale)
        placement.products.extend(Product(p.tensor, p.at, p.at + p.last, left, Operand(None)) for p in parameter.pieces)
        return
    transposed = _is_transposed(base, adapter, pair, shape)
    for piece in parameter.pieces:
        rows, own = slice(piece.first, piece.last), slice(piece.expert * rank, (piece.expert + 1) * rank)
        every = slice(piece.expert, None, count) if count > 1 else slice(None)
        if transposed:
            left = Operand(pair.a, rows=own, columns=rows, transpose=True)
            right = Operand(pair.b, columns=every, transpose=True, scale=scale)
        else:
            left = Operand(pair.b, rows=rows, columns=every, scale=scale)
            right = Operand(pair.a, rows=own)
        stop = piece.at + piece.last - piece.first
        placement.products.append(Product(piece.tensor, piece.at, stop, left, right))


# -- tied embeddings ---------------------------------------------------------------------------------------------------


def _without_tied(
    base: BaseModel, adapter: Adapter, placed: Sequence[tuple[str, Pair, Parameter]], placement: Placement
) -> list[tuple[str, Pair, Parameter]]:
    """Leave out the pair of an output layer that is the embedding's own, transposed: training added it once."""
    embeddings = {parameter.pieces: pair for _, pair, parameter in placed if pair.kind == "embedding"}
    kept = []
    for key, pair, parameter in placed:
        name = f"{pair.module}.weight"
        is_head = pair.kind == "linear" and name.endswith(HEADS)
        shared = pair.kind != "bias" and base.is_shared(parameter.pieces[0].tensor)
        if is_head and (shared or base.find(name) is None):
            twin = embeddings.get(parameter.pieces)
            if twin is not None and _are_transposes(adapter, pair, twin):
                continue
            placement.warnings.append(_tied_warning(adapter, pair.module))
        elif pair.kind == "embedding" and shared and not any(p.module.endswith("lm_head") for _, p, _ in placed):
            placement.warnings.append(_tied_warning(adapter, pair.module))
        kept.append((key, pair, parameter))
    return kept


def _tied_warning(adapter: Adapter, module: str) -> str:
    return (
        f"{adapter.name}: {module} shares its weight with another layer of this model, so the merged model changes "
        "both, which training did not do (with peft's ensure_weight_tying it does)"
    )


def _are_transposes(adapter: Adapter, head: Pair, embedding: Pair) -> bool:
    pairs = ((head.a, embedding.b), (head.b, embedding.a))
    return all(
        adapter.shape(one) == adapter.shape(other)[::-1]
        and np.array_equal(adapter.matrix(Operand(one)), adapter.matrix(Operand(other, transpose=True)))
        for one, other in pairs
    )


# -- whole parameters --------------------------------------------------------------------------------------------------


def _add_copies(base: BaseModel, adapter: Adapter, placement: Placement) -> None:
    """modules_to_save, trained biases, and the base's embedding that peft saves along: what differs from the base."""
    changes: dict[tuple[str, int], list[Copy]] = {}
    for name, source in adapter.copies.items():
        parameter = _parameter(base, adapter, name)
        if adapter.shape(source) != parameter.shape:
            raise InputError(
                f"the adapter {adapter.name} replaces {name!r} {parameter.shape} by a tensor {adapter.shape(source)}",
                remedy=_BASE_REMEDY + " If the vocabulary was resized, resize the base's and save it first.",
            )
        rows = parameter.shape[1] if len(parameter.shape) == 3 else 0
        for piece in parameter.pieces:
            row = piece.expert * rows + piece.first
            copy = Copy(piece.tensor, piece.at, piece.at + piece.last - piece.first, source, row)
            changes.setdefault((copy.tensor, copy.start), []).append(copy)
    for copies in changes.values():
        distinct: list[Copy] = []
        for copy in copies:
            if _differs(base, adapter, copy, None) and all(_differs(base, adapter, copy, other) for other in distinct):
                distinct.append(copy)
        if len(distinct) > 1:
            raise InputError(
                f"the adapter {adapter.name} holds {' and '.join(c.source for c in distinct)} with different values, "
                f"but the base model stores one tensor for both, {copies[0].tensor!r}",
                remedy="Load the base with tie_word_embeddings=False, save it, and merge into that.",
            )
        placement.copies.extend(distinct)


def _differs(base: BaseModel, adapter: Adapter, copy: Copy, other: Copy | None) -> bool:
    """Whether the copy differs from the base's rows, or from another copy of the same rows."""
    extent = base.extent(copy.tensor)
    if extent.dtype not in MERGEABLE:
        return True
    columns = matrix_shape(extent.shape)[1]
    for start, stop in row_tiles((copy.stop - copy.start, columns)):
        mine = adapter.rows(copy.source, copy.row + start, copy.row + stop, columns)
        if other is None:
            theirs = decode(base.read(copy.tensor, copy.start + start, copy.start + stop), extent.dtype, columns)
        else:
            theirs = adapter.rows(other.source, other.row + start, other.row + stop, columns)
        if not np.array_equal(mine, theirs):
            return True
    return False
