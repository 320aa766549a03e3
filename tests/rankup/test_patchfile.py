"""The patch file itself: written piece by piece, and read with distrust."""

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weightfiles import apply, nudged, ref_of, save, weights

from rankup.errors import InputError, IntegrityError
from rankup.patch import write_patch
from rankup.patchfile import PatchReader, PatchWriter
from rankup.tensorfile import TensorFile

# -- writing piece by piece --------------------------------------------------------------------------------------------


def write_pieces(old: Path, new: Path, order: list[str], cut: Callable[[bytes], Iterator[bytes]]) -> bytes:
    target = BytesIO()
    with TensorFile.open(old) as before, TensorFile.open(new) as after:
        writer = PatchWriter(target, {name: (e.dtype, e.shape) for name, e in before.entries.items()})
        for name in order:
            for pair in zip(cut(before.read(name)), cut(after.read(name)), strict=True):
                writer.append(name, *pair)
    assert writer.finish(ref_of(old).sha256, ref_of(new).sha256).size_bytes == len(target.getvalue())
    return target.getvalue()


@settings(max_examples=10)
@given(st.lists(st.integers(0, 1_800_000), max_size=6))
def test_the_bytes_of_a_patch_do_not_depend_on_how_its_pieces_are_cut(
    tmp_path_factory: pytest.TempPathFactory, places: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    bits = np.tile(weights(3, 1000, 3), 400)
    old = save(folder / "old", {"w": ("BF16", bits.shape, bits.tobytes()), "n": ("I8", (3,), b"abc")})
    bits = np.tile(nudged(bits[:, :1000], 4), 400)
    new = save(folder / "new", {"w": ("BF16", bits.shape, bits.tobytes()), "n": ("I8", (3,), b"abd")})

    def cut(content: bytes) -> Iterator[bytes]:
        ends = [0, *sorted(place for place in places if place < len(content)), len(content)]
        yield from (content[start:stop] for start, stop in pairwise(ends))

    write_patch(old, new, folder / "patch")
    assert write_pieces(old, new, ["w", "n"], cut) == (folder / "patch").read_bytes()


def test_tensors_may_come_in_any_order_and_unchanged_ones_not_at_all(tmp_path: Path) -> None:
    bits = weights(48, 32, 0)
    old, new = (
        save(
            tmp_path / f"v{number}",
            {
                "embed": ("BF16", (4,), b"unchange"),
                "proj": ("BF16", (48, 32), content.tobytes()),
                "norm": ("F32", (1,), bytes([number] * 4)),
                "steps": ("U8", (1,), bytes([number])),
            },
        )
        for number, content in enumerate([bits, nudged(bits, 1)])
    )
    for order in (["proj", "steps", "norm"], ["embed", "norm", "proj", "steps"]):
        (tmp_path / "patch").write_bytes(write_pieces(old, new, order, lambda content: iter([content])))
        apply(old, [tmp_path / "patch"], tmp_path / "out", new)
        assert (tmp_path / "out").read_bytes() == new.read_bytes()


@pytest.mark.parametrize(
    "pieces",
    [
        [("z", b"", b"")],
        [("a", b"1234", b"123")],
        [("a", b"12345", b"12345")],
        [("a", b"1234", b"1234"), ("a", b"5", b"5")],
        [("a", b"123", b"123")],
        [("a", b"123", b"123"), ("b", b"1", b"1")],
        [("a", b"1234", b"1234"), ("b", b"1", b"1"), ("a", b"", b"")],
    ],
    ids=["unknown", "unequal", "too long", "one too many", "incomplete", "interrupted", "taken up again"],
)
def test_pieces_that_do_not_fit_are_refused(pieces: list[tuple[str, bytes, bytes]]) -> None:
    def write() -> None:
        writer = PatchWriter(BytesIO(), {"a": ("U8", (4,)), "b": ("U8", (1,))})
        for piece in pieces:
            writer.append(*piece)
        writer.finish("00" * 32, "00" * 32)

    with pytest.raises(InputError):
        write()


# -- bombs -------------------------------------------------------------------------------------------------------------

SHAPES = {"a": ("BF16", (4, 4)), "b": ("F32", (0, 3)), "c": ("U8", (5,))}


def forge(blocks: bytes, index: bytes, *, index_bytes: int | None = None) -> PatchReader:
    """Open a patch for SHAPES whose checksums are right, whatever its index says."""
    target = BytesIO()
    PatchWriter(target, SHAPES).finish("00" * 32, "11" * 32)
    empty = target.getvalue()
    trailer = empty[16:-40] + struct.pack("<Q", len(index) if index_bytes is None else index_bytes)
    data = empty[:16] + blocks + index + trailer + hashlib.sha256(empty[:16] + index + trailer).digest()

    def read_at(start: int, length: int) -> bytes:
        assert length < 2**20
        return data[start : start + length]

    return PatchReader(read_at, len(data), SHAPES)


def record(number: int, *blocks: bytes, length: int | None = None) -> bytes:
    pairs = [(len(block) if length is None else length, zlib.crc32(block)) for block in blocks]
    return struct.pack("<I", number) + b"".join(struct.pack("<II", *pair) for pair in pairs)


@pytest.mark.parametrize(
    ("blocks", "index"),
    [
        (bytes(34), record(0, bytes(34))),
        (bytes(9), record(0, bytes(9), length=2**32 - 1)),
        (bytes(9), record(0, bytes(8))),
        (bytes(9), record(0, bytes(9), length=10)),
        (bytes(9), record(0)),
        (bytes(9), record(0, bytes(9)) + b"\0\0"),
        (bytes(8), record(0, bytes(4)) + record(0, bytes(4))),
        (b"", record(3)),
        (b"", record(2**32 - 1)),
        (b"", record(1, b"")),
    ],
    ids=[
        "a block that is too long",
        "a block of 4 GiB",
        "a byte between blocks and index",
        "a block that reaches into the index",
        "an index that ends in a tensor",
        "an index that ends in a number",
        "a tensor twice",
        "a tensor that is not there",
        "a tensor that cannot be there",
        "a block for no weight",
    ],
)
def test_an_index_that_is_not_well_formed_is_refused(blocks: bytes, index: bytes) -> None:
    with pytest.raises(IntegrityError, match="the patch"):
        forge(blocks, index)


@pytest.mark.parametrize("index_bytes", [5, 2**20, 2**40, 2**64 - 1])
def test_the_length_of_an_index_is_checked_before_it_is_read(index_bytes: int) -> None:
    with pytest.raises(IntegrityError, match="damaged"):
        forge(b"", b"", index_bytes=index_bytes)


def test_what_the_table_of_forgeries_varies_is_accepted() -> None:
    reader = forge(b"123456789", record(2, b"1234") + record(0, b"56789") + record(1))
    assert (reader.read(2, 0), reader.read(0, 0), reader.read(1, 0)) == (b"1234", b"56789", b"")
    assert (reader.base_sha256, reader.result_sha256) == ("00" * 32, "11" * 32)
