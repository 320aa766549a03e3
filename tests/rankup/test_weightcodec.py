"""One block of weights as a change of the parent's block."""

import struct
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pcodec import ChunkConfig, DeltaSpec, ModeSpec
from pcodec.wrapped import FileCompressor

from rankup.bfloat16 import to_bfloat16
from rankup.errors import IntegrityError
from rankup.tensorfile import DTYPE_BYTES
from rankup.weightcodec import (
    BLOCK_ELEMENTS,
    MAX_LEVELS,
    Blocks,
    _pcodec_errors,
    decode_block,
    encode_block,
    limit_bytes,
)

FLOATS = ("BF16", "F16", "F32")


def changed_weights(rows: int, columns: int, relative: float, seed: int = 0) -> tuple[bytes, bytes]:
    """bfloat16 weights before and after a change of low rank."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns)) * rng.gamma(4, 0.25, (rows, 1)) * 0.05
    change = rng.standard_normal((rows, 8)) * rng.gamma(1, 1, (rows, 1)) @ rng.standard_normal((8, columns))
    change *= relative * np.sqrt((weights**2).mean() / (change**2).mean())
    before, after = (to_bfloat16(array.astype(np.float32)) for array in (weights, weights + change))
    return before.tobytes(), after.tobytes()


def assert_round_trip(dtype: str, width: int, old: bytes, new: bytes) -> bytes:
    coded = encode_block(dtype, width, old, new)
    assert len(coded) <= limit_bytes(len(new))
    assert bytes(decode_block(dtype, width, old, coded)) == new
    assert encode_block(dtype, width, old, new) == coded
    return coded


# -- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("step", [1, 77, 2**15, 2**16 - 3])
def test_every_bit_pattern_can_become_another(dtype: str, step: int) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for turned in (patterns + np.uint16(step), patterns ^ np.uint16(step), patterns[::-1]):
        assert_round_trip(dtype, 256, patterns.tobytes(), turned.tobytes())


@given(
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.integers(1, 6),
    st.integers(1, 700),
    st.sampled_from([0, 1, 3, 2**8, 2**16, 2**31]),
    st.sampled_from(["rows", "one row"]),
    st.integers(0, 2**32),
)
def test_what_is_coded_is_decoded_whatever_the_bits(
    dtype: str, rows: int, columns: int, spread: int, cut: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = DTYPE_BYTES[dtype]
    old = rng.integers(0, 2 ** min(8 * size, 63), rows * columns, dtype=np.uint64)
    new = old + rng.integers(-spread, spread + 1, rows * columns).astype(np.uint64)
    raw = [array.astype(f"<u{size}").tobytes() for array in (old, new)]
    assert_round_trip(dtype, columns if cut == "rows" else 0, raw[0], raw[1])


@given(
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.sampled_from([0, 1, 2, 3, 1000, 2**20 - 1, 2**20, 2**20 + 1]), max_size=3).map(tuple),
)
def test_blocks_are_whole_rows_and_cover_the_tensor(dtype: str, shape: tuple[int, ...]) -> None:
    blocks = Blocks.of(dtype, shape)
    total = int(np.prod(shape, dtype=object)) if shape else 1
    assert blocks.size_bytes == total * DTYPE_BYTES[dtype]
    assert 0 < blocks.elements <= BLOCK_ELEMENTS
    assert (blocks.count - 1) * blocks.elements < total <= blocks.count * blocks.elements
    if blocks.width:
        assert blocks.width == shape[-1]
        assert blocks.elements % blocks.width == 0


def test_an_unchanged_block_is_empty_and_a_random_one_costs_one_byte() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.bytes(2**14), rng.bytes(2**14)
    for dtype in FLOATS:
        assert assert_round_trip(dtype, 0, old, old) == b""
        assert len(assert_round_trip(dtype, 0, old, new)) == len(new) + 1


@pytest.mark.parametrize(
    ("relative", "bits"), [(3e-4, 1.0), (1.4e-3, 2.0), (6e-3, 3.7)], ids=["small", "usual", "large"]
)
def test_a_change_of_low_rank_is_coded_in_few_bits_a_weight(relative: float, bits: float) -> None:
    old, new = changed_weights(512, 600, relative)
    assert len(assert_round_trip("BF16", 600, old, new)) * 8 / (512 * 600) < bits


def test_scales_of_rows_and_columns_make_a_block_smaller() -> None:
    old, new = changed_weights(512, 600, 1.4e-3)
    assert len(encode_block("BF16", 600, old, new)) < 0.97 * len(encode_block("BF16", 0, old, new))


def test_a_block_of_the_largest_size_goes_through_all_its_parts() -> None:
    old, new = changed_weights(1024, 1024, 1e-3)
    assert_round_trip("BF16", 1024, old, new)


def test_weights_of_float32_are_coded_too() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(40_000).astype(np.float32)
    new = (weights * np.float32(1 + 2**-12)).tobytes()
    assert len(assert_round_trip("F32", 200, weights.tobytes(), new)) < 0.6 * len(new)


# -- hostile bytes -----------------------------------------------------------------------------------------------------

OLD, NEW = changed_weights(48, 64, 2e-3)


def forged(streams: list[bytes], lowest: int = 0, count: int | None = None, kind: int = 1) -> bytes:
    """A block with these streams: rows' scales, columns' scales, one for each level."""
    lengths = b"".join(struct.pack("<I", len(stream)) for stream in streams)
    return struct.pack("<BhB", kind, lowest, len(streams) - 2 if count is None else count) + lengths + b"".join(streams)


def pco(values: npt.NDArray[Any], mode: ModeSpec | None = None, delta: DeltaSpec | None = None) -> bytes:
    config = ChunkConfig(mode_spec=mode or ModeSpec.classic(), delta_spec=delta or DeltaSpec.no_op())
    chunk = FileCompressor().chunk_compressor(values, config)
    return bytes(chunk.write_meta() + chunk.write_page(0))


ZEROS = pco(np.zeros(3072, np.int16))
LEVELS_16 = np.tile(np.arange(64, dtype=np.int16) % 7, 48)

REFUSED = {
    "an unknown kind": b"\x02" + NEW,
    "raw bytes, one too few": b"\x00" + NEW[:-1],
    "more bytes than the block": b"\x00" + NEW + b"\x00",
    "a head that ends": b"\x01\x00\x00",
    "no level": forged([b"", b""]),
    "too many levels": forged([b"", b"", *[ZEROS] * (MAX_LEVELS + 1)]),
    "a level out of reach": forged([b"", b"", ZEROS], lowest=2000),
    "lengths that end": forged([b"", b"", ZEROS], count=MAX_LEVELS)[:40],
    "a byte left over": forged([b"", b"", ZEROS]) + b"\x00",
    "a byte left over in a stream": forged([b"", b"", ZEROS + b"\x00"]),
    "values for no weight": forged([b"", b"", ZEROS, ZEROS], lowest=1000),
    "no values for weights": forged([b"", b"", b""]),
    "too few values": forged([b"", b"", pco(LEVELS_16[:3000])]),
    "too many values": forged([b"", b"", pco(np.tile(LEVELS_16, 2))]),
    "scales of too few rows": forged([pco(LEVELS_16[:40]), b"", ZEROS]),
    "a scale out of reach": forged([b"", pco(np.full(64, 128, np.int16)), ZEROS]),
    "a stream with a delta encoding": forged([b"", b"", pco(LEVELS_16, delta=DeltaSpec.try_consecutive(1))]),
    "a stream with a mode": forged([b"", b"", pco(LEVELS_16 * 10, mode=ModeSpec.try_int_mult(10))]),
    "a stream of noise": forged([b"", b"", b"\x00" + bytes(range(200))]),
}


@pytest.mark.parametrize("coded", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_well_formed_is_refused(coded: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_block("BF16", 64, OLD, coded)


def test_what_the_table_of_refusals_varies_is_accepted() -> None:
    assert decode_block("BF16", 64, OLD, forged([b"", b"", ZEROS])) == OLD
    assert decode_block("BF16", 64, OLD, forged([pco(np.zeros(48, np.int16)), pco(np.zeros(64, np.int16)), ZEROS]))
    assert decode_block("BF16", 64, OLD, b"\x00" + NEW) == NEW


def test_only_floats_have_streams() -> None:
    with pytest.raises(IntegrityError, match="unknown kind"):
        decode_block("I16", 64, OLD, forged([b"", b"", ZEROS]))


@given(st.data())
def test_damaged_bytes_are_refused_or_decode_to_the_same_length(data: st.DataObject) -> None:
    coded = bytearray(encode_block("BF16", 64, OLD, NEW))
    for _ in range(data.draw(st.integers(1, 3))):
        coded[data.draw(st.integers(0, len(coded) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(coded), data.draw(st.integers(1, len(coded)))]))
    try:
        content = decode_block("BF16", 64, OLD, bytes(coded[:cut]))
    except IntegrityError:
        return
    assert memoryview(content).nbytes == len(OLD)


def test_a_block_that_promises_a_window_of_four_billion_values_takes_no_memory() -> None:
    wide = bytes([0x20, 0x1F]) + bytes(60)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="plain"):
            decode_block("BF16", 64, OLD, forged([b"", b"", wide]))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_panic_of_the_decoder_is_an_integrity_error_and_an_interrupt_stays_one() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(IntegrityError, match="panic"), _pcodec_errors():
        raise panic
    with pytest.raises(KeyboardInterrupt), _pcodec_errors():
        raise KeyboardInterrupt
