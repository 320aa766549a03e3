"""The tiny base reads and writes any text, is the same for the same seed, and learns within a few steps."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.tiny import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_any_text_is_one_token_a_byte_and_comes_back_as_it_was(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer: Any) -> None:
    asked, answered = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
    prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([asked, answered])["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id


def test_the_seed_alone_decides_the_weights_and_global_randomness_is_untouched(folder: Path, tmp_path: Path) -> None:
    import torch

    before = torch.get_rng_state()
    write_tiny_model(tmp_path / "same")
    write_tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (folder / weights).read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()


@pytest.mark.parametrize(("lora", "lr", "falls_by"), [(False, 3e-3, 1.5), (True, 2e-3, 0.5)], ids=["full", "lora"])
def test_twenty_steps_teach_it_something(folder: Path, tokenizer: Any, lora: bool, lr: float, falls_by: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    ids = torch.tensor(tokenizer(inspect.getdoc(str.split) * 20)["input_ids"][: 24 * 128]).reshape(24, 128)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(20):
        loss = model(input_ids=ids[step % 4 :: 6], labels=ids[step % 4 :: 6]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(261), abs=0.3)
    assert losses[-1] < losses[0] - falls_by
