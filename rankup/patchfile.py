"""The patch file (docs/formats.md): its writer, and a reader that trusts nothing in it.

What always holds:
- a patch is made for one file, by digest, and leads to one file, by digest; both have the same tensors, dtypes and
  shapes in the same places;
- the reader knows from the base's tensors how long anything in a patch may be, and checks the index of the whole patch
  before it reads a block;
- the writer holds one block in memory, the reader the index and what it is asked for.

How a block is coded is the subject of `rankup.weightcodec`, what to do with whole files that of `rankup.patch`.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Final

import numpy as np

from rankup.errors import InputError, IntegrityError
from rankup.records import BlobRef
from rankup.tensorfile import DTYPE_BYTES, Content
from rankup.weightcodec import Blocks, encode_block, limit_bytes

FORMAT: Final = "rankup.patch/1"
OTHER_FILE: Final = "Apply the patches of all versions in between, in their order, or fetch the whole file."
"""What to do with a patch that is made for another file."""

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""name -> (dtype, shape), in the order of the file."""

_MAGIC: Final = FORMAT.encode() + b"\0\0"
_TRAILER: Final = struct.Struct("<32s32s32sQ32s")
"""Digests of the tensors' layout, of the base and of the result; length of the index; digest of all but the blocks."""
_DIGEST_BYTES: Final = 32


class PatchWriter:
    """Writes a patch piece by piece while both files come into being. A tensor of which nothing is given is unchanged.

    Tensors may come in any order, one after the other; the same tensors in the same order give the same bytes, however
    their pieces are cut. `file` is empty and writable.

    Raises:
        InputError: pieces that do not fit the tensors.
        SetupError: the installed pcodec writes another format.
    """

    def __init__(self, file: IO[bytes], tensors: Tensors) -> None:
        self._file = file
        self._plan = {
            name: (number, dtype, Blocks.of(dtype, shape))
            for number, (name, (dtype, shape)) in enumerate(tensors.items())
        }
        self._layout = _layout_digest(tensors)
        self._index: list[bytes] = []
        self._finished: set[str] = set()
        self._name: str | None = None
        self._position = 0
        self._block = (bytearray(), bytearray())
        self._coded: list[tuple[int, int]] = []
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._write(_MAGIC)

    def append(self, name: str, old: Content, new: Content) -> None:
        """The next raw little-endian bytes of one tensor, in the base and in the result; equally many."""
        if name != self._name:
            self._begin(name)
        before, after = memoryview(old), memoryview(new)
        _, dtype, blocks = self._plan[name]
        if before.nbytes != after.nbytes or self._position + after.nbytes > blocks.size_bytes:
            raise InputError(f"tensor {name!r} is given pieces that differ in length or are more than its shape has")
        if not after.nbytes:
            return
        before, after = before.cast("B"), after.cast("B")
        block_bytes = blocks.elements * DTYPE_BYTES[dtype]
        while after:
            filled = self._position % block_bytes
            taken = min(block_bytes - filled, after.nbytes)
            self._block[0][filled : filled + taken] = before[:taken]
            self._block[1][filled : filled + taken] = after[:taken]
            before, after = before[taken:], after[taken:]
            self._position += taken
            if self._position % block_bytes == 0 or self._position == blocks.size_bytes:
                self._write_block(dtype, blocks.width)

    def finish(self, base_sha256: str, result_sha256: str) -> BlobRef:
        """Write the end; `base_sha256` and `result_sha256` are those of the two complete files, in hex. Returns the
        patch's own digest and size; the file is not closed.

        Raises InputError: a tensor is not complete.
        """
        self._end()
        index = b"".join(self._index)
        trailer = _TRAILER.pack(
            self._layout, bytes.fromhex(base_sha256), bytes.fromhex(result_sha256), len(index), bytes(_DIGEST_BYTES)
        )[:-_DIGEST_BYTES]
        self._write(index + trailer + hashlib.sha256(_MAGIC + index + trailer).digest())
        return BlobRef(sha256=self._digest.hexdigest(), size_bytes=self._size_bytes)

    def _begin(self, name: str) -> None:
        self._end()
        if name not in self._plan or name in self._finished:
            raise InputError(f"tensor {name!r} is not one of the file, or was given before")
        self._name, self._position, self._coded = name, 0, []

    def _end(self) -> None:
        if self._name is None:
            return
        number, _, blocks = self._plan[self._name]
        if self._position != blocks.size_bytes:
            raise InputError(f"tensor {self._name!r} lacks {blocks.size_bytes - self._position} bytes")
        if any(length for length, _ in self._coded):
            self._index.append(np.array([number, *sum(self._coded, ())], "<u4").tobytes())
        self._finished.add(self._name)
        self._name = None

    def _write_block(self, dtype: str, width: int) -> None:
        coded = encode_block(dtype, width, *self._block)
        for buffer in self._block:
            buffer.clear()
        self._coded.append((len(coded), zlib.crc32(coded)))
        self._write(coded)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._size_bytes += len(content)


