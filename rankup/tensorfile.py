"""Reading safetensors files by range and writing them canonically, without mapping or loading the whole file.

The container (github.com/huggingface/safetensors): 8 bytes little-endian header length, the header as JSON, then the
tensors' raw little-endian bytes in row-major order. What this reader adds to the usual one:
- the header's length is capped before it is read, duplicate names are refused;
- every extent must be exactly `product(shape) * size of dtype` bytes, and the extents must follow each other from 0 to
  the end of the file, without a gap or an overlap. So no byte of a file escapes the hashes of its tensors and header.

The writer is canonical: the same tensors and metadata give the same bytes, whatever the order they come in. Widest
dtypes stand first and the header is padded to 8 bytes, so every tensor is aligned to its element size.

It knows dtypes as names, not as arrays, and does not check hashes. Files of deltas have a stricter reader of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rankup.durable import read_range
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.records import BlobRef

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 8
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F32": 4,
    "I32": 4,
    "F64": 8,
    "I64": 8,
}

Content = bytes | bytearray | memoryview

_COPY_BYTES = 1024 * 1024


@dataclass(frozen=True)
class TensorExtent:
    """Where a tensor lies: bytes `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file behind `read_at(start, length) -> bytes`; only the header is read up front.

    Raises:
        IntegrityError: the file breaks the rules in the module's docstring, or `read_at` returned too few bytes.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._read_at = read_at
        self._close: Callable[[], None] | None = None
        self.size_bytes = size_bytes
        self.entries, self.metadata = _parse(self._read, size_bytes)

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Open a local file; close it with `close` or a `with` block."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as exc:
            raise NotFoundError(f"there is no file {path}", remedy="Pull the version again.") from exc
        except OSError as exc:
            raise InputError(f"cannot read {path}: {exc.strerror}") from exc
        try:
            file = cls(lambda start, length: read_range(descriptor, start, length), os.fstat(descriptor).st_size)
        except BaseException:
            os.close(descriptor)
            raise
        file._close = lambda: os.close(descriptor)
        return file

    def close(self) -> None:
        if self._close is not None:
            self._close()
            self._close = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        """Names in the order of their bytes."""
        return iter(self.entries)

    def read(self, name: str) -> bytes:
        """Raw bytes of one tensor. Raises NotFoundError: the file has no such tensor."""
        extent = self._extent(name)
        return self._read(extent.start, extent.stop - extent.start)

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """`length` raw bytes of one tensor from its byte `start` on.

        Raises:
            NotFoundError: the file has no such tensor.
            InputError: the tensor ends before.
        """
        extent = self._extent(name)
        if start < 0 or length < 0 or extent.start + start + length > extent.stop:
            raise InputError(f"tensor {name!r} has no {length} bytes at {start}")
        return self._read(extent.start + start, length)

    def _extent(self, name: str) -> TensorExtent:
        extent = self.entries.get(name)
        if extent is None:
            raise NotFoundError(f"the file has no tensor {name!r}", remedy="Check the manifest of this version.")
        return extent

    def _read(self, start: int, length: int) -> bytes:
        data = self._read_at(start, length)
        if len(data) != length:
            raise IntegrityError(f"the tensor file ends early: {len(data)} of {length} bytes at {start}")
        return data


def _parse(read: Callable[[int, int], bytes], size_bytes: int) -> tuple[dict[str, TensorExtent], dict[str, str]]:
    if size_bytes < 8:
        raise IntegrityError(f"a tensor file of {size_bytes} bytes has no header")
    header_bytes = int.from_bytes(read(0, 8), "little")
    if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise IntegrityError(f"the tensor file's header claims {header_bytes} bytes")
    try:
        header = json.loads(read(8, header_bytes), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(f"the tensor file's header is not valid: {exc}") from exc
    if not isinstance(header, dict):
        raise IntegrityError("the tensor file's header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise IntegrityError("the tensor file's metadata is not a table of strings")
    extents = {name: _extent(name, entry, 8 + header_bytes) for name, entry in header.items()}
    ordered = dict(sorted(extents.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = 8 + header_bytes
    for name, extent in ordered.items():
        if extent.start != position:
            raise IntegrityError(f"tensor {name!r} starts at byte {extent.start}, not at {position}")
        position = extent.stop
    if position != size_bytes:
        raise IntegrityError(f"the tensors end at byte {position} of {size_bytes}")
    return ordered, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _extent(name: str, entry: object, base: int) -> TensorExtent:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise IntegrityError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise IntegrityError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise IntegrityError(f"tensor {name!r} has no valid shape and extent")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise IntegrityError(f"tensor {name!r} has {offsets[1] - offsets[0]} bytes for {dtype} {tuple(shape)}")
    return TensorExtent(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**60 for item in value)


class TensorFileWriter:
    """Writes a safetensors file piece by piece, straight to its final place: shapes are known before values are.

    `file` is empty, writable and, where tensors are not written in the order of the file (`order`), also seekable and
    readable: then what could not be hashed on the way is read back at the end.

    Raises:
        InputError: an unknown dtype or too long a header.
    """

    def __init__(
        self,
        file: IO[bytes],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """tensors: name -> (dtype, shape)."""
        self._file = file
        self.order = tuple(sorted(tensors, key=lambda name: (-DTYPE_BYTES.get(tensors[name][0], 0), name)))
        """Names in the order of their bytes."""
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        lengths: dict[str, int] = {}
        position = 0
        for name in self.order:
            dtype, shape = tensors[name]
            if dtype not in DTYPE_BYTES:
                raise InputError(f"tensor {name!r} has the unknown dtype {dtype!r}")
            lengths[name] = math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + lengths[name]]}
            position += lengths[name]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise InputError(f"a header of {len(text)} bytes is above the limit of {MAX_HEADER_BYTES}")
        self.size_bytes = 8 + len(text) + position
        self._ends: dict[str, int] = {}
        end = 8 + len(text)
        for name in self.order:
            end += lengths[name]
            self._ends[name] = end
        self._next = {name: self._ends[name] - lengths[name] for name in self.order}
        """Where the next piece of each tensor goes."""
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._position = 0
        self._write(0, len(text).to_bytes(8, "little"))
        self._write(8, text)

    def append(self, name: str, content: Content) -> None:
        """The next raw little-endian bytes of one tensor.

        Raises:
            InputError: the file has no such tensor, or it has fewer bytes.
        """
        if name not in self._ends:
            raise InputError(f"the file has no tensor {name!r}")
        flat = memoryview(content)
        if self._next[name] + flat.nbytes > self._ends[name]:
            raise InputError(f"tensor {name!r} is given more bytes than its shape has")
        self._write(self._next[name], flat)
        self._next[name] += flat.nbytes

    def finish(self) -> BlobRef:
        """Hash and size of the complete file; it is not closed.

        Raises:
            InputError: a tensor is not complete.
        """
        if missing := [name for name in self.order if self._next[name] != self._ends[name]]:
            raise InputError(f"tensor {missing[0]!r} lacks {self._ends[missing[0]] - self._next[missing[0]]} bytes")
        if self._hashed != self.size_bytes:
            self._file.seek(self._hashed)
            while piece := self._file.read(_COPY_BYTES):
                self._digest.update(piece)
            self._file.seek(self.size_bytes)
        return BlobRef(sha256=self._digest.hexdigest(), size_bytes=self.size_bytes)

    def _write(self, start: int, content: Content) -> None:
        flat = memoryview(content)
        if start != self._position:
            self._file.seek(start)
        self._file.write(flat)
        self._position = start + flat.nbytes
        if start == self._hashed:
            self._digest.update(flat)
            self._hashed += flat.nbytes


def write_tensor_file(
    target: Path | IO[bytes],
    tensors: Mapping[str, tuple[str, tuple[int, ...], Content]],
    metadata: Mapping[str, str] | None = None,
) -> BlobRef:
    """Write name -> (dtype, shape, raw little-endian bytes) as a safetensors file; returns its hash and size.

    Raises:
        InputError: an unknown dtype, or bytes that do not fit the shape.
    """
    if isinstance(target, Path):
        with target.open("wb") as file:
            return write_tensor_file(file, tensors, metadata)
    writer = TensorFileWriter(target, {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}, metadata)
    for name in writer.order:
        writer.append(name, tensors[name][2])
    return writer.finish()
