"""How good a version is: its loss on held-out rows, and its answer to one question.

What always holds:
- tokens are made and masked as TRL's trainers do (`aggregator.encoding`), and what is made of their log-probabilities
  depends on the kind of rows (`aggregator.heldout`);
- weights and arithmetic are float32 on the CPU, nothing is drawn at random: the same folder, rows and number of threads
  give the same number on the same machine. Another machine may differ in the last digits.

It does not decide whether a version may be released, and never runs code that a model folder brings along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregator.encoding import Example, chat_ids, plain_ids
from aggregator.heldout import Heldout, read_heldout
from rankup.errors import InputError
from rankup.vision import auto_model, load_processor

MAX_LOGITS = 2**27
"""Most logits held at once (float32: 512 MiB); a batch is made smaller to keep to it."""


@dataclass(frozen=True)
class Loss:
    """Held-out loss over `tokens` scored tokens of `examples` rows; its unit is `aggregator.heldout`'s."""

    loss: float
    examples: int
    tokens: int


def heldout_loss(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    assistant_only: bool = False,
    batch_size: int = 8,
    threads: int | None = None,
) -> Loss:
    """Score the model in `folder` on `rows`, all of one kind of `aggregator.heldout`.

    Args:
        max_tokens: longer rows are cut at the end; a row whose prompt fills them all is left out.
        assistant_only: of `messages`, score the assistant's words alone.
        batch_size: most sequences scored at once; changes the speed and at most the last digits.
        threads: of the arithmetic; None leaves torch's setting.

    Raises:
        InputError: what `aggregator.heldout.read_heldout` raises, or the folder holds no usable model.
    """
    import torch

    if max_tokens < 2 or batch_size < 1:
        raise InputError(f"cannot score {max_tokens} tokens a row in batches of {batch_size}")
    tokenizer = load_tokenizer(folder, rows)
    heldout = read_heldout(tokenizer, rows, max_tokens=max_tokens, assistant_only=assistant_only)
    with limited_threads(threads), torch.inference_mode():
        model = load_model(folder)
        log_probs = log_probs_of(model, heldout, batch_size, padding_of(tokenizer))
        return Loss(loss=float(heldout.loss(log_probs)), examples=heldout.rows, tokens=heldout.tokens)


def answer(folder: Path, question: str, *, max_new_tokens: int = 64, threads: int | None = None) -> str:
    """The model's greedy answer to one question, through its chat template where it has one.

    Raises:
        InputError: the folder holds no usable model.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template:
        ids = chat_ids(tokenizer, [{"role": "user", "content": question}], opens_answer=True)
    else:
        ids = plain_ids(tokenizer, question)
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


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return [*value] if isinstance(value, list) else [value]


# -- loading -----------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> Any:
    """Of a local folder, without its code: for rows with images the processor of a vision-language model.

    Raises InputError where it holds no usable one.
    """
    import transformers

    if any("images" in row for row in rows):
        return load_processor(transformers, folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as exc:
        raise InputError(f"{folder} holds no usable tokenizer: {exc}") from exc


def padding_of(tokenizer: Any) -> int:
    """The token that fills up a batch, of a tokenizer or a processor."""
    return int(getattr(tokenizer, "tokenizer", tokenizer).pad_token_id or 0)


def load_model(folder: Path) -> Any:
    """In float32 on the CPU, in evaluation mode, without its code. Raises InputError where there is no usable one."""
    import torch
    import transformers

    try:
        model = auto_model(transformers, folder).from_pretrained(
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


# -- scoring -----------------------------------------------------------------------------------------------------------


def in_batches(examples: Sequence[Example], batch_size: int, vocabulary: int) -> Iterator[list[Example]]:
    """Consecutive examples, sorted by length, in batches within `batch_size` and `MAX_LOGITS`; one with images is a
    batch of its own."""
    batch: list[Example] = []
    for example in examples:
        full = len(batch) == batch_size or example.pictured is not None
        if batch and (full or (len(batch) + 1) * len(example.ids) * vocabulary > MAX_LOGITS):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def log_probs_of(model: Any, heldout: Heldout, batch_size: int, pad: int) -> Any:
    """ln p of each example, summed over its scored tokens: a float64 tensor (examples,)."""
    import torch

    batches = in_batches(heldout.examples, batch_size, int(model.config.get_text_config().vocab_size))
    return torch.cat([batch_log_probs(model, batch, pad) for batch in batches])


def weights_of(model: Any, heldout: Heldout, batch_size: int, pad: int) -> list[float]:
    """The derivative of the loss by the log-probability of each example."""
    import torch

    if heldout.is_linear:
        log_probs = torch.zeros(len(heldout.examples), dtype=torch.float64)
    else:
        with torch.no_grad():
            log_probs = log_probs_of(model, heldout, batch_size, pad)
    log_probs.requires_grad_(True)
    heldout.loss(log_probs).backward()
    weights: list[float] = log_probs.grad.tolist()
    return weights


def batch_log_probs(model: Any, batch: Sequence[Example], pad: int) -> Any:
    """ln p of each example of a batch, summed over its scored tokens: a float64 tensor (rows,)."""
    import torch

    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), pad)  # (rows, tokens)
    mask = torch.zeros_like(ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        scored[row, : len(example.ids)] = torch.tensor(example.scored)
    pixels = batch[0].pictured.pixels() if batch[0].pictured is not None else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **pixels).logits  # (rows, tokens, vocabulary)
    chosen = scored[:, 1:]
    # The logits at one place predict the token at the next.
    nats = torch.nn.functional.cross_entropy(logits[:, :-1][chosen].float(), ids[:, 1:][chosen], reduction="none")
    rows = chosen.nonzero()[:, 0]
    return torch.zeros(len(batch), dtype=torch.float64).index_add(0, rows, -nats.double())