class PatchReader:
    """A patch behind `read_at(start, length) -> bytes`, for a base with these tensors; blocks are not read up front.

    Raises:
        IntegrityError: damaged, not well-formed, or made for a file with other tensors. Messages call it "the patch".
    """

    def __init__(self, read_at: Callable[[int, int], bytes], size_bytes: int, tensors: Tensors) -> None:
        self._read_at = read_at
        plan = [(Blocks.of(*tensor), DTYPE_BYTES[tensor[0]]) for tensor in tensors.values()]
        end = size_bytes - _TRAILER.size
        if end < len(_MAGIC) or read_at(0, len(_MAGIC)) != _MAGIC:
            raise IntegrityError(f"the patch is not a whole {FORMAT} file")
        trailer = read_at(end, _TRAILER.size)
        layout, base, result, index_bytes, checksum = _TRAILER.unpack(trailer)
        if index_bytes > min(end - len(_MAGIC), sum(4 + 8 * blocks.count for blocks, _ in plan)):
            raise IntegrityError("the patch is damaged, or made for another file", remedy=OTHER_FILE)
        index = read_at(end - index_bytes, index_bytes)
        if hashlib.sha256(_MAGIC + index + trailer[:-_DIGEST_BYTES]).digest() != checksum:
            raise IntegrityError("the patch is damaged: its index does not have its digest")
        if layout != _layout_digest(tensors):
            raise IntegrityError("the patch is made for another file", remedy=OTHER_FILE)
        self.base_sha256: str = base.hex()
        self.result_sha256: str = result.hex()
        self._places = _parse_index(index, plan, end - index_bytes)

    def read(self, number: int, block: int) -> bytes:
        """One coded block of the tensor with this number in the file, counted from 0; nothing for an unchanged one.

        Raises IntegrityError: it does not have its checksum.
        """
        start, length, checksum = self._places.get((number, block), (0, 0, 0))
        coded = self._read_at(start, length)
        if len(coded) != length or zlib.crc32(coded) != checksum:
            raise IntegrityError("the patch is damaged: a block does not have its checksum")
        return coded


def _parse_index(
    index: bytes, plan: Sequence[tuple[Blocks, int]], end: int
) -> dict[tuple[int, int], tuple[int, int, int]]:
    """The places of all blocks. `plan` has each tensor's blocks and bytes an element; blocks lie without gaps from the
    magic to `end`."""
    places: dict[tuple[int, int], tuple[int, int, int]] = {}
    if len(index) % 4:
        raise IntegrityError("the patch's index ends within a number")
    words = iter(np.frombuffer(index, "<u4").tolist())
    seen: set[int] = set()
    position = len(_MAGIC)
    for number in words:
        if number >= len(plan) or number in seen:
            raise IntegrityError(f"the patch's index names tensor {number} of {len(plan)}, or names it twice")
        seen.add(number)
        blocks, element_bytes = plan[number]
        block_bytes = blocks.elements * element_bytes
        for block in range(blocks.count):
            length, checksum = next(words, None), next(words, None)
            if length is None or checksum is None:
                raise IntegrityError("the patch's index ends within a tensor")
            if length > limit_bytes(min(block_bytes, blocks.size_bytes - block * block_bytes)):
                raise IntegrityError(f"the patch has {length} bytes for a block of tensor {number}")
            places[number, block] = position, length, checksum
            position += length
    if position != end:
        raise IntegrityError(f"the patch's blocks end at byte {position}, not at {end}")
    return places


def _layout_digest(tensors: Tensors) -> bytes:
    listed = [[name, dtype, list(shape)] for name, (dtype, shape) in tensors.items()]
    return hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).digest()
