"""Stacks of experts and int8 mantissas in the delta file: read as written, refused where they are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.delta import Change, DeltaHeader, DeltaReader, check_structure, write_delta
from rankup.errors import DeltaError, InputError, NotFoundError, RankupError, TooLargeError
from rankup.fixedpoint import Factors, quantise
from rankup.message import canonical_json
from rankup.targets import MAX_SLICES, Target

HEADER = DeltaHeader(model="tiny", round_id="tiny-r1", lease_id="lease-1", base_manifest="ab" * 32)
EXPERTS, NARROW, NORM, PLAIN, STACK8 = (
    "layers.0.experts.down_proj",
    "layers.0.k_proj.weight",
    "layers.0.norm.weight",
    "layers.0.q_proj.weight",
    "layers.1.experts.down_proj",
)
TARGETS = {
    EXPERTS: Target(role="experts", d_out=4, d_in=3, slices=3, rank=2),
    NARROW: Target(d_out=3, d_in=5, rank=1),
    NORM: Target(role="vector", d_out=7, d_in=1, rank=1),
    PLAIN: Target(d_out=6, d_in=5, rank=2),
    STACK8: Target(role="experts", d_out=3, d_in=3, slices=5, rank=1),
}
BITS: dict[str, Any] = {EXPERTS: 16, NARROW: 8, NORM: 16, PLAIN: 16, STACK8: 8}


def make_changes() -> dict[str, Change]:
    rng = np.random.default_rng(3)
    changes: dict[str, Change] = {}
    for name, target in TARGETS.items():
        stack = [
            quantise(
                rng.normal(size=(target.d_out, target.rank)),
                rng.normal(size=(target.rank, target.d_in)),
                bits=BITS[name],
            )
            for _ in range(target.slices)
        ]
        changes[name] = stack if target.slices > 1 else stack[0]
    return changes


def delta_bytes(folder: Path, changes: dict[str, Change]) -> bytes:
    write_delta(folder / "made.delta", HEADER, changes)
    return (folder / "made.delta").read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return delta_bytes(tmp_path_factory.mktemp("good"), make_changes())


def admit(data: bytes, **options: Any) -> None:
    check_structure(DeltaReader.from_bytes(data), header=HEADER, **{"targets": TARGETS} | options)


def same(left: Factors, right: Factors) -> bool:
    fields = ("b", "b_exp", "a", "a_exp", "b_max", "a_max")
    pairs = [(getattr(left, field), getattr(right, field)) for field in fields]
    return all(one.dtype == other.dtype and np.array_equal(one, other) for one, other in pairs)


def stack_of(change: Change) -> Sequence[Factors]:
    return [change] if isinstance(change, Factors) else change


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_every_slice_and_width_is_read_as_it_was_written(good: bytes) -> None:
    reader = DeltaReader.from_bytes(good)
    for name, change in make_changes().items():
        stack = stack_of(change)
        assert reader.slices(name) == len(stack)
        assert all(same(reader.factors(name, slice=index), part) for index, part in enumerate(stack))
    admit(good)


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.dictionaries(
        st.from_regex(r"[a-c](\.[a-c]){0,2}", fullmatch=True),
        st.tuples(*[st.integers(1, 4)] * 4, st.sampled_from([8, 16])),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_mixture_of_shapes_is_read_as_it_was_written_and_the_library_would_write_the_same(
    shapes: dict[str, tuple[int, int, int, int, Any]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(seed)
    changes: dict[str, Change] = {
        name: [
            quantise(rng.normal(size=(d_out, rank)), rng.normal(size=(rank, d_in)), bits=bits) for _ in range(slices)
        ]
        for name, (d_out, rank, d_in, slices, bits) in shapes.items()
    }
    data = delta_bytes(tmp_path_factory.getbasetemp(), changes)
    reader = DeltaReader.from_bytes(data)
    assert reader.names == tuple(sorted(changes))
    for name, change in changes.items():
        parts = [reader.factors(name, index) for index in range(reader.slices(name))]
        assert all(same(part, made) for part, made in zip(parts, stack_of(change), strict=True))
    assert sum(layout.size_bytes for layout in reader.layouts.values()) == len(data) - 8 - int.from_bytes(
        data[:8], "little"
    )
    metadata = {"rankup": canonical_json(HEADER).decode()}
    assert safetensors.save(safetensors.load(data), metadata=metadata) == data


def test_a_stack_of_one_slice_is_an_ordinary_weight(tmp_path: Path) -> None:
    factors = stack_of(make_changes()[PLAIN])[0]
    assert delta_bytes(tmp_path, {PLAIN: [factors]}) == delta_bytes(tmp_path, {PLAIN: factors})


def test_safetensors_loads_every_type_from_memory_and_from_a_mapped_file(good: bytes, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    (tmp_path / "x.safetensors").write_bytes(good)
    made = make_changes()
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.get_tensor(f"{EXPERTS}.lora_A").shape == (3, 2, 3)
        assert file.get_tensor(f"{STACK8}.lora_B").dtype == np.int8
        for name, change in made.items():
            scales = file.get_tensor(f"{name}.lora_scales").reshape(len(stack_of(change)), 4, -1)
            assert all(np.array_equal(part.a_max, scales[index][3]) for index, part in enumerate(stack_of(change)))


def reading(good: bytes) -> tuple[DeltaReader, list[tuple[int, int]]]:
    reads: list[tuple[int, int]] = []

    def read_at(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return good[offset : offset + length]

    reader = DeltaReader(read_at, len(good))
    reads.clear()
    return reader, reads


@pytest.mark.parametrize(
    ("name", "requests", "size"),
    [
        (PLAIN, 1, 2 * 2 * (6 + 5 + 4)),
        (NORM, 1, 2 * (7 + 1 + 4)),
        (NARROW, 2, 3 + 5 + 2 * 4),
        (EXPERTS, 3, 2 * 2 * (4 + 3 + 4)),
        (STACK8, 3, 3 + 3 + 2 * 4),
    ],
)
def test_a_slice_costs_its_own_bytes_and_few_requests(name: str, requests: int, size: int, good: bytes) -> None:
    reader, reads = reading(good)
    reader.factors(name, reader.slices(name) - 1)
    assert (len(reads), sum(length for _, length in reads)) == (requests, size)


def test_a_whole_check_reads_every_byte_of_the_tensors_once(good: bytes) -> None:
    reader, reads = reading(good)
    check_structure(reader, targets=TARGETS, header=HEADER)
    places = sorted(place for offset, length in reads for place in range(offset, offset + length))
    assert places == list(range(8 + int.from_bytes(good[:8], "little"), len(good)))


def test_extents_cover_a_weight_and_nothing_else(good: bytes) -> None:
    reader, reads = reading(good)
    for name in reader.names:
        reads.clear()
        for index in range(reader.slices(name)):
            reader.factors(name, index)
        extents = reader.layouts[name].extents
        covered = [place for start, end in extents for place in range(start, end)]
        assert covered == sorted(place for offset, length in reads for place in range(offset, offset + length))
        assert len(covered) == reader.layouts[name].size_bytes


def test_a_stack_is_read_slice_by_slice_only(good: bytes) -> None:
    reader = DeltaReader.from_bytes(good)
    with pytest.raises(InputError, match="stack of 3 slices"):
        reader.factors(EXPERTS)
    for name, index in ((EXPERTS, 3), (EXPERTS, -1), (PLAIN, 1)):
        with pytest.raises(NotFoundError, match="no slice"):
            reader.factors(name, index)
    with pytest.raises(NotFoundError):
        reader.slices("another")


def test_slices_that_do_not_match_are_not_written(tmp_path: Path) -> None:
    one = quantise(np.ones((3, 2)), np.ones((2, 4)))
    for other in (
        quantise(np.ones((3, 1)), np.ones((1, 4))),
        quantise(np.ones((4, 2)), np.ones((2, 4))),
        quantise(np.ones((3, 2)), np.ones((2, 4)), bits=8),
    ):
        with pytest.raises(DeltaError, match="x: its slices differ"):
            write_delta(tmp_path / "x.delta", HEADER, {"x": [one, other]})
    for stack in ([], [one] * (MAX_SLICES + 1)):
        with pytest.raises(DeltaError, match="slices; a weight has"):
            write_delta(tmp_path / "x.delta", HEADER, {"x": stack})
    assert list(tmp_path.iterdir()) == []


def test_the_largest_stack_fits(tmp_path: Path) -> None:
    one = quantise(np.ones((1, 1)), np.ones((1, 1)), bits=8)
    data = delta_bytes(tmp_path, {"x": [one] * MAX_SLICES})
    target = Target(role="experts", d_out=1, d_in=1, slices=MAX_SLICES, rank=1)
    admit(data, targets={"x": target})


# -- what a round expects ----------------------------------------------------------------------------------------------


def changed(name: str, **fields: Any) -> dict[str, Target]:
    return {**TARGETS, name: TARGETS[name].model_copy(update=fields)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": changed(EXPERTS, slices=4)}, r"\[3, 4, 3\], not \[4, 4, 3\]"),
        ({"targets": changed(EXPERTS, slices=1)}, r"\[3, 4, 3\], not \[4, 3\]"),
        ({"targets": changed(PLAIN, slices=2)}, r"\[6, 5\], not \[2, 6, 5\]"),
        ({"targets": changed(EXPERTS, rank=1)}, "rank 2 is above this round's limit of 1"),
        ({"targets": changed(NORM, d_out=8)}, r"\[7, 1\], not \[8, 1\]"),
        ({"mantissa_bits": 16}, f"{NARROW}: mantissas of 8 bits; this round asks for 16"),
        ({"mantissa_bits": 8}, f"{EXPERTS}: mantissas of 16 bits; this round asks for 8"),
    ],
)
def test_a_delta_of_another_kind_than_the_round_asks_for_is_refused(
    options: dict[str, Any], says: str, good: bytes
) -> None:
    with pytest.raises(DeltaError, match=says):
        admit(good, **options)


def test_a_partial_delta_may_leave_out_weights_and_have_lower_ranks(tmp_path: Path) -> None:
    changes = make_changes()
    data = delta_bytes(tmp_path, {name: changes[name] for name in (EXPERTS, NARROW)})
    with pytest.raises(DeltaError, match=rf"{NORM}: missing \(3 of 5"):
        admit(data)
    admit(data, partial=True)
    admit(data, partial=True, targets=changed(EXPERTS, rank=64))
    with pytest.raises(DeltaError, match=f"{NARROW}: not a weight"):
        admit(data, partial=True, targets={EXPERTS: TARGETS[EXPERTS]})


def test_one_slice_that_is_not_zero_is_enough(tmp_path: Path) -> None:
    target = TARGETS[EXPERTS]
    none = quantise(np.zeros((4, 2)), np.ones((2, 3)))
    some = quantise(np.eye(4, 2), np.ones((2, 3)))
    admit(delta_bytes(tmp_path, {EXPERTS: [none, none, some]}), targets={EXPERTS: target})
    with pytest.raises(DeltaError, match="zero everywhere"):
        admit(delta_bytes(tmp_path, {EXPERTS: [none, none, none]}), targets={EXPERTS: target})


# -- hostile files -----------------------------------------------------------------------------------------------------

Entries = dict[str, tuple[str, list[int]]]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(head: dict[str, Any], body: bytes) -> bytes:
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


def entries_of(data: bytes) -> Entries:
    head, _ = split(data)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in head.items() if name != "__metadata__"}


def remade(data: bytes, changes: Entries, *, by_type: bool = True) -> bytes:
    """A consistent container with other types and shapes, all data zero. `by_type`: in the order of the library."""
    entries = {**entries_of(data), **changes}
    head, offset = {"__metadata__": split(data)[0]["__metadata__"]}, 0
    for name in sorted(entries, key=lambda name: (by_type and entries[name][0] == "I8", name)):
        dtype, shape = entries[name]
        size = {"I16": 2, "I8": 1}.get(dtype, 4) * prod(shape)
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return join(head, bytes(offset))


def stacked(slices: int, rank: int = 2) -> Entries:
    return {
        f"{EXPERTS}.lora_A": ("I16", [slices, rank, 3]),
        f"{EXPERTS}.lora_B": ("I16", [slices, 4, rank]),
        f"{EXPERTS}.lora_scales": ("I16", [slices, 4, rank]),
    }


def patched(data: bytes, name: str, place: int, value: bytes) -> bytes:
    head, body = split(data)
    at = head[name]["data_offsets"][0] + place
    return join(head, body[:at] + value + body[at + len(value) :])


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], type[RankupError], str]] = {
    "no slices": (lambda d: remade(d, stacked(0)), DeltaError, rf"{EXPERTS}.lora_A.*shape"),
    "a stack of one": (lambda d: remade(d, stacked(1)), DeltaError, f"{EXPERTS}: 1 slices; a stack has 2 to"),
    "too many slices": (
        lambda d: remade(d, stacked(MAX_SLICES + 1)),
        DeltaError,
        f"{EXPERTS}: {MAX_SLICES + 1} slices",
    ),
    "slices beyond any memory": (
        lambda d: join({**split(d)[0], f"{EXPERTS}.lora_A": {"dtype": "I16", "shape": [2**24] * 3}}, b""),
        DeltaError,
        rf"{EXPERTS}.lora_A.*data_offsets",
    ),
    "a huge stack without its data": (
        lambda d: join(split(remade(d, stacked(MAX_SLICES, 1024)))[0], b""),
        DeltaError,
        "the file at",
    ),
    "slices in A only": (
        lambda d: remade(d, {**stacked(3), f"{EXPERTS}.lora_B": ("I16", [12, 2])}),
        DeltaError,
        f"{EXPERTS}: shapes .* do not share",
    ),
    "one slice less in the scales": (
        lambda d: remade(d, {**stacked(3), f"{EXPERTS}.lora_scales": ("I16", [2, 4, 2])}),
        DeltaError,
        "number of slices",
    ),
    "slices in the scales only": (
        lambda d: remade(d, {f"{PLAIN}.lora_scales": ("I16", [2, 4, 2])}),
        DeltaError,
        f"{PLAIN}: shapes",
    ),
    "slices that differ in rank": (
        lambda d: remade(d, {**stacked(3), f"{EXPERTS}.lora_A": ("I16", [3, 1, 3])}),
        DeltaError,
        "share one rank",
    ),
    "a rank above the format's in a stack": (lambda d: remade(d, stacked(3, 1025)), DeltaError, "rank 1025"),
    "four dimensions": (
        lambda d: remade(d, {f"{EXPERTS}.lora_A": ("I16", [1, 3, 2, 3])}),
        DeltaError,
        rf"{EXPERTS}.lora_A.*shape",
    ),
    "A of int8, B of int16": (
        lambda d: remade(d, {f"{PLAIN}.lora_A": ("I8", [2, 5])}),
        DeltaError,
        f"{PLAIN}: mantissas of I8 and I16",
    ),
    "scales of int8": (
        lambda d: remade(d, {f"{NARROW}.lora_scales": ("I8", [4, 1])}),
        DeltaError,
        rf"{NARROW}\.lora_scales: dtype I8",
    ),
    "unsigned bytes": (
        lambda d: remade(d, {f"{NARROW}.lora_A": ("U8", [1, 5])}),
        DeltaError,
        rf"{NARROW}.lora_A.*dtype",
    ),
    "types in the order of names": (lambda d: remade(d, {}, by_type=False), DeltaError, "data_offsets .* should be"),
    "mantissa -128": (lambda d: patched(d, f"{NARROW}.lora_A", 0, b"\x80"), DeltaError, f"{NARROW}: A holds .*-128"),
    "mantissa -32768 in the last slice": (
        lambda d: patched(d, f"{EXPERTS}.lora_B", 2 * 2 * 4 * 2, b"\x00\x80"),
        DeltaError,
        rf"{EXPERTS}\[2\]: B holds .*-32768",
    ),
    "an exponent of another slice": (
        lambda d: patched(d, f"{STACK8}.lora_scales", 2 * 4 * 3, b"\x65\x00"),
        DeltaError,
        rf"{STACK8}\[3\]: an exponent of B",
    ),
    "a maximum above int8": (
        lambda d: patched(d, f"{NARROW}.lora_scales", 2 * 2, b"\xff\x00"),
        DeltaError,
        f"{NARROW}: the stated maxima of B",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_stack_is_refused_with_its_cause(name: str, good: bytes) -> None:
    attack, error, cause = HOSTILE[name]
    data = attack(good)
    assert data != good
    with pytest.raises(RankupError, match=cause) as caught:
        admit(data)
    assert type(caught.value) is error
    assert len(caught.value.cause) < 2000


def test_the_tools_of_these_tests_leave_a_good_file_good(good: bytes) -> None:
    assert join(*split(good)) == good
    assert split(remade(good, {}))[0] == split(good)[0]


def test_more_weights_than_the_format_allows_are_refused_before_their_data_is_read(tmp_path: Path) -> None:
    one = quantise(np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(TooLargeError):
        write_delta(tmp_path / "x.delta", HEADER, {f"w{index}": one for index in range(8193)})


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
        for index in range(reader.slices(name)):
            reader.factors(name, index).verify()


@settings(max_examples=200, deadline=None)
@given(
    entries=st.dictionaries(
        st.sampled_from([f"{EXPERTS}{suffix}" for suffix in (".lora_A", ".lora_B", ".lora_scales")]),
        st.tuples(
            st.sampled_from(["I16", "I8"]),
            st.lists(st.sampled_from([0, 1, 2, 3, 4, 1025, 4097]), min_size=1, max_size=4),
        ),
        min_size=1,
    )
)
def test_any_types_and_shapes_end_in_an_error_of_ours(entries: dict[str, tuple[str, list[int]]], good: bytes) -> None:
    """The sizes are not backed by data, so none may be allocated."""
    head, _ = split(good)
    offset = 0
    for name, (dtype, shape) in entries.items():
        size = prod(shape) * (1 if dtype == "I8" else 2)
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    with pytest.raises(RankupError):
        admit(join(head, b""))
