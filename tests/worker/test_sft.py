"""Packed examples do not see each other, and only the assistant's words are learned where only they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import make_job, train
from tiny_model import save_tiny_llama, write_rows

from rankup.errors import InputError
from rankup.recipe import Recipe
from rankup.targets import Target, select_targets
from worker.job import Finished, Job, Ready
from worker.sft import keeps_apart, packed_pieces

RECIPE = Recipe(rank=2, steps=2, learning_rate=1e-2, batch_size=4, max_tokens=48, warmup_steps=0)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)

Base = tuple[Path, dict[str, Target]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return folder, select_targets(save_tiny_llama(folder), RECIPE)


def job_of(to: Path, base: Base, rows: list[dict[str, Any]], **recipe: Any) -> Job:
    to.mkdir(parents=True, exist_ok=True)
    files = (write_rows(to / "rows.jsonl", rows),)
    return make_job(to, base, recipe=RECIPE.model_copy(update=recipe), shard_files=files)


@pytest.mark.slow
def test_packed_examples_train_as_many_tokens_in_fewer_sequences(base: Base, tmp_path: Path) -> None:
    rows = [{"prompt": "abc", "completion": "de"}] * 12  # 6 tokens each with the end mark, 8 of them in 48
    lines = train(job_of(tmp_path, base, rows, packing=True, steps=1))
    ready, done = lines[0], lines[-1]
    assert isinstance(ready, Ready)
    assert ready.examples == 2
    assert isinstance(done, Finished)
    assert done.tokens == 12 * 3


@pytest.mark.slow
def test_a_packed_example_has_the_loss_that_it_has_alone(base: Base, tmp_path: Path) -> None:
    rows = [{"text": f"{n} is a number, as everybody knows"[: 12 + n]} for n in range(6)]
    options = {"steps": 1, "batch_size": 6}
    alone = train(job_of(tmp_path / "alone", base, rows, **options))[-1]
    packed = train(job_of(tmp_path / "packed", base, rows, packing=True, **options))[-1]
    assert isinstance(alone, Finished)
    assert isinstance(packed, Finished)
    assert packed.tokens == alone.tokens
    assert packed.first_loss == pytest.approx(alone.first_loss, rel=1e-5)


@pytest.mark.parametrize(("model", "apart"), [("llama", True), ("gpt2", True), ("mixtral", True), ("bloom", False)])
def test_it_is_tried_out_whether_a_model_keeps_packed_examples_apart(model: str, apart: bool) -> None:
    import torch
    import transformers
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    made: dict[str, Any] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=48, **sizes)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                intermediate_size=48, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes
            )
        ),
        "bloom": lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_head=4, n_layer=2)
        ),
    }
    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    assert keeps_apart(torch, made[model]().train(), collator, "float32") is apart


@pytest.mark.parametrize(
    ("micro_batch", "max_tokens", "size"), [(8, 128, 8), (8, 1024, 4), (6, 1024, 3), (4, 4096, 1), (4, 9999, 1)]
)
def test_packed_sequences_go_through_the_model_a_few_at_a_time(micro_batch: int, max_tokens: int, size: int) -> None:
    assert packed_pieces(micro_batch, max_tokens) == size


@pytest.mark.slow
def test_only_the_assistants_words_are_learned_where_the_template_marks_them(base: Base, tmp_path: Path) -> None:
    rows = [{"messages": TALK}] * 3 + [{"messages": TALK[:1]}]
    with pytest.raises(InputError, match="does not mark"):
        train(job_of(tmp_path / "unmarked", base, rows, assistant_only=True))
    marked = tmp_path / "base"
    marked.mkdir()
    for path in base[0].iterdir():
        (marked / path.name).write_bytes(path.read_bytes())
    (marked / "chat_template.jinja").write_text(MARKED)
    job = job_of(
        tmp_path / "marked", (marked, base[1]), rows, assistant_only=True, steps=1, batch_size=3, max_tokens=64
    )
    done = train(job)[-1]
    assert isinstance(done, Finished)
    assert done.tokens == 3 * (len("Hello") + 1 + len("Ciao") + 1)
    silent = job_of(tmp_path / "silent", (marked, base[1]), rows[3:], assistant_only=True)
    with pytest.raises(InputError, match="in none of the shard's"):
        train(silent)
