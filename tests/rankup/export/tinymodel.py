"""Tiny random models as Hugging Face folders, made without torch, and one of them as a version that was pulled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rankup.bfloat16 import to_bfloat16
from rankup.folder import ENVELOPE_NAME, FolderState, write_folder_state
from rankup.records import FileEntry, Group, Manifest, TensorEntry
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex
from rankup.tensorfile import write_tensor_file
from rankup.versions import manifest_digest, seal

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS, VOCAB = 32, 48, 4, 2, 2, 300
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = BYTES | {"use_regex": True}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, dict[str, Any]] = {
    "gpt-2": {"pre_tokenizer": WORDS},
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, WORDS],
        }
    },
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
                BYTES,
            ],
        },
    },
}
SPLITS = {
    **SPLITS,
    "llama-bpe": {
        "ignore_merges": True,
        "pre_tokenizer": json.loads(
            json.dumps(SPLITS["qwen2"]["pre_tokenizer"]).replace(r"\\p{N}| ?", r"\\p{N}{1,3}| ?")
        ),
    },
}
"""Name of the pre-tokenizer in GGUF -> what a tokenizer.json has for it."""


def config_of(architecture: str, **changes: Any) -> dict[str, Any]:
    """A config.json as transformers writes it."""
    return {
        "architectures": [architecture],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
        "tie_word_embeddings": architecture != "Qwen2ForCausalLM",
        "hidden_act": "silu",
        "eos_token_id": 2,
        **changes,
    }


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name of a tensor in transformers -> its shape."""
    head = config.get("head_dim") or HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        for name, rows in {"q": HEADS * head, "k": KV_HEADS * head, "v": KV_HEADS * head}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if config["architectures"] == ["Qwen2ForCausalLM"]:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * head)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, WIDE)
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def tokenizer_of(split: str) -> dict[str, Any]:
    """A tokenizer.json: the byte alphabet, two merges, three marks."""
    alphabet = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    alphabet += [chr(0x100 + code) for code in range(256 - len(alphabet))]
    words = [*alphabet, "he", "Ġhe"]
    differences = dict(SPLITS[split])
    model = {
        "type": "BPE",
        "vocab": {word: number + len(MARKS) for number, word in enumerate(words)},
        "merges": [["h", "e"], ["Ġ", "he"]],
        "byte_fallback": False,
        "ignore_merges": differences.pop("ignore_merges", False),
    }
    added = [{"id": number, "content": mark, "special": True, "normalized": False} for number, mark in enumerate(MARKS)]
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "model": model, **differences}


def make_model(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    split: str = "smollm",
    *,
    dtype: str = "BF16",
    parts: int = 2,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a model's folder; returns its tensors: bfloat16 as uint16 bit patterns."""
    rng = np.random.default_rng(seed)
    settings = config_of(architecture, **(config or {}))
    store = {"BF16": to_bfloat16, "F32": lambda x: x, "F16": lambda x: x.astype("<f2")}[dtype]
    tensors = {name: store(rng.standard_normal(shape).astype("<f4")) for name, shape in shapes_of(settings).items()}
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    table: dict[str, str] = {}
    for number in range(parts):
        mine = names[number::parts]
        file = "model.safetensors" if parts == 1 else f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        write_tensor_file(folder / file, {n: (dtype, tensors[n].shape, tensors[n].tobytes()) for n in mine})
        table |= dict.fromkeys(mine, file)
    if parts > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_of(split)))
    marks = {"bos_token": MARKS[1], "eos_token": MARKS[2], "unk_token": MARKS[0], "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    return tensors


def pull_model(folder: Path, key: Ed25519PrivateKey | None = None) -> Manifest:
    """Turn the folder into one that a pull has finished in: version 7 of the model "tiny"."""
    key = key or parse_private_key(generate_private_key())
    entries, groups, files = {}, [], []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        entry = FileEntry(path=path.name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        if path.suffix != ".safetensors":
            files.append(entry)
            continue
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, place in header.items():
            start, stop = (8 + int.from_bytes(data[:8], "little") + offset for offset in place["data_offsets"])
            digest = hashlib.sha256(data[start:stop]).hexdigest()
            entries[name] = TensorEntry(
                shape=tuple(place["shape"]), export_dtype=place["dtype"], master=digest, export=digest
            )
        groups.append(Group(tensors=tuple(sorted(header)), master=entry.model_copy(), export=entry))
    manifest = Manifest(
        model="tiny",
        version=7,
        parent="0" * 64,
        round_id=None,
        recipe=None,
        tensors=entries,
        groups=tuple(groups),
        files=tuple(files),
        base_model="example/tiny-base",
        licence="apache-2.0",
        datasets=("pydocs",),
        created_at=1.0,
    )
    (folder / ENVELOPE_NAME).write_bytes(seal(manifest, key))
    state = FolderState(
        model="tiny",
        publisher_key=public_key_hex(key),
        version=7,
        manifest=manifest_digest(manifest),
        files=manifest.export_files(),
        complete=True,
    )
    write_folder_state(folder, state)
    return manifest
