"""The header of a delta file: which weights it changes, where their numbers lie, and what the file says about itself.

What always holds:
- one content has one header: `parse_header` refuses every spelling that `render_header` would not have written;
- nothing is believed: names, types, shapes and offsets are checked here, from at most 1 MiB of JSON, before anybody
  reads or allocates a byte of tensor data.

The order of the file is that of the safetensors library: tensors of I16 before those of I8, so that all of them are
aligned, and by name within a type. docs/formats.md has the format on one page. This module does not read files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from rankup.errors import DeltaError, TooLargeError
from rankup.message import Digest, Identifier, Message, TensorName, canonical_json
from rankup.recipe import MAX_RANK
from rankup.targets import MAX_SLICES, MAX_TARGETS

FORMAT: Final = "rankup.delta/1"
HEADER_MAX_BYTES: Final = 2**20
METADATA_KEY: Final = "rankup"
SUFFIXES: Final = (".lora_A", ".lora_B", ".lora_scales")

Bits = Literal[16, 8]
"""Width of a weight's mantissas."""
_Dtype = Literal["I16", "I8"]
_ITEM_BYTES: Final[Mapping[str, int]] = {"I16": 2, "I8": 1}
_DTYPE_OF_BITS: Final[Mapping[int, _Dtype]] = {16: "I16", 8: "I8"}
_SCALES_BYTES: Final = 2 * 4
"""Of one rank component: four int16."""


class DeltaHeader(Message):
    """What a delta says about itself. A file is only good for the lease that it names."""

    format: Literal["rankup.delta/1"] = FORMAT
    model: Identifier | None = None
    """For the reader's eyes: `base_manifest` already fixes the model."""
    round_id: Identifier
    lease_id: Identifier
    base_manifest: Digest


@dataclass(frozen=True)
class Dimensions:
    """The factors of one weight: `slices` products of (d_out, rank) and (rank, d_in), with mantissas of `bits` bits."""

    d_out: int
    rank: int
    d_in: int
    slices: int = 1
    bits: Bits = 16

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of the three tensors, in the order of `SUFFIXES`; with a first dimension for the slices where there are
        several."""
        stack = () if self.slices == 1 else (self.slices,)
        return (*stack, self.rank, self.d_in), (*stack, self.d_out, self.rank), (*stack, 4, self.rank)

    @property
    def dtypes(self) -> tuple[_Dtype, _Dtype, _Dtype]:
        mantissas = _DTYPE_OF_BITS[self.bits]
        return mantissas, mantissas, "I16"


@dataclass(frozen=True)
class Layout(Dimensions):
    """Where one weight's tensors lie, in bytes of the file: A at `start`, B behind it, the scales at `scales_start`."""

    start: int = 0
    scales_start: int = 0

    @property
    def size_bytes(self) -> int:
        """Of all three tensors."""
        return sum(end - start for start, end in self.extents)

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """Half-open ranges that hold the whole weight, in the order of the file: one, or two for int8."""
        a, b, scales = (self.slices * length for _, length in self.slice_extents(0))
        return merge_extents([(self.start, a + b), (self.scales_start, scales)])

    def slice_extents(self, index: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(offset, length) of slice `index` in A, B and the scales."""
        item = self.bits // 8
        a, b, scales = item * self.rank * self.d_in, item * self.d_out * self.rank, _SCALES_BYTES * self.rank
        b_start = self.start + self.slices * a
        return (self.start + index * a, a), (b_start + index * b, b), (self.scales_start + index * scales, scales)


def merge_extents(pieces: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(offset, length) of pieces -> half-open ranges that cover them, neighbours as one, sorted."""
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(pieces):
        if merged and merged[-1][1] == offset:
            merged[-1] = merged[-1][0], offset + length
        else:
            merged.append((offset, offset + length))
    return tuple(merged)


def check_target_name(name: str) -> None:
    """Raise DeltaError unless a weight can have this name.

    ".lora_" is kept for the suffixes: then no other tensor sorts between those of one weight.
    """
    try:
        _TENSOR_NAME.validate_python(name)
    except ValidationError as exc:
        raise DeltaError(f"{name[:300]!r} is no name of a weight") from exc
    if ".lora_" in name:
        raise DeltaError(f"{name!r}: the name of a weight must not hold '.lora_'")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of the weight in front of a DeltaError."""
    try:
        yield
    except DeltaError as exc:
        raise DeltaError(f"{name}: {exc.cause}", remedy=exc.remedy) from exc


_TENSOR_NAME: Final[TypeAdapter[str]] = TypeAdapter(TensorName)


# -- rendering ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: of which weight, which of the three (an index of `SUFFIXES`), and its type and shape."""

    name: str
    weight: str
    kind: int
    dtype: _Dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * prod(self.shape)


def order_tensors(dimensions: Mapping[str, Dimensions]) -> list[Tensor]:
    """Every tensor of a delta in the order of the file."""
    tensors = [
        Tensor(weight + SUFFIXES[kind], weight, kind, dtype, shape)
        for weight, dims in dimensions.items()
        for kind, (dtype, shape) in enumerate(zip(dims.dtypes, dims.shapes, strict=True))
    ]
    return sorted(tensors, key=lambda tensor: (tensor.dtype == "I8", tensor.name))


def render_header(header: DeltaHeader, tensors: Sequence[Tensor]) -> bytes:
    """Length and JSON of the container's header, padded to 8 bytes, as safetensors writes it.

    `tensors`: in the order of the file. Raises DeltaError (no weight) and TooLargeError (more names than fit).
    """
    if not tensors:
        raise DeltaError("a delta without a single weight")
    entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: canonical_json(header).decode()}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_MAX_BYTES:
        raise TooLargeError(f"the header of {len(tensors) // 3} weights takes {len(text)} bytes of {HEADER_MAX_BYTES}")
    return len(text).to_bytes(8, "little") + text


