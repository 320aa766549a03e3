"""Preferences are learned against the base, whatever is trained and however often the training is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import losses, make_job, train
from tiny_model import write_rows
from zoo import save_model, targets_of

from rankup.errors import InputError
from rankup.recipe import Recipe
from worker.job import Finished, Job
from worker.preference import comparable_pieces, first_values
from worker.surgery import adapt

PAIRS = [{"prompt": f"Is {n} a number?", "chosen": " yes", "rejected": " no way"} for n in range(10)]
LABELLED = [
    {"prompt": f"Is {n} a number?", "completion": " yes" if n % 2 else " no way", "label": bool(n % 2)}
    for n in range(10)
]
SPOKEN = [
    {
        "prompt": [{"role": "user", "content": f"Is {n} a number?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no way"}],
    }
    for n in range(4)
]
EVERYWHERE = Recipe(
    rank=2,
    steps=6,
    learning_rate=1e-2,
    batch_size=4,
    max_tokens=48,
    warmup_steps=0,
    target_modules=("q_proj", "down_proj", "embed_tokens", "lm_head"),
    train_vectors=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama with biases", tmp_path_factory.mktemp("base"))


def job_of(to: Path, folder: Path, rows: list[dict[str, Any]], recipe: Recipe) -> Job:
    to.mkdir(parents=True)
    files = (write_rows(to / "rows.jsonl", rows),)
    return make_job(to, (folder, targets_of(folder, recipe)), recipe=recipe, shard_files=files)


@pytest.mark.parametrize("model", ["llama with biases", "llama, tied", "gpt2", "qwen3-moe"])
def test_at_its_first_values_a_trained_model_is_the_base(model: str, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    base_folder = save_model(model, tmp_path)
    experts = ("mlp.experts.gate_up_proj",) if model == "qwen3-moe" else ()
    heads = ("embed_tokens", "lm_head") if model == "llama with biases" else ("embed_tokens",)
    modules = {"gpt2": ("c_attn", "wte")}.get(model, ("q_proj", *heads))
    recipe = EVERYWHERE.model_copy(update={"target_modules": modules, "target_parameters": experts})
    job = job_of(tmp_path / "job", base_folder, PAIRS, recipe)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    tokens = {"input_ids": torch.arange(1, 25).reshape(2, 12)}
    with torch.no_grad():
        before = base(**tokens).logits
        trained = adapt(torch, transformers, peft, base, job).model.eval()
        start = first_values(torch, trained)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        held = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        copies = [parameter.clone() for parameter in held]
        assert not torch.allclose(trained(**tokens).logits, before, atol=1e-2)
        torch.testing.assert_close(
            torch.func.functional_call(trained, start, (), tokens).logits, before, rtol=0, atol=1e-5
        )
    assert all(torch.equal(parameter, copy) for parameter, copy in zip(held, copies, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rows", "first", "tokens"),
    # Two epochs over answers " yes</s>" and " no way</s>".
    [("dpo", PAIRS, 0.6931, 2 * 10 * (5 + 8)), ("kto", LABELLED, 0.5, 10 * (5 + 8))],
)
def test_an_interrupted_training_on_preferences_follows_the_same_curve(
    folder: Path, tmp_path: Path, method: str, rows: list[dict[str, Any]], first: float, tokens: int
) -> None:
    recipe = EVERYWHERE.model_copy(update={"method": method})
    at_one_go = train(job_of(tmp_path / "one", folder, rows, recipe))
    curve = losses(at_one_go)
    # Nothing has been learned at first, so that chosen and rejected stand as in the base.
    assert curve[0][1] == pytest.approx(first, abs=1e-3)
    assert curve[-1][1] < first - 0.05
    job = job_of(tmp_path / "many", folder, rows, recipe)
    parts = [train(job, 1), train(job, 4), train(job)]
    assert [entry for part in parts for entry in losses(part)] == curve
    assert isinstance(at_one_go[-1], Finished)
    assert isinstance(parts[-1][-1], Finished)
    assert parts[-1][-1].sha256 == at_one_go[-1].sha256
    assert parts[-1][-1].tokens == at_one_go[-1].tokens == tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tokens"),
    # "yes</s>" and "no way</s>"; for kto each answer is a row of its own, four of eight in one step
    [("dpo", 4 * (4 + 7)), ("kto", 2 * (4 + 7))],
)
def test_pairs_of_conversations_train_both_methods(folder: Path, tmp_path: Path, method: str, tokens: int) -> None:
    recipe = EVERYWHERE.model_copy(update={"method": method, "steps": 1, "target_modules": ("q_proj",)})
    done = train(job_of(tmp_path / "job", folder, SPOKEN, recipe))[-1]
    assert isinstance(done, Finished)
    assert done.tokens == tokens


@pytest.mark.slow
def test_a_prompt_that_fills_the_limit_leaves_nothing_to_prefer(folder: Path, tmp_path: Path) -> None:
    for method, rows in (("dpo", PAIRS), ("kto", LABELLED)):
        recipe = EVERYWHERE.model_copy(update={"method": method, "max_tokens": 9})
        with pytest.raises(InputError, match="room for an answer within 9 tokens"):
            train(job_of(tmp_path / method, folder, rows, recipe))


@pytest.mark.parametrize(("batch", "wanted", "size"), [(4, 1, 2), (8, 4, 4), (9, 1, 3), (7, 2, 7), (8, 3, 4)])
def test_answers_are_compared_in_pieces_of_two_or_more(batch: int, wanted: int, size: int) -> None:
    assert comparable_pieces(batch, wanted) == size


def test_a_batch_of_one_answer_has_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="batch of one"):
        comparable_pieces(1, 1)
