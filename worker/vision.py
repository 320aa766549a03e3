"""The method sft on rows with images: TRL's `SFTTrainer` with a vision-language model and its processor.

What always holds:
- an image is decoded only when its batch is made, within the limits of `rankup.images`, so memory holds the images of
  one batch; each has been looked at once before the training begins;
- rows are cut at the recipe's `max_tokens`, images count with the tokens that they become, and a row whose images do
  not fit within is left out: half an image means nothing;
- nobody is asked to predict the places of an image. Tokens are those that the loss was taken over.

TRL and torch are imported inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rankup.errors import InputError
from rankup.images import require_pictured, row_images
from rankup.shapes import marks_assistant
from rankup.vision import placeholder_ids
from worker.lesson import Lesson, shared_arguments
from worker.sft import trainer_class


def make_trainer(lesson: Lesson) -> Any:
    """The trainer of a lesson whose tokenizer is a processor.

    Raises InputError: an image is damaged or beyond a limit, no example has a token to learn, or nothing marks the
    assistant's words where only they are learned.
    """
    import datasets
    import trl

    recipe = lesson.job.recipe
    if recipe.assistant_only and not marks_assistant(lesson.tokenizer.chat_template):
        raise InputError(
            "the base's chat template does not mark the assistant's words with {% generation %}",
            remedy="The organiser should set the recipe's assistant_only to false, or import a base with such a mark.",
        )
    completion_only = "prompt" in lesson.rows[0]
    config = trl.SFTConfig(
        **shared_arguments(lesson) | {"remove_unused_columns": False},
        completion_only_loss=completion_only,
        assistant_only_loss=recipe.assistant_only,
    )
    collator = make_collator(
        lesson.tokenizer,
        max_tokens=recipe.max_tokens,
        completion_only=completion_only,
        assistant_only=recipe.assistant_only,
    )
    rows = [row for row in lesson.rows if _is_learnable(collator, row)]
    if not rows:
        raise InputError(
            f"no example of the shard has a token to learn within {recipe.max_tokens} tokens, images included",
            remedy="The organiser should raise the recipe's max_tokens.",
        )
    # As text: a table of rows would give every part of a message every field.
    data = datasets.Dataset.from_dict({"row": [json.dumps(row) for row in rows]}).with_transform(_decoded)
    return trainer_class(lesson)(
        model=lesson.adapted.model,
        args=config,
        train_dataset=data,
        processing_class=lesson.tokenizer,
        data_collator=collator,
    )


def make_collator(processor: Any, *, max_tokens: int, completion_only: bool, assistant_only: bool = False) -> Any:
    """TRL's collator of rows with Pillow images, whose labels leave out the places of images.

    It cuts rows itself, as TRL's own way of cutting does not look at images, and raises ValueError where that would
    cut one.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    placeholders = torch.tensor(sorted(placeholder_ids(processor)))

    class WithoutPlaces(DataCollatorForVisionLanguageModeling):  # type: ignore[misc]
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            ids = batch["input_ids"]  # (rows, tokens), padded at the right
            places = torch.isin(ids, placeholders)
            if places[:, max_tokens:].any():
                raise ValueError(f"an image does not fit within {max_tokens} tokens")
            batch["labels"][places] = -100
            by_token = {name for name, value in batch.items() if getattr(value, "shape", None) == ids.shape}
            return {name: value[:, :max_tokens] if name in by_token else value for name, value in batch.items()}

    return WithoutPlaces(
        processor,
        completion_only_loss=completion_only,
        assistant_only_loss=assistant_only,
    )


def _decoded(table: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
    """Columns of rows as TRL takes them, from rows as JSON."""
    rows = [pictured(json.loads(text)) for text in table["row"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


def pictured(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with Pillow images in the place of their base64. Raises InputError: one is damaged or beyond a limit."""
    require_pictured(row)
    return {**row, "images": row_images(row)}


def _is_learnable(collator: Any, row: Mapping[str, Any]) -> bool:
    """Whether the row has all its images within the limit of tokens, and a token to learn behind the first.

    What a processor refuses is no example either: text that itself spells the place of an image.
    """
    from jinja2 import TemplateError

    example = pictured(row)
    try:
        labels = collator([example])["labels"]
    except ValueError:
        return False
    except TemplateError as exc:
        raise InputError(f"the base's chat template does not take this conversation: {exc}") from exc
    return bool((labels[:, 1:] != -100).any())
