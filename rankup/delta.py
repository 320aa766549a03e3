"""The delta file: the quantised factors of every weight that a volunteer trained, in a safetensors container.

For a weight NAME of shape (d_out, d_in) and a rank r of its own the file holds three int16 tensors,

    NAME.lora_B       [d_out, r]    mantissas of B
    NAME.lora_A       [r, d_in]     mantissas of A
    NAME.lora_scales  [4, r]        rows: exponents of B, exponents of A, max|B[:, k]|, max|A[k, :]|

and one metadata entry "rankup", the canonical JSON of `DeltaHeader`. docs/formats.md has the format on one page.

What always holds:
- one content has one file: the reader refuses every header that `write_delta` would not have written for that content;
- nothing is believed: names, types, shapes and offsets are checked before a byte of tensor data is read, and factors
  leave the reader only after `Factors.verify`;
- a hostile file costs at most the parsing of 1 MiB of JSON and the memory of one weight's factors, and ends in a
  RankupError.

It does not know rounds or signatures: who calls `check_structure` says what to expect. No pickle, no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from rankup.durable import read_range, sync_folder
from rankup.errors import DeltaError, DiskFullError, InputError, NotFoundError, TooLargeError
from rankup.fixedpoint import Factors, Int16Array
from rankup.protocol import MAX_RANK, MAX_TARGETS, Digest, Identifier, Message, Target, TensorName, canonical_json
from rankup.records import BlobRef

FORMAT: Final = "rankup.delta/1"
HEADER_MAX_BYTES: Final = 2**20
METADATA_KEY: Final = "rankup"
SUFFIXES: Final = (".lora_A", ".lora_B", ".lora_scales")
"""In the order of the file: tensors are sorted by name."""

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> that many bytes of the file."""


class DeltaHeader(Message):
    """What a delta says about itself. A file is only good for the lease that it names."""

    format: Literal["rankup.delta/1"] = FORMAT
    model: Identifier | None = None
    """For the reader's eyes: `base_manifest` already fixes the model."""
    round_id: Identifier
    lease_id: Identifier
    base_manifest: Digest


class _Entry(Message):
    """One tensor in the safetensors header."""

    dtype: Literal["I16"]
    shape: tuple[Annotated[int, Field(strict=True, ge=1, le=2**24)], Annotated[int, Field(strict=True, ge=1, le=2**24)]]
    data_offsets: tuple[Annotated[int, Field(strict=True, ge=0)], Annotated[int, Field(strict=True, ge=0)]]


_TENSOR_NAME: Final[TypeAdapter[str]] = TypeAdapter(TensorName)


@dataclass(frozen=True)
class Layout:
    """Where one weight's three tensors lie: A, B, scales, one after the other from `start` (in the file, in bytes)."""

    start: int
    d_out: int
    rank: int
    d_in: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """In the order of `SUFFIXES`."""
        return (self.rank, self.d_in), (self.d_out, self.rank), (4, self.rank)

    @property
    def size_bytes(self) -> int:
        return sum(2 * rows * columns for rows, columns in self.shapes)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_delta(path: Path, header: DeltaHeader, factors: Mapping[str, Factors]) -> BlobRef:
    """Write a delta: all of it appears under `path`, or nothing does. The same content gives the same bytes.

    Raises DeltaError (no factors, a name that no weight can have, values that the reader would refuse), TooLargeError
    (more names than the header can hold), DiskFullError, NotFoundError (no such folder), InputError (other trouble with
    the path).
    """
    for name, factor in factors.items():
        _check_target_name(name)
        with _naming(name):
            factor.verify()
    ordered = sorted(factors.items())
    head = _render_header(header, {name: (f.d_out, f.rank, f.d_in) for name, f in ordered})
    digest, size_bytes = hashlib.sha256(), 0
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            for piece in _pieces(head, (factor for _, factor in ordered)):
                digest.update(piece)
                size_bytes += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except FileNotFoundError as exc:
        raise NotFoundError(f"no folder {path.parent} to write {path.name} to") from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no room for the delta {path}") from exc
        raise InputError(f"cannot write the delta {path}: {exc.strerror}", remedy="Choose another folder.") from exc
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return BlobRef(sha256=digest.hexdigest(), size_bytes=size_bytes)


def _pieces(head: bytes, factors: Iterable[Factors]) -> Iterable[bytes]:
    yield head
    for factor in factors:
        scales = np.stack([factor.b_exp, factor.a_exp, factor.b_max, factor.a_max])
        for tensor in (factor.a, factor.b, scales):
            yield tensor.astype("<i2", copy=False).tobytes()


