"""Groups: the plan, both files, and reading one tensor back."""

from __future__ import annotations

import errno
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import load as load_safetensors

from aggregator.groups import (
    GroupReader,
    Layout,
    check_tensor,
    export_path,
    momentum_path,
    open_group_writer,
    plan_groups,
    read_tensor,
    tensor_digest,
    write_group,
)
from rankup.bfloat16 import to_bfloat16
from rankup.errors import DiskFullError, InputError, IntegrityError, NotFoundError
from rankup.foldrows import Tile
from rankup.store import MemoryStore, blob_key, get_blob

TENSORS = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "a.flags": np.array([True, False, True]),
    "a.scalar": np.array(0.3, dtype=np.float32),
    "c.ids": np.arange(5, dtype=np.int64),
    "d.empty": np.zeros((0, 4), dtype=np.float32),
    "e.wide": np.arange(3, dtype=np.float32) / 3,
}
DTYPES = {"b.weight": "BF16", "a.flags": "BOOL", "a.scalar": "F32", "c.ids": "I64", "d.empty": "BF16", "e.wide": "F64"}


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_a_plan_holds_every_tensor_once_in_order_and_no_group_overflows(sizes: dict[str, int], limit: int) -> None:
    plan = plan_groups(sizes, limit)
    assert [name for group in plan for name in group] == sorted(sizes)
    for group in plan:
        assert len(group) == 1 or sum(sizes[name] for name in group) <= limit
    for group, after in pairwise(plan):
        assert sum(sizes[name] for name in group) + sizes[after[0]] > limit, "the group could have taken one more"


def test_the_safetensors_library_reads_both_files() -> None:
    store = MemoryStore()
    group, entries = write_group(store, 1, 1, TENSORS, DTYPES, {"b.weight": "linear"})
    assert (group.master.path, group.export.path) == ("master-00001-of-00001.safetensors", "model.safetensors")
    assert group.tensors == tuple(sorted(TENSORS)) == tuple(entries)
    master = load_safetensors(get_blob(store, group.master.sha256, max_bytes=10_000))
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(master[name], array)
    export = dict(deserialize(get_blob(store, group.export.sha256, max_bytes=10_000)))
    assert export["b.weight"]["dtype"] == "BF16"
    assert bytes(export["b.weight"]["data"]) == to_bfloat16(TENSORS["b.weight"]).tobytes()
    assert bytes(export["c.ids"]["data"]) == TENSORS["c.ids"].tobytes()


def test_the_export_says_pt_so_that_transformers_loads_it() -> None:
    store = MemoryStore()
    group, _ = write_group(store, 2, 3, TENSORS, DTYPES, {})
    data = get_blob(store, group.export.sha256, max_bytes=10_000)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert group.export.path == export_path(2, 3) == "model-00002-of-00003.safetensors"


def test_every_tensor_comes_back_by_range_with_the_hash_of_its_entry() -> None:
    store = MemoryStore()
    group, entries = write_group(store, 1, 1, TENSORS, DTYPES, {"b.weight": "linear"})
    for name, array in TENSORS.items():
        master = read_tensor(store, group.master, name)
        np.testing.assert_array_equal(master, array)
        assert (master.dtype, master.shape) == (array.dtype, array.shape)
        check_tensor(master, entries[name].master, name)
        check_tensor(read_tensor(store, group.export, name), entries[name].export, name)
    assert entries["b.weight"].role == "linear"
    assert entries["c.ids"].role is None
    with pytest.raises(IntegrityError, match=r"b\.weight"):
        check_tensor(TENSORS["b.weight"] + 1, entries["b.weight"].master, "b.weight")
    with pytest.raises(NotFoundError):
        GroupReader(store, group.master).read("absent")


def test_only_the_asked_bytes_are_fetched() -> None:
    store = MemoryStore()
    group, _ = write_group(store, 1, 1, TENSORS, DTYPES, {})
    asked: list[int] = []
    whole = store.get_range
    store.get_range = lambda key, start, length: asked.append(length) or whole(key, start, length)  # type: ignore[method-assign,func-returns-value]
    reader = GroupReader(store, group.master)
    reader.read("b.weight")
    reader.read("c.ids")
    assert asked[0] == 8
    assert asked[2:] == [48, 40]


def test_neighbours_are_read_ahead_in_one_request() -> None:
    store = MemoryStore()
    group, entries = write_group(store, 1, 1, TENSORS, DTYPES, {})
    asked: list[int] = []
    whole = store.get_range
    store.get_range = lambda key, start, length: asked.append(length) or whole(key, start, length)  # type: ignore[method-assign,func-returns-value]
    reader = GroupReader(store, group.master)
    del asked[:]
    reader.use(reader.load(["c.ids", "a.scalar", "a.flags", "absent", "d.empty"]))
    assert sorted(asked) == [3, 40 + 4], "the widest types stand first, in the order of their names"
    for name in ("c.ids", "a.scalar", "a.flags"):
        check_tensor(reader.read(name), entries[name].master, name)
    assert len(asked) == 2
    check_tensor(reader.read("b.weight"), entries["b.weight"].master, "b.weight")
    assert len(asked) == 3
    reader.use(reader.load([]))
    reader.read("c.ids")
    assert len(asked) == 4


