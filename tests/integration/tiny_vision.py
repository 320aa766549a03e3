"""A random vision-language model of 100 thousand weights (Llava: a CLIP, a projector, a Llama), with its processor, and
rows that nobody can answer without looking."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aggregator.tiny import write_tiny_model

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "white": (250, 250, 250)}
QUESTION = "Which?"
SIDE, PATCH = 16, 8
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def save_tiny_vision(folder: Path, *, tied: bool = False) -> None:
    """Write the model, as published ones of its kind are named, and its processor."""
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    write_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    marks = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=None,
            **marks,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
        **marks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def image_file(colour: Sequence[int], size: tuple[int, int] = (20, 20), kind: str = "PNG", **options: Any) -> bytes:
    """A plain image as a file."""
    from PIL import Image

    to = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).save(to, format=kind, **options)
    return to.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def colour_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Rows of the shape image prompt-completion: a shade of a colour, and its name."""
    rows = []
    for number in range(first, first + count):
        name = list(COLOURS)[number % len(COLOURS)]
        shade = [max(0, value - 3 * (number // len(COLOURS))) for value in COLOURS[name]]
        rows.append(
            {
                "images": [in_base64(image_file(shade))],
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": name}]}],
            }
        )
    return rows
