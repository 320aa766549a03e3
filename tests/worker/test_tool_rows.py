"""Rows with tools, calls, thoughts and settings: every method learns the tokens that TRL makes of them, the server
measures the same ones, and a chat template without a word for them is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import make_job, train
from tiny_model import save_tiny_llama, write_rows

from aggregator.encoding import encode
from rankup.errors import InputError
from rankup.recipe import Recipe
from rankup.targets import Target, select_targets
from worker.job import Finished
from worker.lesson import dataset_of
from worker.shard import read_rows

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [called]}


ASKED = {"role": "user", "content": "Warm?"}
SAID = {"role": "assistant", "content": "No."}
# What each row has, another one lacks: as columns, every object would get the fields of all.
TALKS: list[dict[str, Any]] = [
    {"messages": [ASKED, call("look", town="Oslo"), SAID], "tools": [tool("look", town={"type": "string"})]},
    {"messages": [ASKED, call("count", of=3, deep=[True]), SAID], "tools": [tool("count", of={"enum": [1, 3]})]},
    {"messages": [ASKED, SAID | {"reasoning_content": "Four is little."}]},
    {"messages": [ASKED, SAID], "chat_template_kwargs": {"enable_thinking": False}},
]
ANSWERS: list[dict[str, Any]] = [
    {
        "prompt": row["messages"][:1],
        "completion": row["messages"][1:2],
        **{name: row[name] for name in row.keys() - {"messages"}},
    }
    for row in TALKS
]
LABELLED = [row | {"label": number % 2 == 0} for number, row in enumerate(ANSWERS)]
PAIRS = [
    {name: value for name, value in row.items() if name != "completion"}
    | {"chosen": row["completion"], "rejected": [call("guess", what="?")]}
    for row in ANSWERS
]
RECIPE = Recipe(rank=2, steps=1, learning_rate=1e-2, batch_size=4, max_tokens=256, warmup_steps=0)

Base = tuple[Path, dict[str, Target]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return folder, select_targets(save_tiny_llama(folder), RECIPE)


@pytest.fixture(scope="module")
def base(plain: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The same model with a chat template that has a place for everything."""
    folder = tmp_path_factory.mktemp("calling")
    for path in plain[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder, plain[1]


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(base[0])
    found.pad_token = found.eos_token
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rows"),
    [("SFT", TALKS), ("SFT", ANSWERS), ("DPO", PAIRS), ("KTO", LABELLED)],
    ids=["messages", "completions", "pairs", "labels"],
)
def test_tokens_are_those_of_the_template_with_each_rows_own_tools(
    base: Base, tokenizer: Any, tmp_path: Path, method: str, rows: list[dict[str, Any]]
) -> None:
    import trl
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if method != "KTO" else {"train_sampling_strategy": "sequential"}
    config = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path), max_length=256, use_cpu=True, bf16=False, report_to=[], **options
    )
    trainer = getattr(trl, f"{method}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(base[0]),
        args=config,
        train_dataset=dataset_of(rows),
        processing_class=tokenizer,
        **({} if method == "SFT" else {"ref_model": AutoModelForCausalLM.from_pretrained(base[0])}),
    )
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(trainer.train_dataset))])
    learned = batch["labels"] != -100 if method == "SFT" else batch["completion_mask"].bool()
    theirs = sorted(
        (ids[mask.bool()].tolist(), marks[mask.bool()].tolist()[1:])
        for ids, mask, marks in zip(batch["input_ids"], batch["attention_mask"], learned, strict=True)
    )
    ours = [example for row in rows for example in encode(tokenizer, row, 256)]
    assert sorted((list(example.ids), list(example.scored)[1:]) for example in ours) == theirs
    texts = [tokenizer.decode(ids) for ids, _ in theirs]
    asked = json.dumps(TALKS[0]["tools"])
    assert sum(asked in text for text in texts) == (2 if method == "DPO" else 1)
    assert any('{"name": "look", "arguments": {"town": "Oslo"}}' in text for text in texts)
    assert any("<think>Four is little.</think>No." in text for text in texts)
    assert not any("null" in text or "None" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rows"), [("sft", TALKS), ("sft", ANSWERS), ("dpo", PAIRS), ("kto", LABELLED), ("kto", PAIRS)]
)
def test_a_volunteer_trains_on_rows_with_tools(base: Base, tmp_path: Path, method: str, rows: list[Any]) -> None:
    recipe = RECIPE.model_copy(update={"method": method})
    done = train(make_job(tmp_path, base, recipe=recipe, shard_files=(write_rows(tmp_path / "rows", rows),)))[-1]
    assert isinstance(done, Finished)
    assert done.tokens > 40


def test_a_template_that_would_leave_tools_out_is_refused(plain: Base, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    job = make_job(tmp_path, plain, recipe=RECIPE, shard_files=(write_rows(tmp_path / "rows", TALKS),))
    missing = "enable_thinking, reasoning_content, tool_calls, tools, which the chat template of the base leaves out"
    with pytest.raises(InputError, match=missing):
        train(job)
    with pytest.raises(InputError, match="tool_calls, tools, which the chat template of the model leaves out"):
        encode(AutoTokenizer.from_pretrained(plain[0]), TALKS[0], 256)


def test_tools_of_several_templates_are_looked_for_in_each(tokenizer: Any) -> None:
    import copy

    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": "{{ messages[0].content }}", "tool_use": TEMPLATE}
    (example,) = encode(several, TALKS[0], 256)
    assert several.decode(example.ids).startswith("<tools>")


@pytest.mark.parametrize(
    ("changes", "method", "says"),
    [
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "sft", "is no setting of a chat template"),
        ({"tools": ["look"]}, "sft", "is not a list of objects"),
        ({}, "distillation", "tool_calls, tools, of which distillation makes no use"),
    ],
)
def test_a_shard_is_not_trusted(tmp_path: Path, changes: dict[str, Any], method: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_rows([write_rows(tmp_path / "rows", [TALKS[0] | changes])], method)
