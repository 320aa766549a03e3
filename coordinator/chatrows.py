"""Conversations of rows, and the tools that go along with them: which are taken, and how they are cleaned.

Fields are those of `rankup.chat`. Other ways to write them that are taken: tools and calls without the object around
their function, and tools or a call's arguments as JSON text.

What always holds of what comes out:
- every message has `role` and `content`; contents are empty only beside calls, and where a tool answers nothing;
- objects have no field that is null: columnar files fill absent fields with it;
- names and values stay in the order that they were given in: a chat template shows them so.

Nothing here does I/O.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from rankup.chat import CARRIED, SAID, require_settings
from rankup.errors import InputError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
FIELDS = {"assistant": frozenset(SAID), "tool": frozenset({"name", "tool_call_id"})}
"""Of a message by its role, beside role and content."""
MAX_DEPTH = 32
"""Objects and lists within each other, of tools and arguments."""

_REMOVED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


class RowError(InputError):
    """A row breaks its shape; the message names the field but not the line."""


# -- reading -----------------------------------------------------------------------------------------------------------


def parse_messages(field: str, messages: list[Any]) -> list[dict[str, Any]]:
    """Check a conversation; `field` names it in what is raised. Raises RowError."""
    if not messages:
        raise RowError(f"field {field}: has no message")
    return [_message(f"field {field}[{number}]", message) for number, message in enumerate(messages)]


def parse_carried(row: Mapping[str, Any]) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs` of a row of conversations, those that say something. Raises RowError."""
    found: dict[str, Any] = {}
    if settings := row.get("chat_template_kwargs"):
        settings = _decoded("field chat_template_kwargs", settings)
        try:
            require_settings(settings)
        except InputError as exc:
            raise RowError(exc.cause) from exc
        found["chat_template_kwargs"] = settings
    if tools := row.get("tools"):
        tools = _decoded("field tools", tools)
        if not isinstance(tools, list):
            raise RowError(f"field tools: is {kind(tools)}, not a list")
        found["tools"] = [_tool(f"field tools[{number}]", tool) for number, tool in enumerate(tools)]
    # An empty list or object is no list and no object at all, as text too.
    return {name: value for name, value in found.items() if value}


def _message(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f"{where}: is {kind(message)}, not a message")
    # Columnar files fill absent fields with null, and some with nothing.
    present = {name: value for name, value in message.items() if value is not None}
    role, content = present.pop("role", None), present.pop("content", None)
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{where}.role: must be one of {', '.join(sorted(ROLES))}")
    present = {name: value for name, value in present.items() if value not in ("", [])}
    allowed = FIELDS.get(role, frozenset())
    if odd := sorted(present.keys() - allowed):
        more = "".join(f", {name}" for name in sorted(allowed))
        raise RowError(f"{where}: has the unknown field {odd[0]}; a message of {role} has role and content{more}")
    calls = present.pop("tool_calls", None)
    if content is None and calls:
        content = ""
    for name, value in {"content": content, **present}.items():
        if not isinstance(value, str):
            raise RowError(f"{where}.{name}: is {kind(value)}, not text")
    checked = {"role": role, "content": content, **present}
    if calls is None:
        return checked
    if not isinstance(calls, list):
        raise RowError(f"{where}.tool_calls: is {kind(calls)}, not a list")
    return checked | {"tool_calls": [_call(f"{where}.tool_calls[{n}]", call) for n, call in enumerate(calls)]}


def _call(where: str, call: object) -> dict[str, Any]:
    """`{"id": …, "type": "function", "function": {"name": …, "arguments": {…}}}`, the id where it has one."""
    if not isinstance(call, dict):
        raise RowError(f"{where}: is {kind(call)}, not a call")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where}: names no function")
    arguments = {} if arguments is None or arguments == "" else _decoded(f"{where}.arguments", arguments)
    if not isinstance(arguments, dict):
        raise RowError(f"{where}.arguments: is {kind(arguments)}, not an object")
    known = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
    return known | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(where: str, tool: object) -> dict[str, Any]:
    """`{"type": "function", "function": {"name": …, …}}` as it is; what is inside alone gets its outside."""
    if not isinstance(tool, dict):
        raise RowError(f"{where}: is {kind(tool)}, not an object")
    wrapped = isinstance(tool.get("function"), dict)
    function = tool["function"] if wrapped else tool
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{where}: names no function")
    return tool if wrapped else {"type": "function", "function": tool}


def _decoded(where: str, value: object) -> Any:
    """JSON text as what it says, anything else as it is; without nulls."""
    try:
        return _without_nulls(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError) as exc:
        raise RowError(f"{where}: is text that is not JSON: {exc}") from exc


def _without_nulls(value: Any, depth: int = 0) -> Any:
    _require_shallow(depth)
    if isinstance(value, dict):
        return {name: _without_nulls(each, depth + 1) for name, each in value.items() if each is not None}
    return [_without_nulls(each, depth + 1) for each in value] if isinstance(value, list) else value


def _require_shallow(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RowError(f"tools and arguments: more than {MAX_DEPTH} objects and lists within each other")


def kind(value: object) -> str:
    """What a value of JSON is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# -- cleaning ----------------------------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """NFC, line feeds only, no other control characters, no byte order mark, no half of a surrogate pair."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Removing can bring a letter and its accent together, so it comes first.
    return unicodedata.normalize("NFC", _REMOVED.sub("", text))


def clean_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with clean texts and no space around them; None where one of them says and does nothing."""
    cleaned = []
    for message in messages:
        texts = {name: clean_text(value).strip() for name, value in message.items() if isinstance(value, str)}
        calls = {"tool_calls": clean_value(message["tool_calls"])} if "tool_calls" in message else {}
        if not texts["content"] and not calls and texts["role"] != "tool":
            return None
        cleaned.append({name: text for name, text in texts.items() if text or name == "content"} | calls)
    return cleaned


def clean_value(value: Any, depth: int = 0) -> Any:
    """A value of JSON with clean names and texts, in its order. Raises RowError: too deep, or no number."""
    _require_shallow(depth)
    if isinstance(value, dict):
        return {clean_text(name): clean_value(each, depth + 1) for name, each in value.items()}
    if isinstance(value, list):
        return [clean_value(each, depth + 1) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError("tools and arguments: a number is infinite or not a number")
    return clean_text(value) if isinstance(value, str) else value


def clean_carried(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `parse_carried` found, clean. Raises RowError as `clean_value`."""
    return {name: clean_value(row[name]) for name in CARRIED if name in row}


# -- likeness ----------------------------------------------------------------------------------------------------------


def words_of(message: Mapping[str, Any]) -> str:
    """What a message says, thinks and calls, as text in which likeness is looked for."""
    said = [message[name] for name in ("reasoning_content", "thinking", "content") if message.get(name)]
    for call in message.get("tool_calls") or ():
        said.append(call["function"]["name"])
        said.append(json.dumps(call["function"]["arguments"], ensure_ascii=False))
    return "\n".join(said)
