"""Models that see: how one is told from its folder, with what it is loaded, and the processor that prepares its input.

What always holds: a folder is of a vision-language model if its config.json has a `vision_config`; pixels are prepared
with Pillow on every machine, also where torchvision is there, so all of them see the same; nothing is fetched, and no
code of a folder runs.

transformers is handed in, so that no room that only asks needs it. The images themselves are for `rankup.images`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from rankup.errors import InputError, SetupError

MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
_PLACEHOLDERS: Final = ("image_token_ids", "video_token_ids", "audio_token_ids", "image_token_id")
"""Attributes of a processor: the tokens whose places the model fills with what it sees."""


def has_processor(paths: Iterable[str]) -> bool:
    """Whether these files of a version hold a processor, as those of every model that sees do."""
    return not {"processor_config.json", "preprocessor_config.json"}.isdisjoint(paths)


def is_vision_model(folder: Path) -> bool:
    """Whether the folder's config is of a vision-language model. Raises InputError: there is no readable config."""
    try:
        with (folder / "config.json").open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        config = json.loads(data) if len(data) <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as exc:
        raise InputError(f"{folder} has no readable config.json: {exc}") from exc
    if not isinstance(config, dict):
        raise InputError(f"{folder} has no readable config.json")
    return isinstance(config.get("vision_config"), dict)


def auto_model(transformers: Any, folder: Path) -> Any:
    """The class of transformers that builds the model of this folder. Raises as `is_vision_model`."""
    if is_vision_model(folder):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def load_processor(transformers: Any, folder: Path) -> Any:
    """The processor of a vision-language model, with a token for padding.

    Raises InputError: the folder is of no such model, or its processor is not usable; SetupError: it needs a package
    that is not installed.
    """
    if not is_vision_model(folder):
        raise InputError(
            "the rows have images, but the model sees none",
            remedy="Choose a vision-language model as the base, or a dataset without images.",
        )
    try:
        here = {"local_files_only": True, "trust_remote_code": False}
        processor = transformers.AutoProcessor.from_pretrained(folder, **here)
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **here)
    except ImportError as exc:
        raise SetupError(
            f"the processor of this model needs a package that is not installed: {exc.name or exc}",
            remedy="Install it: pip install 'rankup[vision]'.",
        ) from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{folder} holds no usable processor: {exc}") from exc
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise InputError(f"{folder} holds no processor of images and text")
    if not processor.chat_template:
        # Some keep it with the tokenizer.
        processor.chat_template = tokenizer.chat_template
    if not processor.chat_template:
        raise InputError("the model's processor has no chat template, which rows with images need")
    if tokenizer.eos_token is None:
        raise InputError("the model's tokenizer has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padded places are masked out of attention and loss
    return processor


def placeholder_ids(processor: Any) -> frozenset[int]:
    """Tokens that stand for a piece of an image: nobody has to predict them."""
    found: set[int] = set()
    for name in _PLACEHOLDERS:
        value = getattr(processor, name, None)
        found.update(value if isinstance(value, list | tuple) else [value] if isinstance(value, int) else [])
    return frozenset(number for number in found if isinstance(number, int))
