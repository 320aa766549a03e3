"""A round's file to start from: every field with its meaning, what is allowed and its default.

What always holds: it is YAML that `rankup round check` passes, and it asks for what the defaults ask for. It is made of
the models' own words (`round_fields`), so it is never older than they are.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Final

from rankup.cli.round_fields import FieldNote, round_fields

_WIDTH: Final = 100
_HEAD: Final = """\
# A round, or several in a row: `rankup round check FILE` checks it, `rankup round create FILE` opens it.
# Every field but model and dataset may be left out; what stands here are the defaults.
"""


def template(model: str = "my-model", dataset: str = "my-dataset") -> str:
    """The file as text."""
    return "\n".join([_HEAD, *_lines(round_fields(), {"model": model, "dataset": dataset}, 0)]).rstrip("\n") + "\n"


def _lines(notes: Iterable[FieldNote], given: dict[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    # Mappings come last: what follows them would seem to be in them.
    for note in sorted(notes, key=lambda note: bool(note.parts) and not note.is_list):
        yield from _comment(f"{note.meaning}", indent)
        if note.parts and not note.is_list:
            yield f"{indent}{note.name}:"
            yield from _lines(note.parts, {}, depth + 1)
            continue
        default = "required" if note.required else f"default: {_flow(note.default)}"
        yield from _comment(f"Allowed: {note.allowed}; {default}", indent)
        if note.is_list:
            yield from _entry(note.parts, indent)
        value = given.get(note.name, note.default)
        yield f"{indent}{note.name}: {_flow(value)}"
        if depth == 0:
            yield ""


def _entry(parts: tuple[FieldNote, ...], indent: str) -> Iterator[str]:
    """What one entry of a list of mappings looks like."""
    for number, part in enumerate(parts):
        lead = f"{indent}#   {'- ' if number == 0 else '  '}{part.name}: "
        yield from textwrap.wrap(
            f"{part.allowed}. {part.meaning}", _WIDTH, initial_indent=lead, subsequent_indent=f"{indent}#         "
        )


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def _flow(value: Any) -> str:
    """A value on one line; JSON is YAML, and plain words are."""
    if isinstance(value, str) and value.replace("-", "").replace("_", "").replace(".", "").isalnum():
        import yaml

        if yaml.safe_load(value) == value:
            return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)
