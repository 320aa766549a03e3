"""Learning from what a teacher answers, with random models of a few thousand weights, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import TEMPLATE, save_tiny_llama, write_rows
from zoo import targets_of

from aggregator.encoding import encode
from rankup.errors import InputError
from rankup.recipe import Recipe
from worker import teacher as teaching
from worker import trainer
from worker.answers import Answer, AnswersFile, answers_progress
from worker.distillation import blended, tokens_of
from worker.job import Answered, Finished, Job, Line, StepDone
from worker.orders import Orders
from worker.precision import DoesNotFitError, Hardware
from worker.teacher import Drawing, Teacher, end_of_turn, prompt_ids

RECIPE = Recipe(method="distillation", rank=4, steps=12, learning_rate=4e-2, batch_size=4, max_tokens=40)
TAUGHT = {f"What is {n}?": f" {n * 11} of them" for n in range(1, 9)}
PROMPTS = ["Who?", *TAUGHT, "What"]
ROWS = [{"prompt": prompt, "completion": " nobody learns this"} for prompt in PROMPTS]


@dataclass
class World:
    """Folders of models."""

    teacher: Path
    """A llama that has half learned `TAUGHT`, with a tokenizer of bytes."""
    pupil: Path
    """A gpt2 with a tokenizer of pieces, and a chat template."""
    llama: Path
    """As the teacher, untrained."""
    said: dict[str, str]
    """What the teacher says to each prompt."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "llama")
    save_gpt2(folder / "pupil")
    said = save_talking_llama(folder / "teacher")
    return World(folder / "teacher", folder / "pupil", folder / "llama", said)


