"""What a training is made of: the libraries, the device and what it can do, the tokenizer and the frozen base.

What always holds: everything heavy is imported inside functions; the base folder is read with `local_files_only`,
`trust_remote_code=False` and safetensors only, so nothing is fetched and nothing of it is run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankup.errors import InputError, SetupError
from rankup.protocol import DeviceKind
from rankup.tensorfile import TensorFile
from rankup.vision import auto_model, load_processor
from worker.device import free_memory, gpu_number
from worker.nvml import Card
from worker.precision import BaseShape, Fit, Hardware


def choose_device(device: str) -> None:
    """Make exactly one device visible; must run before torch is imported, as torch reads this once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
    elif visible is None or "," in visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").split(",")[0]


def hide_quantisation() -> None:
    """Let bitsandbytes look as if it were not installed: where it is, peft imports it, which takes longer than peft."""
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


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


def device_name(torch: Any, wanted: str) -> DeviceKind:
    kind = wanted.partition(":")[0]
    there: dict[DeviceKind, Callable[[], bool]] = {
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


def hardware_of(torch: Any, device: DeviceKind) -> Hardware:
    """What the device can do, and the memory that is free on it now."""
    four_bit = find_spec("bitsandbytes") is not None
    if device == "cuda":
        # Without the emulation, in which cards before Ampere are slower than in float16.
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", torch.cuda.mem_get_info()[0], bfloat16=bfloat16, four_bit=four_bit)
    return Hardware(device, free_memory(device), bfloat16=True, four_bit=four_bit)


def energy_meter(torch: Any, device: DeviceKind, wanted: str) -> Callable[[], float | None]:
    """Reads the joules that the card has used; None where it does not tell."""
    if device != "cuda":
        return lambda: None
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return Card(gpu_number(wanted), None if uuid is None else f"GPU-{uuid}").energy_j


def shape_of_base(folder: Path) -> BaseShape:
    """From the headers of the folder's safetensors files. Raises what `TensorFile` raises."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile.open(path) as file:
            shapes |= {name: extent.shape for name, extent in file.entries.items()}
    return BaseShape.of(shapes)


def load_tokenizer(transformers: Any, folder: Path, row: Mapping[str, Any]) -> Any:
    """What makes rows like this one into tokens: for rows with images the processor of a vision-language model."""
    if "images" in row:
        return load_processor(transformers, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    conversational = not isinstance(row.get("prompt", row.get("text")), str)
    if conversational and not tokenizer.chat_template:
        raise InputError("the shard holds conversations, but the base's tokenizer has no chat template")
    if tokenizer.eos_token is None:
        raise InputError("the base's tokenizer has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padded places are masked out of attention and loss
    return tokenizer


def load_base(transformers: Any, torch: Any, folder: Path, device: str, fit: Fit) -> Any:
    """The base in the precision of `fit`; a card gets it file by file, so the machine's own memory stays small.

    In nf4 the output head and the embeddings keep 16 bits. Raises InputError.
    """
    how: dict[str, Any] = {"dtype": getattr(torch, fit.compute)}
    if device == "cuda" or fit.precision == "nf4":
        how["device_map"] = {"": torch.cuda.current_device() if device == "cuda" else device}
    if fit.precision == "nf4":
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, fit.compute),
        )
    try:
        model = auto_model(transformers, folder).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **how,
        )
    except (OSError, ValueError) as exc:
        raise InputError(f"the base version cannot be loaded: {exc}") from exc
    config = model.config.get_text_config()
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        config.num_experts = config.num_local_experts  # the name by which TRL asks every mixture of experts
    return model
