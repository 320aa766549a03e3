"""What an adapter's tensors do to a model, against peft's own merge; and which adapters are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model
from peft_world import (
    SMALL,
    VOCABULARY,
    assert_merged,
    expected,
    load,
    make_adapter,
    make_base,
    read_weights,
    values,
    write_adapter,
    write_base,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from aggregator.adapters import Adapter
from aggregator.basemodel import BaseModel
from aggregator.layouts import place
from aggregator.merge import Blend, Merge
from aggregator.mergedfolder import MergeResult, merge_folder
from rankup.errors import InputError, IntegrityError, NotFoundError, RankupError


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, "tie_word_embeddings": False, **changes})


def gpt2(**changes: Any) -> GPT2Config:
    return GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, **changes)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {**SMALL, "head_dim": 8, "num_local_experts": 3}
LAYERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear": (llama, {"target_modules": LINEAR}),
    "linear, rsLoRA": (llama, {"target_modules": LINEAR, "use_rslora": True}),
    "linear, patterns": (
        llama,
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 7},
            "alpha_pattern": {r"layers\.1\..*": 3, "down_proj": 11},
        },
    ),
    "output layer": (llama, {"target_modules": ["lm_head"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "trained norms and output layer": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    ),
    "biases of all layers": (lambda: llama(attention_bias=True), {"target_modules": LINEAR, "bias": "all"}),
    "biases of adapted layers": (
        lambda: llama(attention_bias=True),
        {"target_modules": ["v_proj"], "bias": "lora_only"},
    ),
    "bias of B": (lambda: llama(attention_bias=True), {"target_modules": ["v_proj", "o_proj"], "lora_bias": True}),
    "one weight as a parameter": (
        llama,
        {"target_parameters": ["q_proj.weight", "mlp.up_proj.weight"], "target_modules": []},
    ),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D beside Linear": (
        lambda: gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn", "attn.c_proj", "wte", "lm_head"], "bias": "all"},
    ),
    "experts of Mixtral": (lambda: MixtralConfig(**MOE), {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
    "experts of Mixtral, patterns": (
        lambda: MixtralConfig(**MOE),
        {"target_parameters": EXPERTS, "target_modules": [], "alpha_pattern": {"experts.down_proj": 5}},
    ),
    "square experts of Mixtral": (
        lambda: MixtralConfig(**{**MOE, "intermediate_size": 8}),
        {"target_parameters": EXPERTS, "target_modules": []},
    ),
    "router and experts of Qwen3": (
        lambda: Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10),
        {"target_parameters": [*EXPERTS, "mlp.gate.weight"], "target_modules": []},
    ),
    "experts of GPT-OSS": (lambda: GptOssConfig(**MOE), {"target_parameters": EXPERTS, "target_modules": []}),
    "square experts of GPT-OSS": (
        lambda: GptOssConfig(**{**MOE, "intermediate_size": 16}),
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]},
    ),
    "experts of Llama 4": (
        lambda: Llama4TextConfig(**MOE, intermediate_size_mlp=20),
        {"target_parameters": [name.replace("mlp", "feed_forward") for name in EXPERTS], "target_modules": []},
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_each_kind_of_layer_is_changed_as_peft_changes_it(case: str, tmp_path: Path) -> None:
    config, settings = LAYERS[case]
    base = make_base(tmp_path / "base", config())
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, **{"r": 4, "lora_alpha": 6, **settings})
    result = merge_folder(base, [adapter], tmp_path / "out", Blend())
    assert result.record.tensors_changed > 0
    assert_merged(tmp_path / "out", expected(base, [adapter], [1.0]))


def test_a_base_without_the_models_prefix_is_matched_by_its_ending(tmp_path: Path) -> None:
    named = make_base(tmp_path / "named", gpt2())
    GPT2LMHeadModel.from_pretrained(named).transformer.save_pretrained(tmp_path / "bare")
    assert "h.0.attn.c_attn.weight" in read_weights(tmp_path / "bare" / "model.safetensors")
    adapter = make_adapter(named, tmp_path / "adapter", seed=1, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    merge_folder(tmp_path / "bare", [adapter], tmp_path / "out", Blend())
    found = values(GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float64))
    total, _ = expected(named, [adapter], [1.0])
    for name, value in found.items():
        np.testing.assert_allclose(value, total[name], atol=1e-6, err_msg=name)


# -- tied embeddings ---------------------------------------------------------------------------------------------------


def merged(base: Path, adapter: Path, out: Path) -> MergeResult:
    return merge_folder(base, [adapter], out, Blend())


def test_both_layers_of_a_tied_model_change_its_one_tensor_and_the_user_is_warned(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", llama(tie_word_embeddings=True))
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, r=2, target_modules=["embed_tokens", "lm_head"])
    result = merged(base, adapter, tmp_path / "out")
    assert len(result.warnings) == 1
    assert "lm_head shares its weight" in result.warnings[0]
    assert_merged(tmp_path / "out", expected(base, [adapter], [1.0]))


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_layers_changes_both_and_the_user_is_warned(module: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", llama(tie_word_embeddings=True))
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, r=2, target_modules=[module])
    assert any(f"{module} shares its weight" in text for text in merged(base, adapter, tmp_path / "out").warnings)
    assert_merged(tmp_path / "out", expected(base, [adapter], [1.0]))


def test_an_adapter_that_training_tied_counts_once(tmp_path: Path) -> None:
    """peft's own merge adds it twice, so the oracle is what the adapter computed while it was trained."""
    base = make_base(tmp_path / "base", llama(tie_word_embeddings=True))
    settings = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, steps=3, r=2, **settings)
    tensors = read_weights(adapter / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_A.weight" in tensors
    assert not merged(base, adapter, tmp_path / "out").warnings
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{half}"].astype(float) for half in "AB")
    start = values(load(base))["model.embed_tokens.weight"]
    delta = (b @ a).T * (8 / 2)
    assert np.abs(delta).max() > 1e-4
    np.testing.assert_allclose(values(load(tmp_path / "out"))["model.embed_tokens.weight"], start + delta, atol=1e-7)


def test_a_trained_embedding_that_is_saved_under_both_names_counts_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", llama(tie_word_embeddings=True))
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, steps=2, r=2, **settings)
    saved = read_weights(adapter / "adapter_model.safetensors")
    names = ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    assert set(names) <= set(saved)
    merged(base, adapter, tmp_path / "out")
    found = read_weights(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found, saved[names[1]])