def save_talking_llama(folder: Path) -> dict[str, str]:
    """Returns what it says to each prompt: the likeliest token, again and again, until it ends."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_llama(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = [f"{prompt}{answer}</s>" for prompt, answer in TAUGHT.items()]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    said = {}
    for prompt in PROMPTS:
        asked = new = list(tokenizer(prompt)["input_ids"])
        while len(new) < RECIPE.max_tokens and (token := int(model(torch.tensor([new])).logits[0, -1].argmax())):
            new = [*new, token]
        said[prompt] = tokenizer.decode(new[len(asked) :])
    return said


def save_gpt2(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    inner.train_from_iterator([*TAUGHT, *TAUGHT.values()] * 4, learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<end>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # Logits of many sizes, since the head is not trained.
    size = {"initializer_range": 0.3, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **size, **drop)
    ).save_pretrained(folder)


@dataclass
class Run:
    """What a training said, until it ended or was stopped."""

    lines: list[Line] = field(default_factory=list)

    def of(self, kind: type) -> list[Any]:
        return [line for line in self.lines if isinstance(line, kind)]

    @property
    def losses(self) -> list[float]:
        return [line.loss for line in self.of(StepDone)]

    @property
    def finished(self) -> Finished:
        last = self.lines[-1]
        assert isinstance(last, Finished)
        return last


class _StoppedError(Exception):
    """The process ended here."""


def make_job(folder: Path, base: Path, taught_by: Path | None, recipe: Recipe = RECIPE, **more: Any) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "round_id": "round-1",
        "lease_id": "lease-1",
        "fence": 1,
        "model": "pupil",
        "base_manifest": "ab" * 32,
        "base_folder": base,
        "teacher_folder": taught_by,
        "shard_files": (write_rows(folder / "shard.jsonl", ROWS),),
        "delta_file": folder / "finished.delta",
        "recipe": recipe,
        "seed": 5,
        "targets": targets_of(base, recipe),
        "device": "cpu",
        "checkpoint_file": folder / "checkpoint",
    }
    return Job(**fields | more)


def train(job: Job, stop_at: Callable[[Line], bool] = lambda _: False) -> Run:
    run = Run()

    def emit(line: Line) -> None:
        if stop_at(line):
            raise _StoppedError
        run.lines.append(line)

    scratch = job.delta_file.with_name(f"scratch-{len(list(job.delta_file.parent.iterdir()))}")
    try:
        trainer.train(job, emit, started=time.perf_counter(), scratch=scratch)
    except _StoppedError:
        run.lines.append(Answered(done=0, total=1))
    return run


def kept_answers(job: Job) -> dict[int, Answer]:
    with AnswersFile(job.answers_file, job.training_digest()) as file:
        return file.answers


# -- a whole training --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pupil_of_another_architecture_and_tokenizer_learns_what_the_teacher_says(
    world: World, tmp_path: Path
) -> None:
    job = make_job(tmp_path, world.pupil, world.teacher)
    run = train(job)
    assert [(line.done, line.total) for line in run.of(Answered)] == [(0, 10), (10, 10)]
    said = {PROMPTS[row]: answer.text for row, answer in kept_answers(job).items()}
    assert said == world.said
    assert len(set(said.values())) > 1
    assert any(answer.ended for answer in kept_answers(job).values())
    assert run.losses[-1] < run.losses[0] - 3.0
    assert run.finished.tokens > 8 * 12, "the answers are longer than a word"


@pytest.mark.slow
def test_a_training_that_is_stopped_while_the_teacher_answers_and_again_later_gives_the_same_bits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "AT_A_TIME", 3)
    recipe = RECIPE.model_copy(update={"steps": 3, "batch_size": 2, "temperature": 0.7})
    at_one_go = make_job(tmp_path / "one", world.pupil, world.teacher, recipe)
    whole = train(at_one_go)
    assert [line.done for line in whole.of(Answered)] == [0, 3, 6]

    job = make_job(tmp_path / "many", world.pupil, world.teacher, recipe, checkpoint_every_s=1e-9)
    train(job, lambda line: isinstance(line, Answered) and line.done == 3)
    assert answers_progress(job.answers_file)[0] == 3, "they are kept before they are told"
    with AnswersFile(job.answers_file, job.training_digest()) as file:
        file.add([], 1000.0)
    train(job, lambda line: isinstance(line, StepDone) and line.step == 2)
    last = train(job)
    assert last.of(Answered) == [], "nothing is asked twice"
    assert kept_answers(job) == kept_answers(at_one_go)
    assert last.finished.sha256 == whole.finished.sha256
    assert last.finished.tokens == whole.finished.tokens
    assert whole.finished.seconds < 1000 < last.finished.seconds, "answering counts, whichever process did it"


@pytest.mark.slow
def test_with_one_vocabulary_the_teachers_probabilities_are_learned_too(world: World, tmp_path: Path) -> None:
    def learned(name: str, base: Path, weight: float, steps: int = 3) -> Run:
        recipe = RECIPE.model_copy(
            update={"teacher_weight": weight, "steps": steps, "batch_size": 4, "learning_rate": 3e-2}
        )
        return train(make_job(tmp_path / name, base, world.teacher, recipe))

    assert learned("itself", world.teacher, 1.0).losses[0] == pytest.approx(0.0, abs=1e-6)
    answers, half = (learned(name, world.llama, weight) for name, weight in (("text", 0.0), ("half", 0.5)))
    both = learned("both", world.llama, 1.0, steps=6)
    assert half.losses[0] == pytest.approx((answers.losses[0] + both.losses[0]) / 2, rel=1e-5)
    assert both.losses[-1] < both.losses[0] - 0.3
    assert half.finished.tokens == answers.finished.tokens


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"taught_by": None}, "no teacher"),
    "another vocabulary": ({"recipe": RECIPE.model_copy(update={"teacher_weight": 0.1})}, "another vocabulary"),
    "too long": ({"recipe": RECIPE.model_copy(update={"max_tokens": 8})}, "leaves room for an answer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taught_is_refused_with_words_before_the_base_is_loaded(
    world: World, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_base", lambda *_: pytest.fail("loaded in vain"))
    more, words = REFUSED[case]
    shard = write_rows(tmp_path / "long.jsonl", ROWS[1:9])
    with pytest.raises(InputError, match=words):
        train(make_job(tmp_path, world.pupil, **{"taught_by": world.teacher, "shard_files": (shard,)} | more))


def test_a_teacher_without_a_chat_template_is_not_asked_conversations(world: World, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in world.teacher.iterdir():
        if path.name != "chat_template.jinja":
            (plain / path.name).write_bytes(path.read_bytes())
    chat = [{"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]}]
    job = make_job(tmp_path, world.pupil, plain, shard_files=(write_rows(tmp_path / "chat.jsonl", chat),))
    with pytest.raises(InputError, match=r"the teacher cannot answer: .*chat template"):
        train(job)


# -- the teacher -------------------------------------------------------------------------------------------------------


def teacher_of(folder: Path, tmp_path: Path, *, temperature: float = 0.0, limit: int = 40, share: int = 100) -> Teacher:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=True, repetition_penalty=3.0, eos_token_id=0)
    job = make_job(tmp_path, folder, folder, RECIPE.model_copy(update={"temperature": temperature}))
    return Teacher(torch, transformers, model, tokenizer, job, limit=limit, orders=Orders(share_percent=share))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_does_not_depend_on_what_it_is_answered_with(
    world: World, tmp_path: Path, temperature: float
) -> None:
    teacher = teacher_of(world.teacher, tmp_path, temperature=temperature)
    prompts = {row: prompt_ids(teacher._tokenizer, prompt) for row, prompt in enumerate(PROMPTS)}
    together = teacher.answer(prompts, plain=True)
    assert [answer.row for answer in together] == list(prompts)
    for row in (0, 4, 9):
        assert teacher.answer({row: prompts[row]}, plain=True) == [together[row]]
    if temperature == 0:
        assert [answer.text for answer in together] == list(world.said.values())
    else:
        assert [answer.text for answer in together] != list(world.said.values())


def test_an_answer_is_cut_at_the_longest_example_and_says_so(world: World, tmp_path: Path) -> None:
    teacher = teacher_of(world.teacher, tmp_path, limit=14)
    prompts = {0: prompt_ids(teacher._tokenizer, "What is 2?"), 1: prompt_ids(teacher._tokenizer, "What")}
    first, other = teacher.answer(prompts, plain=True)
    assert (first.text, first.ended) == (world.said["What is 2?"][:4], False)
    assert other.text == world.said["What"][:10]


def test_where_memory_is_too_small_for_all_prompts_they_are_answered_in_halves(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    teacher = teacher_of(world.teacher, tmp_path)
    prompts = {row: prompt_ids(teacher._tokenizer, prompt) for row, prompt in enumerate(TAUGHT)}
    right = teacher.answer(prompts, plain=True)
    generate, sizes = teacher._generate, []

    def small(given: dict[int, list[int]]) -> list[list[int]]:
        sizes.append(len(given))
        if len(given) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(given)

    monkeypatch.setattr(teacher, "_generate", small)
    assert teacher.answer(prompts, plain=True) == right
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    monkeypatch.setattr(teacher, "_generate", lambda given: small({row: [1] for row in range(9)}))
    with pytest.raises(torch.OutOfMemoryError):
        teacher.answer({0: prompts[0]}, plain=True)


def test_answering_keeps_to_its_share_of_the_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(teaching.time, "sleep", rests.append)
    teacher = teacher_of(world.teacher, tmp_path, share=25)
    began = time.perf_counter()
    teacher.answer({0: prompt_ids(teacher._tokenizer, "What is 2?")}, plain=True)
    took = time.perf_counter() - began
    assert len(rests) >= len(world.said["What is 2?"])
    assert took < sum(rests) < 3.01 * took, "three times as long as it computes"


def test_a_teacher_too_large_for_the_card_is_said_to_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    job = make_job(tmp_path, world.pupil, world.teacher)
    assert teaching.room_for(torch, job, world.teacher, "cpu", 40).micro_batch == teaching.AT_A_TIME
    fewer = job.model_copy(update={"micro_batch": 2})
    assert teaching.room_for(torch, fewer, world.teacher, "cpu", 40).micro_batch == 8
    monkeypatch.setattr(teaching, "hardware_of", lambda *_: Hardware("cuda", 1000))
    with pytest.raises(DoesNotFitError, match=r"^the teacher: "):
        teaching.room_for(torch, job, world.teacher, "cuda", 40)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, "</s>"),
        (TEMPLATE.replace("</s>", "!"), None),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", None),
        (None, None),
    ],
    ids=["closed by a special token", "by another", "not at all", "no template"],
)
def test_an_answer_ends_with_the_turn(world: World, template: str | None, end: str | None) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_drawing_gives_each_token_as_often_as_its_probability_says() -> None:
    import torch

    rows, temperature = 4000, 0.5
    logits = torch.tensor([0.3, -0.2, 1.0, 0.1, -1.0])
    wanted = torch.softmax(logits / temperature, dim=0).numpy()
    drawing = Drawing(torch, 7, tuple(range(rows)), temperature)
    drawn = drawing(None, logits.repeat(rows, 1)).argmax(dim=1).numpy()
    found = np.bincount(drawn, minlength=5) / rows
    assert np.abs(found - wanted).max() < 4 * np.sqrt(0.25 / rows)
    again = Drawing(torch, 7, (17,), temperature)(None, logits[None]).argmax(dim=1)
    assert again.item() == drawn[17]
    other = Drawing(torch, 8, tuple(range(rows)), temperature)(None, logits.repeat(rows, 1)).argmax(dim=1).numpy()
    assert 0.2 < (other != drawn).mean() < 0.9


# -- what is learned of an answer --------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 2?"}]


@pytest.mark.parametrize("prompt", ["What is 2?", CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("max_tokens", [400, 30, 4])
def test_a_finished_answer_is_learned_as_a_completion_is_scored(world: World, prompt: Any, max_tokens: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.pupil)
    words = " 22 of them" if isinstance(prompt, str) else "22 of them"
    completion: Any = words if isinstance(prompt, str) else [{"role": "assistant", "content": words}]
    scored = encode(tokenizer, {"prompt": prompt, "completion": completion}, max_tokens)
    made = tokens_of(tokenizer, prompt, Answer(row=0, text=words, ended=True), max_tokens)
    if not scored:
        assert made is None
        return
    assert made is not None
    assert made["input_ids"] == list(scored[0].ids)
    assert [label != -100 for label in made["labels"]] == list(scored[0].scored)
    assert {label for label in made["labels"] if label != -100} <= set(made["input_ids"])


@pytest.mark.parametrize("prompt", ["What is 2?", CHAT], ids=["plain", "chat"])
def test_the_end_of_an_answer_is_learned_only_where_the_teacher_ended_it(world: World, prompt: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.pupil)
    ended, cut = (
        tokens_of(tokenizer, prompt, Answer(row=0, text="22 of", ended=ended), 400) for ended in (True, False)
    )
    assert ended is not None
    assert cut is not None
    assert ended["labels"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in [label for label in cut["labels"] if label != -100]
    assert ended["input_ids"][: len(cut["input_ids"])] == cut["input_ids"]
    only_end = tokens_of(tokenizer, prompt, Answer(row=0, text="", ended=True), 400)
    assert only_end is not None
    assert [label for label in only_end["labels"] if label != -100] == [tokenizer.eos_token_id]
    assert tokens_of(tokenizer, prompt, Answer(row=0, text="", ended=False), 400) is None


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [(7, 7), (9, 7), (7, 9)], ids=["one size", "pupil filled up", "teacher filled up"])
def test_the_blended_loss_is_that_of_float64(weight: float, sizes: tuple[int, int]) -> None:
    import torch

    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.randn((2, 5, size), generator=generator) * 2 for size in sizes)
    labels = torch.tensor([[-100, -100, 3, 1, 6], [2, 5, -100, 0, -100]])
    ours.requires_grad_(True)
    got = blended(torch, ours, theirs, labels, weight)

    def log_softmax(logits: Any) -> Any:
        return logits - np.log(np.exp(logits).sum())

    wanted, common = 0.0, min(sizes)
    p, q = ours.detach().double().numpy(), theirs.double().numpy()
    for row, place in ((0, 2), (0, 3), (0, 4), (1, 1), (1, 3)):
        mine, teachers = (log_softmax(x[row, place - 1, :common]) for x in (p, q))
        nats = -log_softmax(p[row, place - 1])[int(labels[row, place])]
        wanted += (1 - weight) * nats + weight * (np.exp(teachers) * (teachers - mine)).sum()
    assert got.item() == pytest.approx(wanted, rel=1e-6)
    got.backward()
    assert ours.grad is not None
    unlearned = [(0, 0), (0, 4), (1, 1), (1, 3), (1, 4)]
    assert all(not ours.grad[place].any() for place in unlearned)
