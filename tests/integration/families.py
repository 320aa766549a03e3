"""Tiny random models of the architectures that language models are fine-tuned in, as folders that a version is made of.

A family is what transformers calls `model_type`: models that differ in weights, data and tokenizer only are one. The
table is data: configs small enough to train in a second, with every part that makes the family what it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aggregator.tiny import write_tiny_model

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

_PLAIN: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED: Mapping[str, Any] = {**_PLAIN, "num_key_value_heads": 2}
_LATENT: Mapping[str, Any] = {
    **_PLAIN,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Family:
    """How to build one model. `kind` is its `model_type`."""

    kind: str
    config: Mapping[str, Any]
    experts: tuple[str, ...] = ()
    """Stacked weights of experts, as `target_parameters` of a recipe names them."""
    linear: int = 14
    """Linear layers but the head, over all layers."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _PLAIN),
    "llama 3: fewer keys, scaled positions, tied": Family(
        "llama",
        {
            **_GROUPED,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gpt-neox": Family("gpt_neox", {**_PLAIN, "rotary_pct": 0.25}, linear=8),
    "gpt2": Family("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, linear=8),
    "stablelm": Family("stablelm", {**_GROUPED, "use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "stablelm 2: parallel, norms of heads": Family(
        "stablelm", {**_GROUPED, "use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.25}
    ),
    "mistral": Family("mistral", {**_GROUPED, "sliding_window": 16}),
    "mixtral": Family("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, EXPERTS, linear=8),
    "qwen2": Family("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2-moe": Family(
        "qwen2_moe",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        EXPERTS,
        linear=16,
    ),
    "qwen3": Family("qwen3", {**_GROUPED, "head_dim": 8}),
    "qwen3-moe": Family(
        "qwen3_moe",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        EXPERTS,
        linear=8,
    ),
    "gemma": Family("gemma", {**_PLAIN, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": Family("gemma2", {**_GROUPED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": Family("gemma3_text", {**_GROUPED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "deepseek-v2": Family("deepseek_v2", _LATENT, EXPERTS, linear=16),
    "deepseek-v3": Family("deepseek_v3", _LATENT, EXPERTS, linear=16),
    "cohere": Family("cohere", {**_GROUPED, "logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": Family("cohere2", {**_GROUPED, "logit_scale": 0.25, "sliding_window": 16}),
    "phi": Family("phi", {**_PLAIN, "partial_rotary_factor": 0.5}, linear=12),
    "phi3": Family("phi3", _GROUPED, linear=8),
    "falcon": Family("falcon", {**_PLAIN, "multi_query": True, "bias": False}, linear=8),
    "falcon, new decoder": Family(
        "falcon", {**_GROUPED, "num_kv_heads": 2, "new_decoder_architecture": True}, linear=8
    ),
    "opt": Family("opt", {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}, linear=12),
    "bloom": Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, linear=8),
    "olmo2": Family("olmo2", _GROUPED),
    "gpt-oss": Family(
        "gpt_oss", {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, EXPERTS, linear=8
    ),
}
"""Each architecture that this community grew on."""

RELATIVES: Mapping[str, Family] = {
    "gpt-neox, not parallel": Family(
        "gpt_neox", {**_PLAIN, "use_parallel_residual": False, "rotary_pct": 1.0}, linear=8
    ),
    "phimoe": Family("phimoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, EXPERTS, linear=8),
    "falcon with alibi": Family("falcon", {**_PLAIN, "multi_query": False, "alibi": True, "bias": True}, linear=8),
    "opt, narrow embedding, norm after": Family(
        "opt", {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, linear=14
    ),
    "olmoe": Family("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}, EXPERTS, linear=8),
    "gptj": Family("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}, linear=12),
    "gpt-neo": Family(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
            "max_position_embeddings": 128,
        },
        linear=12,
    ),
    "gpt-bigcode": Family("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, linear=8),
    "starcoder2": Family("starcoder2", {**_GROUPED, "sliding_window": 16}, linear=12),
    "mpt": Family("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, linear=8),
    "smollm3": Family("smollm3", {**_GROUPED, "tie_word_embeddings": True}),
    "granite": Family("granite", {**_GROUPED, "logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "granite-moe": Family(
        "granitemoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, EXPERTS, linear=8
    ),
    "glm4": Family("glm4", {**_GROUPED, "head_dim": 8}, linear=12),
    "nemotron": Family("nemotron", _GROUPED, linear=12),
}
"""Their variants, and others that cost nothing."""


@cache
def _config_fields() -> Mapping[str, Any]:
    from aggregator.tiny import MARKS

    return {"vocab_size": 256 + len(MARKS), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def build(family: Family) -> Any:
    """The model, every parameter of it random, for vectors start as zeros and ones, where a wrong sum could hide; and
    bfloat16 numbers, as published ones mostly are, so that what volunteers pull is the master."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(family.kind, **_config_fields() | dict(family.config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + torch.randn_like(parameter) * 0.1).bfloat16())
    return model.eval()


def save(model: Any, tokenizer: Path, folder: Path, *, original: bool = False) -> Path:
    """Write a folder with the tokenizer of another one; `original`: under the names that published files have."""
    model.save_pretrained(folder, save_original_format=original)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat")):
            shutil.copy(path, folder)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A folder with the byte tokenizer that all of them share."""
    folder.mkdir()
    write_tiny_model(folder)
    return folder
