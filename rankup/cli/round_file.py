"""A round's file, read and checked: every fault with its line, what is allowed, and the name that was probably meant.

What always holds: at most `MAX_FILE_BYTES` are read, no tag of YAML makes anything but plain values, a name that stands
twice is a fault, and what passes is a valid `RoundRequest`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from rankup.cli.round_fields import FieldNote, every_field, find_field, round_fields
from rankup.errors import InputError
from rankup.protocol import RoundRequest

if TYPE_CHECKING:
    from yaml.nodes import Node

MAX_FILE_BYTES: Final = 2**20
_Place = tuple[str | int, ...]
_SEE_TEMPLATE: Final = "`rankup round template` prints every field with what is allowed."


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a file."""

    path: str
    """Like `recipe.rank` or `tiers[0].rank`; empty: the file as a whole."""
    line: int | None
    """From 1; of the field, or of what it should stand in."""
    cause: str
    allowed: str = ""
    meant: str = ""
    """Full name of the field that was probably meant."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shown(self, file: str) -> str:
        place = file if self.line is None else f"{file}:{self.line}"
        words = f"{place}: {self.path}: {self.cause}" if self.path else f"{place}: {self.cause}"
        words += f"; allowed: {self.allowed}" if self.allowed else ""
        return words + (f"; did you mean {self.meant}?" if self.meant else "")


@dataclass(frozen=True)
class RoundFile:
    """What a file says, and on which line."""

    data: Mapping[str, Any]
    lines: Mapping[_Place, int]
    doubles: tuple[Fault, ...] = ()


def read_round_file(path: Path) -> RoundFile:
    """Raises InputError: no such file, too large, or not a mapping in YAML."""
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise InputError(f"{path} has more than {MAX_FILE_BYTES} bytes", remedy=_SEE_TEMPLATE)
        loader = yaml.SafeLoader(content.decode())
        try:
            root = loader.get_single_node()
            data = loader.construct_document(root) if root is not None else None
        finally:
            loader.dispose()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise InputError(f"cannot read {path}: {exc}", remedy=_SEE_TEMPLATE) from exc
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping with at least `model` and `dataset`", remedy=_SEE_TEMPLATE)
    lines: dict[_Place, int] = {}
    doubles = tuple(_walk(root, (), lines))
    return RoundFile(data, lines, doubles)


def _walk(node: Node | None, place: _Place, lines: dict[_Place, int]) -> Iterator[Fault]:
    """Note the line of everything below `node`; yields names that stand twice in one mapping."""
    from yaml.nodes import MappingNode, SequenceNode

    if isinstance(node, MappingNode):
        for key, value in node.value:
            below = (*place, str(key.value))
            if below in lines:
                yield Fault(_dotted(below), key.start_mark.line + 1, f"stands on line {lines[below]} too")
                continue
            lines[below] = key.start_mark.line + 1
            yield from _walk(value, below, lines)
    elif isinstance(node, SequenceNode):
        for number, value in enumerate(node.value):
            lines[*place, number] = value.start_mark.line + 1
            yield from _walk(value, (*place, number), lines)


def faults_of(file: RoundFile) -> list[Fault]:
    """All that is wrong with it, by line; empty: it can be opened."""
    faults = list(file.doubles)
    try:
        RoundRequest.model_validate(file.data)
    except ValidationError as exc:
        faults += _of_validation(exc, file.lines)
    return sorted(faults, key=lambda fault: (fault.line or 0, fault.path))


def require_sound(file: RoundFile, name: str) -> None:
    """Raises InputError that tells every fault on a line of its own."""
    faults = faults_of(file)
    if faults:
        raise InputError("\n       ".join(fault.shown(name) for fault in faults), remedy=_SEE_TEMPLATE)


def _of_validation(error: ValidationError, lines: Mapping[_Place, int]) -> Iterator[Fault]:
    told: set[_Place] = set()
    for found in error.errors():
        place = _place_of(found["loc"])
        if place in told:
            continue  # Each choice of a union has an error of its own.
        told.add(place)
        note = find_field(tuple(part for part in place if isinstance(part, str)))
        line = _line_of(place, lines)
        if found["type"] == "extra_forbidden":
            yield Fault(_dotted(place), line, "there is no such field", meant=_meant(place))
        elif found["type"] == "missing":
            yield Fault(_dotted(place), line, "is missing", allowed=note.allowed if note else "")
        else:
            cause = found["msg"].removeprefix("Value error, ")
            said = cause[:1].lower() + cause[1:]
            if note is None or isinstance(place[-1], int) or found["type"] == "value_error":
                yield Fault(_dotted(place), line, said if not place else f"{_short(found['input'])}: {said}")
            else:
                yield Fault(_dotted(place), line, f"{_short(found['input'])} does not fit", allowed=note.allowed)


def _place_of(loc: tuple[str | int, ...]) -> _Place:
    """Where in the file an error is: its location without the names of choices and checks."""
    place: _Place = ()
    inside: tuple[FieldNote, ...] = round_fields()
    free = False
    """Whether the names of the present mapping are the writer's own."""
    for part in loc:
        note = next((note for note in inside if note.name == part), None)
        if isinstance(part, int) or note is not None or (free and not part.startswith("[")):
            place = (*place, part)
        elif part == loc[-1] and inside:
            return (*place, part)  # An unknown name.
        if isinstance(part, str):
            inside = note.parts if note is not None else ()
            free = note is not None and note.is_free
    return place


def _line_of(place: _Place, lines: Mapping[_Place, int]) -> int | None:
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place)


def _meant(place: _Place) -> str:
    """The known field whose name is nearest: beside the unknown one, else anywhere."""
    name, above = str(place[-1]), tuple(part for part in place[:-1] if isinstance(part, str))
    beside = {note.name: note.dotted for note in every_field() if note.path[:-1] == above}
    anywhere: dict[str, str] = {}
    for note in every_field():
        anywhere.setdefault(note.name, note.dotted)
    for names, cutoff in ((beside, 0.75), (anywhere, 0.85), (beside, 0.55)):
        close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        if close:
            return names[close[0]]
    return ""


def _dotted(place: _Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 60 else words[:57] + "..."
