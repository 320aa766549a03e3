"""The shapes of training rows, and which method of a recipe trains on which.

The shapes are TRL's (https://huggingface.co/docs/trl/dataset_formats). What always holds: a row has exactly one shape,
the first of `SHAPES` whose fields it has; datasets are of one shape. What the fields hold is checked where rows come in
(`coordinator.rows`). Nothing here does I/O.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from rankup.errors import InputError
from rankup.recipe import Method, Recipe

SHAPES: Final[Mapping[str, tuple[str, ...]]] = {
    "image messages": ("images", "messages"),
    "image prompt-completion": ("images", "prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
"""Shape -> its fields. A card adds " chat" where prompt and answers are conversations."""
TRAINED_ON: Final[Mapping[Method, tuple[str, ...]]] = {
    "sft": ("prompt-completion", "messages", "text", "image messages", "image prompt-completion"),
    "dpo": ("preference",),
    "kto": ("unpaired", "preference"),
    "distillation": ("prompt-completion", "messages"),
}
"""Method -> the shapes that it takes. Of pairs, kto takes each answer as one row; distillation takes the prompts."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def shape_of(fields: Collection[str]) -> str | None:
    """The shape of a row with these fields; None where it has none."""
    return next((shape for shape, wanted in SHAPES.items() if set(wanted) <= set(fields)), None)


def marks_assistant(chat_template: object) -> bool:
    """Whether a chat template, of several the default one, says which words are the assistant's, as transformers reads
    it."""
    if isinstance(chat_template, Mapping):
        chat_template = chat_template.get("default")
    return isinstance(chat_template, str) and _GENERATION.search(chat_template) is not None


def require_fit(recipe: Recipe, shape: str) -> None:
    """Return if the recipe can train on rows of this shape, as a card or `shape_of` names it.

    Raises InputError: the method takes others, or a setting has no meaning for these rows.
    """
    plain = shape.removesuffix(" chat")
    takes = TRAINED_ON[recipe.method]
    if plain not in takes:
        others = [method for method, shapes in TRAINED_ON.items() if plain in shapes]
        raise InputError(
            f"The method {recipe.method} trains on rows of the shape {' or '.join(takes)}, not on {plain}.",
            remedy=f"Choose the method {' or '.join(others)}, or another dataset."
            if others
            else "Choose another dataset.",
        )
    if recipe.packing and "images" in SHAPES[plain]:
        raise InputError("Rows with images cannot be packed.", remedy="Set packing to false.")
    if recipe.packing and recipe.method != "sft":
        raise InputError(
            f"Rows can be packed for the method sft, not for {recipe.method}.",
            remedy="Set packing to false.",
        )
    if recipe.assistant_only and (recipe.method != "sft" or "messages" not in SHAPES[plain]):
        raise InputError(
            f"assistant_only is for the method sft on rows of the shape messages, not for {recipe.method} on {plain}.",
            remedy="Set assistant_only to false: of a prompt with a completion, only the completion is learned anyway.",
        )
    if recipe.method == "kto" and recipe.batch_size < 2:
        raise InputError(
            "The method kto compares answers within a batch: a batch of one has nothing to compare.",
            remedy="Set batch_size to 2 or more; 8 is better.",
        )
