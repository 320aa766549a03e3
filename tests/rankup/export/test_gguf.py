"""GGUF files of tiny random models, read back with the package gguf: every bit of every tensor, every key."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinymodel import HEADS, HIDDEN, KV_HEADS, LAYERS, MARKS, SPLITS, VOCAB, WIDE, make_model, pull_model, tokenizer_of

from rankup.bfloat16 import from_bfloat16, to_bfloat16
from rankup.errors import (
    DiskFullError,
    InputError,
    IntegrityError,
    NotFoundError,
    RankupError,
    SetupError,
    StateError,
    TooLargeError,
)
from rankup.export import ggufvocab, ggufwriter, newfile
from rankup.export.ggufmodel import OutType, interleave_heads
from rankup.export.ggufsource import open_folder
from rankup.export.ggufwriter import GgufFile, write_gguf
from rankup.folder import read_folder_state, write_folder_state
from rankup.keychain import make_key_change
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.tensorfile import TensorFile

NAMES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "Llama, tied": ("LlamaForCausalLM", "smollm", {}),
    "Llama, not tied, wide heads": ("LlamaForCausalLM", "llama-bpe", {"tie_word_embeddings": False, "head_dim": 16}),
    "Mistral without a window": ("MistralForCausalLM", "gpt-2", {"sliding_window": None}),
    "Qwen2": ("Qwen2ForCausalLM", "qwen2", {"sliding_window": 64, "use_sliding_window": False}),
    "Qwen3": ("Qwen3ForCausalLM", "qwen2", {"head_dim": 16}),
}


def export(folder: Path, to: Path, out: OutType | None = None, **options: Any) -> GgufFile:
    model = open_folder(folder)
    return write_gguf(model, to, out=out, **options)


def read(path: Path) -> tuple[dict[str, gguf.ReaderTensor], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {tensor.name: tensor for tensor in reader.tensors}, fields


def name_in_gguf(source: str) -> str:
    stem, _, kind = source.rpartition(".")
    for number in range(LAYERS):
        stem = stem.replace(f"model.layers.{number}.", f"blk.{number}.")
    block, name = stem.split(".", 2)[:2] if stem.startswith("blk.") else ("", "")
    part = stem.removeprefix(f"{block}.{name}.") if block else stem
    return f"{f'{block}.{name}.' if block else ''}{NAMES[part]}.{kind}"


def rotated_by_hand(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half comes to 2i, row i of the second to 2i + 1: an index at a time."""
    result, size = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            result[head * size + 2 * i] = rows[head * size + i]
            result[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("piece_bytes", [1, 1024, 2**22])
def test_every_tensor_has_the_bits_of_the_folder(
    name: str, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggufwriter, "PIECE_BYTES", piece_bytes)
    architecture, split, config = MODELS[name]
    tensors = make_model(tmp_path / "model", architecture, split, config=config)
    made = export(tmp_path / "model", tmp_path / "model.gguf")
    found, fields = read(tmp_path / "model.gguf")
    assert set(found) == {name_in_gguf(source) for source in tensors}
    for source, bits in tensors.items():
        tensor = found[name_in_gguf(source)]
        llama = architecture != "Qwen2ForCausalLM" and architecture != "Qwen3ForCausalLM"
        if llama and ("q_proj" in source or "k_proj" in source):
            bits = rotated_by_hand(bits, HEADS if "q_proj" in source else KV_HEADS)
        assert tuple(reversed(tensor.shape.tolist())) == bits.shape
        if bits.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(tensor.data, from_bfloat16(bits))
        else:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
            assert tensor.data.tobytes() == bits.tobytes()
    assert made.tensors == len(tensors)
    assert made.parameters == sum(bits.size for bits in tensors.values())
    assert fields["tokenizer.ggml.pre"] == split


@given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(1, 4))
def test_interleaving_is_the_one_of_every_head(heads: int, half: int, width: int) -> None:
    rows = np.arange(heads * 2 * half * width).reshape(-1, width)
    np.testing.assert_array_equal(interleave_heads(rows, 2 * half), rotated_by_hand(rows, heads))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("out", [None, "BF16", "F16", "F32"])
