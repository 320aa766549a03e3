"""Reading tensor files by range, and writing them canonically."""

import contextlib
import hashlib
import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.errors import InputError, IntegrityError, NotFoundError, RankupError
from rankup.tensorfile import DTYPE_BYTES, TensorFile, TensorFileWriter, write_tensor_file

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), max_size=5
)


def read(data: bytes) -> TensorFile:
    return TensorFile(lambda start, length: data[start : start + length], len(data))


def raw(header: Any, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def filled(table: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    rng = np.random.default_rng(0)
    return {n: (d, s, rng.bytes(int(np.prod(s, dtype=int)) * DTYPE_BYTES[d])) for n, (d, s) in table.items()}


@given(tensors)
def test_what_is_written_is_read_whatever_the_order(table: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    content = filled(table)
    first, second = BytesIO(), BytesIO()
    ref = write_tensor_file(first, content, {"format": "pt"})
    assert write_tensor_file(second, dict(reversed(content.items())), {"format": "pt"}) == ref
    assert first.getvalue() == second.getvalue()
    file = read(first.getvalue())
    assert {name: (e.dtype, e.shape, file.read(name)) for name, e in file.entries.items()} == content
    assert all(entry.start % DTYPE_BYTES[entry.dtype] == 0 for entry in file.entries.values())


def test_the_safetensors_library_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays: dict[str, np.ndarray[Any, Any]] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.int64),
    }
    ours = {n: ("F32" if a.dtype == np.float32 else "I64", tuple(a.shape), a.tobytes()) for n, a in arrays.items()}
    write_tensor_file(tmp_path / "ours", ours, {"format": "pt"})
    assert all((load_file(tmp_path / "ours")[name] == array).all() for name, array in arrays.items())
    save_file(arrays, tmp_path / "theirs")
    with TensorFile.open(tmp_path / "theirs") as file:
        assert {name: file.read(name) for name in file} == {name: array.tobytes() for name, array in arrays.items()}


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("header longer than the file", (99).to_bytes(8, "little") + b"{}"),
    ("header of 2^60 bytes", (2**60).to_bytes(8, "little") + b"{}"),
    ("not JSON", raw(b"{")),
    ("a list", raw([])),
    ("nested too deep", raw(b"[" * 100_000)),
    ("a name twice", raw(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), b"12345678")),
    ("unknown dtype", raw({"a": {**F32, "dtype": "F4"}}, b"12345678")),
    ("dtype of another type", raw({"a": {**F32, "dtype": ["F32"]}}, b"12345678")),
    ("a field too many", raw({"a": {**F32, "x": 1}}, b"12345678")),
    ("extent does not fit the shape", raw({"a": {**F32, "shape": [3]}}, b"12345678")),
    ("negative shape", raw({"a": {**F32, "shape": [-2]}}, b"12345678")),
    ("shape of booleans", raw({"a": {**F32, "shape": [True, 2]}}, b"12345678")),
    ("nine dimensions", raw({"a": {**F32, "shape": [2] + [1] * 8}}, b"12345678")),
    ("a gap", raw({"a": {**F32, "data_offsets": [8, 16]}}, b"1234567812345678")),
    ("an overlap", raw({"a": F32, "b": F32}, b"12345678")),
    ("bytes after the end", raw({"a": F32}, b"123456789")),
    ("cut", raw({"a": F32}, b"1234567")),
    ("metadata is no table of strings", raw({"__metadata__": {"a": 1}})),
]


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in BAD])
def test_a_malformed_file_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        read(data)


@given(st.binary(max_size=64))
def test_any_bytes_give_one_of_our_errors_or_an_empty_file(data: bytes) -> None:
    with contextlib.suppress(RankupError):
        assert not read(data).entries


def test_missing_files_and_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        TensorFile.open(tmp_path / "absent")
    with pytest.raises(NotFoundError, match="'b'"):
        read(raw({"a": F32}, b"12345678")).read("b")


def test_bytes_that_do_not_fit_their_shape_are_not_written() -> None:
    for tensor in (("F32", (2,), b"1234"), ("F4", (2,), b"1")):
        with pytest.raises(InputError):
            write_tensor_file(BytesIO(), {"a": tensor})


@given(tensors, st.randoms(use_true_random=False))
def test_pieces_in_any_order_of_tensors_give_the_same_file(
    table: dict[str, tuple[str, tuple[int, ...]]], rng: random.Random
) -> None:
    content = filled(table)
    whole, pieced = BytesIO(), BytesIO()
    ref = write_tensor_file(whole, content, {"format": "pt"})
    writer = TensorFileWriter(pieced, table, {"format": "pt"})
    pieces = [name for name, (_, _, data) in content.items() for _ in range(0, len(data), 3)]
    rng.shuffle(pieces)
    done = dict.fromkeys(content, 0)
    for name in pieces:
        writer.append(name, content[name][2][done[name] : done[name] + 3])
        done[name] += 3
    assert writer.finish() == ref
    assert pieced.getvalue() == whole.getvalue()
    assert ref.sha256 == hashlib.sha256(whole.getvalue()).hexdigest()
    assert (ref.size_bytes, writer.size_bytes) == (len(whole.getvalue()), len(whole.getvalue()))


def test_a_file_written_in_its_own_order_is_never_read_back() -> None:
    class WriteOnly(BytesIO):
        def seek(self, *_: int) -> int:
            raise AssertionError("no need to go back")

    content = filled({"b": ("F32", (3,)), "a": ("BF16", (5,)), "c": ("I64", (2,))})
    file = WriteOnly()
    assert write_tensor_file(file, content).sha256 == hashlib.sha256(file.getvalue()).hexdigest()


def test_what_does_not_fit_the_announced_shapes_is_refused() -> None:
    writer = TensorFileWriter(BytesIO(), {"a": ("F32", (2,))})
    writer.append("a", b"1234")
    with pytest.raises(InputError, match="lacks 4 bytes"):
        writer.finish()
    with pytest.raises(InputError, match="more bytes"):
        writer.append("a", b"12345")
    with pytest.raises(InputError, match="no tensor 'b'"):
        writer.append("b", b"")
    with pytest.raises(InputError, match="unknown dtype"):
        TensorFileWriter(BytesIO(), {"a": ("F4", (2,))})


def test_a_part_of_a_tensor_is_read_and_nothing_beside_it() -> None:
    content = filled({"a": ("F32", (4,)), "b": ("F32", (4,))})
    buffer = BytesIO()
    write_tensor_file(buffer, content)
    file = read(buffer.getvalue())
    assert file.read_part("b", 4, 8) == content["b"][2][4:12]
    assert file.read_part("b", 16, 0) == b""
    for start, length in ((0, 17), (12, 8), (-4, 8), (4, -1)):
        with pytest.raises(InputError, match="has no"):
            file.read_part("b", start, length)
    with pytest.raises(NotFoundError):
        file.read_part("c", 0, 0)
