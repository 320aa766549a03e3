"""Tiny models and LoRA adapters, made with transformers and peft, and peft's own merge in float64 as the oracle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from aggregator.merge import Blend
from rankup.tensorfile import TensorFile, write_tensor_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 48
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Values = Mapping[str, np.ndarray]


def make_base(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any) -> Path:
    """A random model saved as `save_pretrained` does; its biases and norms are no round numbers."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def make_adapter(base: Path, folder: Path, *, seed: int, steps: int = 0, **settings: Any) -> Path:
    """An adapter on `base`: trained for some steps on random tokens, or else with random values in all it trains."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base, torch.float32), LoraConfig(**settings))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if steps:
            optimizer = torch.optim.AdamW(trained, lr=2e-2)
            for _ in range(steps):
                tokens = torch.randint(0, VOCABULARY, (4, 12))
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        else:
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return folder


def peft_merge(base: Path, adapter: Path) -> Values:
    """The state dict of peft's merge_and_unload, everything in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load(base), adapter, autocast_adapter_dtype=False).double()
        return values(model.merge_and_unload())


def values(model: Any) -> Values:
    return {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}


def expected(base: Path, adapters: Sequence[Path], weights: Sequence[float]) -> tuple[Values, Values]:
    """(base + sum of w · (peft's merge of one adapter - base), sum of |…|), by parameter, float64."""
    start = values(load(base))
    total = {name: value.copy() for name, value in start.items()}
    moved = {name: np.zeros_like(value) for name, value in start.items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, value in peft_merge(base, adapter).items():
            total[name] += weight * (value - start[name])
            moved[name] += abs(weight) * np.abs(value - start[name])
    return total, moved


HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_merged(folder: Path, oracle: tuple[Values, Values], dtype: torch.dtype = torch.float32) -> None:
    """Every element is the oracle's, within one rounding to `dtype` and the two to float32 before it."""
    found = values(load(folder))
    total, moved = oracle
    assert set(found) == set(total)
    for name, value in found.items():
        size = np.abs(total[name]) + moved[name]
        allowed = HALF_ULP[dtype] * np.abs(total[name]) + 2.0**-23 * size + 2.0**-27 * moved[name].max(initial=0.0)
        if dtype == torch.float16:
            allowed = allowed + 2.0**-25  # half of its smallest subnormal
        worst = np.max(np.abs(value - total[name]) - allowed, initial=-1.0)
        assert worst <= 0, f"{name} is off by {worst} more than rounding explains"


def hashes(folder: Path) -> dict[str, bytes]:
    """Every file that is no lock and no journal."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


# -- by hand, without torch --------------------------------------------------------------------------------------------


def write_weights(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """float32 tensors as a safetensors file."""
    write_tensor_file(
        path, {name: ("F32", value.shape, value.astype("<f4").tobytes()) for name, value in tensors.items()}
    )


def write_base(folder: Path, files: Mapping[str, Mapping[str, np.ndarray]], **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for name, tensors in files.items():
        write_weights(folder / name, tensors)
    if len(files) > 1:
        table = {tensor: name for name, tensors in files.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "peft_version": "0.21.2", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_weights(folder / "adapter_model.safetensors", {f"base_model.model.{n}": v for n, v in tensors.items()})
    return folder


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """float32 tensors of a safetensors file."""
    with TensorFile.open(path) as file:
        return {name: np.frombuffer(file.read(name), "<f4").reshape(file.entries[name].shape) for name in file}


TWO = Blend(weights=(Fraction(7, 10), Fraction(-3, 10)))
"""Weights of the two adapters of `trained_llamas`."""


def trained_llamas(folder: Path) -> dict[torch.dtype, tuple[Path, list[Path]]]:
    """One small model in three dtypes, and two adapters of different ranks and targets, trained on it in float32."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SMALL, tie_word_embeddings=False)
    made = {}
    for dtype in HALF_ULP:
        made[dtype] = make_base(folder / str(dtype), config, dtype=dtype, max_shard_size="8KB")
    source = made[torch.float32]
    adapters = [
        make_adapter(source, folder / "code", seed=1, steps=4, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]),
        make_adapter(
            source,
            folder / "chat",
            seed=2,
            steps=4,
            r=6,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj", "down_proj", "embed_tokens"],
            modules_to_save=["lm_head"],
        ),
    ]
    return {dtype: (base, adapters) for dtype, base in made.items()}


Q = "model.q_proj"


def one_layer(tmp_path: Path, base: np.ndarray, *products: tuple[np.ndarray, np.ndarray], name: str = "a") -> Any:
    folder = write_base(tmp_path / "base", {"model.safetensors": {f"{Q}.weight": base}})
    return folder, [
        write_adapter(
            tmp_path / f"{name}{index}",
            {f"{Q}.lora_B.weight": b, f"{Q}.lora_A.weight": a},
            r=len(a),
            lora_alpha=len(a),
        )
        for index, (b, a) in enumerate(products)
    ]
