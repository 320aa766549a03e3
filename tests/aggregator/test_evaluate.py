"""The held-out loss equals a hand-written loop over rows, and tokens are masked as TRL masks them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from aggregator.encoding import encode
from aggregator.evaluate import Loss, answer, heldout_loss
from aggregator.tiny import write_tiny_model
from rankup.errors import InputError

CHAT = {
    "prompt": [{"role": "user", "content": "What does `len` do in Python?"}],
    "completion": [{"role": "assistant", "content": "Return the number of items in a container."}],
}
PLAIN = {"prompt": "The sky is", "completion": " blue."}
TEXT = {"text": "Good small data beats large data."}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Grüezi 你好"}]}
ROWS: list[dict[str, Any]] = [CHAT, PLAIN, TEXT, MESSAGES, {"text": "a" * 100}, {"text": "short"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _by_hand(folder: Path, rows: list[dict[str, Any]], max_tokens: int) -> Loss:
    """One row at a time, no padding, one token at a time, in float64 from the logits on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = tokenizer.eos_token
    total, count, examples = 0.0, 0, 0
    for row in rows:
        if "text" in row:
            ids, start = tokenizer(row["text"] + end)["input_ids"], 1
        elif "messages" in row:
            ids, start = tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"], 1
        elif isinstance(row["prompt"], str):
            ids = tokenizer(row["prompt"] + row["completion"] + end)["input_ids"]
            start = len(tokenizer(row["prompt"])["input_ids"])
        else:
            text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
            opening = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            ids, start = tokenizer(text)["input_ids"], len(tokenizer(opening)["input_ids"])
        ids = ids[:max_tokens]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats = [-float(logs[place - 1, ids[place]]) for place in range(start, len(ids))]
        total, count, examples = total + sum(nats), count + len(nats), examples + bool(nats)
    return Loss(total / count, examples, count)


@pytest.mark.parametrize("max_tokens", [16, 48, 4096])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_equals_a_loop_over_single_rows(folder: Path, max_tokens: int, batch_size: int) -> None:
    measured = heldout_loss(folder, ROWS, max_tokens=max_tokens, batch_size=batch_size)
    expected = _by_hand(folder, ROWS, max_tokens)
    assert (measured.examples, measured.tokens) == (expected.examples, expected.tokens)
    assert measured.loss == pytest.approx(expected.loss, rel=2e-6)


def test_an_untrained_model_is_about_as_good_as_guessing(folder: Path) -> None:
    assert heldout_loss(folder, ROWS, max_tokens=128).loss == pytest.approx(math.log(261), abs=0.4)


def test_the_same_threads_give_the_same_bits_and_the_order_of_rows_does_not_matter(folder: Path) -> None:
    first = heldout_loss(folder, ROWS, max_tokens=64, threads=1)
    assert heldout_loss(folder, ROWS[::-1], max_tokens=64, threads=1) == first


def test_the_number_of_threads_is_put_back(folder: Path) -> None:
    import torch

    before = torch.get_num_threads()
    heldout_loss(folder, [TEXT], max_tokens=64, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("row", [CHAT, PLAIN], ids=["conversation", "plain"])
def test_the_tokens_and_the_mask_are_those_of_trl(folder: Path, tokenizer: Any, row: dict[str, Any]) -> None:
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder / "trl"), max_length=64, completion_only_loss=True, use_cpu=True, bf16=False, report_to=[]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    (ours,) = encode(tokenizer, row, 64)
    assert list(ours.ids) == ids
    assert [label != -100 for label in labels] == list(ours.scored)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "?", "answer": "!"}, "question"),
        ({"prompt": "text", "completion": [{"role": "assistant", "content": "x"}]}, "both"),
        ({"prompt": "no completion"}, "completion"),
    ],
)
def test_a_row_of_another_shape_is_refused_by_name(folder: Path, row: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        heldout_loss(folder, [row], max_tokens=64)


def test_rows_whose_prompt_fills_the_limit_are_left_out_and_none_left_is_an_error(folder: Path) -> None:
    long = {"prompt": "x" * 50, "completion": "y"}
    assert heldout_loss(folder, [long, TEXT], max_tokens=32).examples == 1
    with pytest.raises(InputError, match="none of the 1"):
        heldout_loss(folder, [long], max_tokens=32)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable"):
        heldout_loss(tmp_path, [TEXT], max_tokens=32)


def test_a_greedy_answer_is_text_and_repeats(folder: Path) -> None:
    first = answer(folder, "What does `len` do?", max_new_tokens=8)
    assert isinstance(first, str)
    assert answer(folder, "What does `len` do?", max_new_tokens=8) == first
