"""What can be said in a round's file, field by field: read from the models, so that template, check and schema agree.

What always holds: every field of `RoundRequest` and of what it contains has an entry with its meaning, its unit where
the name tells one, what is allowed and its default. Nothing here reads a file or talks to a server.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rankup.message import Identifier
from rankup.protocol import RoundRequest

_NAMES: Final = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
_BOUNDS: Final = {Ge: "minimum", Gt: "exclusiveMinimum", Le: "maximum", Lt: "exclusiveMaximum"}
_IDENTIFIER: Final = next(part.pattern for part in get_args(Identifier) if isinstance(part, StringConstraints))
_UNITS: Final = {"_s": "seconds", "_gib": "GiB", "_tokens": "tokens"}


@dataclass(frozen=True)
class FieldNote:
    """One field as people read of it."""

    path: tuple[str, ...]
    """Names from the top of the file; `tiers` and its fields: ("tiers", "rank")."""
    meaning: str
    allowed: str
    """Kind, range and unit in words."""
    default: Any
    """As JSON has it; None is a value, `REQUIRED` is none."""
    parts: tuple[FieldNote, ...] = ()
    """The fields inside, where it is a mapping or a list of mappings."""
    is_list: bool = False
    is_free: bool = False
    """A mapping whose names are the writer's own."""

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


REQUIRED: Final = object()


@functools.cache
def round_fields() -> tuple[FieldNote, ...]:
    """The fields of a round's file, in the order of the model."""
    schema = described_schema()
    return _fields(RoundRequest, schema, schema, ())


def every_field(notes: tuple[FieldNote, ...] | None = None) -> Iterator[FieldNote]:
    """All fields, each before those inside it."""
    for note in round_fields() if notes is None else notes:
        yield note
        yield from every_field(note.parts)


def find_field(path: tuple[str, ...]) -> FieldNote | None:
    """The field of that name, numbers of list entries left out."""
    return next((note for note in every_field() if note.path == path), None)


def described_schema() -> dict[str, Any]:
    """The JSON schema of a round's file, with the meaning and the bounds of every field: for editors."""
    schema = RoundRequest.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A round of Rankup"}
    owners = {model.__name__: model for model in _models(RoundRequest)}
    for owner, node in {**schema["$defs"], "RoundRequest": schema}.items():
        model = owners[owner]
        for name, field in model.model_fields.items():
            told = node["properties"][name]
            if meaning := field_docs(model).get(name):
                told["description"] = meaning
            _tell_bounds(told, field)
    return schema


def _tell_bounds(node: dict[str, Any], field: FieldInfo) -> None:
    """Put the bounds of a number into its node: those behind a validator of our own are not there by themselves."""
    numbers = [choice for choice in node.get("anyOf", [node]) if choice.get("type") in ("integer", "number")]
    bounds = {_BOUNDS[type(one)]: getattr(one, _NAMES[type(one)]) for one in _metadata(field) if type(one) in _BOUNDS}
    for number in numbers:
        number |= bounds
        if number.get("exclusiveMinimum", -math.inf) >= number.get("minimum", math.inf):
            del number["minimum"]
        if number.get("exclusiveMaximum", math.inf) <= number.get("maximum", -math.inf):
            del number["maximum"]


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Constraints of a field, in the order in which they are checked, those of the choices of a union too."""
    yield from _unfolded(field.annotation)
    for entry in field.metadata:
        yield from entry.metadata if isinstance(entry, FieldInfo) else (entry,)


def _unfolded(annotation: Any) -> Iterator[Any]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _unfolded(args[0])
        for entry in args[1:]:
            yield from entry.metadata if isinstance(entry, FieldInfo) else (entry,)
    elif origin in (Union, UnionType):
        for choice in args:
            yield from _unfolded(choice)


@functools.cache
def field_docs(model: type[BaseModel]) -> Mapping[str, str]:
    """Field -> the sentence below it in the class, on one line and in the words of YAML."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                docs[field.target.id] = re.sub(r"\bNone\b", "null", " ".join(text.split()).replace("`", ""))
    return docs


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _models(inner)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, or that its list's entries are."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := _model_in(arg))), None)


def _fields(
    model: type[BaseModel], node: Mapping[str, Any], root: Mapping[str, Any], above: tuple[str, ...]
) -> tuple[FieldNote, ...]:
    notes = []
    for name, field in model.model_fields.items():
        told, path = node["properties"][name], (*above, name)
        inner = _model_in(field.annotation)
        parts = _fields(inner, root["$defs"][inner.__name__], root, path) if inner is not None else ()
        default = field.get_default(call_default_factory=True)
        notes.append(
            FieldNote(
                path=path,
                meaning=field_docs(model).get(name, ""),
                allowed=_words(told, root, name),
                default=REQUIRED if default is PydanticUndefined else told.get("default", _plain(default)),
                parts=parts,
                is_list=told.get("type") == "array",
                is_free=told.get("type") == "object",
            )
        )
    return tuple(notes)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _words(node: Mapping[str, Any], root: Mapping[str, Any], name: str) -> str:
    """What a node of a JSON schema allows."""
    if "anyOf" in node:
        return ", or ".join(_words(choice, root, name) for choice in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    match node.get("type"):
        case "integer":
            return "a whole number" + _range(node) + _unit(name)
        case "number":
            return "a number" + _range(node) + _unit(name)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "string" if node.get("pattern") == _IDENTIFIER:
            return "a name of at most 64 lower-case letters, digits, dots, dashes and underscores"
        case "string":
            return "text" + (f" of at most {node['maxLength']} characters" if "maxLength" in node else "")
        case "array":
            return f"a list of at most {node['maxItems']} entries" if "maxItems" in node else "a list"
        case _:
            return "a mapping"


def _range(node: Mapping[str, Any]) -> str:
    bounds = [
        (f"{word} {node[key]:.15g}")
        for key, word in (
            ("exclusiveMinimum", "above"),
            ("minimum", "from"),
            ("exclusiveMaximum", "to below"),
            ("maximum", "to"),
        )
        if key in node
    ]
    return " " + " ".join(bounds) if bounds else ""


def _unit(name: str) -> str:
    return next((f", in {unit}" for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")
