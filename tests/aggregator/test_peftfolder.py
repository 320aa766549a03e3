"""A contribution as a PEFT adapter: what peft computes with it, the way back bit for bit, and what is refused."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_world import SMALL, VOCABULARY, load, make_adapter, make_base, write_base
from toy_world import SHAPES, random_model, store_model

from aggregator.peftdelta import requantise, restore
from aggregator.peftfolder import RECORD, AdapterRecord, to_peft
from aggregator.skeleton import Skeleton
from rankup.delta import Change, DeltaHeader, DeltaReader, write_delta
from rankup.errors import DeltaError, InputError, IntegrityError, NotFoundError, RankupError, StateError
from rankup.fixedpoint import Factors, dequantise, quantise
from rankup.folder import ENVELOPE_NAME
from rankup.signing import generate_private_key, parse_private_key
from rankup.store import MemoryStore
from rankup.tensorfile import TensorFile
from rankup.versions import seal

HEADER = DeltaHeader(model="toy", round_id="round-1", lease_id="lease-7", base_manifest="ab" * 32)
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


def random_factors(
    shape: Sequence[int], rank: int, *, seed: int = 0, bits: Literal[8, 16] = 16, scale: float = 0.1
) -> Factors:
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    return quantise(scale * b, a, bits=bits)


def write(folder: Path, factors: Mapping[str, Change], name: str = "one.delta") -> Path:
    write_delta(folder / name, HEADER, factors)
    return folder / name


def plain(folder: Path, bits: Literal[8, 16] = 16) -> Path:
    """A delta of two linear weights of different ranks, which needs no base to be converted."""
    return write(
        folder, {Q: random_factors((16, 12), 3, bits=bits), UP: random_factors((24, 16), 2, bits=bits, seed=1)}
    )


# -- what peft makes of it ---------------------------------------------------------------------------------------------


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SMALL, tie_word_embeddings=False)


def gpt2(*, tied: bool = False) -> Any:
    from transformers import GPT2Config

    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)


def every_matrix(base: Path) -> dict[str, tuple[int, ...]]:
    return {name: p.shape for name, p in Skeleton.of(base).parameters.items() if p.role != "vector"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [llama, gpt2], ids=["llama", "gpt2, with Conv1D"])
def test_peft_computes_the_base_plus_the_product(config: Any, tmp_path: Path) -> None:
    """In float64, and so only rounding is left; with linear layers, embeddings, an output head and Conv1D, square ones
    too, of four ranks."""
    import torch
    from peft import PeftModel

    base = make_base(tmp_path / "base", config())
    factors = {
        name: random_factors(shape, 1 + index % 4, seed=index)
        for index, (name, shape) in enumerate(sorted(every_matrix(base).items()))
    }
    to_peft(write(tmp_path, factors), tmp_path / "adapter", base=str(base))
    tokens = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    by_hand = load(base)
    with torch.no_grad():
        before = by_hand(input_ids=tokens).logits
        for name, change in factors.items():
            b, a = dequantise(change)
            by_hand.get_parameter(name).add_(torch.from_numpy(b @ a))
        expected = by_hand(input_ids=tokens).logits
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(load(base, dtype), tmp_path / "adapter", autocast_adapter_dtype=False)
        assert not [w for w in caught if "missing" in str(w.message) or "inconsisten" in str(w.message)]
        with torch.no_grad():
            found = model.to(dtype)(input_ids=tokens).logits
            merged = model.merge_and_unload()(input_ids=tokens).logits
        scale = float(expected.abs().max())
        assert float((expected - before).abs().max()) > 0.1 * scale
        assert float((found - expected).abs().max()) <= allowed * scale
        assert float((merged - expected).abs().max()) <= allowed * scale
    restored = restore(tmp_path / "adapter", tmp_path / "again.delta")
    assert restored.identical
    assert (tmp_path / "again.delta").read_bytes() == (tmp_path / "one.delta").read_bytes()
    requantise(tmp_path / "adapter", tmp_path / "one.delta", tmp_path / "anew.delta")
    assert (tmp_path / "anew.delta").read_bytes() == (tmp_path / "one.delta").read_bytes()


@pytest.mark.slow
def test_an_adapter_of_pefts_own_becomes_a_delta_of_its_scaled_product(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", gpt2())
    targets = {"target_modules": ["c_attn", "c_proj", "wpe"], "rank_pattern": {"c_proj": 2}}
    folder = make_adapter(base, tmp_path / "adapter", seed=1, r=3, lora_alpha=7, use_rslora=True, **targets)
    shapes = every_matrix(base)
    names = [name for name in shapes if any(f".{part}." in name for part in targets["target_modules"])]
    like = write(tmp_path, {name: random_factors(shapes[name], 1) for name in names})
    done = requantise(folder, like, tmp_path / "new.delta")
    assert (done.identical, done.missing, done.header) == (False, (), HEADER)
    from peft_world import peft_merge, values

    merged, before = peft_merge(base, folder), values(load(base))
    with DeltaReader.open(tmp_path / "new.delta") as reader:
        assert set(reader.names) == set(names)
        for name in names:
            b, a = dequantise(reader.factors(name))
            change = merged[name] - before[name]
            assert np.abs(b @ a - change).max() <= 2e-4 * np.abs(change).max()


def test_the_configuration_names_every_layer_and_gives_each_a_scaling_of_one(tmp_path: Path) -> None:
    made = to_peft(plain(tmp_path), tmp_path / "adapter", base="someone/toy")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [UP.removesuffix(".weight"), Q.removesuffix(".weight")]
    assert config["base_model_name_or_path"] == "someone/toy"
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["lora_alpha"] == config["r"]
    with TensorFile.open(tmp_path / "adapter" / "adapter_model.safetensors") as file:
        shapes = {name: (extent.dtype, extent.shape) for name, extent in file.entries.items()}
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    assert shapes[f"{start}.lora_A.weight"] == ("F32", (3, 12))
    assert shapes[f"{start}.lora_B.weight"] == ("F32", (16, 3))
    assert made.record.contribution.sha256 == hashlib.sha256((tmp_path / "one.delta").read_bytes()).hexdigest()
    assert made.size_bytes == sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())


def test_the_card_of_an_adapter_names_its_base_round_and_contribution(tmp_path: Path) -> None:
    digest = to_peft(plain(tmp_path), tmp_path / "named", base="someone/toy").record.contribution.sha256
    card = (tmp_path / "named" / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/toy\nlibrary_name: peft\n")
    for part in ("`round-1`", "`toy`", digest, "ab" * 32, "2 weights."):
        assert part in card
    to_peft(plain(tmp_path), tmp_path / "unnamed", base="x: y")
    assert "base_model:" not in (tmp_path / "unnamed" / "README.md").read_text()


@pytest.mark.slow
def test_in_a_model_with_experts_attention_is_converted_and_the_rest_is_left_out(tmp_path: Path) -> None:
    """peft takes the names of a dense layer's weights for those of the experts, and says nothing."""
    import torch
    from peft import PeftModel
    from transformers import Qwen3MoeConfig

    base = make_base(
        tmp_path / "base",
        Qwen3MoeConfig(
            **SMALL, moe_intermediate_size=8, mlp_only_layers=[0], num_experts=4, num_experts_per_tok=2, head_dim=8
        ),
        save_original_format=False,
    )
    factors: dict[str, Change] = {}
    for index, (name, shape) in enumerate(sorted(every_matrix(base).items())):
        parts = [random_factors(shape[-2:], 2, seed=index + slice_) for slice_ in range(shape[0] if shape[2:] else 1)]
        factors[name] = parts if len(parts) > 1 else parts[0]
    made = to_peft(write(tmp_path, factors), tmp_path / "adapter", base=str(base), partial=True).record
    reasons = {name.split(".")[-2]: reason for name, reason in made.left_out.items() if "experts" not in name}
    assert {"gate_proj", "up_proj", "down_proj"} <= reasons.keys()
    assert any("stack of 4" in reason for reason in made.left_out.values())
    assert {name.split(".")[-2] for name in made.weights} >= {"q_proj", "o_proj", "lm_head"}
    tokens = torch.arange(16)[None]
    by_hand = load(base, torch.float32)  # its kernel for experts has no float64
    with torch.no_grad():
        before = by_hand(input_ids=tokens).logits
        for name in made.weights:
            change = factors[name]
            assert isinstance(change, Factors)
            b, a = dequantise(change)
            by_hand.get_parameter(name).add_(torch.from_numpy(b @ a).float())
        expected = by_hand(input_ids=tokens).logits
        model = PeftModel.from_pretrained(load(base, torch.float32), tmp_path / "adapter")
        found = model(input_ids=tokens).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale < 1e-2 * float((expected - before).abs().max())


