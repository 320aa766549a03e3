"""Held-out rows as tokens, made and masked as TRL's trainers do.

What always holds:
- of a prompt with a completion only the completion is scored, of chosen and rejected answers the answers, of `text` and
  `messages` everything but the first token, or the assistant's words alone; plain text ends with the end mark;
- what is longer than the limit is cut at the end; a row of which nothing is left to score is left out, a pair as a
  whole;
- chat templates are run in transformers' sandbox, and nothing else that a model folder brings along is.

It knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aggregator.images import Pictured
from rankup.chat import needs, require_template, template_settings
from rankup.errors import InputError
from rankup.shapes import marks_assistant


@dataclass(frozen=True)
class Example:
    """One sequence of tokens: a row, or one answer of a pair."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    """Which of `ids` are predicted; never the first one, which has nothing before it."""
    row: int = 0
    """Number of its row."""
    good: bool = True
    """False for a rejected answer, and for one with the label false."""
    pictured: Pictured | None = field(default=None, compare=False)
    """A row with images: what else the model is given."""

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return sum(self.scored)


def encode(
    tokenizer: Any, row: Mapping[str, Any], max_tokens: int, *, number: int = 0, assistant_only: bool = False
) -> tuple[Example, ...]:
    """A row as tokens: one example, of a pair two, the chosen one first; none when nothing of it is left to score.

    An answer starts where the tokens of the prompt (with the mark that opens an answer) and those of prompt and answer
    together first differ; of a pair, where either differs.

    Raises:
        InputError: the row has none of the shapes, or the tokenizer's chat template does not take it, or does not mark
            the assistant's words where only they count.
    """
    if "images" in row:
        pictured = Pictured(tokenizer, row, max_tokens, assistant_only)
        tokens = pictured.scored()
        return () if tokens is None else (Example(*tokens, row=number, pictured=pictured),)
    require_template(tokenizer.chat_template, needs(row), whose="the model")
    settings = template_settings(row)
    if "prompt" in row and "chosen" in row and "rejected" in row:
        opening, (chosen, rejected) = _answered(tokenizer, settings, row["prompt"], row["chosen"], row["rejected"])
        sequences = [(chosen, opening, True), (rejected, opening, False)]
    elif "prompt" in row and "completion" in row:
        opening, (whole,) = _answered(tokenizer, settings, row["prompt"], row["completion"])
        sequences = [(whole, opening, row.get("label") is not False)]
    elif isinstance(row.get("messages"), list):
        whole, marked = _conversation(tokenizer, settings, row["messages"], assistant_only)
        scored = tuple(marked[:max_tokens])
        found = Example(tuple(whole[:max_tokens]), (False, *scored[1:]), number)
        return (found,) if found.tokens else ()
    elif isinstance(row.get("text"), str):
        sequences = [(plain_ids(tokenizer, _ended(tokenizer, row["text"])), 0, True)]
    else:
        raise InputError(
            f"a held-out row needs text, messages, or a prompt with its completion or with chosen and rejected; "
            f"it has {sorted(row)}"
        )
    examples = []
    for whole, start, good in sequences:
        length = min(len(whole), max_tokens)
        start = min(max(start, 1), length)
        examples.append(Example(tuple(whole[:length]), (False,) * start + (True,) * (length - start), number, good))
    return tuple(examples) if all(example.tokens for example in examples) else ()


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of plain text, with what the tokenizer puts around it."""
    return list(tokenizer(text=text, verbose=False)["input_ids"])


def chat_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, opens_answer: bool = False, **settings: Any
) -> list[int]:
    """Tokens of a conversation; with the mark that opens an answer at the end, if `opens_answer`. `settings`: tools and
    whatever else the chat template is told. Raises InputError."""
    return list(_templated(tokenizer, messages, add_generation_prompt=opens_answer, **settings)["input_ids"])


def _answered(tokenizer: Any, settings: Mapping[str, Any], prompt: Any, *answers: Any) -> tuple[int, list[list[int]]]:
    """Where the answers start, and prompt and answer together as tokens, for each answer."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        opening = plain_ids(tokenizer, prompt)
        wholes = [plain_ids(tokenizer, prompt + _ended(tokenizer, answer)) for answer in answers]
    elif isinstance(prompt, list) and all(isinstance(answer, list) for answer in answers):
        opening = chat_ids(tokenizer, prompt, opens_answer=True, **settings)
        wholes = [chat_ids(tokenizer, prompt + answer, **settings) for answer in answers]
    else:
        raise InputError("prompt and answers must both be text or both be lists of messages")
    return min(_shared(opening, whole) for whole in wholes), wholes


def _shared(opening: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens both begin with."""
    least = min(len(opening), len(whole))
    return next((n for n in range(least) if opening[n] != whole[n]), least)


def _conversation(
    tokenizer: Any, settings: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], assistant_only: bool
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are learned."""
    if not assistant_only:
        whole = chat_ids(tokenizer, messages, **settings)
        return whole, [True] * len(whole)
    if tokenizer.chat_template and not marks_assistant(tokenizer.chat_template):
        raise InputError(
            "the model's chat template does not mark the assistant's words with {% generation %}",
            remedy="Set the recipe's assistant_only to false, or import the base with a template that has the mark.",
        )
    found = _templated(tokenizer, messages, return_assistant_tokens_mask=True, **settings)
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def _templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Mapping[str, Any]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "the rows are conversations, but the model's tokenizer has no chat template",
            remedy="Choose an instruct or chat model as the base, or a dataset of text or plain prompts.",
        )
    try:
        whole: Mapping[str, Any] = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
        )
    except (TemplateError, TypeError, ValueError) as exc:
        raise InputError(f"the model's chat template does not take this conversation: {exc}") from exc
    return whole


def _ended(tokenizer: Any, text: str) -> str:
    """Plain text as TRL trains on it: with the end mark, once."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end
