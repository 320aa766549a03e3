"""The methods dpo and kto: preferences, with TRL's `DPOTrainer` and `KTOTrainer`.

What always holds:
- the reference is the base: the model with everything that is trained at its first value, whatever a checkpoint brought
  along and however `worker.surgery` trains it; it costs a forward pass without gradients in each step, and no memory
  but that of trained vectors;
- parameters of the model are never changed for the reference, so a pause may come at any time;
- tokens are those of answers that the loss is taken over, of all answers; for kto the shuffled pairs that only measure
  how far the model has moved are not among them.

A loss of dpo is in nats per pair, one of kto a number from 0 to 1 per answer. TRL is imported inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rankup.errors import InputError
from worker.lesson import Lesson, dataset_of, shared_arguments
from worker.pausing import going_on


def make_dpo_trainer(lesson: Lesson) -> Any:
    """The trainer of a lesson of pairs (arXiv:2305.18290). Raises InputError where no pair has a token to learn."""
    import trl

    config = trl.DPOConfig(**shared_arguments(lesson), beta=lesson.job.recipe.beta)
    return _make(lesson, trl.DPOTrainer, config, lesson.rows)


def make_kto_trainer(lesson: Lesson) -> Any:
    """The trainer of a lesson of good and bad answers (arXiv:2402.01306), in the order of the shards.

    How far the model has moved is measured within what is in memory at a time, so smaller pieces of a batch, of two
    examples at least, measure it more roughly. Raises InputError where no answer has a token to learn.
    """
    import trl

    arguments = shared_arguments(lesson)
    pieces = comparable_pieces(lesson.job.recipe.batch_size, arguments["per_device_train_batch_size"])
    arguments |= {
        "per_device_train_batch_size": pieces,
        "gradient_accumulation_steps": lesson.job.recipe.batch_size // pieces,
        "train_sampling_strategy": "sequential",
    }
    return _make(lesson, trl.KTOTrainer, trl.KTOConfig(**arguments, beta=lesson.job.recipe.beta), unpaired(lesson.rows))


def unpaired(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Each answer as a row of its own; the two of a pair stay together, so that every batch has both kinds."""
    for row in rows:
        if "chosen" not in row:
            yield row
            continue
        others = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        yield {**others, "completion": row["chosen"], "label": True}
        yield {**others, "completion": row["rejected"], "label": False}


def comparable_pieces(batch_size: int, wanted: int) -> int:
    """The smallest divisor of the batch that is at least `wanted` and 2. Raises InputError for a batch of one."""
    if batch_size < 2:
        raise InputError("kto compares answers within a batch, and a batch of one has nothing to compare")
    return next(size for size in range(max(wanted, 2), batch_size + 1) if batch_size % size == 0)


def first_values(torch: Any, model: Any) -> dict[str, Any]:
    """Values of trained parameters with which the model is the base; to be taken before any of them is trained.

    One factor of each pair starts at zero, so the other one may have any value and is left out.
    """
    values = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not bool(parameter.any()):
            values[name] = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        elif "lora_" not in name:
            values[name] = parameter.detach().clone()
    return values


def _reference(torch: Any, model: Any) -> Any:
    """What TRL takes for a model of its own, and what computes with `model` at its first values."""
    start = first_values(torch, model)

    class Reference(torch.nn.Module):  # type: ignore[misc]
        config = model.config

        def __call__(self, **inputs: Any) -> Any:
            # Other tensors stand in for parameters while this lasts: the parameters stay what they are.
            return torch.func.functional_call(model, start, (), inputs)

        def forward(self, **inputs: Any) -> Any:
            """Stands here for TRL, which gives every model a head that computes log-probabilities only: `model` has
            one."""

    return Reference()


def _make(lesson: Lesson, trainer_class: Callable[..., Any], config: Any, rows: Iterable[Mapping[str, Any]]) -> Any:
    import torch

    progress = lesson.progress

    class CountingTrainer(trainer_class):  # type: ignore[valid-type,misc]
        """Counts the tokens of answers, after the shift by one."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            progress.tokens += int(inputs["completion_mask"][..., 1:].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = going_on(CountingTrainer, torch, lesson.checkpoint)(
        model=lesson.adapted.model,
        ref_model=_reference(torch, lesson.adapted.model),
        args=config,
        train_dataset=dataset_of(rows),
        processing_class=lesson.tokenizer,
    )
    if len(trainer.train_dataset) == 0:
        raise InputError(
            f"no prompt of the shard leaves room for an answer within {lesson.job.recipe.max_tokens} tokens",
            remedy="The organiser should raise the recipe's max_tokens.",
        )
    return trainer
