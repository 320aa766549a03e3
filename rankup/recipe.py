"""The recipe: how a shard is trained and how a round's contributions become one step, in full, as a typed object.

A round states it and the manifest of its version repeats it, so a version says how it was made. Nothing here does I/O.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import Field

from rankup.message import Dyadic, Finite, Message, TensorName

MAX_RANK: Final = 1024

Rule = Literal["mean_by_tokens", "multi_krum", "geometric_median", "centred_clipping"]
"""How weights are chosen from the contributions: see `aggregator.rules`."""
Method = Literal["sft", "dpo", "kto", "distillation"]
"""What a volunteer's training minimises: the next token (sft); a preference, of chosen over rejected answers (dpo,
arXiv:2305.18290) or of good answers over bad ones (kto, arXiv:2402.01306); the next token of what a published version
answers (distillation, arXiv:1606.07947)."""
Precision = Literal["float32", "bfloat16", "float16", "nf4"]
"""What the frozen base is held in while a volunteer trains; nf4: 4 bits a weight (QLoRA, arXiv:2305.14314)."""


MAX_COSINE: Final = 0.98
"""Default limit of likeness: what is closer differs by less than a fifth of its length. A copy rounded to int8 is at
0.9999, one with a tenth of noise in each factor at 0.990. Every lease has a seed of its own: honest contributions to
SmolLM2-135M are at 0.07, those to `aggregator.tiny` at 0.37 to 0.41 on docstrings, and at 0.92 at worst, where all rows
are one sentence with other figures (rank 8 in a model of width 64)."""
MAX_LOSS_MADS: Final = 4.0
"""Default limit of held-out loss: 2.7 standard deviations of a normal spread. With 3, one honest contribution in 25 was
refused in rounds without attackers (docs/results/poison.md); what 4 lets through, the slope finds."""
MIN_DESCENT: Final = 0.25
"""Default least slope of the held-out loss, as a share of the cohort's median. Honest ones of a noisy round are at
half of the median at times; flipped ones are below zero and random ones near it. Alone it would not do: what is
harmful only further out has a good slope."""


class OuterStep(Message):
    """What the sum of a round does to the weights: SGD, or Nesterov momentum as in DiLoCo (arXiv:2311.08105).

    With D the round's sum, in float32, each operation rounded on its own (docs/numerics.md, "The outer step"):

        M <- momentum·M + D
        W <- W + learning_rate·(D + momentum·M)

    With momentum 0 no state is kept; with learning rate 1 besides, W <- W + D. The defaults make up for rounds: in
    docs/results/poison.md 8 rounds with them reach what 16 plain sums do.
    """

    learning_rate: Annotated[Dyadic, Field(gt=0)] = 0.75
    """Of the step that the sum of a round is: a multiple of 1/256."""
    momentum: Annotated[Dyadic, Field(lt=1)] = 0.875
    """Nesterov's, from round to round: a multiple of 1/256; 0 keeps no state."""

    @property
    def keeps_state(self) -> bool:
        """Whether a float32 momentum stands beside the master."""
        return self.momentum > 0


PLAIN_SUM: Final = OuterStep(learning_rate=1.0, momentum=0.0)
"""W <- W + D, without a state."""


class Aggregation(Message):
    """How accepted contributions become one step: screening of the cohort, weights, outer step."""

    rule: Rule = "mean_by_tokens"
    """How contributions are weighed; all but the mean withstand a share of bad ones."""
    clip_norm_ratio: Annotated[Finite, Field(ge=1, le=1e6)] = 1.5
    """A contribution whose Frobenius norm exceeds this multiple of the cohort's median is scaled down to it. More
    shards make a longer delta (16 in one lease about three times that of one, in `aggregator.tiny`): beside small
    leases it is scaled down, though its tokens count in full."""
    byzantine_share: Annotated[Finite, Field(ge=0, lt=0.5)] = 0.3
    """Share of bad contributions that the rule should withstand; the mean does not use it."""
    max_cosine: Annotated[Finite, Field(gt=0, le=1)] | None = MAX_COSINE
    """Of contributions that are more alike than this, the first one counts; None lets all count."""
    max_loss_mads: Annotated[Finite, Field(gt=0, le=1e6)] | None = MAX_LOSS_MADS
    """A contribution counts if its held-out loss is at most this many median absolute deviations above the median of
    those that were trained on about as many shards; None leaves contributions unmeasured."""
    min_descent: Annotated[Finite, Field(ge=0, lt=1)] | None = MIN_DESCENT
    """A contribution counts if the held-out loss falls along it, at first, by at least this share of what it does along
    the cohort's median one; None leaves slopes unmeasured."""
    max_staleness: Annotated[int, Field(ge=0, le=64)] = 1
    """How many versions older than the round's base a delta's own base may be, and how many earlier rounds of the
    campaign late deltas may come from; 0: none is taken."""
    staleness_decay: Annotated[Dyadic, Field(gt=0, le=1)] = 0.5
    """Factor of a delta's weight for each version that its base is older."""
    outer: OuterStep = OuterStep()
    """What the sum of a round does to the weights; learning_rate 1 and momentum 0 simply add it."""


