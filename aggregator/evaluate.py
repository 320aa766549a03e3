"""How good a version is: its loss on held-out rows, and its answer to one question.

What always holds:
- loss is the mean over all scored tokens of all rows, in nats per token, so a long answer counts more than a short one;
- tokens are made and scored as TRL's `SFTTrainer` does with `completion_only_loss`: of a prompt with a completion only
  the completion counts, of `text` and `messages` everything but the first token; plain text ends with the end mark;
- weights and arithmetic are float32 on the CPU, nothing is drawn at random: the same folder, rows and number of threads
  give the same number on the same machine. Another machine may differ in the last digits.

It does not decide whether a version may be released, and never runs code that a model folder brings along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankup.errors import InputError

MAX_LOGITS = 2**27
"""Most logits held at once (float32: 512 MiB); a batch is made smaller to keep to it."""


@dataclass(frozen=True)
class Loss:
    """Held-out loss in nats per token over `tokens` scored tokens of `examples` rows."""

    loss: float
    examples: int
    tokens: int


@dataclass(frozen=True)
class Example:
    """One row as tokens. `ids[scored_from:]` are predicted; `scored_from` is at least 1."""

    ids: tuple[int, ...]
    scored_from: int


def heldout_loss(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    batch_size: int = 8,
    threads: int | None = None,
) -> Loss:
    """Score the model in `folder` on `rows`, each of the shape text, messages or prompt/completion.

    Args:
        max_tokens: longer rows are cut at the end; a row whose prompt fills them all is left out.
        batch_size: most rows scored at once; changes the speed and at most the last digits.
        threads: of the arithmetic; None leaves torch's setting.

    Raises:
        InputError: a row has none of these shapes, no row has a token to score, or the folder holds no usable model.
    """
    import torch

    if max_tokens < 2 or batch_size < 1:
        raise InputError(f"cannot score {max_tokens} tokens a row in batches of {batch_size}")
    tokenizer = load_tokenizer(folder)
    examples = encode_rows(tokenizer, rows, max_tokens)
    with limited_threads(threads), torch.inference_mode():
        model = load_model(folder)
        vocabulary = int(model.config.get_text_config().vocab_size)
        batches = in_batches(examples, batch_size, vocabulary)
        sums = [float(batch_nats(model, batch, tokenizer.pad_token_id or 0)) for batch in batches]
    tokens = sum(len(example.ids) - example.scored_from for example in examples)
    return Loss(loss=math.fsum(sums) / tokens, examples=len(examples), tokens=tokens)


def encode_rows(tokenizer: Any, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[Example]:
    """The rows that have a token to score, by their length: what shares a batch then needs little padding.

    Raises:
        InputError: no row has one, and what `encode` raises.
    """
    examples = [example for row in rows if (example := encode(tokenizer, row, max_tokens)) is not None]
    if not examples:
        raise InputError(f"none of the {len(rows)} held-out rows has a token to score within {max_tokens} tokens")
    return sorted(examples, key=lambda example: (len(example.ids), example.ids))


def encode(tokenizer: Any, row: Mapping[str, Any], max_tokens: int) -> Example | None:
    """A row as tokens, cut to `max_tokens`; None when nothing of it is left to score.

    The completion starts where the tokens of the prompt (with the mark that opens an answer) and those of prompt and
    completion together first differ.

    Raises:
        InputError: the row has none of the shapes, or is a conversation and the tokenizer has no chat template.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            opening = _plain_ids(tokenizer, prompt)
            whole = _plain_ids(tokenizer, prompt + _ended(tokenizer, completion))
        elif isinstance(prompt, list) and isinstance(completion, list):
            opening = _chat_ids(tokenizer, prompt, opens_answer=True)
            whole = _chat_ids(tokenizer, prompt + completion)
        else:
            raise InputError("prompt and completion must both be text or both be lists of messages")
        scored_from = next((n for n, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), None)
        if scored_from is None:
            scored_from = min(len(opening), len(whole))
    elif isinstance(row.get("messages"), list):
        whole, scored_from = _chat_ids(tokenizer, row["messages"]), 0
    elif isinstance(row.get("text"), str):
        whole, scored_from = _plain_ids(tokenizer, _ended(tokenizer, row["text"])), 0
    else:
        raise InputError(f"a held-out row needs text, messages, or prompt and completion; it has {sorted(row)}")
    ids = tuple(whole[:max_tokens])
    # The first token has nothing before it that could predict it.
    scored_from = max(scored_from, 1)
    return Example(ids, scored_from) if scored_from < len(ids) else None


def answer(folder: Path, question: str, *, max_new_tokens: int = 64, threads: int | None = None) -> str:
    """The model's greedy answer to one question, through its chat template where it has one.

    Raises:
        InputError: the folder holds no usable model.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template:
        ids = _chat_ids(tokenizer, [{"role": "user", "content": question}], opens_answer=True)
    else:
        ids = _plain_ids(tokenizer, question)
    with limited_threads(threads), torch.inference_mode():
        model = load_model(folder)
        stops = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
        # A new configuration: the folder's own may ask for sampling or penalties, which would not be greedy.
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stops) or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0),
        )
        model.generation_config = greedy
        prompt = torch.tensor([ids])
        whole = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    return str(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)).strip()


# -- loading -----------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """Of a local folder, without its code. Raises InputError where it holds no usable one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as exc:
        raise InputError(f"{folder} holds no usable tokenizer: {exc}") from exc


def load_model(folder: Path) -> Any:
    """In float32 on the CPU, in evaluation mode, without its code. Raises InputError where there is no usable one."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, ImportError) as exc:
        raise InputError(f"{folder} holds no usable model: {exc}") from exc
    return model.eval()


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """torch computes with so many threads while this context lasts; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- tokens ------------------------------------------------------------------------------------------------------------


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text=text, verbose=False)["input_ids"])


def _chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, opens_answer: bool = False) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "the rows are conversations, but the model's tokenizer has no chat template",
            remedy="Choose an instruct or chat model as the base, or a dataset of text or plain prompts.",
        )
    try:
        whole = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=opens_answer,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )
    except (TemplateError, TypeError, ValueError) as exc:
        raise InputError(f"the model's chat template does not take this conversation: {exc}") from exc
    return list(whole["input_ids"])


def _ended(tokenizer: Any, text: str) -> str:
    """Plain text as TRL trains on it: with the end mark, once."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return [*value] if isinstance(value, list) else [value]


# -- scoring -----------------------------------------------------------------------------------------------------------


def in_batches(examples: Sequence[Example], batch_size: int, vocabulary: int) -> Iterator[list[Example]]:
    """Consecutive examples, sorted by length, in batches within `batch_size` and `MAX_LOGITS`."""
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(example.ids) * vocabulary > MAX_LOGITS):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def batch_nats(model: Any, batch: Sequence[Example], pad: int) -> Any:
    """Sum of -ln p over the scored tokens of a batch: a float64 tensor without dimensions."""
    import torch

    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), pad)  # (rows, tokens)
    mask = torch.zeros_like(ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        scored[row, example.scored_from : len(example.ids)] = True
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (rows, tokens, vocabulary)
    chosen = scored[:, 1:]
    # The logits at one place predict the token at the next.
    nats = torch.nn.functional.cross_entropy(logits[:, :-1][chosen].float(), ids[:, 1:][chosen], reduction="none")
    return nats.double().sum()
