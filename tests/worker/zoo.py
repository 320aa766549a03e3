"""Tiny random models of every kind of layer that a delta can change, saved as folders, and the targets of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny_model import save_tiny_llama

from aggregator.skeleton import Skeleton
from rankup.recipe import Recipe
from rankup.targets import Target, select_targets, target_of

VOCABULARY = 257
"""Of the tokenizer of `tiny_model`."""


def _llama(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **config | fields))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=VOCABULARY, head_dim=8, num_key_value_heads=2, pad_token_id=0, **config)
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GptOssForCausalLM(config)


def _qwen3_moe() -> Any:
    """A dense layer, whose linear layers are called as experts were in older files, below one with experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        mlp_only_layers=[0],
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


MODELS: Mapping[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama, tied": lambda: _llama(tie_word_embeddings=True),
    "llama with biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "gpt2": _gpt2,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
    "qwen3-moe": _qwen3_moe,
}


def save_model(name: str, folder: Path) -> Path:
    """Write the model, every parameter of it random, and a tokenizer; weights as the model holds them."""
    import torch

    save_tiny_llama(folder)
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors start as zeros and ones, where a wrong merge could hide.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_original_format=False)
    return folder


def targets_of(folder: Path, recipe: Recipe) -> dict[str, Target]:
    """What a delta of this recipe changes."""
    parameters = Skeleton.of(folder).parameters
    every = {name: target_of(parameter.role, parameter.shape) for name, parameter in parameters.items()}
    return select_targets(every, recipe)
