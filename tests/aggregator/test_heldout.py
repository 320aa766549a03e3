"""Held-out losses of preferences: a float64 loop over single answers, slopes, and the tokens of TRL's trainers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_losses import llama, random_delta

from aggregator.descent import heldout_descents
from aggregator.encoding import Example, encode
from aggregator.evaluate import Loss, heldout_loss
from aggregator.heldout import BETA, Heldout, first_rows, read_heldout
from aggregator.losses import heldout_losses
from aggregator.tiny import _byte_tokenizer
from rankup.errors import InputError
from rankup.fixedpoint import dequantise, quantise

PAIRS: list[dict[str, Any]] = [
    {"prompt": "Is it blue?", "chosen": " Yes.", "rejected": " Not at all."},
    {"prompt": "And then?", "chosen": " It rained for a while.", "rejected": " No"},
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello! How are you?"}],
        "rejected": [{"role": "assistant", "content": "Go"}],
    },
]
LABELLED: list[dict[str, Any]] = [
    {"prompt": "Is it blue?", "completion": " Yes.", "label": True},
    {"prompt": "Is it red?", "completion": " Not at all, no.", "label": False},
    {"prompt": "And then?", "completion": " It rained.", "label": True},
    {"prompt": "And then?", "completion": " Who cares", "label": False},
    {"prompt": "Why?", "completion": " Because.", "label": True},
]
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}<u>{{ m['content'] }}{% endif %}{% endfor %}"
)
TALK = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Well, well."},
    ]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = _byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = llama(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def log_probs_by_hand(folder: Path, tokenizer: Any, prompt: Any, answer: Any, max_tokens: int) -> tuple[float, int]:
    """ln p of one answer and its tokens, one token at a time, in float64 from the logits on."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if isinstance(prompt, str):
        opening, whole = prompt, prompt + answer + tokenizer.eos_token
    else:
        opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
    start, ids = len(tokenizer(opening)["input_ids"]), tokenizer(whole)["input_ids"][:max_tokens]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids))), len(ids) - start


@pytest.mark.parametrize("max_tokens", [24, 256])
def test_the_loss_of_pairs_is_that_of_a_choice_between_their_answers(
    folder: Path, tokenizer: Any, max_tokens: int
) -> None:
    losses, tokens = [], 0
    for row in PAIRS:
        chosen, rejected = (
            log_probs_by_hand(folder, tokenizer, row["prompt"], row[answer], max_tokens)
            for answer in ("chosen", "rejected")
        )
        if min(chosen[1], rejected[1]) > 0:
            losses.append(math.log1p(math.exp(-BETA * (chosen[0] - rejected[0]))))
            tokens += chosen[1] + rejected[1]
    expected = Loss(sum(losses) / len(losses), len(losses), tokens)
    measured = heldout_loss(folder, PAIRS, max_tokens=max_tokens, batch_size=3)
    assert (measured.examples, measured.tokens) == (expected.examples, expected.tokens)
    assert measured.loss == pytest.approx(expected.loss, rel=1e-5)
    assert heldout_loss(folder, PAIRS[::-1], max_tokens=max_tokens).loss == pytest.approx(expected.loss, rel=1e-5)


def test_the_loss_of_labelled_answers_compares_every_good_one_with_every_bad_one(folder: Path, tokenizer: Any) -> None:
    means: dict[bool, list[float]] = {True: [], False: []}
    for row in LABELLED:
        nats, tokens = log_probs_by_hand(folder, tokenizer, row["prompt"], row["completion"], 64)
        means[row["label"]].append(nats / tokens)
    each = [math.log1p(math.exp(bad - good)) for good in means[True] for bad in means[False]]
    measured = heldout_loss(folder, LABELLED, max_tokens=64, batch_size=2)
    assert measured.loss == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert measured.examples == 5