# -- parsing -----------------------------------------------------------------------------------------------------------

_Size = Annotated[int, Field(strict=True, ge=1, le=2**24)]
_Offset = Annotated[int, Field(strict=True, ge=0)]


class _Entry(Message):
    """One tensor in the safetensors header."""

    dtype: _Dtype
    shape: Annotated[tuple[_Size, ...], Field(min_length=2, max_length=3)]
    data_offsets: tuple[_Offset, _Offset]


def parse_header(raw: bytes, *, data_start: int, size_bytes: int) -> tuple[DeltaHeader, Mapping[str, Layout]]:
    """What `render_header` wrote, behind its length: the metadata, and weight -> layout, sorted by name.

    `data_start`: where the tensors begin in the file; `size_bytes`: of the file. Raises DeltaError that names the
    tensor, and TooLargeError.
    """
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise DeltaError("the header is not JSON") from exc
    if not isinstance(entries, dict):
        raise DeltaError("the header is not a JSON object")
    header = _parse_metadata(entries.pop("__metadata__", None))
    stated_entries = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    dimensions = _group(stated_entries)
    tensors = order_tensors(dimensions)
    starts: dict[str, int] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        stated = stated_entries[tensor.name].data_offsets
        if stated != (offset, end):
            raise DeltaError(f"{tensor.name}: data_offsets {list(stated)} should be {[offset, end]}")
        starts[tensor.name] = data_start + offset
        offset = end
    if data_start + offset != size_bytes:
        raise DeltaError(f"the tensors end at byte {data_start + offset}, the file at {size_bytes}")
    if render_header(header, tensors)[8:] != raw:
        raise DeltaError(
            "the header is not in canonical form: order, spacing or escapes differ from what write_delta makes"
        )
    a, _, scales = SUFFIXES
    layouts = {
        name: Layout(
            d_out=dims.d_out,
            rank=dims.rank,
            d_in=dims.d_in,
            slices=dims.slices,
            bits=dims.bits,
            start=starts[name + a],
            scales_start=starts[name + scales],
        )
        for name, dims in dimensions.items()
    }
    return header, layouts


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DeltaError(f"the header names {key[:80]!r} twice")
        result[key] = value
    return result