# -- the way back ------------------------------------------------------------------------------------------------------


@st.composite
def any_factors(draw: st.DrawFn) -> Factors:
    """Also such as no quantiser writes: small mantissas, exponents apart, components of zero with an exponent."""
    bits, rank = draw(st.sampled_from([8, 16])), draw(st.integers(1, 4))
    limit, dtype = (32767, np.int16) if bits == 16 else (127, np.int8)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, limit))
    b = rng.integers(-size, size + 1, (draw(st.integers(1, 6)), rank)).astype(dtype)
    a = rng.integers(-limit, limit + 1, (rank, draw(st.integers(2, 6)))).astype(dtype)
    b[:, : draw(st.integers(0, 1))] = 0
    exponents = st.lists(st.integers(-149, 100), min_size=rank, max_size=rank)
    b_exp, a_exp = (np.array(draw(exponents), dtype=np.int16) for _ in range(2))
    b_max, a_max = np.abs(b).max(axis=0).astype(np.int16), np.abs(a).max(axis=1).astype(np.int16)
    return Factors(b=b, b_exp=b_exp, a=a, a_exp=a_exp, b_max=b_max, a_max=a_max)


@settings(deadline=None, max_examples=40)
@given(first=any_factors(), second=any_factors())
def test_any_delta_comes_back_bit_for_bit(
    first: Factors, second: Factors, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("law")
    delta = write(folder, {Q: first, UP: second})
    assert to_peft(delta, folder / "adapter").record.exact
    assert restore(folder / "adapter", folder / "again.delta").identical
    assert (folder / "again.delta").read_bytes() == delta.read_bytes()


def test_bfloat16_keeps_int8_and_rounds_int16_so_that_only_a_new_delta_can_be_made(tmp_path: Path) -> None:
    narrow = plain(tmp_path, bits=8)
    assert to_peft(narrow, tmp_path / "narrow", values="BF16").record.exact
    assert restore(tmp_path / "narrow", tmp_path / "again.delta").identical
    assert (tmp_path / "again.delta").read_bytes() == narrow.read_bytes()
    wide = plain(tmp_path)
    assert not to_peft(wide, tmp_path / "wide", values="BF16").record.exact
    with pytest.raises(IntegrityError, match=r"no mantissas|comes out as"):
        restore(tmp_path / "wide", tmp_path / "rounded.delta")
    assert not (tmp_path / "rounded.delta").exists()
    done = requantise(tmp_path / "wide", wide, tmp_path / "rounded.delta")
    assert not done.identical
    with DeltaReader.open(tmp_path / "rounded.delta") as new, DeltaReader.open(wide) as old:
        for name in old.names:
            (b, a), (b0, a0) = dequantise(new.factors(name)), dequantise(old.factors(name))
            assert 0 < np.abs(b - b0).max() <= 2.0**-8 * np.abs(b0).max()
            assert np.abs(a - a0).max() <= 2.0**-8 * np.abs(a0).max()


def test_what_was_left_out_is_named_on_the_way_back(tmp_path: Path) -> None:
    norm = "model.norm.weight"
    delta = write(tmp_path, {Q: random_factors((16, 12), 3), norm: random_factors((16, 1), 1)})
    made = to_peft(delta, tmp_path / "adapter", partial=True)
    assert made.record.left_out == {norm: "a vector: the scale of a norm, or a bias"}
    done = restore(tmp_path / "adapter", tmp_path / "again.delta")
    assert (done.identical, done.missing, done.header) == (False, (norm,), HEADER)
    with DeltaReader.open(tmp_path / "again.delta") as reader:
        assert reader.names == (Q,)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", RECORD, "adapter_config.json"])
def test_a_changed_byte_ends_in_an_error_of_ours_or_in_the_same_delta(name: str, tmp_path: Path) -> None:
    """Some bytes of the JSON files, such as the base's name, are not part of the delta."""
    delta = plain(tmp_path)
    to_peft(delta, tmp_path / "adapter", base="someone/toy")
    good = (tmp_path / "adapter" / name).read_bytes()
    refused = 0
    for place in np.random.default_rng(0).choice(len(good), 60, replace=False):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        (tmp_path / "adapter" / name).write_bytes(bad)
        try:
            restore(tmp_path / "adapter", tmp_path / "again.delta")
        except RankupError:
            refused += 1
        else:
            assert name != "adapter_model.safetensors" or place < int.from_bytes(good[:8], "little") + 8
            assert (tmp_path / "again.delta").read_bytes() == delta.read_bytes()
    assert refused > (50 if name == "adapter_model.safetensors" else 5)
    assert not list(tmp_path.glob(".*"))


# -- what is refused ---------------------------------------------------------------------------------------------------


def square(rank: int = 2) -> Factors:
    return random_factors((16, 16), rank)


NAMELESS: Mapping[str, tuple[str, Change, str]] = {
    "a norm": ("model.norm.weight", random_factors((16, 1), 1), "a vector"),
    "a bias": ("model.layers.0.q_proj.bias", random_factors((16, 1), 1), "a vector"),
    "experts": ("model.layers.0.mlp.experts.gate_up_proj", [square(), square()], "a stack of 2 matrices"),
    "an embedding without its base": ("model.embed_tokens.weight", square(), "share one weight"),
    "positions without their base": ("transformer.wpe.weight", square(), "share one weight"),
    "a head without its base": ("lm_head.weight", square(), "share one weight"),
    "what may be a Conv1D": ("transformer.h.0.attn.c_attn.weight", square(), r"\(in, out\) in some"),
    "a parameter of no layer": ("model.layers.0.scale", square(), "no weight of a layer"),
}


@pytest.mark.parametrize("case", NAMELESS)
def test_what_a_lora_adapter_cannot_express_is_refused_or_left_out(case: str, tmp_path: Path) -> None:
    name, change, reason = NAMELESS[case]
    delta = write(tmp_path, {Q: square(), name: change})
    with pytest.raises(InputError, match=reason) as caught:
        to_peft(delta, tmp_path / "adapter")
    assert name in caught.value.cause
    assert "--partial" in caught.value.remedy
    assert not (tmp_path / "adapter").exists()
    assert to_peft(delta, tmp_path / "adapter", partial=True).record.left_out.keys() == {name}
    with pytest.raises(InputError, match="any weight"):
        to_peft(write(tmp_path, {name: change}), tmp_path / "other", partial=True)


@pytest.mark.slow
def test_an_embedding_that_is_the_head_too_is_refused(tmp_path: Path) -> None:
    """peft's own merge would add its product twice."""
    base = make_base(tmp_path / "base", gpt2(tied=True))
    delta = write(tmp_path, {"transformer.wte.weight": random_factors((VOCABULARY, 16), 2)})
    with pytest.raises(InputError, match="output head too"):
        to_peft(delta, tmp_path / "adapter", base=str(base))


def version_folder(folder: Path, **config: Any) -> Path:
    """A folder as it is pulled: a sealed manifest beside config and weights."""
    store = MemoryStore()
    model = {name: array for name, array in random_model().items() if array.dtype == np.float32}
    roles = {name: "embedding" if name.startswith("embed") else "linear" for name in model if model[name].ndim == 2}
    manifest = store_model(store, model, 10**6, roles)
    write_base(folder, {"model.safetensors": model}, **config)
    (folder / ENVELOPE_NAME).write_bytes(seal(manifest, parse_private_key(generate_private_key())))
    return folder


def test_the_manifest_of_a_version_tells_what_its_weights_are(tmp_path: Path) -> None:
    base = version_folder(tmp_path / "tied")
    up, embedding = "layer.0.up.weight", "embed.weight"
    delta = write(tmp_path, {name: random_factors(SHAPES[name], 2) for name in (up, embedding)})
    with pytest.raises(InputError, match="output head too"):
        to_peft(delta, tmp_path / "adapter", base=str(base))
    made = to_peft(delta, tmp_path / "adapter", base=str(base), partial=True)
    assert made.record.weights.keys() == {up}
    assert made.base_manifest not in (None, HEADER.base_manifest)


WRONG: Mapping[str, tuple[dict[str, Change], str]] = {
    "a weight that the base does not have": ({"layer.9.up.weight": square()}, "does not have"),
    "a weight without a role": ({"norm.weight": random_factors((16, 1), 1)}, "not as a weight that is trained"),
    "another shape": ({"layer.0.up.weight": random_factors((16, 24), 2)}, r"24 x 16|16 x 24"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_delta_of_another_base_is_refused(case: str, tmp_path: Path) -> None:
    factors, says = WRONG[case]
    with pytest.raises(InputError, match=says):
        to_peft(write(tmp_path, factors), tmp_path / "a", base=str(version_folder(tmp_path / "base")), partial=True)


def test_other_contents_of_the_folder_and_missing_things_are_refused(tmp_path: Path) -> None:
    delta = plain(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StateError, match="not empty"):
        to_peft(delta, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(NotFoundError, match="no folder"):
        to_peft(delta, tmp_path / "adapter", base=str(tmp_path / "nowhere"))
    with pytest.raises(NotFoundError, match="no delta"):
        to_peft(tmp_path / "nothing.delta", tmp_path / "adapter")
    (tmp_path / "bad.delta").write_bytes(delta.read_bytes()[:-1])
    with pytest.raises(DeltaError):
        to_peft(tmp_path / "bad.delta", tmp_path / "adapter")
    with pytest.raises(NotFoundError, match=RECORD):
        restore(tmp_path / "full", tmp_path / "again.delta")
    assert not (tmp_path / "adapter").exists()


def test_a_value_below_float32_is_refused(tmp_path: Path) -> None:
    one = np.ones((2, 1), dtype=np.int16)
    tiny, top = np.array([-160], dtype=np.int16), np.array([1], dtype=np.int16)
    factors = Factors(b=one, b_exp=tiny, a=one.T.copy(), a_exp=np.array([0], np.int16), b_max=top, a_max=top)
    with pytest.raises(InputError, match=r"2\^-149"):
        to_peft(write(tmp_path, {Q: factors}), tmp_path / "adapter")
    assert not list(tmp_path.glob(".*"))


LIKE: Mapping[str, tuple[dict[str, Change], str]] = {
    "another weight": ({"model.layers.5.q_proj.weight": random_factors((16, 12), 1)}, "which .* does not"),
    "another shape": ({Q: random_factors((12, 15), 1), UP: random_factors((24, 16), 1)}, "is not the delta's"),
}


@pytest.mark.parametrize("case", LIKE)
def test_a_new_delta_changes_only_what_its_model_changes(case: str, tmp_path: Path) -> None:
    factors, says = LIKE[case]
    to_peft(plain(tmp_path), tmp_path / "adapter")
    with pytest.raises(InputError, match=says):
        requantise(tmp_path / "adapter", write(tmp_path, factors, "like.delta"), tmp_path / "new.delta")
    assert not (tmp_path / "new.delta").exists()


def test_the_record_of_another_adapter_is_refused(tmp_path: Path) -> None:
    to_peft(plain(tmp_path), tmp_path / "adapter")
    path = tmp_path / "adapter" / RECORD
    record = AdapterRecord.model_validate_json(path.read_bytes())
    less = record.model_copy(update={"weights": {Q: record.weights[Q]}})
    path.write_text(less.model_dump_json())
    with pytest.raises(IntegrityError, match="not in both"):
        restore(tmp_path / "adapter", tmp_path / "again.delta")
    other = record.model_copy(update={"header": HEADER.model_copy(update={"lease_id": "lease-8"})})
    path.write_text(other.model_dump_json())
    with pytest.raises(IntegrityError, match="comes out as"):
        restore(tmp_path / "adapter", tmp_path / "again.delta")
    assert not (tmp_path / "again.delta").exists()


def test_the_golden_delta_converts_and_returns(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "rankup" / "golden" / "small.delta"
    to_peft(golden, tmp_path / "adapter")
    restore(tmp_path / "adapter", tmp_path / "again.delta")
    assert (tmp_path / "again.delta").read_bytes() == golden.read_bytes()
    config = (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    to_peft(golden, tmp_path / "twice")
    assert (tmp_path / "twice" / "adapter_config.json").read_bytes() == config