def test_two_different_copies_of_one_stored_tensor_are_refused(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base",
        {"model.safetensors": {"model.embed_tokens.weight": np.zeros((4, 2))}},
        tie_word_embeddings=True,
    )
    copies = {"model.embed_tokens.weight": np.ones((4, 2)), "lm_head.weight": np.full((4, 2), 2.0)}
    adapter = write_adapter(tmp_path / "adapter", copies)
    with pytest.raises(InputError, match="stores one tensor for both"):
        merged(base, adapter, tmp_path / "out")


def test_a_tied_model_that_stores_both_layers_keeps_them_equal(tmp_path: Path) -> None:
    table = np.arange(8.0).reshape(4, 2)
    base = write_base(
        tmp_path / "base",
        {"model.safetensors": {"model.embed_tokens.weight": table, "lm_head.weight": table}},
        tie_word_embeddings=True,
    )
    halves = {"lm_head.lora_A.weight": np.ones((2, 2)), "lm_head.lora_B.weight": np.ones((4, 2))}
    merged(base, write_adapter(tmp_path / "adapter", halves), tmp_path / "out")
    found = read_weights(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["lm_head.weight"], table + 2)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], table + 2)


# -- refusals ----------------------------------------------------------------------------------------------------------

WEIGHT = {"model.safetensors": {"model.layers.0.q_proj.weight": np.ones((6, 5))}}
Q = "model.layers.0.q_proj"
PLAIN = {f"{Q}.lora_A.weight": np.ones((2, 5)), f"{Q}.lora_B.weight": np.ones((6, 2))}


def place_by_hand(tmp_path: Path, tensors: dict[str, Any], base: dict[str, Any] | None = None, **config: Any) -> None:
    folder = write_base(tmp_path / "base", base or WEIGHT, **config.pop("base_config", {}))
    with BaseModel(folder) as model, Adapter(write_adapter(tmp_path / "adapter", tensors, **config)) as adapter:
        place(model, adapter)
        for tensor in Merge(model, [adapter], Blend()).touched:
            list(Merge(model, [adapter], Blend()).tiles(tensor))