def _parse_metadata(metadata: object) -> DeltaHeader:
    if not isinstance(metadata, dict) or metadata.keys() != {METADATA_KEY}:
        raise DeltaError(f"the metadata must hold the key {METADATA_KEY!r} and nothing else")
    text = metadata[METADATA_KEY]
    if not isinstance(text, str):
        raise DeltaError(f"the metadata entry {METADATA_KEY!r} is not a string")
    try:
        header = DeltaHeader.model_validate_json(text)
    except ValidationError as exc:
        raise DeltaError(f"the metadata entry {METADATA_KEY!r} is wrong: {_places(exc)}") from exc
    except UnicodeError as exc:
        raise DeltaError(f"the metadata entry {METADATA_KEY!r} is not text") from exc
    if canonical_json(header).decode() != text:
        raise DeltaError(f"the metadata entry {METADATA_KEY!r} is not canonical JSON")
    return header


def _parse_entry(name: str, entry: object) -> _Entry:
    try:
        return _Entry.model_validate(entry)
    except ValidationError as exc:
        raise DeltaError(f"{name[:300]!r}: not an integer matrix of the delta format: {_places(exc)}") from exc


def _places(error: ValidationError) -> str:
    """Where and what, without the hostile input itself."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])[:80] or 'value'}: {item['msg'][:120]}"
        for item in error.errors()[:3]
    )


def _group(tensors: Mapping[str, _Entry]) -> dict[str, Dimensions]:
    """Weight -> dimensions, sorted by name; every weight with exactly its three tensors."""
    groups: dict[str, dict[str, _Entry]] = {}
    for name, entry in tensors.items():
        target, dot, kind = name.rpartition(".lora_")
        suffix = f"{dot}{kind}"
        if suffix not in SUFFIXES:
            raise DeltaError(f"{name[:300]!r}: no tensor of a delta; the names end in {', '.join(SUFFIXES)}")
        check_target_name(target)
        groups.setdefault(target, {})[suffix] = entry
    if not groups:
        raise DeltaError("a delta without a single weight")
    if len(groups) > MAX_TARGETS:
        raise TooLargeError(f"a delta of {len(groups)} weights; the limit is {MAX_TARGETS}")
    return {target: _dimensions(target, entries) for target, entries in sorted(groups.items())}


def _dimensions(target: str, entries: Mapping[str, _Entry]) -> Dimensions:
    for suffix in SUFFIXES:
        if suffix not in entries:
            raise DeltaError(f"{target}{suffix}: missing")
    a, b, scales = (entries[suffix] for suffix in SUFFIXES)
    if a.dtype != b.dtype:
        raise DeltaError(f"{target}: mantissas of {a.dtype} and {b.dtype}; A and B must have one type")
    if scales.dtype != "I16":
        raise DeltaError(f"{target}{SUFFIXES[2]}: dtype {scales.dtype}; scales are I16")
    slices = a.shape[0] if len(a.shape) == 3 else 1
    if len(a.shape) == 3 and not 2 <= slices <= MAX_SLICES:
        raise DeltaError(f"{target}: {slices} slices; a stack has 2 to {MAX_SLICES}, and one slice is no stack")
    (d_out, rank), d_in = b.shape[-2:], a.shape[-1]
    dimensions = Dimensions(d_out=d_out, rank=rank, d_in=d_in, slices=slices, bits=16 if a.dtype == "I16" else 8)
    found = (a.shape, b.shape, scales.shape)
    if found != dimensions.shapes:
        shapes = [list(shape) for shape in found]
        raise DeltaError(f"{target}: shapes {shapes} do not share one rank, or one number of slices")
    if rank > MAX_RANK:
        raise DeltaError(f"{target}: rank {rank} is above the format's limit of {MAX_RANK}")
    return dimensions