class Recipe(Message):
    """How a shard is trained and how the round is summed. A round states it in full and the manifest repeats it.

    The delta of a layer is `scaling * B @ A` with `scaling = alpha / rank` (or `alpha / sqrt(rank)` with `rslora`,
    arXiv:2312.03732); the worker folds the scaling into B, so nobody downstream needs to know it.
    """

    method: Method = "sft"
    """What is minimised; each takes datasets of its own shapes (`rankup.shapes`)."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    """Of B·A, the delta of a layer: what a volunteer trains grows with it, and so does the upload."""
    rank_pattern: Annotated[dict[TensorName, Annotated[int, Field(ge=1, le=MAX_RANK)]], Field(max_length=256)] = Field(
        default_factory=dict
    )
    """Last parts of module names -> rank of their layers, where it is not `rank`; the longest name that fits counts."""
    alpha: Annotated[Finite, Field(gt=0, le=65536)] = 16.0
    """The delta is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    learning_rate: Annotated[Finite, Field(gt=0, le=1)] = 5e-4
    """Highest one of a volunteer's training."""
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 25
    """Optimizer steps on one shard; a lease of several shards has as many times more."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    """Examples of one step; a small GPU takes them a few at a time, with the same result."""
    max_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = 128
    """Longest example, in tokens; longer ones are cut."""
    packing: bool = False
    """Put several short examples into one sequence of `max_tokens`: less padding, other batches. For sft only."""
    assistant_only: bool = False
    """Of conversations in `messages`, learn the assistant's words only; the chat template has to mark them."""
    beta: Annotated[Finite, Field(gt=0, le=100)] = 0.1
    """How far a preference may move the model from its base: dpo and kto."""
    teacher_weight: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    """Distillation: share of the loss that is the divergence from the teacher's probabilities (arXiv:1503.02531), for a
    teacher with the same vocabulary; the rest, and by default all, is the next token of its answers."""
    temperature: Annotated[Finite, Field(ge=0, le=10)] = 0.0
    """Distillation: of the teacher's answers; 0 takes its likeliest token."""
    warmup_steps: Annotated[int, Field(ge=0, le=100_000)] = 3
    """Steps in which the learning rate rises to its highest."""
    lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    """How the learning rate goes on after that."""
    weight_decay: Annotated[Finite, Field(ge=0, le=10)] = 0.0
    """Of AdamW, on A and B."""
    max_grad_norm: Annotated[Finite, Field(gt=0, le=1e6)] = 1.0
    """Longer gradients are cut to this norm."""
    target_modules: Literal["all-linear"] | Annotated[tuple[TensorName, ...], Field(min_length=1, max_length=256)] = (
        "all-linear"
    )
    """Every linear layer but the output head, or the last parts of module names, as in peft: also of the head and of
    embeddings."""
    target_parameters: Annotated[tuple[TensorName, ...], Field(max_length=256)] = ()
    """Last parts of the names of stacked expert weights, as in peft."""
    train_vectors: bool = False
    """Train biases and the scales of norms too, as full deltas."""
    partial: bool = False
    """A delta may leave out weights of the recipe, and have a lower rank than it in any case."""
    four_bit: Literal["never", "if_needed"] = "if_needed"
    """Whether a GPU with too little memory for the base in 16 bits may train beside it in 4 bits (nf4)."""
    mantissa_bits: Literal[16, 8] = 16
    """Width of a delta's numbers: 8 halves the upload and costs about two per cent of each product."""
    aggregation: Aggregation = Aggregation()
    """What happens to contributions when the round closes."""

    def tier_rank(self, rank: int, tier: int | None) -> int:
        """What a rank of this recipe becomes where its `rank` becomes `tier`: all shrink alike; None leaves it."""
        return rank if tier is None else max(1, rank * tier // self.rank)

    def at_tier(self, tier: int | None) -> Recipe:
        """The recipe as volunteers of a tier train it: lower ranks, and alpha so that `scaling` stays."""
        if tier is None or tier == self.rank:
            return self
        share = tier / self.rank
        pattern = {name: self.tier_rank(rank, tier) for name, rank in self.rank_pattern.items()}
        alpha = self.alpha * (math.sqrt(share) if self.rslora else share)
        return self.model_copy(update={"rank": tier, "alpha": alpha, "rank_pattern": pattern})
