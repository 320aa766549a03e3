"""What benchmarks/aggregate.py compares with, run by the Python of .venv-bench: peft, mergekit and Flower.

Nothing of Rankup is imported here, and nothing of the peers is changed: these are the calls that their users make.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any

from aggregate_run import MODELS, contribution, master, serve, shares


def peft_sequential(model: str, contributions: int, rank: int, passes: int) -> dict[str, Any]:
    """CPU seconds of each pass of `LoraLayer.merge` with all adapters over one layer of nn.Linear, float32.

    The weights of the sum are in B already and alpha is the rank, so that peft's scaling is one.
    """
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    torch.set_num_threads(1)
    shapes = MODELS[model].linear
    scales = [np.float32(c / 2**16) for c in shares(contributions, equal=False)]
    base = torch.nn.Module()
    names = {path: path.rpartition(".")[2] for path in shapes}
    for path, (d_out, d_in) in shapes.items():
        setattr(base, names[path], torch.nn.Linear(d_in, d_out, bias=False))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names.values()), init_lora_weights=False)
    adapted = get_peft_model(base, config, adapter_name="0")
    adapters = [str(i) for i in range(contributions)]
    for adapter in adapters[1:]:
        adapted.add_adapter(adapter, config)
    layers = {name.rpartition(".")[2]: part for name, part in adapted.named_modules() if isinstance(part, LoraLayer)}
    olds = {}
    with torch.no_grad():
        for place, (path, shape) in enumerate(shapes.items()):
            layer, olds[path] = layers[names[path]], master(*shape, seed=(0, place))
            layer.get_base_layer().weight.copy_(torch.from_numpy(olds[path]))
            for i, adapter in enumerate(adapters):
                b, a = contribution(*shape, rank, seed=(1, place, i))
                layer.lora_A[adapter].weight.copy_(torch.from_numpy(a))
                layer.lora_B[adapter].weight.copy_(torch.from_numpy(scales[i] * b))

    def merge(path: str, order: list[str]) -> None:
        layer = layers[names[path]]
        layer.merge(adapter_names=order)
        layer.merged_adapters.clear()  # so that the next pass merges again; the weights go on from there

    def merged(path: str, order: list[str]) -> Any:
        weight = layers[names[path]].get_base_layer().weight
        with torch.no_grad():
            weight.copy_(torch.from_numpy(olds[path]))
            merge(path, order)
        return weight.detach().numpy().copy()

    small = min(shapes, key=lambda path: shapes[path][0] * shapes[path][1])
    result, backwards = merged(small, adapters), merged(small, adapters[::-1])
    seconds = []
    in_system = os.times().system
    for _ in range(passes):
        started = time.process_time()
        for path in shapes:
            merge(path, adapters)
        seconds.append(time.process_time() - started)
    in_system = os.times().system - in_system
    true = np.zeros(shapes[small])
    for i, scale in enumerate(scales):
        b, a = contribution(*shapes[small], rank, seed=(1, list(shapes).index(small), i))
        true += (b.astype(np.float64) * float(scale)) @ a.astype(np.float64)
    found = result.astype(np.float64) - olds[small]
    return {
        "cpu_s": seconds,
        "system_share": in_system / sum(seconds),
        "order_free": result.tobytes() == backwards.tobytes(),
        "error": float(np.linalg.norm(found - true) / np.linalg.norm(true)),
        "versions": {name: version(name) for name in ("peft", "torch")},
    }


def peft_merge(base: str, adapters: list[str], out: str) -> dict[str, Any]:
    """Load a model, merge LoRA adapters into it with `merge_and_unload`, save it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, adapter_name=str(number))
    model.merge_and_unload(adapter_names=[str(i) for i in range(len(adapters))]).save_pretrained(out)
    return {"versions": {name: version(name) for name in ("peft", "torch", "transformers")}}


def mergekit_merge(base: str, adapters: list[str], out: str, cache: str) -> dict[str, Any]:
    """base + the sum of the adapters, as mergekit has it: each adapter is merged into a model of its own in `cache`,
    then `task_arithmetic` adds up the differences to the base."""
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    torch.set_num_threads(1)
    plan = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "dtype": "bfloat16",
        "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}} for adapter in adapters],
    }
    options = MergeOptions(lora_merge_cache=cache, lora_merge_dtype="bfloat16", copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(plan), out, options)
    return {"versions": {name: version(name) for name in ("mergekit", "torch", "transformers")}}


def flower_pairwise(model: str, contributions: int) -> dict[str, Any]:
    """CPU seconds of `flwr.server.strategy.aggregate.aggregate_krum` on dense float32 arrays of one layer."""
    from flwr.server.strategy.aggregate import aggregate_krum

    shapes = list(MODELS[model].linear.values())
    results = [([master(*s, seed=(2, i, place)) for place, s in enumerate(shapes)], 1) for i in range(contributions)]
    started = time.process_time()
    aggregate_krum(results, num_malicious=contributions // 4, to_keep=0)
    return {
        "cpu_s": time.process_time() - started,
        "contributions": contributions,
        "entries": sum(d_out * d_in for d_out, d_in in shapes),
        "versions": {"flwr": version("flwr")},
    }


def flower_product(model: str, contributions: int) -> dict[str, Any]:
    """The same for `flwr.serverapp.strategy.multikrum.select_multikrum`, which multiplies matrices, on one k_proj."""
    from flwr.app import ArrayRecord, RecordDict
    from flwr.serverapp.strategy.multikrum import select_multikrum

    shape = MODELS[model].linear["self_attn.k_proj"]
    replies = [RecordDict({"arrays": ArrayRecord([master(*shape, seed=(2, i))])}) for i in range(contributions)]
    started = time.process_time()
    select_multikrum(replies, contributions // 4, contributions - contributions // 4)
    return {
        "cpu_s": time.process_time() - started,
        "contributions": contributions,
        "entries": shape[0] * shape[1],
        "versions": {"flwr": version("flwr")},
    }


WAYS: dict[str, Any] = {
    way.__name__: way for way in (peft_sequential, peft_merge, mergekit_merge, flower_pairwise, flower_product)
}

if __name__ == "__main__":
    serve(lambda way, **arguments: WAYS[way](**arguments))
