"""One block of weights, coded as what it adds to the same block of the parent: from bytes to bytes, without any I/O.

How it works (docs/formats.md, "The patch file"): the bit patterns of both blocks are taken as integers that grow with
the number they stand for; their difference wraps, so every pair of patterns is covered. How large a difference is
likely to be depends on the step between numbers at the parent's exponent, and on how much its row and its column have
changed. So each weight has a level, from its exponent and from a scale of its row and of its column, which the block
carries; differences are sorted into one stream for each level, and each stream is entropy-coded by pcodec
(github.com/pcodec/pcodec), whose file format, version 4.1, is part of this one.

What always holds:
- decoding gives back the child's bytes for the parent that they were coded against, whatever the bits mean;
- a coded block is at most one byte longer than the block itself (`limit_bytes`), an unchanged one is empty;
- a decoder takes memory for one block, whatever the bytes claim: pcodec gets a buffer of the right size to fill, and
  only streams whose first byte says that they need no other memory (no mode, no delta encoding).

It does not check that the result is right: a wrong parent of the same size may well decode. Whole files have digests.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor

from rankup.dtypes import raw_bytes
from rankup.errors import IntegrityError, SetupError
from rankup.tensorfile import DTYPE_BYTES, Content

BLOCK_ELEMENTS: Final = 2**20
MAX_LEVELS: Final = 32

_RAW, _STREAMS = 0, 1
_HEAD: Final = struct.Struct("<BhB")
"""Kind, lowest level, number of levels. Then the lengths of all streams, u32: rows' scales, columns' scales, levels."""
_LEVEL_LIMIT: Final = 1023
_SCALE_LIMIT: Final = 127
_SCALED_FROM: Final = 32
"""Scales pay where there are so many weights for each."""
_PCO_HEADER: Final = b"\x04\x01"
"""What pcodec writes ahead of a file: the version of its format."""
_PLAIN_CHUNK: Final = 0
"""First byte of a pcodec chunk: four bits of mode, four bits of delta encoding. Others may ask for much memory."""
_EFFORT: Final = 8
_RARE: Final = 1000
_FEW: Final = 256
_PART: Final = 2**17
_TOP: Final = 16
_OCTAVES: Final = 14
"""Changes are measured to this many octaves below those of the largest weights."""

_Signed = npt.NDArray[np.signedinteger[Any]]
_Levels = npt.NDArray[np.int16]


@dataclass(frozen=True)
class _Float:
    """A floating format as integers of its own width."""

    signed: np.dtype[Any]
    unsigned: np.dtype[Any]
    wide: np.dtype[Any]
    pco_name: str
    mantissa_bits: int
    exponent_mask: int

    def ordered(self, bits: _Signed) -> _Signed:
        """Bit patterns <-> integers in the order of the numbers: negative ones have all bits but the sign turned."""
        info = np.iinfo(self.signed)
        turned: _Signed = bits >> (info.bits - 1)
        turned &= info.max
        turned ^= bits
        return turned

    def exponents(self, bits: _Signed) -> _Levels:
        return ((bits.view(self.unsigned) >> self.mantissa_bits) & self.exponent_mask).astype(np.int16)


_FLOATS: Final[Mapping[str, _Float]] = {
    "BF16": _Float(np.dtype("<i2"), np.dtype("<u2"), np.dtype("i4"), "i16", 7, 0xFF),
    "F16": _Float(np.dtype("<i2"), np.dtype("<u2"), np.dtype("i4"), "i16", 10, 0x1F),
    "F32": _Float(np.dtype("<i4"), np.dtype("<u4"), np.dtype("i8"), "i32", 23, 0xFF),
}


@dataclass(frozen=True)
class Blocks:
    """How a tensor is cut: into blocks of `elements`, the last one shorter, each of whole rows of `width`."""

    elements: int
    width: int
    count: int
    size_bytes: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...]) -> Blocks:
        """Rows of a matrix or a stack are its last dimension; any other tensor, and one with longer rows than a block,
        is cut as one long row."""
        width = shape[-1] if len(shape) > 1 and 0 < shape[-1] <= BLOCK_ELEMENTS else 0
        elements = BLOCK_ELEMENTS // width * width if width else BLOCK_ELEMENTS
        return cls(elements, width, -(-math.prod(shape) // elements), math.prod(shape) * DTYPE_BYTES[dtype])


def limit_bytes(size_bytes: int) -> int:
    """The longest that a block of `size_bytes` may be when it is coded."""
    return size_bytes + 1


def encode_block(dtype: str, width: int, old: Content, new: Content) -> bytes:
    """`new` as a change of `old`: raw little-endian bytes of equally many elements, at most BLOCK_ELEMENTS, in rows of
    `width` (0: one row).

    The same arguments give the same bytes for one version of pcodec. Nothing at all where `new` equals `old`.

    Raises:
        SetupError: the installed pcodec writes another format.
    """
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    if np.array_equal(before, after):
        return b""
    raw = bytes([_RAW]) + bytes(new)
    kind = _FLOATS.get(dtype)
    if kind is None:
        return raw
    coded = _encode(
        kind, width or before.size // kind.signed.itemsize, before.view(kind.signed), after.view(kind.signed)
    )
    return coded if len(coded) < len(raw) else raw


def decode_block(dtype: str, width: int, old: Content, coded: bytes) -> Content:
    """The raw bytes of which `encode_block` made `coded`.

    Raises:
        IntegrityError: `coded` is not well-formed, or does not fit `old`.
    """
    size_bytes = memoryview(old).nbytes
    if not coded:
        return old
    if len(coded) > limit_bytes(size_bytes):
        raise IntegrityError(f"{len(coded)} bytes for a block of {size_bytes}")
    if coded[0] == _RAW:
        if len(coded) != limit_bytes(size_bytes):
            raise IntegrityError(f"{len(coded) - 1} raw bytes for a block of {size_bytes}")
        return memoryview(coded)[1:]
    kind = _FLOATS.get(dtype)
    if coded[0] != _STREAMS or kind is None:
        raise IntegrityError(f"a block of {dtype} of the unknown kind {coded[0]}")
    before = np.frombuffer(old, kind.signed)
    return raw_bytes(_decode(kind, width or before.size, before, coded))


# -- one stream for each level -----------------------------------------------------------------------------------------


def _encode(kind: _Float, width: int, before: _Signed, after: _Signed) -> bytes:
    difference = kind.ordered(after)
    difference -= kind.ordered(before)
    levels = kind.exponents(before)
    scales = _measure_scales(kind, width, difference, levels)
    _scale_levels(levels, width, *scales)
    lowest, count = _choose_levels(difference, levels)
    sorted_parts = [
        (difference[part.start : part.stop][part.order], part.bounds) for part in _sort(levels, lowest, count)
    ]
    streams = [_write_stream(values) for values in scales]
    streams += [
        _write_stream(np.concatenate([values[bounds[i] : bounds[i + 1]] for values, bounds in sorted_parts]))
        for i in range(count)
    ]
    lengths = np.array([len(stream) for stream in streams], "<u4")
    return b"".join([_HEAD.pack(_STREAMS, lowest, count), lengths.tobytes(), *streams])


def _decode(kind: _Float, width: int, before: _Signed, coded: bytes) -> _Signed:
    lowest, count, streams = _split(coded)
    levels = kind.exponents(before)
    _scale_levels(levels, width, _read_scales(streams[0], before.size // width), _read_scales(streams[1], width))
    parts = _sort(levels, lowest, count)
    difference = np.empty(before.size, kind.signed)
    for i, stream in enumerate(streams[2:]):
        places = [part.order[part.bounds[i] : part.bounds[i + 1]] for part in parts]
        values = _read_stream(kind.pco_name, stream, np.empty(sum(len(place) for place in places), kind.signed))
        taken = 0
        for part, place in zip(parts, places, strict=True):
            difference[part.start : part.stop][place] = values[taken : taken + len(place)]
            taken += len(place)
    difference += kind.ordered(before)
    return kind.ordered(difference)


def _split(coded: bytes) -> tuple[int, int, list[bytes]]:
    """Lowest level, number of levels, and the streams: two of scales, then one for each level."""
    if len(coded) < _HEAD.size:
        raise IntegrityError("a block ends in its head")
    _, lowest, count = _HEAD.unpack_from(coded)
    position = _HEAD.size + 4 * (2 + count)
    if not 1 <= count <= MAX_LEVELS or abs(lowest) > _LEVEL_LIMIT or len(coded) < position:
        raise IntegrityError(f"a block of {len(coded)} bytes has {count} levels from {lowest} on")
    lengths = np.frombuffer(coded, "<u4", 2 + count, _HEAD.size).tolist()
    if position + sum(lengths) != len(coded):
        raise IntegrityError(f"streams of {sum(lengths)} bytes in a block of {len(coded)}")
    streams = []
    for length in lengths:
        streams.append(coded[position : position + length])
        position += length
    return lowest, count, streams


def _measure_scales(kind: _Float, width: int, difference: _Signed, exponents: _Levels) -> tuple[_Levels, _Levels]:
    """How much each row and each column has changed, in half octaves, the middle one 0; empty where scales do not pay.

    Sums are of integers, so they are the same on every machine.
    """
    rows = difference.size // width
    if difference.size < _SCALED_FROM * (rows + width):
        return np.empty(0, np.int16), np.empty(0, np.int16)
    change = np.abs(difference.astype(kind.wide)) >> max(0, kind.mantissa_bits - 15)
    top = int(np.partition(exponents[:: _step(exponents)], -_TOP)[-_TOP])
    change <<= np.clip(exponents - (top - _OCTAVES), 0, _OCTAVES)
    change = change.reshape(rows, width)
    row_scales = _half_octaves(change.sum(axis=1, dtype=np.int64))
    change >>= ((row_scales - row_scales.min()) >> 1)[:, None]
    return row_scales, _half_octaves(change.sum(axis=0, dtype=np.int64))


def _half_octaves(sums: npt.NDArray[np.int64]) -> _Levels:
    logarithms = 2 * np.log2(np.maximum(sums, 1))
    scales: _Levels = np.rint(logarithms - np.median(logarithms)).astype(np.int16)
    return np.clip(scales, -_SCALE_LIMIT, _SCALE_LIMIT, out=scales)


def _read_scales(stream: bytes, count: int) -> _Levels:
    scales: _Levels = _read_stream("i16", stream, np.empty(count if stream else 0, np.int16))
    if scales.size and (scales.min() < -_SCALE_LIMIT or scales.max() > _SCALE_LIMIT):
        raise IntegrityError(f"a scale is beyond {_SCALE_LIMIT}")
    return scales


def _scale_levels(levels: _Levels, width: int, row_scales: _Levels, column_scales: _Levels) -> None:
    """Exponents become levels, in place: twice the exponent, less the scales of row and column."""
    levels <<= 1
    table = levels.reshape(-1, width)
    if row_scales.size:
        table -= row_scales[:, None]
    if column_scales.size:
        table -= column_scales


def _choose_levels(difference: _Signed, levels: _Levels) -> tuple[int, int]:
    """The lowest level with a stream of its own, and how many levels have one. Rare ones below and above share the
    first and the last, since a stream costs some fifty bytes whatever it holds. Only changed weights count: far above
    them a change is less than a step, and all differences are 0."""
    step = _step(levels)
    changed = levels[::step][difference[::step] != 0]
    if not changed.size:
        changed = levels[difference != 0]
    least = int(changed.min())
    reached = np.concatenate([[0], np.cumsum(np.bincount(changed - least, minlength=MAX_LEVELS))])
    window = int(np.argmax(reached[MAX_LEVELS:] - reached[:-MAX_LEVELS]))
    within = np.sort(changed[(changed >= least + window) & (changed < least + window + MAX_LEVELS)])
    rare = min(max(_FEW // step, levels.size // step // _RARE), (within.size - 1) // 2)
    first, last = int(within[rare]), int(within[-1 - rare])
    return first, last - first + 1


def _step(levels: _Levels) -> int:
    """Every so many weights are a sample from all columns; 1 for a small block."""
    return levels.size // 2**16 | 1


@dataclass(frozen=True)
class _Part:
    """Elements `start` to `stop` of a block: their positions in the order of their streams, and where each stream
    begins in that order and the last one ends."""

    start: int
    stop: int
    order: npt.NDArray[np.intp]
    bounds: list[int]


def _sort(levels: _Levels, lowest: int, count: int) -> list[_Part]:
    """Sort a block in parts that stay in the processor's cache; within a stream, elements keep their order."""
    parts = []
    for start in range(0, levels.size, _PART):
        keys = np.clip(levels[start : start + _PART], lowest, lowest + count - 1)
        keys -= lowest
        keys = keys.astype(np.uint8)
        order = np.argsort(keys, kind="stable")
        bounds = np.searchsorted(keys, np.arange(count + 1), sorter=order).tolist()
        parts.append(_Part(start, start + keys.size, order, bounds))
    return parts