def _render_header(header: DeltaHeader, dimensions: Mapping[str, tuple[int, int, int]]) -> bytes:
    """Length and JSON of the container's header, padded to 8 bytes, as safetensors writes it. Names must be sorted."""
    if not dimensions:
        raise DeltaError("a delta without a single weight")
    entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: canonical_json(header).decode()}}
    offset = 0
    for name, (d_out, rank, d_in) in dimensions.items():
        for suffix, shape in zip(SUFFIXES, Layout(0, d_out, rank, d_in).shapes, strict=True):
            end = offset + 2 * shape[0] * shape[1]
            entries[name + suffix] = {"dtype": "I16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_MAX_BYTES:
        raise TooLargeError(f"the header of {len(dimensions)} weights takes {len(text)} bytes of {HEADER_MAX_BYTES}")
    return len(text).to_bytes(8, "little") + text


def _check_target_name(name: str) -> None:
    """ ".lora_" is kept for the suffixes: then no other tensor sorts between the three of one weight."""
    try:
        _TENSOR_NAME.validate_python(name)
    except ValidationError as exc:
        raise DeltaError(f"{name[:300]!r} is no name of a weight") from exc
    if ".lora_" in name:
        raise DeltaError(f"{name!r}: the name of a weight must not hold '.lora_'")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of the weight in front of a DeltaError."""
    try:
        yield
    except DeltaError as exc:
        raise DeltaError(f"{name}: {exc.cause}", remedy=exc.remedy) from exc


# -- reading -----------------------------------------------------------------------------------------------------------


class DeltaReader:
    """A delta behind `read_at`: a file, or an object in a bucket read by ranges.

    The constructor reads and checks the whole header and no tensor data. Raises DeltaError that names the tensor, or
    TooLargeError for a header above HEADER_MAX_BYTES; whatever `read_at` raises passes through.
    """

    header: DeltaHeader
    layouts: Mapping[str, Layout]
    """Weight -> where and how large its tensors are; sorted by name."""

    def __init__(self, read_at: ReadAt, size_bytes: int) -> None:
        self._read_at = read_at
        self.size_bytes = size_bytes
        self._close: Callable[[], None] | None = None
        if size_bytes < 8:
            raise DeltaError(f"a file of {size_bytes} bytes is no delta")
        length = int.from_bytes(self._read(0, 8), "little")
        if length > HEADER_MAX_BYTES:
            raise TooLargeError(f"the header claims {length} bytes; the limit is {HEADER_MAX_BYTES}")
        if 8 + length > size_bytes:
            raise DeltaError(f"the header claims {length} bytes, but the file has {size_bytes}")
        raw = self._read(8, length)
        self.header, self.layouts = _parse_header(raw, data_start=8 + length, size_bytes=size_bytes)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a local file; close the reader, or use it in a `with`. Raises NotFoundError, else as the constructor."""
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as exc:
            raise NotFoundError(f"there is no delta {path}") from exc
        except OSError as exc:
            raise InputError(f"cannot open the delta {path}: {exc.strerror}") from exc
        try:
            reader = cls(lambda offset, length: _read_range(descriptor, offset, length), os.fstat(descriptor).st_size)
        except BaseException:
            os.close(descriptor)
            raise
        reader._close = lambda: os.close(descriptor)
        return reader

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a delta that is in memory. Raises as the constructor."""
        return cls(lambda offset, length: data[offset : offset + length], len(data))

    def close(self) -> None:
        """Close the file that `open` opened; a second call does nothing."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that this delta changes, sorted."""
        return tuple(self.layouts)

    def factors(self, name: str) -> Factors:
        """The factors of one weight in one read, verified.

        Raises DeltaError (values that no quantiser wrote, a file that ends early), NotFoundError (no such weight here).
        """
        layout = self.layouts.get(name)
        if layout is None:
            raise NotFoundError(f"the delta does not change {name!r}", remedy="`names` lists what it changes.")
        data = np.frombuffer(self._read(layout.start, layout.size_bytes), dtype="<i2").astype(np.int16, copy=False)
        arrays: list[Int16Array] = []
        for rows, columns in layout.shapes:
            head, data = data[: rows * columns], data[rows * columns :]
            arrays.append(head.reshape(rows, columns))
        a, b, scales = arrays
        with _naming(name):
            factors = Factors(b=b, b_exp=scales[0], a=a, a_exp=scales[1], b_max=scales[2], a_max=scales[3])
            factors.verify()
        return factors

    def _read(self, offset: int, length: int) -> bytes:
        data = self._read_at(offset, length)
        if len(data) != length:
            raise DeltaError(f"the delta ends early: {len(data)} of {length} bytes at {offset}")
        return data


def _read_range(descriptor: int, offset: int, length: int) -> bytes:
    try:
        return read_range(descriptor, offset, length)
    except OSError as exc:
        raise InputError(f"cannot read the delta: {exc.strerror}") from exc


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DeltaError(f"the header names {key[:80]!r} twice")
        result[key] = value
    return result


def _parse_header(raw: bytes, *, data_start: int, size_bytes: int) -> tuple[DeltaHeader, Mapping[str, Layout]]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise DeltaError("the header is not JSON") from exc
    if not isinstance(entries, dict):
        raise DeltaError("the header is not a JSON object")
    header = _parse_metadata(entries.pop("__metadata__", None))
    tensors = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    dimensions = _group(tensors)
    offset = 0
    for name in sorted(tensors):
        entry = tensors[name]
        end = offset + 2 * entry.shape[0] * entry.shape[1]
        if entry.data_offsets != (offset, end):
            raise DeltaError(f"{name}: data_offsets {list(entry.data_offsets)} should be {[offset, end]}")
        offset = end
    if data_start + offset != size_bytes:
        raise DeltaError(f"the tensors end at byte {data_start + offset}, the file at {size_bytes}")
    if _render_header(header, dimensions)[8:] != raw:
        raise DeltaError(
            "the header is not in canonical form: order, spacing or escapes differ from what write_delta makes"
        )
    layouts: dict[str, Layout] = {}
    for name, (d_out, rank, d_in) in dimensions.items():
        layouts[name] = Layout(data_start, d_out, rank, d_in)
        data_start += layouts[name].size_bytes
    return header, layouts


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
        raise DeltaError(f"{name[:300]!r}: not an int16 matrix of the delta format: {_places(exc)}") from exc


def _places(error: ValidationError) -> str:
    """Where and what, without the hostile input itself."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])[:80] or 'value'}: {item['msg'][:120]}"
        for item in error.errors()[:3]
    )


def _group(tensors: Mapping[str, _Entry]) -> dict[str, tuple[int, int, int]]:
    """Weight -> (d_out, rank, d_in), sorted by name; every weight with exactly its three tensors of one rank."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, entry in tensors.items():
        target, dot, kind = name.rpartition(".lora_")
        suffix = f"{dot}{kind}"
        if suffix not in SUFFIXES:
            raise DeltaError(f"{name[:300]!r}: no tensor of a delta; the names end in {', '.join(SUFFIXES)}")
        _check_target_name(target)
        groups.setdefault(target, {})[suffix] = entry.shape
    if not groups:
        raise DeltaError("a delta without a single weight")
    if len(groups) > MAX_TARGETS:
        raise TooLargeError(f"a delta of {len(groups)} weights; the limit is {MAX_TARGETS}")
    dimensions: dict[str, tuple[int, int, int]] = {}
    for target, shapes in sorted(groups.items()):
        for suffix in SUFFIXES:
            if suffix not in shapes:
                raise DeltaError(f"{target}{suffix}: missing")
        (rank, d_in), (d_out, b_rank), (rows, s_rank) = (shapes[suffix] for suffix in SUFFIXES)
        if not rank == b_rank == s_rank or rows != 4:
            raise DeltaError(f"{target}: shapes {[list(shapes[suffix]) for suffix in SUFFIXES]} do not share one rank")
        if rank > MAX_RANK:
            raise DeltaError(f"{target}: rank {rank} is above the format's limit of {MAX_RANK}")
        dimensions[target] = (d_out, rank, d_in)
    return dimensions


# -- admission ---------------------------------------------------------------------------------------------------------


def check_structure(reader: DeltaReader, *, targets: Mapping[str, Target], max_rank: int, header: DeltaHeader) -> None:
    """Check that a delta is one for this lease: its header, exactly these weights, their shapes, ranks and every value.

    `header` is the expected one; `model` counts only where both state it. Reads every tensor once, one weight at a
    time. Raises DeltaError that names what is wrong.
    """
    _check_header(reader.header, header)
    missing, extra = sorted(targets.keys() - reader.layouts.keys()), sorted(reader.layouts.keys() - targets.keys())
    if missing:
        raise DeltaError(f"{missing[0]}: missing ({len(missing)} of {len(targets)} weights are)")
    if extra:
        raise DeltaError(f"{extra[0]}: not a weight that this round trains ({len(extra)} such)")
    for name, layout in reader.layouts.items():
        target = targets[name]
        if (layout.d_out, layout.d_in) != (target.d_out, target.d_in):
            raise DeltaError(
                f"{name}: made for a weight of shape {[layout.d_out, layout.d_in]}, not {[target.d_out, target.d_in]}"
            )
        if layout.rank > max_rank:
            raise DeltaError(f"{name}: rank {layout.rank} is above this round's limit of {max_rank}")
    zero = True
    for name in reader.names:
        zero &= reader.factors(name).is_zero
    if zero:
        raise DeltaError(
            "the delta is zero everywhere", remedy="Train for at least one step with a learning rate above 0."
        )


def _check_header(found: DeltaHeader, expected: DeltaHeader) -> None:
    for field in ("round_id", "lease_id", "base_manifest"):
        if getattr(found, field) != getattr(expected, field):
            raise DeltaError(
                f"the delta is for {field} {getattr(found, field)}, not {getattr(expected, field)}",
                remedy="Submit the delta that was trained for this lease.",
            )
    if None not in (found.model, expected.model) and found.model != expected.model:
        raise DeltaError(f"the delta is for model {found.model}, not {expected.model}")
