"""Roles of weights, from a config alone: what a recipe may train in models of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregator.skeleton import Parameter, Skeleton
from rankup.errors import InputError

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def skeleton(config: Any, folder: Path) -> Skeleton:
    config.save_pretrained(folder)
    return Skeleton.of(folder)


def llama(**fields: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SMALL | {"intermediate_size": 24} | fields)


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=32)


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(**SMALL, intermediate_size=24, num_local_experts=4, num_key_value_heads=2, head_dim=8)


def opt() -> Any:
    from transformers import OPTConfig

    return OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)


def gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**SMALL, intermediate_size=24, head_dim=8, num_key_value_heads=2)


def mamba() -> Any:
    from transformers import MambaConfig

    return MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)


def phimoe() -> Any:
    from transformers import PhimoeConfig

    return PhimoeConfig(**SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=4)


def falcon() -> Any:
    from transformers import FalconConfig

    return FalconConfig(**SMALL)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Parameter | None]]] = {
    "linear layers, and a head of its own": (
        llama,
        {
            "model.layers.0.mlp.down_proj.weight": Parameter((16, 24), "linear"),
            "model.norm.weight": Parameter((16,), "vector"),
            "model.embed_tokens.weight": Parameter((64, 16), "embedding"),
            "lm_head.weight": Parameter((64, 16), "head"),
        },
    ),
    "a head that is the embedding": (
        lambda: llama(tie_word_embeddings=True),
        {"model.embed_tokens.weight": Parameter((64, 16), "embedding"), "lm_head.weight": None},
    ),
    "Conv1D stores (in, out)": (
        gpt2,
        {
            "transformer.h.0.attn.c_attn.weight": Parameter((8, 24), "linear"),
            "transformer.h.0.attn.c_attn.bias": Parameter((24,), "vector"),
            "transformer.wpe.weight": Parameter((32, 8), "embedding"),
            "transformer.wte.weight": Parameter((64, 8), "embedding"),
            "lm_head.weight": None,
        },
    ),
    "stacked experts, but not their biases": (
        gpt_oss,
        {
            "model.layers.0.mlp.experts.gate_up_proj": Parameter((4, 16, 48), "experts"),
            "model.layers.0.mlp.experts.down_proj": Parameter((4, 24, 16), "experts"),
            "model.layers.0.mlp.experts.down_proj_bias": None,
            "model.layers.0.self_attn.sinks": Parameter((2,), "vector"),
        },
    ),
    "positions that are looked up by another rule": (
        opt,
        {
            "model.decoder.embed_positions.weight": None,
            "model.decoder.embed_tokens.weight": Parameter((64, 16), "embedding"),
        },
    ),
    "a router is no linear layer, though it is made from one": (
        phimoe,
        {
            "model.layers.0.mlp.router.weight": None,
            "model.layers.0.mlp.experts.down_proj": Parameter((4, 16, 24), "experts"),
        },
    ),
    "a linear layer that multiplies in its own way": (
        falcon,
        {"transformer.h.0.self_attention.query_key_value.weight": Parameter((32, 16), "linear")},
    ),
    "an embedding that scales": (gemma3, {"model.embed_tokens.weight": Parameter((64, 16), "embedding")}),
    "a convolution is no stack of experts": (
        mamba,
        {
            "backbone.layers.0.mixer.conv1d.weight": None,
            "backbone.layers.0.mixer.A_log": None,
            "backbone.layers.0.mixer.D": Parameter((32,), "vector"),
            "backbone.layers.0.mixer.in_proj.weight": Parameter((64, 16), "linear"),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_has_the_role_that_a_delta_can_change(case: str, tmp_path: Path) -> None:
    make, expected = CASES[case]
    found = skeleton(make(), tmp_path)
    assert {name: found.parameters.get(name) for name in expected} == expected
    assert found.parameters.keys() <= found.names


def test_buffers_have_no_role(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    found = skeleton(opt(), tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert found.parameters.keys() <= {name for name, _ in model.named_parameters()}


def test_files_of_a_bare_backbone_are_found_by_their_prefix(tmp_path: Path) -> None:
    found = skeleton(gpt2(), tmp_path)
    assert found.model_name("wte.weight") == "transformer.wte.weight"
    assert found.model_name("transformer.wte.weight") == "transformer.wte.weight"
    assert found.model_name("of.another.model") == "of.another.model"
    assert found.tied_head == "lm_head.weight"
    assert found.embedding == "transformer.wte.weight"


def test_a_folder_without_a_known_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "from-the-future"}')
    with pytest.raises(InputError, match="no language model"):
        Skeleton.of(tmp_path)