def test_a_change_of_type_is_one_rounding(dtype: str, out: OutType | None, tmp_path: Path) -> None:
    tensors = make_model(tmp_path / "model", dtype=dtype, parts=1)
    made = export(tmp_path / "model", tmp_path / "model.gguf", out)
    bits = tensors["model.embed_tokens.weight"]
    wide = from_bfloat16(bits) if dtype == "BF16" else bits.astype("<f4")
    expected = {"bf16": to_bfloat16(wide), "f16": wide.astype("<f2"), "f32": wide}[made.out]
    assert read(tmp_path / "model.gguf")[0]["token_embd.weight"].data.tobytes() == expected.tobytes()
    assert made.out == (out or ("BF16" if dtype == "BF16" else "F16")).lower()


def test_the_keys_are_those_of_the_config_and_the_tokenizer(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf")
    _, fields = read(tmp_path / "model.gguf")
    numbers = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.vocab_size": VOCAB,
        "llama.rope.freq_base": 50000.0,
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    assert {name: fields[name] for name in numbers} == numbers
    assert math.isclose(fields["llama.attention.layer_norm_rms_epsilon"], 1e-5, rel_tol=1e-6)
    words = tokenizer_of("smollm")["model"]["vocab"]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[: len(MARKS)] == list(MARKS)
    assert [tokens[number] for number in words.values()] == list(words)
    assert tokens[-1] == f"[PAD{VOCAB - 1}]"
    assert (kinds[0], kinds[3], kinds[-1]) == (3, 1, 5)
    assert fields["tokenizer.ggml.merges"] == ["h e", "Ġ he"]
    assert "im_start" in fields["tokenizer.chat_template"]
    assert "rankup.manifest" not in fields


def test_a_pulled_version_says_which_one_it_is(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    manifest = pull_model(tmp_path / "model")
    made = export(tmp_path / "model", tmp_path / "model.gguf")
    assert made.provenance is not None
    _, fields = read(tmp_path / "model.gguf")
    expected = {
        "general.name": "tiny",
        "general.version": "7",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "example/tiny-base",
        "general.dataset.0.name": "pydocs",
        "rankup.model": "tiny",
        "rankup.version": 7,
        "rankup.manifest": made.provenance.digest,
        "rankup.publisher_key": made.provenance.publisher_key,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert manifest.version == 7


def test_llama_3s_stretched_frequencies_are_a_tensor_of_their_own(tmp_path: Path) -> None:
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    make_model(tmp_path / "model", split="llama-bpe", config={"rope_parameters": stretched})
    export(tmp_path / "model", tmp_path / "model.gguf")
    factors = read(tmp_path / "model.gguf")[0]["rope_freqs.weight"].data
    for index, found in enumerate(factors):
        wavelength = 2 * math.pi * 500000.0 ** (2 * index / (HIDDEN // HEADS))
        smooth = (64 / wavelength - 1) / 3
        expected = 1 if wavelength < 16 else 8 if wavelength > 64 else 1 / ((1 - smooth) / 8 + smooth)
        assert math.isclose(found, expected, rel_tol=1e-5)


def test_a_known_vocabulary_keeps_its_name_where_the_tokenizer_file_has_lost_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", split="gpt-2")
    table = tokenizer_of("gpt-2")["model"]["vocab"]
    monkeypatch.setattr(ggufvocab, "KNOWN_VOCABULARIES", {ggufvocab.vocabulary_digest(table): "smollm"})
    export(tmp_path / "model", tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[1]["tokenizer.ggml.pre"] == "smollm"


def test_a_vocabulary_of_single_bytes_gets_a_merge_that_changes_nothing(tmp_path: Path) -> None:
    make_model(tmp_path / "model", split="gpt-2")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    export(tmp_path / "model", tmp_path / "model.gguf")
    _, fields = read(tmp_path / "model.gguf")
    [merge] = fields["tokenizer.ggml.merges"]
    assert merge.replace(" ", "") not in fields["tokenizer.ggml.tokens"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("config.json", lambda content: content.update(changes))


def model(**changes: Any) -> Callable[[Path], None]:
    return edit("tokenizer.json", lambda content: content["model"].update(changes))


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    return edit("tokenizer.json", lambda content: content.update(changes))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def fill(name: str, data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


def truncate(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def too_long(folder: Path) -> None:
    os.truncate(folder / "config.json", 2**20 + 1)


INDEX = "model.safetensors.index.json"
REFUSED: Mapping[str, tuple[Callable[[Path], None], type[RankupError], str]] = {
    "another architecture": (config(architectures=["PhiForCausalLM"]), InputError, "--converter"),
    "no architecture": (config(architectures=None), InputError, "--converter"),
    "a sliding window": (config(architectures=["MistralForCausalLM"], sliding_window=64), InputError, "--converter"),
    "another activation": (config(hidden_act="gelu"), InputError, "hidden_act"),
    "a quantised model": (config(quantization_config={"bits": 4}), InputError, "quantization_config"),
    "unknown rotary embeddings": (config(rope_parameters={"rope_type": "yarn"}), InputError, "'yarn'"),
    "a rotary factor that is no number": (
        config(rope_parameters={"rope_type": "linear", "factor": "2"}),
        InputError,
        "'2' is not a positive number",
    ),
    "a negative width": (config(hidden_size=-1), InputError, "hidden_size"),
    "heads that do not divide": (config(num_key_value_heads=3), InputError, "do not divide"),
    "a shape that is not the config's": (config(intermediate_size=WIDE + 1), InputError, "mlp.gate_proj"),
    "a missing layer": (config(num_hidden_layers=LAYERS + 1), InputError, "is missing"),
    "a layer too many": (config(num_hidden_layers=LAYERS - 1), InputError, "belongs to no LlamaForCausalLM"),
    "an untied head that is not there": (config(tie_word_embeddings=False), InputError, "lm_head.weight"),
    "a config that is no JSON": (fill("config.json", b"{"), InputError, "JSON"),
    "a config that is a list": (fill("config.json", b"[]"), InputError, "not a JSON object"),
    "a config that nests too deep": (fill("config.json", b"[" * 100_000), InputError, "JSON"),
    "a config of more than a megabyte": (too_long, TooLargeError, "the limit"),
    "no config": (drop("config.json"), InputError, "no config.json"),
    "no weights": (drop(INDEX), InputError, "neither"),
    "a missing part": (drop("model-00002-of-00002.safetensors"), NotFoundError, "00002-of-00002"),
    "a truncated part": (truncate, IntegrityError, "bytes"),
    "an index that leaves the folder": (
        edit(INDEX, lambda content: content["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
        InputError,
        "no safetensors file of this folder",
    ),
    "an index that lies": (
        edit(INDEX, lambda content: content["weight_map"].pop("model.norm.weight")),
        IntegrityError,
        "does not lie where",
    ),
    "no tokenizer": (drop("tokenizer.json"), InputError, "no tokenizer.json"),
    "a SentencePiece tokenizer": (model(byte_fallback=True), InputError, "--converter"),
    "a word-piece tokenizer": (model(type="WordPiece"), InputError, "--converter"),
    "an unknown way to split": (tokenizer(pre_tokenizer={"type": "Whitespace"}), InputError, "--converter"),
    "an unknown normaliser": (tokenizer(normalizer={"type": "Lowercase"}), InputError, "--converter"),
    "a prefix space": (
        tokenizer(pre_tokenizer=SPLITS["gpt-2"]["pre_tokenizer"] | {"add_prefix_space": True}),
        InputError,
        "--converter",
    ),
    "whole words that skip the merges": (model(ignore_merges=True), InputError, "--converter"),
    "a token beyond the embedding": (
        edit("tokenizer.json", lambda content: content["model"]["vocab"].update({"late": VOCAB})),
        InputError,
        f"a token {VOCAB}",
    ),
    "one id twice": (
        edit("tokenizer.json", lambda content: content["model"]["vocab"].update({"late": 5})),
        InputError,
        "one id twice",
    ),
    "a merge of three parts": (model(merges=[["a", "b", "c"]]), InputError, "no merge of two parts"),
    "an added token without text": (tokenizer(added_tokens=[{"id": 0}]), InputError, "added tokens"),
    "a model card that is no YAML": (fill("README.md", b"---\na: [\n---\n"), InputError, "metadata"),
    "a model card of more than a megabyte": (fill("README.md", b" " * (2**20 + 1)), TooLargeError, "the limit"),
    "a chat template that is no text": (fill("chat_template.jinja", b"\xff"), InputError, "metadata"),
    "a sampling setting that is no number": (
        fill("generation_config.json", b'{"temperature": "warm"}'),
        InputError,
        "metadata",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_exactly_is_refused_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    spoil, kind, said = REFUSED[case]
    make_model(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(kind) as caught:
        export(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert said in f"{caught.value} {caught.value.remedy}"
    assert not list(tmp_path.glob("out/*"))


def flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json"])
def test_a_pulled_folder_that_was_changed_does_not_become_a_file_of_that_version(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    for file in ("config.json", "tokenizer.json"):
        with (tmp_path / "model" / file).open("a") as out:
            out.write("\n")  # the byte that flips
    pull_model(tmp_path / "model")
    flip(tmp_path / "model", name)
    with pytest.raises(IntegrityError, match="tiny version 7"):
        export(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    opened = open_folder(tmp_path / "model")
    make_model(tmp_path / "model", dtype="F16", parts=2, config={"head_dim": 16})
    with pytest.raises(IntegrityError, match="was replaced"):
        write_gguf(opened, tmp_path / "out" / "model.gguf")
    assert not list(tmp_path.glob("out/*"))


def test_a_version_that_an_earlier_key_signed_is_exported(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    old, new = (parse_private_key(generate_private_key()) for _ in range(2))
    pull_model(tmp_path / "model", old)
    change = make_key_change(old, public_key_hex(new), model="tiny", from_version=8)
    state = read_folder_state(tmp_path / "model")
    assert state is not None
    pinned = {"publisher_key": public_key_hex(new), "keys": (change,)}
    write_folder_state(tmp_path / "model", state.model_copy(update=pinned))
    export(tmp_path / "model", tmp_path / "model.gguf")
    write_folder_state(tmp_path / "model", state.model_copy(update=pinned | {"keys": ()}))
    with pytest.raises(IntegrityError, match="publisher's key"):
        export(tmp_path / "model", tmp_path / "other.gguf")


def test_an_unfinished_pull_is_not_exported(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    pull_model(tmp_path / "model")
    edit(".rankup.json", lambda state: state.update(complete=False))(tmp_path / "model")
    with pytest.raises(StateError, match="not finished"):
        export(tmp_path / "model", tmp_path / "model.gguf")


def test_a_weight_beyond_float16_is_refused_there(tmp_path: Path) -> None:
    make_model(tmp_path / "model", parts=1)
    path = tmp_path / "model" / "model.safetensors"
    with TensorFile.open(path) as file:
        end = file.entries["model.embed_tokens.weight"].stop
    data = bytearray(path.read_bytes())
    data[end - 2 : end] = to_bfloat16(np.array([1e30], dtype=np.float32)).tobytes()
    path.write_bytes(data)
    export(tmp_path / "model", tmp_path / "model.gguf")
    with pytest.raises(InputError, match="float16"):
        export(tmp_path / "model", tmp_path / "half.gguf", "F16")


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    to = tmp_path / "model.gguf"
    to.write_text("mine")
    with pytest.raises(StateError, match="exists already"):
        export(tmp_path / "model", to)
    assert to.read_text() == "mine"
    export(tmp_path / "model", to, force=True)
    assert to.read_bytes()[:4] == b"GGUF"


def test_an_interruption_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    to = tmp_path / "out" / "model.gguf"
    export(tmp_path / "model", to)
    old = to.read_bytes()

    def interrupt(_state: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "model", to, force=True, progress=interrupt)
    assert [path.name for path in to.parent.iterdir()] == ["model.gguf"]
    assert to.read_bytes() == old


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model")
    monkeypatch.setattr(newfile.shutil, "disk_usage", lambda _path: _Usage())
    with pytest.raises(DiskFullError, match="no room"):
        export(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert not list(tmp_path.glob("out/*"))


class _Usage:
    free = 1000


def test_a_folder_that_cannot_be_written_to_is_explained(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot write"):
        export(tmp_path / "model", tmp_path / "file" / "model.gguf")


def test_progress_counts_every_byte_of_the_weights(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    seen: list[tuple[int, int]] = []
    export(
        tmp_path / "model",
        tmp_path / "model.gguf",
        progress=lambda state: seen.append((state.done_bytes, state.total_bytes)),
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
