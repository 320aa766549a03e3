"""The delta file: the quantised factors of every weight that a volunteer trained, in a safetensors container.

For a weight NAME of shape (d_out, d_in) and a rank r of its own the file holds three tensors,

    NAME.lora_B       [d_out, r]    mantissas of B, int16 or int8
    NAME.lora_A       [r, d_in]     mantissas of A, of the same type
    NAME.lora_scales  [4, r]        int16; rows: exponents of B, exponents of A, max|B[:, k]|, max|A[k, :]|

each with a first dimension more for a stack of matrices, such as the weights of all experts: then every slice has
factors of its own. One metadata entry "rankup" is the canonical JSON of `DeltaHeader`. docs/formats.md has the format
on one page, `rankup.deltaheader` its header.

What always holds:
- one content has one file: the reader refuses every header that `write_delta` would not have written for that content;
- nothing is believed: names, types, shapes and offsets are checked before a byte of tensor data is read, and factors
  leave the reader only after `Factors.verify`;
- a hostile file costs at most the parsing of 1 MiB of JSON and the memory of one slice's factors, and ends in a
  RankupError.

It does not know rounds or signatures: who calls `check_structure` says what to expect. No pickle, no torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from rankup.deltaheader import (
    FORMAT,
    HEADER_MAX_BYTES,
    SUFFIXES,
    Bits,
    DeltaHeader,
    Dimensions,
    Layout,
    Tensor,
    check_target_name,
    merge_extents,
    naming,
    order_tensors,
    parse_header,
    render_header,
)
from rankup.durable import read_range, sync_folder
from rankup.errors import DeltaError, DiskFullError, InputError, NotFoundError, TooLargeError
from rankup.fixedpoint import Factors
from rankup.records import BlobRef
from rankup.targets import MAX_SLICES, Target

__all__ = [
    "FORMAT",
    "HEADER_MAX_BYTES",
    "SUFFIXES",
    "Change",
    "DeltaHeader",
    "DeltaReader",
    "Layout",
    "ReadAt",
    "check_structure",
    "write_delta",
]

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> that many bytes of the file."""

Change = Factors | Sequence[Factors]
"""What a delta does to one weight: one product, or one for each slice of a stack, all of the same shape and type."""

_NUMPY_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {"I16": np.dtype("<i2"), "I8": np.dtype("i1")}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_delta(path: Path, header: DeltaHeader, factors: Mapping[str, Change]) -> BlobRef:
    """Write a delta: all of it appears under `path`, or nothing does. The same content gives the same bytes.

    Raises DeltaError (no factors, a name that no weight can have, slices that differ in shape or type, values that the
    reader would refuse), TooLargeError (more names than the header can hold), DiskFullError, NotFoundError (no such
    folder), InputError (other trouble with the path).
    """
    stacks = {name: _stack_of(name, change) for name, change in factors.items()}
    tensors = order_tensors({name: _dimensions_of(name, stack) for name, stack in stacks.items()})
    head = render_header(header, tensors)
    digest, size_bytes = hashlib.sha256(), 0
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            for piece in _pieces(head, stacks, tensors):
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


def _stack_of(name: str, change: Change) -> Sequence[Factors]:
    check_target_name(name)
    stack = [change] if isinstance(change, Factors) else change
    if not 1 <= len(stack) <= MAX_SLICES:
        raise DeltaError(f"{name}: {len(stack)} slices; a weight has 1 to {MAX_SLICES}")
    with naming(name):
        for factors in stack:
            factors.verify()
    return stack


def _dimensions_of(name: str, stack: Sequence[Factors]) -> Dimensions:
    found = {
        Dimensions(
            d_out=factors.d_out,
            rank=factors.rank,
            d_in=factors.d_in,
            slices=len(stack),
            bits=16 if factors.b.dtype == np.int16 else 8,
        )
        for factors in stack
    }
    if len(found) != 1:
        raise DeltaError(f"{name}: its slices differ in shape, rank or type")
    return found.pop()


