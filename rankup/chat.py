"""What a conversation has beyond roles and contents, and whether a chat template can say it.

| where | field | what it is |
|---|---|---|
| row | `tools` | what may be called: a list of `{"type": "function", "function": {"name": …, "parameters": …}}` |
| row | `chat_template_kwargs` | settings of the chat template for this row, such as `{"enable_thinking": false}` |
| the assistant's message | `tool_calls` | a list of `{"type": "function", "function": {"name": …, "arguments": {…}}}` |
| the assistant's message | `reasoning_content`, `thinking` | what was thought before the content was said |
| a tool's message | `name`, `tool_call_id` | which call it answers |

A template leaves out in silence what it has no word for, and then something else is learned than the rows say. So each
room asks before it makes tokens: `needs` tells the words, `require_template` looks for them.

What always holds: settings of a row are plain values under names that mean nothing to the call that renders it. Nothing
here does I/O or knows a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rankup.errors import InputError

CARRIED: Final = ("chat_template_kwargs", "tools")
"""Fields of a row that go along with its conversations."""
SAID: Final = ("reasoning_content", "thinking", "tool_calls")
"""Fields of the assistant's messages that a template must know. Those of a tool's messages many leave out, rightly."""
MAX_SETTINGS: Final = 16
MAX_SETTING_CHARACTERS: Final = 1024

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}\Z")
_TAKEN: Final = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "padding"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
    }
)
"""Parameters of transformers' `apply_chat_template`, and what a template gets from it."""


def needs(row: Mapping[str, Any]) -> frozenset[str]:
    """The words that a chat template must have for this row; none for plain text, and for roles and contents alone."""
    words = set(row.get("chat_template_kwargs") or ())
    if row.get("tools"):
        words.add("tools")
    for content in row.values():
        for message in content if isinstance(content, list) else ():
            if isinstance(message, Mapping) and "role" in message:
                words.update(name for name in SAID if message.get(name))
    return frozenset(words)


def require_template(template: object, words: Iterable[str], *, whose: str) -> None:
    """Return if the template has every word. `template`: as a tokenizer has it, one or several by name, or None.

    Raises InputError, which names `whose` template it is.
    """
    text = "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")
    missing = [word for word in sorted(words) if not re.search(rf"\b{re.escape(word)}\b", text)]
    if missing:
        raise InputError(
            f"the rows have {', '.join(missing)}, which the chat template of {whose} leaves out",
            remedy="Import the base with a template that has it (rankup model import --chat-template), or leave it "
            "out of the rows.",
        )


def template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's conversations are rendered with, beside their messages: keyword arguments of `apply_chat_template`.

    Raises InputError: tools are no list of objects, and as `require_settings`.
    """
    settings = row.get("chat_template_kwargs") or {}
    require_settings(settings)
    tools = row.get("tools")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError("field tools: is not a list of objects")
    return {**settings, "tools": tools} if tools else dict(settings)


def require_settings(settings: object) -> None:
    """Return if these are settings of a chat template: few, short, plain values. Raises InputError."""
    if not isinstance(settings, Mapping) or len(settings) > MAX_SETTINGS:
        raise InputError(f"field chat_template_kwargs: is not an object of at most {MAX_SETTINGS} settings")
    for name, value in settings.items():
        if not isinstance(name, str) or not _NAME.match(name) or name in _TAKEN:
            raise InputError(f"field chat_template_kwargs: {str(name)[:64]!r} is no setting of a chat template")
        if not isinstance(value, bool | int | str) or len(str(value)) > MAX_SETTING_CHARACTERS:
            raise InputError(f"field chat_template_kwargs.{name}: is no short text, whole number, true or false")
