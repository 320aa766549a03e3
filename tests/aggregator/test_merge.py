"""A merge against float64 by hand; the same bytes whatever the order, the tiles or the kill; one file at a time."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_world import (
    HALF_ULP,
    SMALL,
    TWO,
    Q,
    assert_merged,
    expected,
    hashes,
    load,
    make_adapter,
    make_base,
    one_layer,
    read_weights,
    write_adapter,
    write_base,
)
from transformers import LlamaConfig, MixtralConfig

from aggregator.merge import Blend, parse_weights
from aggregator.mergedfolder import merge_folder
from aggregator.mergerecord import read_record
from rankup.errors import InputError, IntegrityError
from rankup.tensorfile import TensorFile

# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_ULP)
def test_every_element_is_the_float64_sum_within_the_rounding_of_its_dtype(
    llamas: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, adapters = llamas[dtype]
    merge_folder(base, adapters, tmp_path / "out", TWO)
    assert_merged(tmp_path / "out", expected(base, adapters, [0.7, -0.3]), dtype)


def test_the_merged_model_loads_computes_the_logits_of_the_float64_merge_and_generates(
    llamas: Any, tmp_path: Path
) -> None:
    base, adapters = llamas[torch.float32]
    merge_folder(base, adapters, tmp_path / "out", TWO)
    by_hand = load(base)
    total, _ = expected(base, adapters, [0.7, -0.3])
    by_hand.load_state_dict({name: torch.from_numpy(value) for name, value in total.items()})
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain, wanted = load(base)(tokens).logits, by_hand(tokens).logits
        found = load(tmp_path / "out")(tokens).logits
    assert (wanted - plain).abs().max() > 1e-2
    assert (wanted - found).abs().max() < 1e-5
    assert load(tmp_path / "out", torch.float32).generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 9)


def test_names_files_dtypes_and_untouched_tensors_are_the_bases(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.bfloat16]
    record = merge_folder(base, adapters, tmp_path / "out", TWO).record
    files = sorted(path.name for path in base.glob("model*.safetensors"))
    assert len(files) == 2
    changed = 0
    for name in files:
        with TensorFile.open(base / name) as old, TensorFile.open(tmp_path / "out" / name) as new:
            assert old.entries == new.entries
            differ = [tensor for tensor in old if old.read(tensor) != new.read(tensor)]
        adapted = ("q_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
        assert all(any(part in tensor for part in adapted) for tensor in differ)
        changed += len(differ)
    assert record.tensors_changed == changed == 8
    assert [file.name for file in record.files] == sorted([*files, "config.json", "generation_config.json", *INDEX])


INDEX = ["model.safetensors.index.json"]


def test_a_copy_with_weight_one_comes_out_bit_for_bit(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float32]
    merge_folder(base, adapters[1:], tmp_path / "out", Blend())
    saved = read_weights(adapters[1] / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    found = [read_weights(path) for path in (tmp_path / "out").glob("model*.safetensors")]
    np.testing.assert_array_equal(next(table for table in found if "lm_head.weight" in table)["lm_head.weight"], saved)


def weight_of(folder: Path) -> np.ndarray:
    return read_weights(folder / "model.safetensors")[f"{Q}.weight"]


def test_components_that_cancel_leave_the_small_one_between_them(tmp_path: Path) -> None:
    """1e4 - 1e4 + 1e-4 in one entry: float32 partial sums lose the small one, whichever way they go."""
    big, small = np.full((1, 1), 1e4), np.full((1, 1), 1e-4, dtype=np.float32)
    one = np.ones((1, 1))
    base, adapters = one_layer(tmp_path, np.zeros((1, 1)), (big, one), (-big, one), (small, one))
    merge_folder(base, adapters, tmp_path / "out", Blend())
    assert weight_of(tmp_path / "out")[0, 0] == pytest.approx(1e-4, rel=0.2)


def test_an_entry_that_is_not_changed_keeps_its_bits_and_a_zero_sum_keeps_the_tensor(tmp_path: Path) -> None:
    base = np.array([[-0.0, 1.5], [2.5, -3.5]])
    nothing, one = np.zeros((2, 1)), np.ones((1, 2))
    folder, adapters = one_layer(tmp_path, base, (nothing, one))
    result = merge_folder(folder, adapters, tmp_path / "out", Blend())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert result.record.tensors_changed == 0


def test_a_value_that_leaves_the_dtype_of_the_base_is_refused_by_its_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**SMALL), dtype=torch.float16)
    adapter = make_adapter(base, tmp_path / "a", seed=1, r=2, target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e6}))
    with pytest.raises(InputError, match=r"q_proj.*range of F16"):
        merge_folder(base, [adapter], tmp_path / "out", Blend(weights=(Fraction(128),)))
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_a_base_with_a_value_that_is_not_finite_is_refused_by_its_tensor(tmp_path: Path) -> None:
    folder, adapters = one_layer(tmp_path, np.array([[np.nan, 1.0]]), (np.ones((1, 1)), np.ones((1, 2))))
    with pytest.raises(IntegrityError, match=r"not finite in 'model\.q_proj\.weight'"):
        merge_folder(folder, adapters, tmp_path / "out", Blend())


# -- weights and rules -------------------------------------------------------------------------------------------------


@given(st.lists(st.decimals(-128, 128, allow_nan=False, places=7), min_size=1, max_size=5))
def test_decimal_weights_are_read_exactly(decimals: list[Any]) -> None:
    assert parse_weights(",".join(map(str, decimals))) == tuple(map(Fraction, decimals))


@pytest.mark.parametrize("text", ["", "1,", "nan", "inf", "1e9", "-129", "1/2", "0x10", "1" * 100, "1e-999999"])
def test_what_is_no_weight_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no weight"):
        parse_weights(text)


def test_weights_are_recorded_as_the_nearest_multiples_of_2_to_the_minus_30(tmp_path: Path) -> None:
    ones = (np.ones((3, 1)), np.ones((1, 2)))
    base, adapters = one_layer(tmp_path, np.zeros((3, 2)), ones, (2 * ones[0], ones[1]))
    record = merge_folder(base, adapters, tmp_path / "out", Blend(weights=parse_weights("0.7,-0.3"))).record
    assert record.denominator_log2 == 30
    found = {adapter.name: adapter.coefficient for adapter in record.adapters}
    assert found == {"a0": round(Fraction(7, 10) * 2**30), "a1": round(Fraction(-3, 10) * 2**30)}
    assert {adapter.scalings for adapter in record.adapters} == {(1.0,)}
    np.testing.assert_allclose(weight_of(tmp_path / "out"), np.full((3, 2), 0.1), rtol=1e-6)


def crowd(tmp_path: Path, scales: list[float]) -> tuple[Path, list[Path]]:
    """Adapters near one another, each times its scale."""
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(8, 2)), rng.normal(size=(2, 6))
    near = [(scale * (b + 0.1 * rng.normal(size=b.shape)), a + 0.1 * rng.normal(size=a.shape)) for scale in scales]
    folder, adapters = one_layer(tmp_path, np.zeros((8, 6)), *near)
    return folder, adapters


def weights_of(out: Path) -> dict[str, float]:
    return {adapter.name: adapter.coefficient / 2**30 for adapter in read_record(out).adapters}


def test_the_mean_is_the_sum_over_the_number_of_adapters(tmp_path: Path) -> None:
    base, adapters = crowd(tmp_path, [1, 1, 1, 1])
    merge_folder(base, adapters, tmp_path / "mean", Blend("mean"))
    merge_folder(base, adapters, tmp_path / "sum", Blend())
    np.testing.assert_allclose(weight_of(tmp_path / "mean") * 4, weight_of(tmp_path / "sum"), rtol=1e-6)
    merge_folder(base, adapters, tmp_path / "half", Blend("mean", weights=(Fraction(2),) * 4))
    np.testing.assert_allclose(weight_of(tmp_path / "half") * 2, weight_of(tmp_path / "sum"), rtol=1e-6)


@pytest.mark.parametrize("rule", ["multi_krum", "geometric_median", "centred_clipping"])
def test_a_robust_rule_leaves_a_hostile_adapter_next_to_nothing(rule: Any, tmp_path: Path) -> None:
    base, adapters = crowd(tmp_path, [1, 1, -1000, 1, 1, 1])
    merge_folder(base, adapters, tmp_path / rule, Blend(rule))
    found = weights_of(tmp_path / rule)
    assert abs(found["a2"]) * 1000 < 1
    assert sum(found.values()) == pytest.approx(1, abs=0.2)


def test_a_clip_scales_the_longest_adapter_down_to_its_share_of_the_median(tmp_path: Path) -> None:
    base, adapters = crowd(tmp_path, [1, 1, 50, 1, 1])
    merge_folder(base, adapters, tmp_path / "out", Blend(clip=2.0))
    found = weights_of(tmp_path / "out")
    assert found["a2"] == pytest.approx(2 / 50, rel=0.2)
    assert all(found[name] == 1 for name in ("a0", "a1", "a3", "a4"))


def test_copies_count_in_the_length_of_an_adapter(tmp_path: Path) -> None:
    """Six adapters that replace a norm; one replaces it by something far away, and only there it is hostile."""
    rng = np.random.default_rng(0)
    tensors = {f"{Q}.weight": np.zeros((4, 3)), "model.norm.weight": np.ones(40)}
    base = write_base(tmp_path / "base", {"model.safetensors": tensors})
    halves = {f"{Q}.lora_B.weight": np.ones((4, 2)), f"{Q}.lora_A.weight": np.ones((2, 3))}
    adapters = [
        write_adapter(tmp_path / f"a{i}", {**halves, "model.norm.weight": rng.normal(size=40) + (1e4 if i == 3 else 0)})
        for i in range(6)
    ]
    merge_folder(base, adapters, tmp_path / "out", Blend("geometric_median"))
    found = weights_of(tmp_path / "out")
    assert found["a3"] < 1e-3
    assert found["a0"] == pytest.approx(0.2, abs=0.05)


BLENDS = {
    "a rule that does not exist": (Blend("median"), "no rule"),  # type: ignore[arg-type]
    "too few weights": (Blend(weights=(Fraction(1),)), "1 weights for 3"),
    "a weight that is too large": (Blend(weights=(Fraction(129),) * 3), "outside"),
    "weights for a robust rule": (Blend("multi_krum", weights=(Fraction(1),) * 3), "finds the weights itself"),
    "a clip at nothing": (Blend(clip=0.0), "leaves nothing"),
    "a clip that is no number": (Blend(clip=float("nan")), "leaves nothing"),
}


@pytest.mark.parametrize("case", BLENDS)
def test_a_blend_that_makes_no_sense_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    blend, message = BLENDS[case]
    base, adapters = crowd(tmp_path, [1, 1, 1])
    with pytest.raises(InputError, match=message):
        merge_folder(base, adapters, tmp_path / "out", blend)
    assert not (tmp_path / "out").exists()


# -- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [Blend(), Blend("geometric_median", clip=1.1)], ids=["sum", "median"])
def test_the_order_of_the_adapters_changes_no_byte_of_any_file(llamas: Any, blend: Blend, tmp_path: Path) -> None:
    base, adapters = llamas[torch.bfloat16]
    third = make_adapter(base, tmp_path / "third", seed=3, r=3, target_modules="all-linear")
    three = [*adapters, third]
    merge_folder(base, three, tmp_path / "one", blend)
    merge_folder(base, three[::-1], tmp_path / "other", blend)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other")


@pytest.mark.parametrize("tile_bytes", [1, 200, 5000])
def test_the_size_of_the_tiles_changes_no_byte(llamas: Any, tile_bytes: int, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float16]
    merge_folder(base, adapters, tmp_path / "one", TWO)
    merge_folder(base, adapters, tmp_path / "other", TWO, tile_bytes=tile_bytes)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other")


def test_the_size_of_the_tiles_changes_no_byte_of_experts(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", MixtralConfig(**SMALL, head_dim=8, num_local_experts=3))
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = make_adapter(base, tmp_path / "a", seed=1, r=2, target_parameters=parameters, target_modules=[])
    merge_folder(base, [adapter], tmp_path / "one", Blend())
    merge_folder(base, [adapter], tmp_path / "other", Blend(), tile_bytes=300)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other")