def test_the_adapter_of_the_refusals_is_accepted_as_it_stands(tmp_path: Path) -> None:
    place_by_hand(tmp_path, PLAIN)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "single tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "initialised from the base": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    "a variant of tomorrow": ({"use_hyper": True}, "use_hyper"),
    "another rank": ({"r": 4}, "has rank 2"),
    "no rank": ({"r": 0}, "states 0"),
    "an alpha that is no number": ({"lora_alpha": "1e400"}, "states '1e400'"),
    "patterns that never end": ({"alpha_pattern": {"(a+)+": 2}}, "not a simple regular expression"),
    "patterns that are broken": ({"rank_pattern": {"[": 2}}, "not a simple regular expression"),
    "patterns that are no table": ({"rank_pattern": [1]}, "no table"),
    "another kind": ({"peft_type": "IA3"}, "type IA3"),
    "no kind": ({"peft_type": None}, "type None"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_plain_lora_does_not_have_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    config, message = SETTINGS[case]
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        place_by_hand(tmp_path, PLAIN, **config)
    assert caught.value.remedy


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "a magnitude of DoRA": ({f"{Q}.lora_magnitude_vector.weight": np.ones(6)}, "magnitude vector"),
    "a variant's tensor": ({f"{Q}.lora_diag.weight": np.ones(6)}, "lora_diag"),
    "a bias of A": ({f"{Q}.lora_A.bias": np.ones(2)}, "lora_A.bias"),
    "a parameter that the base lacks": ({"score.weight": np.ones((2, 5))}, "'score.weight', which the base"),
    "a layer that the base lacks": (
        {
            "model.layers.1.q_proj.lora_A.weight": np.ones((2, 5)),
            "model.layers.1.q_proj.lora_B.weight": np.ones((6, 2)),
        },
        "model.layers.1.q_proj",
    ),
    "half of a pair": ({"model.layers.0.k_proj.lora_A.weight": np.ones((2, 5))}, "without its other half"),
    "a parameter of another shape": ({f"{Q}.weight": np.ones((7, 5))}, r"by a tensor \(7, 5\)"),
    "an empty tensor": ({f"{Q}.weight": np.ones((0, 5))}, "is empty"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_without_a_place_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    extra, message = TENSORS[case]
    with pytest.raises(InputError, match=message) as caught:
        place_by_hand(tmp_path, {**PLAIN, **extra})
    assert caught.value.remedy


SHAPES = {
    "a longer B": {f"{Q}.lora_B.weight": np.ones((7, 2))},
    "a longer A": {f"{Q}.lora_A.weight": np.ones((2, 6))},
    "the transpose of a plain layer": {f"{Q}.lora_A.weight": np.ones((2, 6)), f"{Q}.lora_B.weight": np.ones((5, 2))},
    "a convolution": {f"{Q}.lora_A.weight": np.ones((2, 5, 1, 1)), f"{Q}.lora_B.weight": np.ones((6, 2, 1, 1))},
    "halves of two ranks": {f"{Q}.lora_A.weight": np.ones((3, 5))},
}


@pytest.mark.parametrize("case", SHAPES)
def test_factors_that_do_not_fit_the_base_are_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit|do not fit|no linear"):
        place_by_hand(tmp_path, {**PLAIN, **SHAPES[case]})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(half: str, value: float, tmp_path: Path) -> None:
    name = f"{Q}.{half}.weight"
    broken = PLAIN[name].copy()
    broken[1, 1] = value
    with pytest.raises(InputError, match=f"not finite in 'base_model.model.{name}'"):
        place_by_hand(tmp_path, {**PLAIN, name: broken})


def test_a_name_that_two_stored_tensors_end_with_is_refused(tmp_path: Path) -> None:
    weights = {f"{tower}.{Q}.weight": np.ones((6, 5)) for tower in ("text", "vision")}
    with pytest.raises(InputError, match="could be any of"):
        place_by_hand(tmp_path, PLAIN, {"model.safetensors": weights})


def test_square_experts_of_an_older_peft_are_refused_unless_the_model_is_known(tmp_path: Path) -> None:
    experts = {"model.safetensors": {"mlp.experts.down_proj": np.ones((2, 4, 4))}}
    halves = {"mlp.experts.lora_A.weight": np.ones((4, 4)), "mlp.experts.lora_B.weight": np.ones((4, 4))}
    config = {"target_parameters": ["experts.down_proj"], "peft_version": "0.17.1"}
    with pytest.raises(InputError, match="square"):
        place_by_hand(tmp_path / "unknown", halves, experts, **config)
    place_by_hand(tmp_path / "known", halves, experts, base_config={"model_type": "gpt_oss"}, **config)


def test_wrapped_parameters_of_one_shape_are_refused_since_their_order_is_not_stored(tmp_path: Path) -> None:
    experts = {"model.safetensors": {"mlp.experts.left": np.ones((2, 4, 5)), "mlp.experts.right": np.ones((2, 4, 5))}}
    halves = {
        f"mlp.experts.{depth}lora_{half}.weight": np.ones(shape)
        for depth in ("", "base_layer.")
        for half, shape in {"A": (4, 5), "B": (4, 4)}.items()
    }
    with pytest.raises(InputError, match="cannot be told"):
        place_by_hand(tmp_path, halves, experts, target_parameters=["experts.left", "experts.right"])


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised"):
        place_by_hand(tmp_path, PLAIN, base_config={"quantization_config": {"quant_method": "mxfp4"}})


def test_an_adapter_of_another_type_made_with_peft_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", llama())
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(load(base, torch.float32), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="type IA3"):
        Adapter(tmp_path / "adapter")


def test_a_folder_without_an_adapter_and_a_pickled_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        Adapter(Path("org/adapter"))
    assert "hf download org/adapter" in caught.value.remedy
    with pytest.raises(InputError, match="not a PEFT adapter"):
        Adapter(tmp_path)
    folder = write_adapter(tmp_path / "adapter", PLAIN)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled") as refused:
        Adapter(folder)
    assert "foreign code" in refused.value.remedy


HEADERS = {
    "a header without end": (2**62).to_bytes(8, "little") + b"{}",
    "deep nesting": b"".join([(40000).to_bytes(8, "little"), b"[" * 40000]),
    "a tensor beyond the end": b"".join(
        [
            (71).to_bytes(8, "little"),
            json.dumps({"a.weight": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode().ljust(71),
        ]
    ),
    "nothing": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_tensor_file_is_refused_before_anything_of_it_is_used(case: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", PLAIN)
    (folder / "adapter_model.safetensors").write_bytes(HEADERS[case])
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        Adapter(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_configuration_that_is_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", PLAIN)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(RankupError):
        Adapter(folder)