def test_a_file_must_hold_a_tensor_as_it_is_expected() -> None:
    store = MemoryStore()
    group, _ = write_group(store, 1, 1, TENSORS, DTYPES, {})
    reader = GroupReader(store, group.master)
    reader.require("b.weight", "F32", (3, 4))
    for name, dtype, shape in (("absent", "F32", (3, 4)), ("b.weight", "I32", (3, 4)), ("b.weight", "F32", (4, 3))):
        with pytest.raises(IntegrityError, match="does not hold"):
            reader.require(name, dtype, shape)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_in_which_tensors_arrive_changes_no_byte(backwards: bool) -> None:
    layouts = {name: Layout(array.shape, DTYPES[name]) for name, array in TENSORS.items()}  # type: ignore[arg-type]
    store = MemoryStore()
    with open_group_writer(1, 1, layouts) as writer:
        for name in sorted(TENSORS, reverse=backwards):
            writer.add(name, TENSORS[name])
        written = writer.finish(store)
    assert written == write_group(store, 1, 1, TENSORS, DTYPES, {})
    for file in (written[0].master, written[0].export):
        assert len(get_blob(store, file.sha256, max_bytes=10_000)) == file.size_bytes


# -- the momentum file -------------------------------------------------------------------------------------------------

LAYOUTS = {"a": Layout((2, 3), "BF16", "linear"), "b": Layout((4,), "BF16", "vector")}
WEIGHT, STATE = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)


def tiles(rows: np.ndarray, state: np.ndarray | None) -> list[Tile]:
    return [Tile(row, to_bfloat16(row), None if state is None else state[n]) for n, row in enumerate(rows)]


def test_the_momentum_file_holds_the_tensors_that_have_a_state() -> None:
    store = MemoryStore()
    with open_group_writer(1, 2, LAYOUTS, {"a"}) as writer:
        writer.write("a", tiles(WEIGHT, STATE))
        writer.add("b", np.zeros(4, np.float32))
        group, entries = writer.finish(store)
    assert group.momentum is not None
    assert group.momentum.path == momentum_path(1, 2) == "momentum-00001-of-00002.safetensors"
    state = load_safetensors(get_blob(store, group.momentum.sha256, max_bytes=10_000))
    assert list(state) == ["a"]
    np.testing.assert_array_equal(state["a"], STATE)
    assert (entries["a"].momentum, entries["b"].momentum) == (tensor_digest(STATE), None)
    without, _ = write_group(store, 1, 2, {"a": WEIGHT}, {"a": "BF16"}, {})
    assert without.momentum is None


@pytest.mark.parametrize(("stateful", "state"), [({"a"}, None), (set(), STATE)], ids=["missing", "unplanned"])
def test_a_momentum_that_was_not_planned_or_is_missing_is_refused(stateful: set[str], state: np.ndarray | None) -> None:
    with (
        open_group_writer(1, 1, LAYOUTS, stateful) as writer,
        pytest.raises(InputError, match="not in both"),
    ):
        writer.write("a", tiles(WEIGHT, state))


def test_a_tensor_with_too_few_rows_does_not_end_a_group() -> None:
    with open_group_writer(1, 1, {"a": LAYOUTS["a"]}) as writer:
        writer.write("a", tiles(WEIGHT[:1], None))
        with pytest.raises(InputError, match="lacks"):
            writer.finish(MemoryStore())


def test_a_full_disk_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_group_writer(1, 1, LAYOUTS) as writer:
        monkeypatch.setattr("rankup.tensorfile.TensorFileWriter.append", full)
        with pytest.raises(DiskFullError, match="no room"):
            writer.add("a", WEIGHT)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("absent", np.zeros(2, np.float32), "does not belong"),
        ("w", np.zeros((3, 2), np.float32), "not F32"),
        ("w", np.zeros((2, 3), np.float64), "not F32"),
    ],
    ids=["unknown name", "wrong shape", "wrong dtype"],
)
def test_a_tensor_that_does_not_fit_its_layout_is_refused(name: str, array: np.ndarray, message: str) -> None:
    with open_group_writer(1, 1, {"w": Layout((2, 3), "BF16")}) as writer:
        with pytest.raises(InputError, match=message):
            writer.add(name, array)
        with pytest.raises(InputError, match="lacks 1"):
            writer.finish(MemoryStore())


def test_a_damaged_file_is_refused_when_it_is_opened() -> None:
    store = MemoryStore()
    group, _ = write_group(store, 1, 1, TENSORS, DTYPES, {})
    store.put(blob_key(group.master.sha256), b"\xff" * group.master.size_bytes)
    with pytest.raises(IntegrityError):
        GroupReader(store, group.master)


def test_a_digest_is_of_little_endian_row_major_bytes() -> None:
    array = TENSORS["b.weight"]
    assert tensor_digest(np.asfortranarray(array)) == tensor_digest(array) == tensor_digest(array.astype(">f4"))
    assert tensor_digest(array.T) != tensor_digest(array)


def test_nothing_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_group(MemoryStore(), 1, 1, TENSORS, DTYPES, {})
    assert list(tmp_path.iterdir()) == []
