"""Whether a recipe can train on a dataset from a base: the organiser hears what every volunteer would stumble over.

What always holds: nothing is written; of the version only its chat template is read, at most `MAX_TEMPLATE_BYTES`.
"""

from __future__ import annotations

import json

from rankup.chat import require_template
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.recipe import Recipe
from rankup.records import DatasetCard, Manifest
from rankup.shapes import marks_assistant, require_fit
from rankup.store import Store, get_blob
from rankup.vision import has_processor

MAX_TEMPLATE_BYTES = 16 * 1024**2
"""Of the file that a chat template stands in."""


def require_trainable(store: Store, recipe: Recipe, card: DatasetCard, base: Manifest) -> None:
    """Return if the recipe's method takes rows of the dataset's shape, and the base has what its settings need.

    Raises:
        InputError: it does not, the rows have images and the model sees none, or tools and its chat template has none;
            the remedy says what would.
        IntegrityError: the version's tokenizer cannot be read.
    """
    if card.shape:
        require_fit(recipe, card.shape)
    if card.shape.startswith("image ") and not has_processor(file.path for file in base.files):
        raise InputError(
            f"The rows of {card.dataset} have images, but {base.model} sees none.",
            remedy="Choose a vision-language model, or a dataset without images.",
        )
    if card.needs and recipe.method == "distillation":
        raise InputError(
            f"The rows of {card.dataset} have {', '.join(card.needs)}, of which distillation makes no use.",
            remedy="Choose the method sft, or a dataset of plain conversations.",
        )
    if card.needs:
        require_template(chat_template(store, base), card.needs, whose=base.model)
    if recipe.assistant_only and not marks_assistant(chat_template(store, base)):
        raise InputError(
            f"The chat template of {base.model} does not mark the assistant's words with {{% generation %}}.",
            remedy="Set assistant_only to false, or import the base with a chat template that has the mark.",
        )


def chat_template(store: Store, version: Manifest) -> str | dict[str, str] | None:
    """The chat template of a version's tokenizer, or several by name; None where it has none. Raises IntegrityError."""
    files = {file.path: file for file in version.files}
    try:
        if "chat_template.jinja" in files:
            return get_blob(store, files["chat_template.jinja"].sha256, max_bytes=MAX_TEMPLATE_BYTES).decode()
        # Processors of older days keep it in a file of its own, which goes before the tokenizer's settings.
        name = next((name for name in ("chat_template.json", "tokenizer_config.json") if name in files), None)
        if name is None:
            return None
        data = get_blob(store, files[name].sha256, max_bytes=MAX_TEMPLATE_BYTES)
        found = json.loads(data).get("chat_template")
        if isinstance(found, list):
            return {str(each["name"]): str(each["template"]) for each in found}
    except (NotFoundError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise IntegrityError(f"the tokenizer of {version.model} {version.version} cannot be read") from exc
    return found if isinstance(found, str) else None
