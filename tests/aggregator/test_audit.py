"""Audits fall where the secret says, as often as they should, and agree on products, not on bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.audit import MIN_AGREEMENT, agreement, chosen, judge, probability
from aggregator.tiny import write_tiny_model
from rankup.delta import DeltaReader
from rankup.errors import InputError
from rankup.fixedpoint import Factors, dequantise, quantise
from rankup.recipe import Recipe
from rankup.targets import Target

SECRET = b"only the coordinator knows"


def digest(number: int) -> str:
    return f"{number:064x}"


@pytest.mark.parametrize(("valid", "expected"), [(0, 1.0), (1, 1.0), (2, 0.5), (3, 1 / 3), (100, 0.01)])
def test_trust_makes_audits_rare(valid: int, expected: float) -> None:
    assert probability(valid) == expected


@pytest.mark.parametrize("valid", [1, 2, 5, 20])
def test_as_many_are_chosen_as_the_probability_says(valid: int) -> None:
    count = 4000
    found = sum(chosen(SECRET, digest(number), valid) for number in range(count))
    expected = probability(valid)
    # Five standard deviations of a binomial count; the digests are fixed, so this passes always or never.
    assert abs(found - expected * count) <= 5 * (count * expected * (1 - expected)) ** 0.5


@given(st.binary(min_size=1), st.integers(0, 2**256 - 1), st.integers(0, 50))
def test_a_retry_decides_the_same_and_more_trust_never_adds_an_audit(secret: bytes, number: int, valid: int) -> None:
    assert chosen(secret, digest(number), valid) == chosen(secret, digest(number), valid)
    assert chosen(secret, digest(number), valid) >= chosen(secret, digest(number), valid + 1)


def test_another_secret_chooses_others() -> None:
    ours = [chosen(SECRET, digest(number), 2) for number in range(200)]
    theirs = [chosen(b"a guess", digest(number), 2) for number in range(200)]
    assert 60 < sum(a == b for a, b in zip(ours, theirs, strict=True)) < 140


def test_an_empty_secret_is_refused() -> None:
    with pytest.raises(InputError):
        chosen(b"", digest(1), 1)


def delta(seed: int, rank: int = 3) -> dict[str, tuple[Factors, ...]]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (8, 6), "up": (5, 8)}
    return {
        name: (quantise(rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in))),)
        for name, (d_out, d_in) in shapes.items()
    }


def cosine(left: Mapping[str, Sequence[Factors]], right: Mapping[str, Sequence[Factors]]) -> float:
    return agreement(lambda name: left.get(name, ()), lambda name: right.get(name, ()), ["q", "up"])


def test_agreement_is_the_cosine_of_the_dense_deltas() -> None:
    def flat(factors: Mapping[str, Sequence[Factors]]) -> np.ndarray:
        return np.concatenate([np.matmul(*dequantise(parts[0])).ravel() for parts in factors.values()])

    left, right = delta(0), delta(1)
    x, y = flat(left), flat(right)
    assert cosine(left, right) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)


def test_other_factors_of_the_same_product_agree_and_the_opposite_disagrees() -> None:
    turned, opposite = {}, {}
    for name, (factors,) in delta(0).items():
        b, a = dequantise(factors)
        turn = np.random.default_rng(3).standard_normal((3, 3))
        turned[name] = (quantise(b @ turn, np.linalg.inv(turn) @ a),)
        opposite[name] = (quantise(-b, a),)
    assert cosine(delta(0), turned) > 0.9999
    assert cosine(delta(0), opposite) < -0.9999


def test_a_delta_without_a_weight_agrees_less() -> None:
    whole = delta(0)
    assert 0.1 < cosine(whole, {"q": whole["q"]}) < 0.95
    assert cosine(whole, {}) == 0.0


def test_the_limit_itself_is_good_enough() -> None:
    assert judge(MIN_AGREEMENT).passed
    check = judge(MIN_AGREEMENT - 1e-6)
    assert (check.name, check.passed, check.value) == ("audit", False, MIN_AGREEMENT - 1e-6)
    assert str(MIN_AGREEMENT) in check.detail


# -- training again ----------------------------------------------------------------------------------------------------

ROWS = [{"text": f"{n} plus {m} is {n + m}, and {n} times {m} is {n * m}."} for n in range(2, 12) for m in range(2, 12)]
RECIPE = Recipe(rank=8, steps=12, learning_rate=5e-3, batch_size=4, max_tokens=48)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder)
    return folder


def targets_of(base: Path) -> dict[str, Target]:
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if ".layers." in name}  # noqa: SIM118
    return {name: Target(d_out=shape[0], d_in=shape[1]) for name, shape in shapes.items() if len(shape) == 2}


def train(folder: Path, base: Path, **more: Any) -> Path:
    """One run of the real trainer, in this process."""
    from worker.job import Job
    from worker.trainer import train as train_job

    folder.mkdir()
    shard = folder / "shard.jsonl"
    shard.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields: dict[str, Any] = {
        "round_id": "round-1",
        "lease_id": "lease-1",
        "fence": 1,
        "model": "tiny",
        "base_manifest": "ab" * 32,
        "base_folder": base,
        "shard_files": (shard,),
        "delta_file": folder / "trained.delta",
        "recipe": RECIPE,
        "seed": 7,
        "targets": targets_of(base),
        "device": "cpu",
    }
    job = Job(**fields | more)
    train_job(job, lambda line: None, started=0.0, scratch=folder / "scratch")
    return job.delta_file


@pytest.mark.slow
def test_an_honest_repetition_agrees_and_lazy_or_invented_work_does_not(tmp_path: Path, base: Path) -> None:
    half = RECIPE.model_copy(update={"steps": RECIPE.steps // 2})
    original = train(tmp_path / "original", base)
    others = {
        "the same again": train(tmp_path / "again", base),
        "half of the steps": train(tmp_path / "half", base, recipe=half),
        "another seed": train(tmp_path / "seed", base, seed=8),
    }

    def compare(other: Path) -> float:
        with DeltaReader.open(original) as left, DeltaReader.open(other) as right:
            return agreement(lambda name: [left.factors(name)], lambda name: [right.factors(name)], left.names)

    found = {name: compare(other) for name, other in others.items()}
    assert found.pop("the same again") > 0.9999
    assert not any(judge(value).passed for value in found.values()), found
