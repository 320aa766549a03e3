"""Training beside a base in 4 bits, on a processor, which bitsandbytes computes as a card would."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import write_rows
from zoo import save_model, targets_of

from rankup.delta import DeltaReader
from rankup.errors import InputError
from rankup.fixedpoint import dequantise
from rankup.recipe import Precision, Recipe
from worker import surgery, trainer
from worker.job import Finished, Job, Line, Ready
from worker.surgery import Adapted

ROWS = [{"text": f"the {n}th list of files, sorted by name"[: 20 + n]} for n in range(8)]
RECIPE = Recipe(rank=2, steps=6, learning_rate=2e-3, batch_size=4, max_tokens=48, warmup_steps=2)
MODELS = {"llama": {}, "gpt2": {"target_modules": ("c_attn", "c_proj", "c_fc")}}
"""Linear layers, and Conv1D layers, which store their weight the other way round."""


def job_of(folder: Path, model: str, precision: Precision) -> Job:
    base = folder / "base"
    if not base.exists():
        save_model(model, base)
    recipe = Recipe.model_validate(RECIPE.model_dump() | MODELS[model])
    place = folder / precision
    place.mkdir()
    return Job(
        round_id="round-1",
        lease_id="lease-1",
        fence=1,
        model="tiny",
        base_manifest="ab" * 32,
        base_folder=base,
        shard_files=(write_rows(place / "shard.jsonl", ROWS),),
        delta_file=place / "finished.delta",
        recipe=recipe,
        seed=5,
        targets=targets_of(base, recipe),
        device="cpu",
        precision=precision,
    )


def train(job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Line], Adapted]:
    kept: list[Adapted] = []

    def adapt(*arguments: Any) -> Adapted:
        kept.append(surgery.adapt(*arguments))
        return kept[0]

    lines: list[Line] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "adapt", adapt)
        trainer.train(job, lines.append, started=time.perf_counter(), scratch=job.delta_file.parent / "scratch")
    return lines, kept[0]


def products_of(job: Job) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    with DeltaReader.open(job.delta_file) as reader:
        return {name: np.matmul(*dequantise(reader.factors(name))) for name in job.targets}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_factors_in_float32_are_trained_beside_four_bits_and_are_those_of_the_stored_weights(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    job = job_of(tmp_path, model, "nf4")
    lines, adapted = train(job, monkeypatch)
    ready, finished = lines[0], lines[-1]
    assert isinstance(ready, Ready)
    assert isinstance(finished, Finished)
    assert (ready.precision, finished.precision, finished.device) == ("nf4", "nf4", "cpu")
    assert {p.dtype for p in adapted.base.parameters() if p.requires_grad} == {torch.float32}
    packed = {name for name, p in adapted.base.named_parameters() if p.dtype is torch.uint8}
    assert {name.replace(".base_layer", "") for name in packed} == set(job.targets)
    products = products_of(job)
    for name, product in products.items():
        change = adapted.base.get_submodule(name.removesuffix(".weight")).get_delta_weight("default")
        stored = (change.T if model == "gpt2" else change).detach().double().numpy()
        assert product.shape == job.targets[name].shape
        assert np.linalg.norm(product - stored) < 1e-3 * np.linalg.norm(stored), name


@pytest.mark.slow
def test_a_delta_of_four_bits_points_where_that_of_the_full_base_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job_of(tmp_path, "llama", precision) for precision in ("float32", "bfloat16", "nf4")]
    for job in jobs:
        train(job, monkeypatch)
    full, half, four = (np.concatenate([p.ravel() for p in products_of(job).values()]) for job in jobs)

    def cosine(one: Any, other: Any) -> float:
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    assert cosine(full, half) > 0.999
    # Random weights lose more in 4 bits than trained ones.
    assert 0.5 < cosine(full, four) < 0.99


def test_a_weight_of_another_shape_is_refused_in_four_bits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, "gpt2", "nf4")
    name = "transformer.h.0.mlp.c_fc.weight"
    turned = job.targets[name].model_copy(update={"d_out": job.targets[name].d_in, "d_in": job.targets[name].d_out})
    with pytest.raises(InputError, match="the round says"):
        train(job.model_copy(update={"targets": job.targets | {name: turned}}), monkeypatch)
