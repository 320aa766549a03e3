"""Every kind of layer is trained where it stands: base plus delta is the trained model, to the delta's precision."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import write_rows
from zoo import save_model, targets_of

from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.errors import InputError
from rankup.fixedpoint import dequantise
from rankup.recipe import Recipe
from rankup.targets import Target
from worker import trainer
from worker.job import Job, Line
from worker.surgery import Adapted, adapt, initial_a, scaling_of

ROWS = [{"prompt": f"list{n}: ", "completion": "returns a list of the files in the folder"} for n in range(8)]
RECIPE = Recipe(rank=3, alpha=6, steps=4, learning_rate=1e-2, batch_size=2, max_tokens=64, warmup_steps=0)


def job_of(folder: Path, base: Path, recipe: Recipe, targets: dict[str, Target]) -> Job:
    return Job(
        round_id="round-1",
        lease_id="lease-1",
        fence=1,
        model="tiny",
        base_manifest="ab" * 32,
        base_folder=base,
        shard_files=(write_rows(folder / "shard.jsonl", ROWS),),
        delta_file=folder / "finished.delta",
        recipe=recipe,
        seed=11,
        targets=targets,
        device="cpu",
    )


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens() -> Any:
    import torch

    return torch.arange(1, 49).reshape(2, 24) * 5 % 257


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = model.eval()(input_ids=tokens()).logits.double().numpy()
    return found


def loss_in_training(model: Any) -> float:
    """The loss as the trainer takes it, which multiplies with the head's weight itself; without that of a router."""
    import torch

    with torch.no_grad():
        return -float(model.eval()(input_ids=tokens(), labels=tokens(), fused_lm_head=True).log_probs.mean())


def train(job: Job, monkeypatch: pytest.MonkeyPatch) -> Adapted:
    """Run the real trainer in this process; gives the model that it trained."""
    kept: list[Adapted] = []

    def keep(*arguments: Any) -> Adapted:
        kept.append(adapt(*arguments))
        return kept[0]

    monkeypatch.setattr(trainer, "adapt", keep)
    lines: list[Line] = []
    trainer.train(job, lines.append, started=time.perf_counter(), scratch=job.delta_file.parent / "scratch")
    return kept[0]


def deltas_of(job: Job) -> dict[str, np.ndarray]:
    """What the delta file adds to each stored weight, in float64, after the checks of admission."""
    header = DeltaHeader(model="tiny", round_id="round-1", lease_id="lease-1", base_manifest="ab" * 32)
    found = {}
    with DeltaReader.open(job.delta_file) as reader:
        check_structure(reader, targets=job.targets, header=header, mantissa_bits=job.recipe.mantissa_bits)
        for name, target in job.targets.items():
            slices = [dequantise(reader.factors(name, index)) for index in range(reader.slices(name))]
            products = np.stack([b @ a for b, a in slices])
            found[name] = products if target.role == "experts" else products[0]
            if target.role == "vector":
                found[name] = found[name][:, 0]
    return found


def merged(base: Path, deltas: dict[str, np.ndarray]) -> Any:
    import torch

    model = load(base)
    with torch.no_grad():
        for name, delta in deltas.items():
            parameter = model.get_parameter(name)
            parameter.copy_(torch.from_numpy(parameter.double().numpy() + delta))
    return model


CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "linear": ("llama", {}, {"linear"}),
    "linear with rslora and ranks": (
        "llama",
        {"rslora": True, "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 1}},
        {"linear"},
    ),
    "linear in int8": ("llama", {"mantissa_bits": 8}, {"linear"}),
    "conv1d": ("gpt2", {"rank_pattern": {"c_attn": 5}}, {"linear"}),
    "conv1d with everything": (
        "gpt2",
        {"target_modules": ("c_attn", "c_proj", "c_fc", "wte", "wpe"), "train_vectors": True},
        {"linear", "embedding", "vector"},
    ),
    "head": ("llama", {"target_modules": ("lm_head", "q_proj"), "rank_pattern": {"lm_head": 4}}, {"linear", "head"}),
    "head alone": ("llama", {"target_modules": ("lm_head",)}, {"head"}),
    "embedding": ("llama", {"target_modules": ("embed_tokens",)}, {"embedding"}),
    "embedding and head apart": (
        "llama",
        {"target_modules": ("embed_tokens", "lm_head")},
        {"embedding", "head"},
    ),
    "embedding tied to the head": (
        "llama, tied",
        {"target_modules": ("embed_tokens", "o_proj")},
        {"linear", "embedding"},
    ),
    "scaled embedding tied to the head": ("gemma3", {"target_modules": ("embed_tokens",)}, {"embedding"}),
    "vectors": ("llama with biases", {"train_vectors": True}, {"linear", "vector"}),
    "experts": (
        "gpt-oss",
        {"target_parameters": ("experts.gate_up_proj", "experts.down_proj"), "rank_pattern": {"down_proj": 2}},
        {"linear", "experts"},
    ),
    "experts above a dense layer, in int8": (
        "qwen3-moe",
        {"target_parameters": ("gate_up_proj", "down_proj"), "mantissa_bits": 8},
        {"linear", "experts"},
    ),
    "one of two expert weights, and all else": (
        "qwen3-moe",
        {
            "target_modules": ("q_proj", "gate_proj", "lm_head", "embed_tokens"),
            "target_parameters": ("layers.1.mlp.experts.down_proj",),
            "train_vectors": True,
        },
        {"linear", "head", "embedding", "experts", "vector"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_base_plus_delta_is_the_trained_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fields, roles = CASES[case]
    recipe = Recipe.model_validate(RECIPE.model_dump() | fields)
    base = save_model(model, tmp_path / "base")
    job = job_of(tmp_path, base, recipe, targets_of(base, recipe))
    assert {target.role for target in job.targets.values()} == roles
    trained = train(job, monkeypatch).base
    deltas = deltas_of(job)
    assert not [name for name, delta in deltas.items() if not delta.any()]
    whole = merged(base, deltas)
    before, reached, after = logits(load(base)), logits(trained), logits(whole)
    moved = np.abs(reached - before).max()
    # int16 factors are within about 1e-4 of what was trained, int8 ones within about 2e-2.
    near = moved * (1e-3 if recipe.mantissa_bits == 16 else 5e-2)
    assert moved > 1e-2
    assert np.abs(after - reached).max() < near
    plain = float(whole(input_ids=tokens(), labels=tokens()).loss.detach())
    assert loss_in_training(trained) == pytest.approx(plain, abs=near)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["conv1d with everything", "embedding tied to the head", "one of two expert weights, and all else"]
)
def test_a_base_in_bfloat16_is_trained_with_float32_factors_and_checkpointing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import trl

    model, fields, _ = CASES[case]
    recipe = Recipe.model_validate(RECIPE.model_dump() | fields)
    base = save_model(model, tmp_path / "base")
    job = job_of(tmp_path, base, recipe, targets_of(base, recipe)).model_copy(update={"precision": "bfloat16"})
    config = trl.SFTConfig
    monkeypatch.setattr(trl, "SFTConfig", lambda **fields: config(**fields | {"gradient_checkpointing": True}))
    trained = train(job, monkeypatch).base
    assert {parameter.dtype for parameter in trained.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reached = logits(trained)
    deltas = deltas_of(job)
    assert not [name for name, delta in deltas.items() if not delta.any()]
    moved = np.abs(reached - logits(load(base))).max()
    assert np.abs(logits(merged(base, deltas)) - reached).max() < 0.1 * moved


# -- one step, by hand -------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ("q_proj", "down_proj", "embed_tokens", "lm_head")},
    "llama, tied": {"target_modules": ("q_proj", "down_proj", "embed_tokens")},
    "llama with biases": {},
    "gpt2": {"target_modules": ("c_attn", "c_proj", "c_fc", "wte", "wpe")},
    "gemma3": {"target_modules": ("q_proj", "embed_tokens")},
    "gpt-oss": {"target_parameters": ("gate_up_proj", "down_proj")},
    "qwen3-moe": {"target_parameters": ("gate_up_proj", "down_proj")},
}
ETA = 0.25


def adapted(base: Any, job: Job) -> Adapted:
    import peft
    import torch
    import transformers

    return adapt(torch, transformers, peft, base, job)


@pytest.mark.slow
@pytest.mark.parametrize("model", EVERYTHING)
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha over r", "rslora"])
def test_a_first_step_moves_every_weight_by_its_own_gradient_through_its_factor(
    model: str, rslora: bool, tmp_path: Path
) -> None:
    """With W += B A, one factor F fixed and the other zero, a step of gradient descent with rate eta gives
    W -= eta G (s A)^T (s A), or W -= eta (s B) (s B)^T G, with G the gradient of the weight itself."""
    import torch

    recipe = Recipe.model_validate(RECIPE.model_dump() | {"train_vectors": True, "rslora": rslora} | EVERYTHING[model])
    folder = save_model(model, tmp_path / "base")
    job = job_of(tmp_path, folder, recipe, targets_of(folder, recipe))
    plain = load(folder)
    plain(input_ids=tokens(), labels=tokens()).loss.backward()
    base = load(folder)
    surgery = adapted(base, job)
    first = {name: [(b.copy(), a.copy()) for b, a in pairs()] for name, pairs in surgery.trained.items()}
    assert surgery.trained.keys() == job.targets.keys()
    trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
    base(input_ids=tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD(trainable, lr=ETA).step()
    for name, target in job.targets.items():
        scaling = recipe.alpha / (target.rank**0.5 if rslora else target.rank)
        gradients = plain.get_parameter(name).grad.double().numpy()
        gradients = gradients.reshape(target.slices, target.d_out, target.d_in)
        for gradient, (b0, a0), (b, a) in zip(gradients, first[name], surgery.trained[name](), strict=True):
            assert not (b0 @ a0).any()
            if target.role == "vector":
                expected = -ETA * gradient
            elif b0.any():
                expected = -ETA * b0 @ b0.T @ gradient
            else:
                expected = -ETA * scaling**2 * gradient @ a0.T @ a0
            assert np.abs(b @ a - expected).max() <= 1e-3 * np.abs(expected).max() + 1e-7, name


@pytest.mark.slow
def test_fresh_factors_change_nothing_and_follow_from_seed_and_name(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(RECIPE.model_dump() | {"target_modules": ("q_proj", "lm_head", "embed_tokens")})
    folder = save_model("llama", tmp_path / "base")
    job = job_of(tmp_path, folder, recipe, targets_of(folder, recipe))
    surgery = adapted(load(folder), job)
    assert np.array_equal(logits(surgery.base), logits(load(folder)))
    for name, pairs in surgery.trained.items():
        ((b, a),) = pairs()
        assert not b.any()
        assert np.array_equal(a, initial_a(job.seed, name, 3, job.targets[name].d_in))


# -- what does not fit -------------------------------------------------------------------------------------------------

NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("model.layers.7.self_attn.q_proj.weight", Target(d_out=32, d_in=32), "no weight model.layers.7"),
        ("weight", Target(d_out=32, d_in=32), "no weight weight"),
        ("model.layers.0.self_attn.q_proj", Target(d_out=32, d_in=32), "no weight"),
        (Q, Target(d_out=33, d_in=32), r"the round says \(33, 32\)"),
        (Q, Target(role="embedding", d_out=32, d_in=32), "role 'embedding'"),
        (Q, Target(role="head", d_out=32, d_in=32), "role 'head'"),
        (Q, Target(role="vector", d_out=32, d_in=1), r"the round says \(32,\)"),
        (Q, Target(role="experts", d_out=32, d_in=32), "role 'experts'"),
        (Q, Target(role="experts", d_out=32, d_in=32, slices=2), r"the round says \(2, 32, 32\)"),
        ("lm_head.weight", Target(role="linear", d_out=257, d_in=32), "role 'linear'"),
        (NORM, Target(role="linear", d_out=32, d_in=1), "role 'linear'"),
        (NORM, Target(role="vector", d_out=31, d_in=1), r"is \(32,\), the round says \(31,\)"),
    ],
)
def test_a_target_that_the_base_does_not_have_is_refused(name: str, target: Target, says: str, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "base")
    with pytest.raises(InputError, match=says):
        adapted(load(folder), job_of(tmp_path, folder, RECIPE, {name: target}))


# -- without torch -----------------------------------------------------------------------------------------------------


def test_a_starts_from_seed_and_name_alone_and_never_changes() -> None:
    a = initial_a(1, "layer.weight", 2, 3)
    assert a.dtype == np.float32
    assert np.abs(a).max() <= 3**-0.5
    assert not np.array_equal(a, initial_a(2, "layer.weight", 2, 3))
    assert not np.array_equal(a, initial_a(1, "other.weight", 2, 3))
    digest = hashlib.sha256(initial_a(7, "layer.weight", 8, 16).tobytes()).hexdigest()
    assert digest[:16] == "df2a44b617fb8fae"


def test_scaling_follows_the_rank_of_the_target() -> None:
    assert scaling_of(Recipe(rank=1, alpha=32), 16) == 2.0
    assert scaling_of(Recipe(rank=1, alpha=32, rslora=True), 16) == 8.0