def test_a_model_that_cannot_tell_answers_apart_has_the_loss_ln_2_and_a_clear_choice_none() -> None:
    import torch

    pair = tuple(Example((0,) * 4, (False, True, True, True), 0, good) for good in (True, False))
    for kind in ("pairs", "labels"):
        heldout = Heldout(pair, 1, kind)
        assert float(heldout.loss(torch.tensor([-5.0, -5.0]).double())) == pytest.approx(math.log(2))
        assert float(heldout.loss(torch.tensor([0.0, -900.0]).double())) < 1e-6
        assert float(heldout.loss(torch.tensor([-900.0, 0.0]).double())) > 50


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labels"])
def test_screening_measures_slopes_and_losses_of_preferences(folder: Path, rows: list[dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    delta = random_delta(AutoModelForCausalLM.from_pretrained(folder), 3)
    names, step = sorted(delta), 2.0**-7

    def along(by: float) -> Any:
        return lambda name: [quantise(by * b, a) for b, a in map(dequantise, delta[name])]

    limits: dict[str, Any] = {"max_tokens": 64, "max_rows": 100, "threads": 1}
    base, (ahead, behind) = heldout_losses(folder, rows, [along(step), along(-step)], names, **limits)
    assert base == heldout_loss(folder, rows, max_tokens=64, threads=1).loss
    (descent,) = heldout_descents(folder, rows, [along(1.0)], names, **limits)
    assert descent == pytest.approx((behind - ahead) / (2 * step), rel=0.02)
    assert abs(descent) > 1e-3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PAIRS[0], {"text": "x"}], "several kinds: pairs, tokens"),
        ([LABELLED[0], LABELLED[2]], "all good or all bad"),
        ([{"prompt": "p" * 99, "chosen": "a", "rejected": "b"}], "none of the 1"),
        ([{"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}], "must both be text"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(tokenizer: Any, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_heldout(tokenizer, rows, max_tokens=64)


def test_a_few_labelled_rows_have_one_of_each_label_where_there_is_one() -> None:
    good, bad = LABELLED[0], LABELLED[1]
    assert first_rows([good, good, good, bad], 2) == [good, bad]
    assert first_rows([bad, good, good], 2) == [bad, good]
    assert first_rows([good, good, good], 2) == [good, good]
    assert first_rows([{"text": "a"}, {"text": "b"}], 1) == [{"text": "a"}]


# -- beside TRL --------------------------------------------------------------------------------------------------------


def trl_batch(folder: Path, tokenizer: Any, kind: str, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What TRL's trainer of this kind feeds its model with."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM

    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "trl"), max_length=24, use_cpu=True, bf16=False, report_to=[], **options
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        **({} if kind == "SFT" else {"ref_model": AutoModelForCausalLM.from_pretrained(folder)}),
    )
    return dict(trainer.data_collator([trainer.train_dataset[n] for n in range(len(trainer.train_dataset))]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows", "options"),
    [
        ("DPO", PAIRS[:2], {}),
        ("DPO", PAIRS[2:], {}),
        ("KTO", LABELLED, {"per_device_train_batch_size": 5, "train_sampling_strategy": "sequential"}),
    ],
)
def test_tokens_and_masks_of_preferences_are_those_of_trl(
    folder: Path, tokenizer: Any, kind: str, rows: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    batch = trl_batch(folder, tokenizer, kind, rows, **options)
    kept = [mask.bool() for mask in batch["attention_mask"]]
    theirs = sorted(
        (ids[keep].tolist(), mask[keep].bool().tolist())
        for ids, mask, keep in zip(batch["input_ids"], batch["completion_mask"], kept, strict=True)
    )
    ours = [example for row in rows for example in encode(tokenizer, row, 24)]
    assert sorted((list(example.ids), list(example.scored)) for example in ours) == theirs


@pytest.mark.slow
def test_the_assistants_words_are_those_of_trl_and_need_a_mark(folder: Path, tokenizer: Any) -> None:
    import copy

    with pytest.raises(InputError, match="does not mark"):
        encode(tokenizer, TALK, 64, assistant_only=True)
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = MARKED
    batch = trl_batch(folder, marked, "SFT", [TALK], assistant_only_loss=True)
    (ours,) = encode(marked, TALK, 24, assistant_only=True)
    assert list(ours.ids) == batch["input_ids"][0].tolist()
    assert list(ours.scored) == [label != -100 for label in batch["labels"][0].tolist()]
    assert ours.tokens < len(ours.ids) - 1
    whole = "".join(marked.convert_ids_to_tokens([i for i, s in zip(ours.ids, ours.scored, strict=True) if s]))
    assert whole.startswith("Hello!")
