"""In which precision the frozen base is held while it is trained beside, and how many examples at a time: from what
memory there is.

The memory of a training, in bytes, for examples of `tokens` tokens, `n` tokens in memory at a time, and numbers of the
activations of `c` bytes (4 in float32, else 2):

    base         4 or 2 a weight; in nf4 0.516 a weight of a linear layer (4 bits, and a scale of 8 bits for 64 weights,
                 with a scale of 32 bits for 256 of those: QLoRA, arXiv:2305.14314), 2 for each other weight, and one
                 layer unpacked
    trained      16 for each: value, gradient and AdamW's two moments, all in float32
    activations  n · c · spread · (widths + widths / layers), or, with gradient checkpointing (arXiv:1604.06174),
                 n · c · ((layers + 2) · hidden + spread · 2 · widths / layers)
    head         n · (c + 4) · hidden, since the loss is taken in tiles; n · 12 · vocabulary where a method needs all
                 logits, and off a GPU where that is at most 0.5 GiB (`whole_logits`); and 10 for each weight of a head
                 or an embedding that is trained, for the sum of both
    reserve      5 per cent, for what an allocator cannot use, and on a GPU 0.4 GiB for its libraries

`widths` is the sum of inputs and outputs of all linear layers: what they take in and give is what the backward pass
needs. `spread` stands for the rest (norms, activation functions, the copies that LoRA makes): 1.1 in float32 and 1.4 in
16 bits, measured over all that autograd keeps of Llama and GPT-NeoX layers (1.02 and 1.37 at most).

What always holds: with the same hardware, base and recipe the choice is the same; four bits are chosen on a GPU only,
and only where 16 bits do not fit one example and the recipe allows it; a training that began in four bits ends in four.
Where the memory turns out to be less after all, `worker.recovery` makes the pieces smaller. Nothing here does I/O or
needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Literal

from rankup.errors import SetupError
from rankup.protocol import DeviceKind
from rankup.recipe import Precision, Recipe
from rankup.targets import Target

Compute = Literal["float32", "bfloat16", "float16"]
"""What the products are computed in."""

NF4_BYTES: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
TRAINED_BYTES: Final = 16
TRAINED_HEAD_BYTES: Final = 10
LOGIT_BYTES: Final = 12
"""The logits, their probabilities and their gradient, in float32."""
SPREAD: Final[Mapping[Compute, float]] = {"float32": 1.1, "bfloat16": 1.4, "float16": 1.4}
EXPERTS_AT_WORK: Final = 8
"""Experts that a token visits, at most; where a model has fewer, all of them."""
RESERVE_SHARE: Final = 0.05
WHOLE_LOGITS_BYTES: Final = 512 * 1024**2
GPU_RESERVE_BYTES: Final = int(0.4 * 1024**3)
_GIB: Final = 1024**3
_EXAMPLES: Final[Mapping[str, int]] = {"sft": 1, "distillation": 1, "dpo": 2, "kto": 2}
"""Sequences that one example of a batch is computed as."""


class DoesNotFitError(SetupError):
    """The memory that is free is too small for this base and this recipe."""

    code = "does-not-fit"
    default_remedy = "Close other programs that use the card, or join for a smaller model: --model NAME."


@dataclass(frozen=True)
class BaseShape:
    """What the size of a training depends on."""

    weights: int
    """All of them."""
    packed: int
    """Those that nf4 holds in four bits: of linear layers that are neither head nor embedding nor experts."""
    largest: int
    """Of the largest linear layer."""
    widths: int
    layers: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> BaseShape:
        """From the names and shapes of the stored weights, as the headers of the files have them.

        Layers are numbered in their names (`model.layers.3.mlp.up_proj.weight`); matrices outside are embeddings and
        heads. Experts are stacked, or numbered inside a layer.
        """
        weights = packed = largest = 0
        widths = 0.0
        blocks: set[str] = set()
        outside: tuple[int, int] = (1, 1)
        experts = _experts(shapes)
        for name, shape in shapes.items():
            count = _product(shape)
            weights += count
            numbers = _numbers(name)
            if len(shape) < 2:
                continue
            if not numbers:
                outside = max(outside, (max(shape[:2]), min(shape[:2])))
                continue
            blocks.add(numbers[0])
            largest = max(largest, _product(shape[-2:]))
            stacked = shape[0] if len(shape) == 3 else 1
            if stacked > 1 or len(numbers) > 1:
                share = min(1.0, EXPERTS_AT_WORK / max(experts, 1))
                widths += share * stacked * (shape[-1] + shape[-2])
            else:
                packed += count
                widths += shape[0] + shape[1]
        vocabulary, hidden = outside
        return cls(weights, packed, largest, round(widths), max(len(blocks), 1), hidden, vocabulary)


@dataclass(frozen=True)
class Task:
    """What of a recipe takes memory."""

    trained: int
    """Numbers that are trained."""
    trained_matrices: int
    """Weights of heads and embeddings that are trained: their sum with the base is computed as a whole."""
    batch: int
    tokens: int
    """Of the longest example, counted as often as the method computes it."""
    all_logits: bool
    four_bit: bool
    """Whether four bits are allowed."""

    @classmethod
    def of(cls, recipe: Recipe, targets: Mapping[str, Target]) -> Task:
        """targets: with their ranks."""
        matrices = [target for target in targets.values() if target.role in ("head", "embedding")]
        return cls(
            trained=sum(_trained(target) for target in targets.values()),
            trained_matrices=sum(target.d_out * target.d_in for target in matrices),
            batch=recipe.batch_size,
            tokens=recipe.max_tokens * _EXAMPLES[recipe.method],
            all_logits=recipe.method == "distillation" and recipe.teacher_weight > 0,
            four_bit=recipe.four_bit == "if_needed",
        )


@dataclass(frozen=True)
class Hardware:
    """What trains."""

    kind: DeviceKind
    free_bytes: int | None = None
    """None: unknown, so everything is taken to fit."""
    bfloat16: bool = False
    """Whether it computes in bfloat16, not only in its emulation."""
    four_bit: bool = False
    """Whether bitsandbytes is installed."""


@dataclass(frozen=True)
class Fit:
    """How a training is run."""

    precision: Precision
    """Of the frozen base."""
    compute: Compute
    micro_batch: int
    """Examples in memory at a time; divides the batch."""
    checkpointing: bool
    """Whether activations are computed twice to save memory."""
    needs_bytes: int


def memory_bytes(base: BaseShape, task: Task, fit: tuple[Precision, Compute, int, bool], *, gpu: bool) -> int:
    """What a training takes; `fit`: precision, compute, examples at a time, checkpointing."""
    precision, compute, examples, checkpointing = fit
    tokens = examples * task.tokens
    wide = 4 if compute == "float32" else 2
    if precision == "nf4":
        weights = NF4_BYTES * base.packed + wide * (base.weights - base.packed + base.largest)
    else:
        weights = (4.0 if precision == "float32" else 2.0) * base.weights
    block = SPREAD[compute] * base.widths / base.layers
    kept = (base.layers + 2) * base.hidden + 2 * block if checkpointing else (base.layers + 1) * block
    all_logits = task.all_logits or (not gpu and whole_logits(tokens, base.vocabulary))
    head = (wide + 4) * base.hidden + (LOGIT_BYTES * base.vocabulary if all_logits else 0)
    needed = (
        weights
        + TRAINED_BYTES * task.trained
        + tokens * (wide * kept + head)
        + TRAINED_HEAD_BYTES * task.trained_matrices
    )
    return int(needed * (1 + RESERVE_SHARE)) + (GPU_RESERVE_BYTES if gpu else 0)


def choose(
    base: BaseShape,
    task: Task,
    hardware: Hardware,
    *,
    wanted: Precision | Literal["auto"] = "auto",
    begun_in: Precision | None = None,
    micro_batch: int | None = None,
) -> Fit:
    """The widest precision that fits, then the most examples at a time; without checkpointing if the batch fits so.

    `wanted`: the volunteer's own word. `begun_in`: what a checkpoint was trained in. `micro_batch`: the most examples
    at a time, where more have failed. Raises DoesNotFitError, and SetupError: `wanted` cannot be had here.
    """
    for precision in _ladder(task, hardware, wanted, begun_in):
        compute = compute_of(precision, hardware)
        for examples, checkpointing in _ways(task.batch, micro_batch):
            needs = memory_bytes(base, task, (precision, compute, examples, checkpointing), gpu=hardware.kind == "cuda")
            if hardware.free_bytes is None or needs <= hardware.free_bytes:
                return Fit(precision, compute, examples, checkpointing, needs)
    last = _ladder(task, hardware, wanted, begun_in)[-1]
    least = memory_bytes(base, task, (last, compute_of(last, hardware), 1, True), gpu=hardware.kind == "cuda")
    remedy = None
    if hardware.kind == "cuda" and last != "nf4" and wanted == "auto" and task.four_bit and not hardware.four_bit:
        remedy = "In 4 bits it may fit: pip install 'rankup[cuda]'. Or close other programs that use the card."
    free = hardware.free_bytes or 0
    raise DoesNotFitError(
        f"the training needs {least / _GIB:.1f} GiB with the base in {last}, and {free / _GIB:.1f} GiB are free",
        remedy=remedy,
    )


def compute_of(precision: Precision, hardware: Hardware) -> Compute:
    """A 16-bit base is computed in its own type; one in four bits in what the card has."""
    if precision != "nf4":
        return precision
    if hardware.kind == "cpu":
        return "float32"
    return "bfloat16" if hardware.bfloat16 else "float16"


def whole_logits(tokens: int, vocabulary: int) -> bool:
    """Whether the logits of so many tokens are few enough to be computed at once, off a GPU, instead of twice in
    tiles."""
    return LOGIT_BYTES * tokens * vocabulary <= WHOLE_LOGITS_BYTES


def may_narrow(
    recipe: Recipe,
    wanted: Precision | Literal["auto"],
    held: Precision,
    there: Callable[[str], object | None] = find_spec,
) -> bool:
    """Whether a base that a card held in `held` may be tried in 4 bits instead."""
    allowed = wanted == "auto" and recipe.four_bit == "if_needed"
    return allowed and held in ("bfloat16", "float16") and there("bitsandbytes") is not None


def divisors(batch: int, limit: int) -> Iterator[int]:
    """The divisors of a batch that are at most `limit`, the largest first."""
    return (size for size in range(min(batch, limit), 0, -1) if batch % size == 0)


def _ways(batch: int, micro_batch: int | None) -> Iterator[tuple[int, bool]]:
    if micro_batch is None:
        yield batch, False
    yield from ((size, True) for size in divisors(batch, max(1, micro_batch or batch)))


def _ladder(
    task: Task, hardware: Hardware, wanted: Precision | Literal["auto"], begun_in: Precision | None
) -> tuple[Precision, ...]:
    """What may be tried, the best first; never empty."""
    if wanted != "auto":
        _require(task, hardware, wanted)
        return (wanted,)
    ladder: tuple[Precision, ...] = ("float32",)
    if hardware.kind == "cuda":
        ladder = ("bfloat16" if hardware.bfloat16 else "float16",)
        if task.four_bit and hardware.four_bit:
            ladder = (*ladder, "nf4")
    return ladder[ladder.index(begun_in) :] if begun_in in ladder else ladder


def _require(task: Task, hardware: Hardware, wanted: Precision) -> None:
    setting = f"RANKUP_WORKER_PRECISION is {wanted}"
    if wanted == "nf4" and not task.four_bit:
        raise SetupError(f"{setting}, and the round takes no training in 4 bits", remedy="Set it to auto.")
    if wanted == "nf4" and not hardware.four_bit:
        raise SetupError(
            f"{setting}, and bitsandbytes is not installed", remedy="Install it: pip install 'rankup[cuda]'."
        )
    if wanted == "float16" and hardware.kind != "cuda":
        raise SetupError(f"{setting}, which needs a CUDA card", remedy="Set it to auto.")
    if wanted == "bfloat16" and hardware.kind == "cuda" and not hardware.bfloat16:
        raise SetupError(f"{setting}, which this card cannot compute in", remedy="Set it to auto.")


def _trained(target: Target) -> int:
    return target.d_out if target.role == "vector" else target.slices * target.rank * (target.d_out + target.d_in)


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many experts a layer has; 1 where there are none."""
    stacked = [shape[0] for shape in shapes.values() if len(shape) == 3]
    numbered = {numbers[1] for name in shapes if len(numbers := _numbers(name)) > 1}
    return max([1, len(numbered), *stacked])


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
