"""The method sft: the next token of text, conversations, or completions of prompts, with TRL's `SFTTrainer`.

What always holds: tokens are those that the loss was taken over, counted batch by batch. TRL is imported inside.
"""

from __future__ import annotations

from typing import Any

from rankup.errors import InputError
from worker.lesson import Lesson, shared_arguments
from worker.pausing import going_on


def make_trainer(lesson: Lesson) -> Any:
    """The trainer of a lesson. Raises InputError where no example has a token to learn."""
    import datasets
    import torch
    import trl

    recipe, progress = lesson.job.recipe, lesson.progress

    class CountingTrainer(trl.SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that counts the tokens of the loss: labels after the shift by one that are not masked."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            progress.tokens += int((inputs["labels"][..., 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = trl.SFTConfig(**shared_arguments(lesson), completion_only_loss="prompt" in lesson.rows[0])
    data = datasets.Dataset.from_list([dict(row) for row in lesson.rows])
    trainer = going_on(CountingTrainer, torch, lesson.checkpoint)(
        model=lesson.adapted.model, args=config, train_dataset=data, processing_class=lesson.tokenizer
    )
    if len(trainer.train_dataset) == 0:
        raise InputError(
            f"no example of the shard has a token to learn within {recipe.max_tokens} tokens",
            remedy="The organiser should raise the recipe's max_tokens.",
        )
    return trainer
