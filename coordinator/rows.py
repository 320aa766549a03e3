"""Rows of a training set: which shapes are taken, how a row is cleaned, and when two rows are too alike.

The shapes are TRL's (https://huggingface.co/docs/trl/dataset_formats); a row has exactly one of them:

| shape | fields |
|---|---|
| text | `text` |
| messages | `messages`, a conversation |
| prompt-completion | `prompt` and `completion`, both text or both conversations |
| preference | `prompt`, `chosen` and `rejected`, all text or all conversations |
| unpaired | `prompt`, `completion` and `label`, true for a good answer and false for a bad one |

Two more ways to write them are taken: `chosen` and `rejected` that both begin with their prompt, and `conversations`
of `from` and `value` for messages. `coordinator.chatrows` says what a message holds, and which tools and settings go
along with conversations.

What always holds:
- a parsed row holds the fields of its shape, what goes along with its conversations, and nothing else; the texts of a
  clean one are in Unicode NFC, without control characters but line feed and tab, and can be written as UTF-8;
- cleaning a clean row changes nothing;
- the space between a plain prompt and its completion is part of the text and stays.

Nothing here does I/O, and nothing here depends on other rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from coordinator.chatrows import (
    RowError,
    clean_carried,
    clean_messages,
    clean_text,
    kind,
    parse_carried,
    parse_messages,
    words_of,
)
from rankup.chat import CARRIED
from rankup.shapes import SHAPES, shape_of

Row = dict[str, Any]

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""What others call the roles, in `conversations`."""
NGRAM_WORDS = 13
"""Length of the word sequences by which overlap is found, as in GPT-3 (arXiv:2005.14165, appendix C)."""
MIN_ANSWER_WORDS = 4
"""A shorter answer ("yes", "42") says nothing about where a row comes from."""

_AS_GIVEN = frozenset({"tools", "tool_calls"})
_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s+")


def parse_row(text: str) -> tuple[str, Row, tuple[str, ...]]:
    """Check one JSON object; returns its shape with plain or chat ("text", "prompt-completion chat", ...), its fields
    of that shape, and the names of the fields that were left out.

    Raises RowError.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RowError(f"is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise RowError(f"is {kind(value)}, not a JSON object")
    value = {name: content for name, content in value.items() if content is not None}
    shape = shape_of(_plainly(value))
    if shape is None:
        wanted = "; ".join(" and ".join(fields) for fields in SHAPES.values())
        raise RowError(f"has the fields {sorted(value)[:8]}, none of the shapes: {wanted}")
    chat: set[bool] = set()
    row: Row = {}
    for field in SHAPES[shape]:
        content = value[field]
        if field == "label":
            row[field] = content
            continue
        if isinstance(content, list) and shape != "text":
            row[field] = parse_messages(field, content)
        elif isinstance(content, str) and shape != "messages":
            row[field] = content
        else:
            wanted = {"text": "text", "messages": "a list of messages"}.get(shape, "text or a list of messages")
            raise RowError(f"field {field}: is {kind(content)}, not {wanted}")
        chat.add(isinstance(content, list))
    if len(chat) > 1:
        texts = ", ".join(field for field in SHAPES[shape] if field != "label")
        raise RowError(f"fields {texts}: must all be text or all be lists of messages")
    if chat == {True}:
        row |= parse_carried(value)
    # Tools that are none at all are not left out: there are none.
    extra = tuple(sorted(name for name in value.keys() - row.keys() if not (chat == {True} and name in CARRIED)))
    return f"{shape} chat" if chat == {True} and shape != "messages" else shape, row, extra


def _plainly(value: dict[str, Any]) -> set[str]:
    """Bring the other ways to write a row to the plain ones, in place; returns the fields that count for its shape."""
    if {"chosen", "rejected"} <= value.keys() and (
        "prompt" not in value
        # The prompt as text beside whole conversations: they have it as a message.
        or (isinstance(value["prompt"], str) and isinstance(value["chosen"], list))
    ):
        value["prompt"], value["chosen"], value["rejected"] = _split_pair(value["chosen"], value["rejected"])
    talk = value.get("conversations")
    if "messages" not in value and isinstance(talk, list):
        value["messages"] = [_spoken(turn) for turn in talk]
        del value["conversations"]
    # A label of another kind is a column about something else.
    return {name for name, content in value.items() if name != "label" or isinstance(content, bool)}


def _split_pair(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of two that begin alike: the prompt is what they share, to the end of a message or of
    a word, and leaves something of each."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)) and not (
        isinstance(chosen, str) and isinstance(rejected, str)
    ):
        raise RowError("fields chosen, rejected: must both be text or both be lists of messages")
    least = min(len(chosen), len(rejected)) - 1
    shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), least)
    shared = min(shared, least)
    if isinstance(chosen, str):
        # The space before a word belongs to the answer, as tokenizers have it.
        shared = max((space.start() for space in _SPACE.finditer(chosen, 0, max(shared, 0) + 1)), default=0)
    if shared < 1:
        raise RowError("fields chosen, rejected: do not begin with one prompt, and no field prompt goes with them")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _spoken(turn: Any) -> Any:
    """A message as role and content, where it is written as from and value; anything else as it is."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        return turn
    speaker = turn["from"]
    return {"role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": turn["value"]}