# -- pcodec ------------------------------------------------------------------------------------------------------------


def _write_stream(values: _Signed) -> bytes:
    """Chunk metadata and its only page; nothing at all for no values."""
    if not values.size:
        return b""
    file = FileCompressor()
    if file.write_header() != _PCO_HEADER:
        raise SetupError("the installed pcodec writes another format", remedy="Install pcodec 1.1.")
    config = ChunkConfig(
        compression_level=_EFFORT,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(BLOCK_ELEMENTS),
    )
    chunk = file.chunk_compressor(values, config)
    return bytes(chunk.write_meta() + chunk.write_page(0))


def _read_stream(pco_name: str, stream: bytes, values: _Signed) -> _Signed:
    """Fill `values` from exactly `stream`, which is empty for no values only."""
    if bool(stream) != bool(values.size):
        raise IntegrityError(f"a stream of {len(stream)} bytes for {values.size} values")
    if not stream:
        return values
    if stream[0] != _PLAIN_CHUNK:
        raise IntegrityError("a stream is not coded the plain way")
    with _pcodec_errors():
        file, _ = FileDecompressor.new(_PCO_HEADER)
        chunk, meta_bytes = file.chunk_decompressor(stream, pco_name)
        progress, page_bytes = chunk.read_page_into(stream[meta_bytes:], values.size, values)
    if not progress.finished or progress.n_processed != values.size or meta_bytes + page_bytes != len(stream):
        raise IntegrityError(f"a stream does not hold {values.size} values")
    return values


@contextmanager
def _pcodec_errors() -> Iterator[None]:
    """Broken input is a RuntimeError or a panic of Rust, which is no Exception and has no class to import."""
    try:
        yield
    except RuntimeError as exc:
        raise IntegrityError(f"a stream cannot be decoded: {exc}") from exc
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise
        raise IntegrityError("a stream makes its decoder panic") from exc
