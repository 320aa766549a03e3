"""The delta file: what is written is read, byte for byte, and what is hostile is refused with a clear cause."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.delta import (
    FORMAT,
    HEADER_MAX_BYTES,
    DeltaHeader,
    DeltaReader,
    check_structure,
    write_delta,
)
from rankup.errors import DeltaError, DiskFullError, InputError, NotFoundError, RankupError, TooLargeError
from rankup.fixedpoint import Factors, dequantise, quantise
from rankup.message import canonical_json
from rankup.recipe import MAX_RANK
from rankup.targets import Target

GOLDEN = Path(__file__).parent / "golden"
HEADER = DeltaHeader(model="tiny", round_id="tiny-r1", lease_id="lease-1", base_manifest="ab" * 32)
TARGETS = {
    "layers.0.q_proj.weight": Target(d_out=6, d_in=5, rank=2),
    "layers.0.v_proj.weight": Target(d_out=4, d_in=5, rank=2),
}
Q, V = TARGETS


def make_factors(seed: int = 0, rank: int = 2) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {
        name: quantise(rng.normal(size=(target.d_out, rank)), rng.normal(size=(rank, target.d_in)))
        for name, target in TARGETS.items()
    }


def delta_bytes(folder: Path, factors: dict[str, Factors] | None = None, header: DeltaHeader = HEADER) -> bytes:
    write_delta(folder / "made.delta", header, make_factors() if factors is None else factors)
    return (folder / "made.delta").read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return delta_bytes(tmp_path_factory.mktemp("good"))


def admit(data: bytes, header: DeltaHeader = HEADER) -> None:
    check_structure(DeltaReader.from_bytes(data), targets=TARGETS, header=header)


def same(left: Factors, right: Factors) -> bool:
    return all(
        np.array_equal(getattr(left, f), getattr(right, f)) for f in ("b", "b_exp", "a", "a_exp", "b_max", "a_max")
    )


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    factors = make_factors()
    ref = write_delta(tmp_path / "x.delta", HEADER, factors)
    data = (tmp_path / "x.delta").read_bytes()
    assert (ref.sha256, ref.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    with DeltaReader.open(tmp_path / "x.delta") as reader:
        assert reader.header == HEADER
        assert reader.names == (Q, V)
        assert all(same(reader.factors(name), factors[name]) for name in factors)
        check_structure(reader, targets=TARGETS, header=HEADER)
    assert [path.name for path in tmp_path.iterdir()] == ["x.delta"]


def test_the_same_content_gives_the_same_bytes_in_any_order(tmp_path: Path, good: bytes) -> None:
    factors = make_factors()
    assert delta_bytes(tmp_path, dict(reversed(factors.items()))) == good


def test_safetensors_reads_it_and_would_write_the_same_bytes(tmp_path: Path, good: bytes) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load(good)
    factors = make_factors()
    assert np.array_equal(tensors[f"{Q}.lora_B"], factors[Q].b)
    assert np.array_equal(tensors[f"{Q}.lora_scales"][3], factors[Q].a_max)
    assert safetensors.save(tensors, metadata={"rankup": canonical_json(HEADER).decode()}) == good


def test_only_the_header_and_the_weights_asked_for_are_read(good: bytes) -> None:
    reads: list[tuple[int, int]] = []

    def read_at(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return good[offset : offset + length]

    reader = DeltaReader(read_at, len(good))
    header_bytes = int.from_bytes(good[:8], "little")
    assert reads == [(0, 8), (8, header_bytes)]
    reader.factors(V)
    assert reads[2:] == [(len(good) - 2 * 2 * (4 + 5 + 4), 2 * 2 * (4 + 5 + 4))]


def test_weights_may_have_different_ranks(tmp_path: Path) -> None:
    factors = {**make_factors(rank=2), Q: make_factors(rank=1)[Q]}
    admit(delta_bytes(tmp_path, factors))


def test_the_largest_rank_and_the_longest_name_fit(tmp_path: Path) -> None:
    name = "w" * 256
    factors = {name: quantise(np.ones((2, MAX_RANK)), np.ones((MAX_RANK, 1)))}
    reader = DeltaReader.from_bytes(delta_bytes(tmp_path, factors))
    check_structure(reader, targets={name: Target(d_out=2, d_in=1)}, header=HEADER)


def test_some_weights_may_be_zero(tmp_path: Path) -> None:
    factors = {**make_factors(), Q: quantise(np.zeros((6, 2)), np.ones((2, 5)))}
    admit(delta_bytes(tmp_path, factors))


def test_a_header_without_a_model_serves_any_expectation(tmp_path: Path) -> None:
    admit(delta_bytes(tmp_path, header=HEADER.model_copy(update={"model": None})))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.delta"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"x\.delta"):
        write_delta(path, HEADER, make_factors())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.delta"]


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="missing"):
        write_delta(tmp_path / "missing" / "x.delta", HEADER, make_factors())
    with pytest.raises(InputError):
        write_delta(tmp_path, HEADER, make_factors())
    with pytest.raises(NotFoundError):
        DeltaReader.open(tmp_path / "none.delta")
    with pytest.raises(RankupError):
        DeltaReader.open(tmp_path)


def test_content_that_the_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    factors = make_factors()[Q]
    lying = Factors(factors.b, factors.b_exp, factors.a, factors.a_exp, factors.b_max + np.int16(1), factors.a_max)
    for name, value in (("x.lora_A", factors), ("no spaces", factors), ("", factors), ("x", lying)):
        with pytest.raises(DeltaError):
            write_delta(tmp_path / "x.delta", HEADER, {name: value})
    with pytest.raises(DeltaError, match="single weight"):
        write_delta(tmp_path / "x.delta", HEADER, {})
    many = dict.fromkeys((f"{i:04d}{'w' * 250}" for i in range(1200)), factors)
    with pytest.raises(TooLargeError):
        write_delta(tmp_path / "x.delta", HEADER, many)
    assert list(tmp_path.iterdir()) == []


def test_the_golden_file_is_still_read_and_written_byte_for_byte(tmp_path: Path) -> None:
    data = (GOLDEN / "small.delta").read_bytes()
    assert hashlib.sha256(data).hexdigest() == (GOLDEN / "small.delta.sha256").read_text().split()[0]
    reader = DeltaReader.from_bytes(data)
    assert reader.header.format == FORMAT
    assert reader.names == ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight")
    b, a = dequantise(reader.factors(reader.names[1]))
    assert b.tolist() == [[1.0, -0.5], [0.25, 0.0], [3.0, 0.125]]
    assert a.tolist() == [[1.0, 2.0, -3.0, 0.0], [0.5, 0.0, 0.0, 2.0**-15]]
    assert delta_bytes(tmp_path, {name: reader.factors(name) for name in reader.names}, reader.header) == data


# -- hostile files -----------------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(head: dict[str, Any] | str | bytes, body: bytes) -> bytes:
    if isinstance(head, dict):
        head = json.dumps(head, separators=(",", ":"))
    raw = head.encode() if isinstance(head, str) else head
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


def with_entry(data: bytes, name: str, **changes: Any) -> bytes:
    head, body = split(data)
    head[name] = {**head[name], **changes}
    return join(head, body)


def renamed(data: bytes, old: str, new: str) -> bytes:
    head, body = split(data)
    return join({(new if key == old else key): value for key, value in head.items()}, body)


def without(data: bytes, name: str) -> bytes:
    head, body = split(data)
    start, end = head.pop(name)["data_offsets"]
    for entry in (value for key, value in head.items() if key != "__metadata__"):
        entry["data_offsets"] = [o - (end - start) if o >= end else o for o in entry["data_offsets"]]
    return join(head, body[:start] + body[end:])


def patched(data: bytes, name: str, index: int, value: int) -> bytes:
    """Overwrite one int16 of a tensor."""
    head, body = split(data)
    at = head[name]["data_offsets"][0] + 2 * index
    return join(head, body[:at] + value.to_bytes(2, "little", signed=True) + body[at + 2 :])


def with_metadata(data: bytes, metadata: object) -> bytes:
    head, body = split(data)
    return join({**head, "__metadata__": metadata}, body)


def for_other(data: bytes, **changes: Any) -> bytes:
    return with_metadata(data, {"rankup": canonical_json(HEADER.model_copy(update=changes)).decode()})


def remade(data: bytes, shapes: dict[str, tuple[int, int]]) -> bytes:
    """A consistent container with other shapes for the tensors of Q, all data zero."""
    head, _ = split(data)
    result, offset = {"__metadata__": head.pop("__metadata__")}, 0
    for name in sorted(head):
        shape = shapes.get(name.removeprefix(Q), head[name]["shape"])
        size = 2 * shape[0] * shape[1]
        result[name] = {"dtype": "I16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return join(result, bytes(offset))


def zeroed(data: bytes) -> bytes:
    head, body = split(data)
    return join(head, bytes(len(body)))


def spaced(data: bytes) -> bytes:
    head, body = split(data)
    return join(json.dumps(head), body)


def unsorted(data: bytes) -> bytes:
    head, body = split(data)
    return join(dict(reversed(head.items())), body)


def duplicated(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().rstrip()
    return join(text[:-1] + f',"{Q}.lora_A":' + "{}}", data[8 + length :])


A, B, SCALES = f"{Q}.lora_A", f"{Q}.lora_B", f"{Q}.lora_scales"
Q_A_BYTES = 2 * 2 * 5
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], type[RankupError], str]] = {
    "empty file": (lambda d: b"", DeltaError, "0 bytes"),
    "seven bytes": (lambda d: d[:7], DeltaError, "7 bytes"),
    "a pickle": (lambda d: pickle.dumps({"weights": list(range(100))}, protocol=4), TooLargeError, "header"),
    "a zip, as torch saves": (lambda d: b"PK\x03\x04" + bytes(100), TooLargeError, "header claims"),
    "a text": (lambda d: b"these are my weights, honestly", TooLargeError, "header"),
    "header above the limit": (
        lambda d: (HEADER_MAX_BYTES + 1).to_bytes(8, "little") + bytes(HEADER_MAX_BYTES + 9),
        TooLargeError,
        "limit",
    ),
    "header of 2^64 - 1 bytes": (lambda d: b"\xff" * 8 + d[8:], TooLargeError, "limit"),
    "header beyond the file": (lambda d: len(d).to_bytes(8, "little") + d[8:], DeltaError, "header claims"),
    "header of no bytes": (lambda d: bytes(8), DeltaError, "not JSON"),
    "header not JSON": (lambda d: join("{weights}", b""), DeltaError, "not JSON"),
    "header not UTF-8": (lambda d: join(b"\xff\xfe{}", b""), DeltaError, "not JSON"),
    "header with a huge number": (lambda d: join('{"x":' + "9" * 5000 + "}", b""), DeltaError, "not JSON"),
    "header a list": (lambda d: join("[1]", b""), DeltaError, "not a JSON object"),
    "header an empty object": (lambda d: join("{}", b""), DeltaError, "metadata"),
    "nested 500,000 deep": (lambda d: join("[" * 500_000, b""), DeltaError, "not JSON"),
    "objects nested 100,000 deep": (lambda d: join('{"a":' * 100_000, b""), DeltaError, "not JSON"),
    "key given twice": (duplicated, DeltaError, "twice"),
    "spaces in the header": (spaced, DeltaError, "canonical"),
    "tensors out of order": (unsorted, DeltaError, "canonical"),
    "truncated body": (lambda d: d[:-1], DeltaError, "the file at"),
    "no body": (lambda d: join(split(d)[0], b""), DeltaError, "the file at"),
    "trailing bytes": (lambda d: d + b"\0", DeltaError, "the file at"),
    "overlapping offsets": (lambda d: with_entry(d, B, data_offsets=[0, 24]), DeltaError, r"lora_B.*data_offsets"),
    "offsets with a gap": (lambda d: with_entry(d, A, data_offsets=[2, 22]), DeltaError, r"lora_A.*data_offsets"),
    "offsets the wrong way": (lambda d: with_entry(d, A, data_offsets=[20, 0]), DeltaError, r"lora_A.*data_offsets"),
    "negative offset": (lambda d: with_entry(d, A, data_offsets=[-2, 18]), DeltaError, r"lora_A.*data_offsets"),
    "offset a fraction": (lambda d: with_entry(d, A, data_offsets=[0.0, 20.0]), DeltaError, r"lora_A.*data_offsets"),
    "offset true": (lambda d: with_entry(d, A, data_offsets=[False, 20]), DeltaError, r"lora_A.*data_offsets"),
    "three offsets": (lambda d: with_entry(d, A, data_offsets=[0, 20, 20]), DeltaError, r"lora_A.*data_offsets"),
    "type F32": (lambda d: with_entry(d, B, dtype="F32"), DeltaError, r"lora_B.*dtype"),
    "type BF16": (lambda d: with_entry(d, B, dtype="BF16"), DeltaError, r"lora_B.*dtype"),
    "unknown field": (lambda d: with_entry(d, B, compression="zip"), DeltaError, r"lora_B.*compression"),
    "entry null": (lambda d: join({**split(d)[0], B: None}, split(d)[1]), DeltaError, "lora_B"),
    "shape with zero": (lambda d: with_entry(d, A, shape=[0, 10**12]), DeltaError, r"lora_A.*shape"),
    "shape of one dimension": (lambda d: with_entry(d, A, shape=[10]), DeltaError, r"lora_A.*shape"),
    "shape that overflows": (lambda d: with_entry(d, A, shape=[2**32, 2**32]), DeltaError, r"lora_A.*shape"),
    "shape transposed": (lambda d: with_entry(d, A, shape=[5, 2]), DeltaError, "share one rank"),
    "shape of another weight": (
        lambda d: remade(d, {".lora_A": (2, 7)}),
        DeltaError,
        rf"{Q}: made for a weight of shape \[6, 7\]",
    ),
    "ranks that differ": (lambda d: remade(d, {".lora_A": (1, 5)}), DeltaError, "share one rank"),
    "rank 0": (
        lambda d: remade(d, {".lora_A": (0, 5), ".lora_B": (6, 0), ".lora_scales": (4, 0)}),
        DeltaError,
        rf"{Q}.lora_A.*shape",
    ),
    "rank above the round's limit": (
        lambda d: remade(d, {".lora_A": (3, 5), ".lora_B": (6, 3), ".lora_scales": (4, 3)}),
        DeltaError,
        rf"{Q}: rank 3 is above this round's limit of 2",
    ),
    "rank above the format's limit": (
        lambda d: remade(d, {".lora_A": (1025, 5), ".lora_B": (6, 1025), ".lora_scales": (4, 1025)}),
        DeltaError,
        rf"{Q}: rank 1025",
    ),
    "five rows of scales": (lambda d: remade(d, {".lora_scales": (5, 2)}), DeltaError, "share one rank"),
    "tensor missing": (lambda d: without(d, SCALES), DeltaError, rf"{SCALES}: missing"),
    "weight missing": (
        lambda d: without(without(without(d, SCALES), B), A),
        DeltaError,
        rf"{Q}: missing \(1 of 2 weights",
    ),
    "weight of another name": (
        lambda d: renamed(renamed(renamed(d, A, "aa.lora_A"), B, "aa.lora_B"), SCALES, "aa.lora_scales"),
        DeltaError,
        rf"{Q}: missing",
    ),
    "tensor without suffix": (lambda d: renamed(d, A, f"{Q}.lora_C"), DeltaError, "lora_C"),
    "tensor named as a path": (lambda d: renamed(d, A, "../../etc/passwd.lora_A"), DeltaError, "no name of a weight"),
    "tensor with half a surrogate": (lambda d: renamed(d, A, "\ud800.lora_A"), DeltaError, "no name of a weight"),
    "name of 10,000 letters": (lambda d: renamed(d, A, "w" * 10_000 + ".lora_A"), DeltaError, "no name of a weight"),
    "suffix within the name": (lambda d: renamed(d, A, "x.lora_A.lora_A"), DeltaError, "must not hold"),
    "no metadata": (lambda d: join({k: v for k, v in split(d)[0].items() if k[0] != "_"}, b""), DeltaError, "metadata"),
    "metadata a list": (lambda d: with_metadata(d, ["rankup"]), DeltaError, "metadata"),
    "another metadata key": (
        lambda d: with_metadata(d, {**split(d)[0]["__metadata__"], "x": "y"}),
        DeltaError,
        "nothing else",
    ),
    "metadata not a string": (lambda d: with_metadata(d, {"rankup": {}}), DeltaError, "not a string"),
    "metadata not JSON": (lambda d: with_metadata(d, {"rankup": "{"}), DeltaError, "metadata entry"),
    "metadata half a surrogate": (lambda d: with_metadata(d, {"rankup": "\ud800"}), DeltaError, "metadata entry"),
    "metadata nested 100,000 deep": (lambda d: with_metadata(d, {"rankup": "[" * 100_000}), DeltaError, "metadata"),
    "metadata with spaces": (
        lambda d: with_metadata(d, {"rankup": " " + canonical_json(HEADER).decode()}),
        DeltaError,
        "canonical",
    ),
    "another format": (lambda d: for_other(d, format="rankup.delta/2"), DeltaError, "format"),
    "another round": (lambda d: for_other(d, round_id="tiny-r2"), DeltaError, "round_id tiny-r2"),
    "another lease": (lambda d: for_other(d, lease_id="lease-2"), DeltaError, "lease_id lease-2"),
    "another base": (lambda d: for_other(d, base_manifest="cd" * 32), DeltaError, "base_manifest cdcd"),
    "another model": (lambda d: for_other(d, model="huge"), DeltaError, "model huge"),
    "mantissa -32768 in A": (lambda d: patched(d, A, 3, -32768), DeltaError, rf"{Q}: A holds .*-32768"),
    "mantissa -32768 in B": (lambda d: patched(d, B, 3, -32768), DeltaError, rf"{Q}: B holds .*-32768"),
    "exponent of B too large": (lambda d: patched(d, SCALES, 0, 101), DeltaError, rf"{Q}: an exponent of B"),
    "exponent of A too small": (lambda d: patched(d, SCALES, 2, -201), DeltaError, rf"{Q}: an exponent of A"),
    "maximum of B too small": (lambda d: patched(d, SCALES, 4, 1), DeltaError, rf"{Q}: the stated maxima of B"),
    "maximum of A too large": (lambda d: patched(d, SCALES, 6, 32767), DeltaError, rf"{Q}: the stated maxima of A"),
    "maximum negative": (lambda d: patched(d, SCALES, 5, -1), DeltaError, rf"{Q}: the stated maxima of B"),
    "zero everywhere": (zeroed, DeltaError, "zero everywhere"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_cause(name: str, good: bytes) -> None:
    attack, error, cause = HOSTILE[name]
    data = attack(good)
    assert data != good
    with pytest.raises(RankupError, match=cause) as caught:
        admit(data)
    assert type(caught.value) is error
    assert len(caught.value.cause) < 2000
    caught.value.cause.encode()


def test_the_tools_of_these_tests_leave_a_good_file_good(good: bytes) -> None:
    assert join(*split(good)) == good
    admit(good)


def test_a_weight_that_the_round_does_not_train_is_refused(tmp_path: Path) -> None:
    factors = {**make_factors(), "lm_head.weight": make_factors()[Q]}
    with pytest.raises(DeltaError, match=r"lm_head\.weight: not a weight that this round trains"):
        admit(delta_bytes(tmp_path, factors))


def test_half_zero_components_everywhere_are_a_zero_delta(tmp_path: Path) -> None:
    factors = {
        name: quantise(np.zeros((target.d_out, 2)), np.ones((2, target.d_in))) for name, target in TARGETS.items()
    }
    with pytest.raises(DeltaError, match="zero everywhere"):
        admit(delta_bytes(tmp_path, factors))


def test_a_read_that_ends_early_is_refused(good: bytes) -> None:
    reader = DeltaReader(lambda offset, length: good[offset : min(offset + length, len(good) - 1)], len(good))
    with pytest.raises(DeltaError, match="ends early"):
        reader.factors(V)
    with pytest.raises(NotFoundError):
        reader.factors("another")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_flipped_and_lost_bytes_end_in_an_error_of_ours_or_in_a_delta_that_holds_the_law(
    data: st.DataObject, good: bytes
) -> None:
    broken = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        broken[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))))
    try:
        reader = DeltaReader.from_bytes(bytes(broken[:end]))
        check_structure(reader, targets=TARGETS, header=HEADER)
    except RankupError:
        return
    for name in reader.names:
        reader.factors(name).verify()


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([A, B, SCALES, "__metadata__", "rankup", "dtype", "shape", "data_offsets"])
                | st.text(max_size=5),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.binary(max_size=64),
)
def test_any_json_in_the_header_ends_in_an_error_of_ours(head: object, body: bytes) -> None:
    with pytest.raises(RankupError):
        admit(join(json.dumps(head), body))
