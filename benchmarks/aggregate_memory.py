"""Part 2 of benchmarks/aggregate.py: a model and LoRA adapters on disk to merge, and a comparison of what came out.

The model is a Llama of the wanted shapes with random bfloat16 weights; the adapters are folders as peft writes them,
float32, alpha = rank. Values repeat from tensor to tensor at other places: making them must not take longer than the
merge, and no way to merge looks at that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from aggregate_run import MODELS, Model, serve
from numpy.typing import NDArray

from rankup.bfloat16 import from_bfloat16, to_bfloat16
from rankup.tensorfile import TensorFile, TensorFileWriter

PATTERN: int = 1 << 22
COMPARED_ROWS: int = 512


def base_tensors(model: Model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (model.vocabulary, model.hidden),
        "lm_head.weight": (model.vocabulary, model.hidden),
        "model.norm.weight": (model.hidden,),
    }
    for layer in range(model.layers):
        head = f"model.layers.{layer}"
        tensors |= {f"{head}.{name}.weight": shape for name, shape in model.linear.items()}
        tensors |= {
            f"{head}.{name}.weight": (model.hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return tensors


def make(folder: str, model: str, adapters: int, rank: int) -> dict[str, Any]:
    """Write `base` and `adapter-0` … into `folder`."""
    shape = MODELS[model]
    rng = np.random.default_rng(0)
    base = Path(folder) / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(config(shape), indent=2))
    pattern = to_bfloat16(rng.standard_normal(PATTERN, dtype=np.float32) * np.float32(0.02))
    tensors = base_tensors(shape)
    _write(base / "model.safetensors", {name: ("BF16", size) for name, size in tensors.items()}, pattern, rng)
    for number in range(adapters):
        adapter = Path(folder) / f"adapter-{number}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(adapter_config(shape, rank, base), indent=2))
        pairs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for layer in range(shape.layers):
            for name, (d_out, d_in) in shape.linear.items():
                head = f"base_model.model.model.layers.{layer}.{name}"
                pairs |= {
                    f"{head}.lora_A.weight": ("F32", (rank, d_in)),
                    f"{head}.lora_B.weight": ("F32", (d_out, rank)),
                }
        values = rng.standard_normal(PATTERN, dtype=np.float32) * np.float32(0.01)
        _write(adapter / "adapter_model.safetensors", pairs, values, rng)
    entries = sum(int(np.prod(size)) for size in tensors.values())
    return {"base_bytes": 2 * entries, "entries": entries}


def _write(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], pattern: NDArray[Any], rng: Any) -> None:
    with path.open("wb") as file:
        writer = TensorFileWriter(file, tensors, {"format": "pt"})
        for name in writer.order:
            left = int(np.prod(tensors[name][1]))
            while left:
                start = int(rng.integers(0, pattern.size))
                piece = pattern[start : start + left]
                writer.append(name, piece.tobytes())
                left -= piece.size
        writer.finish()


def config(model: Model) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv * model.heads // model.hidden,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def adapter_config(model: Model, rank: int, base: Path) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(name.rpartition(".")[2] for name in model.linear),
    }


def compare(folder: str, merged: dict[str, str]) -> dict[str, Any]:
    """For each merged folder, the share of entries that are the true value, rounded once to bfloat16.

    The true values are base + sum of B·A in float64, for some rows of every weight of the middle layer.
    """
    root = Path(folder)
    adapters = [TensorFile.open(path / "adapter_model.safetensors") for path in sorted(root.glob("adapter-*"))]
    base = TensorFile.open(root / "base" / "model.safetensors")
    names = sorted(name for name in base.entries if name.endswith("_proj.weight"))
    middle = names[len(names) // 2].split(".")[2]
    answer: dict[str, Any] = {}
    for way, place in merged.items():
        right = total = 0
        for name in (name for name in names if name.split(".")[2] == middle):
            d_out, d_in = base.entries[name].shape
            true = from_bfloat16(_matrix(base, name)).astype(np.float64)
            for adapter in adapters:
                pair = f"base_model.model.{name.removesuffix('.weight')}"
                b = _matrix(adapter, f"{pair}.lora_B.weight")[:COMPARED_ROWS].astype(np.float64)
                true[:COMPARED_ROWS] += b @ _matrix(adapter, f"{pair}.lora_A.weight").astype(np.float64)
            found = next(matrix for matrix in _found(Path(place), name))[:COMPARED_ROWS]
            right += int((found == to_bfloat16(true[:COMPARED_ROWS].astype(np.float32))).sum())
            total += min(d_out, COMPARED_ROWS) * d_in
        answer[way] = right / total
    return answer


def _found(folder: Path, name: str) -> Iterator[NDArray[np.uint16]]:
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile.open(path) as file:
            if name in file.entries:
                yield _matrix(file, name)


def _matrix(file: TensorFile, name: str) -> NDArray[Any]:
    extent = file.entries[name]
    return np.frombuffer(file.read(name), "<u2" if extent.dtype == "BF16" else "<f4").reshape(extent.shape)


WAYS: dict[str, Any] = {"make": make, "compare": compare}

if __name__ == "__main__":
    serve(lambda way, **arguments: WAYS[way](**arguments))
