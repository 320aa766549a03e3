"""A training on images that stops and goes on, without a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import losses, make_job, train
from tiny_model import write_rows
from tiny_vision import colour_rows, save_tiny_vision

from aggregator.skeleton import Skeleton
from rankup.errors import InputError
from rankup.recipe import Recipe
from rankup.targets import select_targets, target_of
from worker.job import Finished

RECIPE = Recipe(rank=2, steps=5, learning_rate=1e-2, batch_size=4, max_tokens=24, warmup_steps=1)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("vision")
    save_tiny_vision(folder / "base")
    # No file is read for this: the names of a model's weights follow from its config.
    weights = Skeleton.of(folder / "base").parameters
    targets = {name: target_of(weight.role, weight.shape) for name, weight in weights.items()}
    return {
        "base_folder": folder / "base",
        "targets": select_targets(targets, RECIPE),
        "recipe": RECIPE,
        "shard_files": (write_rows(folder / "shard.jsonl", colour_rows(10)),),
    }


@pytest.mark.slow
def test_a_training_on_images_that_stopped_gives_the_same_curve_and_the_same_bits(
    given: dict[str, Any], tmp_path: Path
) -> None:
    base = (given["base_folder"], given["targets"])
    at_one_go = train(make_job(tmp_path / "one", base, **given))
    job = make_job(tmp_path / "many", base, **given)
    parts = [train(job, 2), train(job)]
    assert [entry for part in parts for entry in losses(part)] == losses(at_one_go)
    last, whole = parts[-1][-1], at_one_go[-1]
    assert isinstance(last, Finished)
    assert isinstance(whole, Finished)
    assert (last.sha256, last.tokens) == (whole.sha256, whole.tokens)


def test_only_the_assistants_words_are_learned_only_where_they_are_marked(
    given: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"images": r["images"], "messages": r["prompt"] + r["completion"]} for r in colour_rows(4)]
    changes = given | {
        "shard_files": (write_rows(tmp_path / "talk.jsonl", rows),),
        "recipe": RECIPE.model_copy(update={"assistant_only": True, "steps": 1}),
    }
    base = (given["base_folder"], given["targets"])
    with pytest.raises(InputError, match="does not mark the assistant's words"):
        train(make_job(tmp_path / "unmarked", base, **changes))
    marked = tmp_path / "base"
    marked.mkdir()
    for path in given["base_folder"].iterdir():
        (marked / path.name).write_bytes(path.read_bytes())
    template = (marked / "chat_template.jinja").read_text()
    part, end = "{{ '<image>' if part['type'] == 'image' else part['text'] }}", "{{ '<|end|>' }}"
    assert part in template
    assert end in template
    answer = "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}{% endgeneration %}{% else %}"
    (marked / "chat_template.jinja").write_text(template.replace(part, answer + part + "{% endif %}"))
    finished = train(make_job(tmp_path / "marked", (marked, given["targets"]), **changes | {"base_folder": marked}))[-1]
    assert isinstance(finished, Finished)
    assert finished.tokens == sum(len(r["completion"][0]["content"][0]["text"]) for r in colour_rows(4))
