"""A teacher: a version that answers prompts, greedily or by drawing, many at a time.

What always holds:
- an answer depends on the version, the prompt, the temperature and the seed; on what it is answered with only in the
  last bits;
- it has at most as many tokens as an example may have, together with its prompt;
- what the version's own files say of sampling and penalties counts for nothing.

torch and transformers are handed in.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rankup.errors import InputError
from rankup.protocol import DeviceKind
from worker.answers import Answer, Prompt
from worker.job import Job
from worker.loading import hardware_of, load_base, shape_of_base
from worker.orders import Orders
from worker.precision import DoesNotFitError, Fit, Task, choose

AT_A_TIME: Final = 32
"""Most prompts that are answered together."""


class Teacher:
    """A version that answers prompts, greedily or by drawing."""

    def __init__(
        self, torch: Any, transformers: Any, model: Any, tokenizer: Any, job: Job, *, limit: int, orders: Orders
    ) -> None:
        self._torch = torch
        self._transformers = transformers
        self._model = model
        self._tokenizer = tokenizer
        self._job = job
        self._limit = limit
        self._orders = orders
        stops = self._model.generation_config.eos_token_id
        listed = stops if isinstance(stops, list) else [stops]
        self._stops = sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *listed} - {None})
        # Of its own configuration nothing stays: it may ask for draws and penalties.
        self._model.generation_config = transformers.GenerationConfig()

    def answer(self, prompts: Mapping[int, list[int]], *, plain: bool) -> list[Answer]:
        """An answer to each prompt, given by row as tokens. All at once, or in halves where memory is too small."""
        try:
            new = self._generate(prompts)
        except self._torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
            self._torch.cuda.empty_cache()
            new = []
        if not new:  # not inside the handler, whose traceback keeps the tensors of the failed call
            rows = list(prompts)
            halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            return [one for half in halves for one in self.answer({row: prompts[row] for row in half}, plain=plain)]
        return [self._answer(row, prompts[row], ids, plain) for row, ids in zip(prompts, new, strict=True)]

    def _generate(self, prompts: Mapping[int, list[int]]) -> list[list[int]]:
        """New tokens for each prompt; prompts are padded on the left, so that all answers begin at the same place."""
        torch, transformers = self._torch, self._transformers
        longest = max(map(len, prompts.values()))
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(each)) + each for each in prompts.values()])  # (rows, longest)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts.values()])
        temperature = self._job.recipe.temperature
        drawing = [Drawing(torch, self._job.seed, tuple(prompts), temperature)] if temperature > 0 else []
        with torch.inference_mode():
            whole = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=transformers.GenerationConfig(
                    max_new_tokens=self._limit - min(map(len, prompts.values())),
                    do_sample=False,
                    eos_token_id=self._stops or None,
                    pad_token_id=pad,
                ),
                logits_processor=transformers.LogitsProcessorList(drawing),
                stopping_criteria=transformers.StoppingCriteriaList([_Resting(torch, self._orders)]),
            )
        return [new.tolist() for new in whole[:, longest:]]

    def _answer(self, row: int, asked: list[int], new: list[int], plain: bool) -> Answer:
        ids = new[: self._limit - len(asked)]
        end = next((place for place, token in enumerate(ids) if token in self._stops), None)
        ids = ids[:end]
        # Some tokenizers lose the space that a text begins with: a plain answer is what it makes the prompt longer by.
        whole, before = (asked + ids, len(self._decode(asked))) if plain else (ids, 0)
        text = self._decode(whole)[before:]
        return Answer(row=row, text=text if plain else text.strip(), ended=end is not None)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def room_for(torch: Any, job: Job, folder: Path, device: DeviceKind, tokens: int) -> Fit:
    """In which precision the teacher in `folder` is loaded, and how many prompts are answered at a time, so that answer
    and prompt may have `tokens` tokens. Raises DoesNotFitError."""
    task = Task(
        trained=0,
        trained_matrices=0,
        batch=AT_A_TIME,
        tokens=tokens,
        all_logits=False,
        four_bit=job.recipe.four_bit == "if_needed",
    )
    # Answering needs no gradients: more examples fit than where they are trained.
    most = None if job.micro_batch is None else 4 * job.micro_batch
    try:
        return choose(shape_of_base(folder), task, hardware_of(torch, device), micro_batch=most)
    except DoesNotFitError as exc:
        raise DoesNotFitError(f"the teacher: {exc.cause}", remedy=exc.remedy) from exc


def load_teacher(transformers: Any, torch: Any, folder: Path, device: DeviceKind, fit: Fit) -> Any:
    """The teacher in `folder`, frozen, on the device. Raises InputError."""
    try:
        model = load_base(transformers, torch, folder, device, fit)
    except InputError as exc:
        raise InputError(f"the teacher: {exc.cause}", remedy=exc.remedy) from exc
    # On a card it is there already, where four bits cannot be moved.
    return (model if device == "cuda" else model.to(device)).requires_grad_(False).eval()


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that follows an assistant's words in the chat template, which may not be the end of text."""
    if not tokenizer.chat_template:
        return None
    # The words must stand nowhere in the template itself.
    said = [{"role": "user", "content": "hedgehog"}, {"role": "assistant", "content": "porcupine"}]
    opened = chat_ids(tokenizer, said, continue_final_message=True)
    after = chat_ids(tokenizer, said)[len(opened) :]
    return after[0] if after and after[0] in tokenizer.all_special_ids else None


@dataclass(frozen=True)
class Drawing:
    """Draws from softmax(logits / temperature) as the likeliest token after adding Gumbel noise (Gumbel, 1954), each
    row from a generator of its own: what a prompt is answered does not depend on what it is answered with."""

    torch: Any
    seed: int
    rows: tuple[int, ...]
    temperature: float

    def __post_init__(self) -> None:
        seeds = (hashlib.sha256(f"rankup.answer/1:{self.seed}:{row}".encode()).digest() for row in self.rows)
        generators = [self.torch.Generator().manual_seed(int.from_bytes(seed[:8]) >> 1) for seed in seeds]
        object.__setattr__(self, "_generators", generators)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`scores` (rows, vocabulary), raised by noise."""
        torch = self.torch
        generators: list[Any] = self._generators  # type: ignore[attr-defined]
        waits = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=own) for own in generators])
        return scores / self.temperature - waits.clamp_min(1e-30).log().to(scores.device)


class _Resting:
    """Rests after each token, so that only the asked share of the time is computed; never ends an answer."""

    def __init__(self, torch: Any, orders: Orders) -> None:
        self._torch = torch
        self._orders = orders
        self._began = time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        share = self._orders.share_percent
        if share < 100:
            time.sleep((time.perf_counter() - self._began) * (100.0 / share - 1.0))
        self._began = time.perf_counter()
        return self._torch.zeros(len(input_ids), dtype=self._torch.bool, device=input_ids.device)


# -- tokens ------------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt as tokens; of a conversation with the mark that opens an answer."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt, verbose=False)["input_ids"])
    return chat_ids(tokenizer, prompt, add_generation_prompt=True)


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **how: bool) -> list[int]:
    from jinja2 import TemplateError

    try:
        return list(tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **how)["input_ids"])
    except (TemplateError, TypeError, ValueError) as exc:
        raise InputError(f"the chat template does not take a conversation of the shard: {exc}") from exc
