"""What a training is made of: the libraries, the device, the tokenizer and the frozen base.

What always holds: everything heavy is imported inside functions; the base folder is read with `local_files_only`,
`trust_remote_code=False` and safetensors only, so nothing is fetched and nothing of it is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankup.errors import InputError, SetupError


def choose_device(device: str) -> None:
    """Make exactly one device visible; must run before torch is imported, as torch reads this once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
    elif visible is None or "," in visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").split(",")[0]


def import_libraries() -> tuple[Any, Any, Any]:
    try:
        import peft
        import torch
        import transformers
    except ImportError as exc:
        raise SetupError(
            f"the trainer needs {exc.name}, which is not installed", remedy="Install it: pip install 'rankup[worker]'."
        ) from exc
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers, peft


def device_name(torch: Any, wanted: str) -> str:
    kind = wanted.partition(":")[0]
    there = {
        "cuda": torch.cuda.is_available,
        "xpu": lambda: hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if kind == "auto":
        return next(name for name, available in there.items() if available())
    if kind not in there or not there[kind]():
        raise SetupError(
            f"this machine has no {wanted} that torch can use",
            remedy="Choose another --device, or install the torch build for it.",
        )
    return kind


def load_tokenizer(transformers: Any, folder: Path, row: Mapping[str, Any]) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    conversational = not isinstance(row.get("prompt", row.get("text")), str)
    if conversational and not tokenizer.chat_template:
        raise InputError("the shard holds conversations, but the base's tokenizer has no chat template")
    if tokenizer.eos_token is None:
        raise InputError("the base's tokenizer has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padded places are masked out of attention and loss
    return tokenizer


def load_base(transformers: Any, torch: Any, folder: Path, device: str) -> Any:
    half = device == "cuda" and torch.cuda.is_bf16_supported()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.bfloat16 if half else torch.float32,
        )
    except (OSError, ValueError) as exc:
        raise InputError(f"the base version cannot be loaded: {exc}") from exc