def _pieces(head: bytes, stacks: Mapping[str, Sequence[Factors]], tensors: Sequence[Tensor]) -> Iterable[bytes]:
    yield head
    for tensor in tensors:
        for factors in stacks[tensor.weight]:
            if SUFFIXES[tensor.kind] == ".lora_scales":
                scales = np.stack([factors.b_exp, factors.a_exp, factors.b_max, factors.a_max])
                yield scales.astype("<i2", copy=False).tobytes()
            else:
                mantissas = (factors.a, factors.b)[tensor.kind]
                yield mantissas.astype(_NUMPY_DTYPES[tensor.dtype], copy=False).tobytes()


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
        self.header, self.layouts = parse_header(raw, data_start=8 + length, size_bytes=size_bytes)

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

    def slices(self, name: str) -> int:
        """Of how many matrices the weight is a stack; 1 for an ordinary one. Raises NotFoundError (not in here)."""
        return self._layout(name).slices

    def factors(self, name: str, slice: int | None = None) -> Factors:  # noqa: A002 - the word for it
        """The factors of one weight, or of one slice of a stack, verified. `slice` may be left out for a single one.

        Costs one read for an int16 weight, at most two for an int8 one, and at most three for a slice of a stack.

        Raises DeltaError (values that no quantiser wrote, a file that ends early), NotFoundError (no such weight or
        slice here), InputError (a stack, and `slice` left out).
        """
        layout = self._layout(name)
        if slice is None and layout.slices > 1:
            raise InputError(f"{name} is a stack of {layout.slices} slices", remedy="Read it slice by slice.")
        index = slice or 0
        if not 0 <= index < layout.slices:
            raise NotFoundError(f"{name} has {layout.slices} slices, and no slice {index}", remedy="They count from 0.")
        pieces = layout.slice_extents(index)
        # What lies side by side is read at once: a request to a bucket costs as much as half a megabyte.
        blocks = {start: self._read(start, end - start) for start, end in merge_extents(list(pieces))}
        raw = []
        for offset, length in pieces:
            start = max(start for start in blocks if start <= offset)
            raw.append(memoryview(blocks[start])[offset - start : offset - start + length])
        mantissas = _NUMPY_DTYPES[layout.dtypes[0]]
        a = np.frombuffer(raw[0], mantissas).reshape(layout.rank, layout.d_in)
        b = np.frombuffer(raw[1], mantissas).reshape(layout.d_out, layout.rank)
        scales = np.frombuffer(raw[2], "<i2").astype(np.int16, copy=False).reshape(4, layout.rank)
        native = mantissas.newbyteorder("=")
        with naming(name if layout.slices == 1 else f"{name}[{index}]"):
            factors = Factors(
                b=b.astype(native, copy=False),
                b_exp=scales[0],
                a=a.astype(native, copy=False),
                a_exp=scales[1],
                b_max=scales[2],
                a_max=scales[3],
            )
            factors.verify()
        return factors

    def _layout(self, name: str) -> Layout:
        layout = self.layouts.get(name)
        if layout is None:
            raise NotFoundError(f"the delta does not change {name!r}", remedy="`names` lists what it changes.")
        return layout

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


# -- admission ---------------------------------------------------------------------------------------------------------


def check_structure(
    reader: DeltaReader,
    *,
    targets: Mapping[str, Target],
    header: DeltaHeader,
    partial: bool = False,
    mantissa_bits: Bits | None = None,
) -> None:
    """Check that a delta is one for this lease: its header, exactly these weights (`partial`: some of them), their
    shapes, slices, ranks and every value.

    `header` is the expected one; `model` counts only where both state it. `mantissa_bits`: the only width that
    mantissas may have; None allows both. Reads every tensor once, one slice at a time. Raises DeltaError that names
    what is wrong.
    """
    _check_header(reader.header, header)
    missing, extra = sorted(targets.keys() - reader.layouts.keys()), sorted(reader.layouts.keys() - targets.keys())
    if missing and not partial:
        raise DeltaError(f"{missing[0]}: missing ({len(missing)} of {len(targets)} weights are)")
    if extra:
        raise DeltaError(f"{extra[0]}: not a weight that this round trains ({len(extra)} such)")
    for name, layout in reader.layouts.items():
        _check_layout(name, layout, targets[name], mantissa_bits)
    zero = True
    for name in reader.names:
        for index in range(reader.slices(name)):
            zero &= reader.factors(name, index).is_zero
    if zero:
        raise DeltaError(
            "the delta is zero everywhere", remedy="Train for at least one step with a learning rate above 0."
        )


def _check_layout(name: str, layout: Layout, target: Target, mantissa_bits: Bits | None) -> None:
    found, wanted = _weight_shape(layout), _weight_shape(target)
    if found != wanted:
        raise DeltaError(f"{name}: made for a weight of shape {found}, not {wanted}")
    if layout.rank > target.rank:
        raise DeltaError(f"{name}: rank {layout.rank} is above this round's limit of {target.rank}")
    if mantissa_bits is not None and layout.bits != mantissa_bits:
        raise DeltaError(f"{name}: mantissas of {layout.bits} bits; this round asks for {mantissa_bits}")


def _weight_shape(weight: Layout | Target) -> list[int]:
    matrix = [weight.d_out, weight.d_in]
    return matrix if weight.slices == 1 else [weight.slices, *matrix]


def _check_header(found: DeltaHeader, expected: DeltaHeader) -> None:
    for field in ("round_id", "lease_id", "base_manifest"):
        if getattr(found, field) != getattr(expected, field):
            raise DeltaError(
                f"the delta is for {field} {getattr(found, field)}, not {getattr(expected, field)}",
                remedy="Submit the delta that was trained for this lease.",
            )
    if None not in (found.model, expected.model) and found.model != expected.model:
        raise DeltaError(f"the delta is for model {found.model}, not {expected.model}")