# -- cleaning ----------------------------------------------------------------------------------------------------------


def clean_row(row: Row) -> Row | None:
    """The row with clean, stripped texts; None when a field or a message has nothing left, or both answers are one."""
    cleaned: Row = {}
    for field, content in row.items():
        if field in CARRIED:
            continue
        if isinstance(content, bool):
            cleaned[field] = content
        elif isinstance(content, str):
            text = clean_text(content)
            # A plain prompt runs on into what follows it: the space between them belongs to the text.
            opens, ends = field in ("prompt", "text"), field != "prompt"
            text = text.lstrip() if opens else text
            text = text.rstrip() if ends else text
            if not text.strip():
                return None
            cleaned[field] = text
        else:
            messages = clean_messages(content)
            if messages is None:
                return None
            cleaned[field] = messages
    if "chosen" in cleaned and cleaned["chosen"] == cleaned["rejected"]:
        return None
    return cleaned | clean_carried(row)


def encode_row(row: Row) -> str:
    """The row as JSON on one line: equal rows, equal text.

    Names are sorted, but for those within tools and calls: a chat template shows them in their order.
    """
    return json.dumps(_sorted(row), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _sorted(value: Any) -> Any:
    if isinstance(value, list):
        return [_sorted(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: each if name in _AS_GIVEN else _sorted(each) for name, each in sorted(value.items())}


def digest(text: str) -> str:
    """Hex sha256 of the text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


# -- likeness ----------------------------------------------------------------------------------------------------------


def features(row: Row) -> set[bytes]:
    """What the row shares with one that is too alike: its prompt as a whole, its answer as a whole, and every 13 words
    in a row of either. Case, punctuation and spacing do not count; prompts are only like prompts, answers like answers.

    Text that is no conversation counts as an answer; what a system message says counts as neither.
    """
    found: set[bytes] = set()
    for part, text in _parts(row):
        words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        if words and (part == "prompt" or len(words) >= MIN_ANSWER_WORDS):
            found.add(_feature(part, "whole", words))
        for start in range(len(words) - NGRAM_WORDS + 1):
            found.add(_feature(part, "ngram", words[start : start + NGRAM_WORDS]))
    return found


def _feature(part: str, kind: str, words: list[str]) -> bytes:
    return hashlib.blake2b(f"{part} {kind} {' '.join(words)}".encode(), digest_size=16).digest()


def _parts(row: Row) -> Iterator[tuple[str, str]]:
    for field, content in row.items():
        if isinstance(content, bool) or field in CARRIED:
            continue
        if isinstance(content, str):
            yield ("prompt" if field == "prompt" else "answer"), content
            continue
        answers = [words_of(message) for message in content if message["role"] == "assistant"]
        asked = [words_of(message) for message in content if message["role"] in ("user", "tool")]
        if field == "prompt":
            # Earlier turns of the assistant are a part of what is asked.
            asked, answers = [words_of(m) for m in content if m["role"] not in ("system", "developer")], []
        if asked:
            yield "prompt", "\n".join(asked)
        if answers:
            yield "answer", "\n".join(answers)
