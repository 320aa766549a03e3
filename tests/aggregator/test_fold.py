"""The fold: exact against a float64 oracle, and the same hashes however the work is cut and ordered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from toy_world import LORA, SHAPES, World, make_world, random_model, store_model

from aggregator.fold import fold_digest, fold_group, next_tensors
from aggregator.groups import read_tensor
from rankup.delta import Change, write_delta
from rankup.errors import IntegrityError, UnreachableError
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors, dequantise, quantise
from rankup.message import canonical_json
from rankup.outer import outer_step
from rankup.products import NumpyKernel
from rankup.recipe import PLAIN_SUM, OuterStep
from rankup.records import FoldedGroup, Group, Manifest, TensorEntry, Term
from rankup.store import MemoryStore, blob_key
from rankup.targets import Role
from rankup.versions import fold_key, manifest_digest

LOG2 = 16
NESTEROV = OuterStep(learning_rate=0.75, momentum=0.875)
TRAINED = 2
"""A group of the toy world with several tensors that its contributions change."""


def contribute(
    world: World, count: int, made: Sequence[Mapping[str, Change]] | None = None
) -> tuple[list[Term], list[dict[str, Factors]]]:
    """Blobs and terms of `count` contributions with different weights."""
    terms, all_factors = [], []
    for shard in range(count):
        factors = world.factors(shard + 10)
        path, ref = world.delta(shard, factors)
        if made is not None:
            ref = write_delta(path, world.header(shard), made[shard])
        world.store.put(blob_key(ref.sha256), path.read_bytes())
        submission = world.submission(shard, ref)
        terms.append(
            Term(
                contribution=ref.sha256,
                size_bytes=ref.size_bytes,
                worker_id=submission.worker_id,
                worker_name=submission.worker_name,
                shard=shard,
                tokens=100,
                coefficient=2**LOG2 // count + shard,
            )
        )
        all_factors.append(factors)
    return terms, all_factors


def fold(
    store: MemoryStore,
    parent: Manifest,
    terms: Sequence[Term],
    outer: OuterStep = PLAIN_SUM,
    *,
    tile_bytes: int = 2**20,
) -> tuple[tuple[Group, ...], dict[str, TensorEntry]]:
    parts = [
        fold_group(store, parent, number, terms, LOG2, outer=outer, tile_bytes=tile_bytes)
        for number in range(1, len(parent.groups) + 1)
    ]
    groups, entries = next_tensors(parts)
    return groups, dict(entries)


def child_of(parent: Manifest, groups: tuple[Group, ...], entries: dict[str, TensorEntry]) -> Manifest:
    """The next version, as far as a fold looks at it."""
    return parent.model_copy(update={"version": parent.version + 1, "groups": groups, "tensors": entries})


def test_the_sum_is_that_of_dense_float64(world: World) -> None:
    terms, all_factors = contribute(world, 3)
    groups, entries = fold(world.store, world.parent, terms)
    model = random_model()
    for group in groups:
        for name in group.tensors:
            expected = model[name].astype(np.float64)
            if name in LORA:
                for term, factors in zip(terms, all_factors, strict=True):
                    b, a = dequantise(factors[name])
                    expected = expected + term.coefficient / 2**LOG2 * (b @ a)
                assert entries[name].master != world.parent.tensors[name].master
            np.testing.assert_allclose(read_tensor(world.store, group.master, name), expected, rtol=2e-7, atol=1e-9)


def test_entries_keep_shape_dtype_and_role(world: World) -> None:
    terms, _ = contribute(world, 2)
    _, entries = fold(world.store, world.parent, terms)
    assert list(entries) == sorted(SHAPES)
    for name, entry in entries.items():
        before = world.parent.tensors[name]
        assert (entry.shape, entry.export_dtype, entry.role) == (before.shape, before.export_dtype, before.role)
        assert (entry == before) == (name not in LORA)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(4)), tile_bytes=st.integers(8, 5000))
def test_neither_the_order_of_contributions_nor_the_tiles_change_a_byte(
    tmp_path: Path, order: list[int], tile_bytes: int
) -> None:
    world = make_world(tmp_path)
    terms, _ = contribute(world, 4)
    plain = fold(world.store, world.parent, terms)
    assert fold(world.store, world.parent, [terms[i] for i in order], tile_bytes=tile_bytes) == plain


@pytest.mark.parametrize("group_bytes", [1, 3000, 10**6], ids=["a group a tensor", "some groups", "one group"])
def test_how_tensors_are_grouped_changes_the_files_and_not_the_tensors(world: World, group_bytes: int) -> None:
    terms, _ = contribute(world, 3)
    groups, entries = fold(world.store, world.parent, terms)
    other_parent = store_model(world.store, random_model(), group_bytes)
    other_groups, other_entries = fold(world.store, other_parent, terms)
    assert len(other_groups) != len(groups)
    assert other_entries == entries


def test_a_group_that_no_contribution_changes_keeps_its_files_and_uploads_nothing(tmp_path: Path) -> None:
    world = make_world(tmp_path, group_bytes=1)
    terms, _ = contribute(world, 2)
    [embed] = [g for g in enumerate(world.parent.groups, 1) if g[1].tensors == ("embed.weight",)]

    def fail(*_: object, **__: object) -> None:
        raise UnreachableError("nothing may be written")

    world.store.put = fail  # type: ignore[method-assign]
    world.store.put_file = fail  # type: ignore[method-assign]
    folded = fold_group(world.store, world.parent, embed[0], terms, LOG2, record_key="rounds/r/fold/x/1.json")
    assert folded.group == embed[1]
    assert folded.tensors == {"embed.weight": world.parent.tensors["embed.weight"]}


def test_no_terms_or_only_weightless_ones_give_the_parent(world: World) -> None:
    terms, _ = contribute(world, 1)
    weightless = [terms[0].model_copy(update={"coefficient": 0})]
    for chosen in ([], weightless):
        groups, entries = fold(world.store, world.parent, chosen)
        assert (groups, entries) == (world.parent.groups, dict(world.parent.tensors))


def test_folding_again_after_a_crash_gives_the_same_groups(world: World) -> None:
    terms, _ = contribute(world, 2)
    assert fold(world.store, world.parent, terms) == fold(world.store, world.parent, terms)


def test_a_parent_tensor_with_other_bytes_than_its_manifest_stops_the_fold(world: World) -> None:
    terms, _ = contribute(world, 1)
    name = "layer.0.up.weight"
    forged = world.parent.tensors[name].model_copy(update={"master": "0" * 64})
    parent = world.parent.model_copy(update={"tensors": {**world.parent.tensors, name: forged}})
    with pytest.raises(IntegrityError, match="hash"):
        fold(world.store, parent, terms)


def test_a_contribution_that_changes_a_frozen_tensor_stops_the_fold(world: World) -> None:
    terms, _ = contribute(world, 1)
    name = "layer.0.up.weight"
    frozen = world.parent.tensors[name].model_copy(update={"role": None})
    parent = world.parent.model_copy(update={"tensors": {**world.parent.tensors, name: frozen}})
    with pytest.raises(IntegrityError, match="does not let"):
        fold(world.store, parent, terms)


def test_a_wrong_hash_shows_nothing(world: World) -> None:
    terms, _ = contribute(world, 1)
    last = world.parent.groups[TRAINED - 1].tensors[-1]
    forged = world.parent.tensors[last].model_copy(update={"master": "0" * 64})
    parent = world.parent.model_copy(update={"tensors": {**world.parent.tensors, last: forged}})
    before = list(world.store.list(""))
    with pytest.raises(IntegrityError, match="hash"):
        fold_group(world.store, parent, TRAINED, terms, LOG2, record_key="rounds/r/fold/x/1.json")
    assert list(world.store.list("")) == before


# -- shapes ------------------------------------------------------------------------------------------------------------

ROLES: Mapping[str, Role] = {
    "experts.down": "experts",
    "head.weight": "head",
    "norm.weight": "vector",
    "up.weight": "linear",
}


def varied_model() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {"experts.down": (3, 10, 6), "head.weight": (30, 6), "norm.weight": (6,), "up.weight": (8, 6)}
    model = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**model, "buffer": np.arange(7, dtype=np.int64)}


def varied_change(seed: int) -> dict[str, Change]:
    rng = np.random.default_rng(seed)

    def low_rank(d_out: int, d_in: int, bits: int = 16) -> Factors:
        b, a = 0.01 * rng.standard_normal((d_out, 2)), rng.standard_normal((2, d_in))
        return quantise(b, a, bits=8 if bits == 8 else 16)

    return {
        "experts.down": [low_rank(10, 6) for _ in range(3)],
        "head.weight": low_rank(30, 6, bits=8),
        "norm.weight": quantise(rng.standard_normal((6, 1)), np.ones((1, 1))),
        "up.weight": low_rank(8, 6),
    }


@pytest.mark.parametrize("outer", [PLAIN_SUM, NESTEROV])
@pytest.mark.parametrize("tile_bytes", [16, 2**20])
@pytest.mark.parametrize("read_ahead", [0, 2**20])
def test_experts_vectors_and_partial_deltas_of_either_width_are_folded(
    world: World, monkeypatch: pytest.MonkeyPatch, outer: OuterStep, tile_bytes: int, read_ahead: int
) -> None:
    monkeypatch.setattr("aggregator.fold.READ_AHEAD_BYTES", read_ahead)
    model = varied_model()
    parent = store_model(world.store, model, 10**6, ROLES)
    first, second = varied_change(1), varied_change(2)
    del second["up.weight"], first["norm.weight"]
    terms, _ = contribute(world, 2, [first, second])
    groups, entries = fold(world.store, parent, terms, outer, tile_bytes=tile_bytes)
    for name in ROLES:
        changes = [
            (term.coefficient, each[name]) for term, each in zip(terms, (first, second), strict=True) if name in each
        ]
        matrices = model[name] if model[name].ndim == 3 else model[name].reshape(1, len(model[name]), -1)
        expected = []
        for number, master in enumerate(matrices):
            pairs = [(c, change if isinstance(change, Factors) else change[number]) for c, change in changes]
            delta = fold_tensor(np.zeros_like(master), pairs, LOG2)
            expected.append(outer_step(master, delta, None, outer)[0])
        found = read_tensor(world.store, groups[0].master, name)
        assert found.tobytes() == np.stack(expected).tobytes()
        assert entries[name].role == ROLES[name]
        assert (entries[name].momentum is None) == (outer is PLAIN_SUM)
    assert entries["buffer"] == parent.tensors["buffer"]


# -- the outer step ----------------------------------------------------------------------------------------------------


def test_the_momentum_goes_from_version_to_version(world: World) -> None:
    model = {name: random_model()[name] for name in LORA}
    masters, momenta = dict(model), dict[str, np.ndarray | None].fromkeys(LORA)
    parent = world.parent
    terms, all_factors = contribute(world, 3)
    for chosen in ([0, 1], [2], [], [1]):
        groups, entries = fold(world.store, parent, [terms[i] for i in chosen], NESTEROV)
        for name in LORA:
            pairs = [(terms[i].coefficient, all_factors[i][name]) for i in chosen]
            delta = fold_tensor(np.zeros_like(masters[name]), pairs, LOG2)
            masters[name], momenta[name] = outer_step(masters[name], delta, momenta[name], NESTEROV)
        parent = child_of(parent, groups, entries)
    for group in parent.groups:
        for name in set(group.tensors) & LORA:
            assert read_tensor(world.store, group.master, name).tobytes() == masters[name].tobytes()
            state = momenta[name]
            assert group.momentum is not None
            assert state is not None
            assert read_tensor(world.store, group.momentum, name).tobytes() == state.tobytes()
            assert parent.tensors[name].momentum is not None


def test_only_tensors_with_a_state_are_in_the_momentum_file(world: World) -> None:
    terms, _ = contribute(world, 1)
    groups, entries = fold(world.store, world.parent, terms, NESTEROV)
    stateful = {name for name, entry in entries.items() if entry.momentum is not None}
    assert stateful == LORA
    for number, group in enumerate(groups, start=1):
        if set(group.tensors) & LORA:
            assert group.momentum is not None
            assert group.momentum.path == f"momentum-{number:05d}-of-{len(groups):05d}.safetensors"
        else:
            assert group.momentum is None


def test_a_round_without_momentum_drops_the_state(tmp_path: Path) -> None:
    world = make_world(tmp_path, group_bytes=1)
    terms, _ = contribute(world, 2)
    with_state = child_of(world.parent, *fold(world.store, world.parent, terms[:1], NESTEROV))
    groups, entries = fold(world.store, with_state, terms[1:])
    assert all(group.momentum is None for group in groups)
    assert all(entry.momentum is None for entry in entries.values())
    nothing, kept = fold(world.store, with_state, [])
    assert all(group.momentum is None for group in nothing)
    assert [group.master for group in nothing] == [group.master for group in with_state.groups]
    assert {name: entry.master for name, entry in kept.items()} == {
        name: entry.master for name, entry in with_state.tensors.items()
    }


def test_a_learning_rate_of_one_without_momentum_is_the_plain_sum(world: World) -> None:
    terms, _ = contribute(world, 2)
    assert fold(world.store, world.parent, terms, PLAIN_SUM) == fold(world.store, world.parent, terms)
    assert fold(world.store, world.parent, terms, OuterStep(learning_rate=0.5, momentum=0)) != fold(
        world.store, world.parent, terms
    )


# -- finished groups ---------------------------------------------------------------------------------------------------


def fold_one(world: World, terms: Sequence[Term], key: str) -> FoldedGroup:
    return fold_group(world.store, world.parent, TRAINED, terms, LOG2, outer=NESTEROV, record_key=key)


def key_of(world: World, terms: Sequence[Term]) -> str:
    return fold_key("round-1", fold_digest(manifest_digest(world.parent), terms, LOG2, NESTEROV), TRAINED)


def test_a_finished_group_is_not_folded_again(world: World) -> None:
    terms, _ = contribute(world, 2)
    key = key_of(world, terms)
    with capture_logs() as logs:
        first = fold_one(world, terms, key)
    assert {entry["event"] for entry in logs} == {"tensor_folded", "group_folded"}
    assert FoldedGroup.model_validate_json(world.store.get(key, max_bytes=10**6)) == first
    with capture_logs() as logs:
        assert fold_one(world, terms, key) == first
    assert [entry["event"] for entry in logs] == ["group_found"]


@pytest.mark.parametrize("lost", ["master", "export", "momentum"])
def test_a_record_whose_blobs_are_lost_or_cut_is_made_good(world: World, lost: str) -> None:
    terms, _ = contribute(world, 2)
    key = key_of(world, terms)
    first = fold_one(world, terms, key)
    blob = blob_key(getattr(first.group, lost).sha256)
    whole = world.store.get(blob, max_bytes=10**6)
    for damage in (lambda: world.store.delete(blob), lambda: world.store.put(blob, whole[:-1])):
        damage()
        assert fold_one(world, terms, key) == first
        assert world.store.get(blob, max_bytes=10**6) == whole


def test_an_unreadable_record_is_replaced(world: World) -> None:
    terms, _ = contribute(world, 2)
    key = key_of(world, terms)
    world.store.put(key, b"{}")
    first = fold_one(world, terms, key)
    assert world.store.get(key, max_bytes=10**6) == canonical_json(first)


def test_two_folds_of_the_same_inputs_that_differ_are_an_error(world: World) -> None:
    terms, _ = contribute(world, 2)
    key = key_of(world, terms)
    first = fold_one(world, terms, key)
    absent = first.group.master.model_copy(update={"sha256": "0" * 64})
    lie = first.model_copy(update={"group": first.group.model_copy(update={"master": absent})})
    world.store.put(key, canonical_json(lie))
    with pytest.raises(IntegrityError, match="differ"):
        fold_one(world, terms, key)


def test_the_digest_of_a_fold_names_everything_that_its_bits_follow_from(world: World) -> None:
    terms, _ = contribute(world, 3)
    base = manifest_digest(world.parent)
    digest = fold_digest(base, terms, LOG2, NESTEROV)
    weightless = terms[0].model_copy(update={"coefficient": 0})
    assert fold_digest(base, terms[::-1], LOG2, NESTEROV) == digest
    assert fold_digest(base, [*terms[1:], weightless], LOG2, NESTEROV) == fold_digest(base, terms[1:], LOG2, NESTEROV)
    others = [
        fold_digest("0" * 64, terms, LOG2, NESTEROV),
        fold_digest(base, terms[1:], LOG2, NESTEROV),
        fold_digest(base, [terms[0].model_copy(update={"coefficient": 5}), *terms[1:]], LOG2, NESTEROV),
        fold_digest(base, terms, LOG2 - 1, NESTEROV),
        fold_digest(base, terms, LOG2, PLAIN_SUM),
        fold_digest(base, terms, LOG2, OuterStep(learning_rate=0.5, momentum=0.875)),
    ]
    assert len({digest, *others}) == 7


# -- what it says and what it needs ------------------------------------------------------------------------------------


def test_the_log_names_each_tensor_and_how_it_was_multiplied(world: World) -> None:
    terms, _ = contribute(world, 2)
    with capture_logs() as logs:
        fold(world.store, world.parent, terms, NESTEROV)
        parent = child_of(world.parent, *fold(world.store, world.parent, terms, NESTEROV))
        fold(world.store, parent, [], NESTEROV)
    lines = [entry for entry in logs if entry["event"] == "tensor_folded"]
    assert {(line["tensor"], line["version"]) for line in lines} == {(name, v) for name in LORA for v in (1, 2)}
    for line in lines:
        assert (line["model"], line["contributions"]) == ("toy", 2 if line["version"] == 1 else 0)
        assert (line["path"] == "none") == (line["version"] == 2)


def test_the_kernels_that_are_given_multiply_and_change_no_bit(world: World) -> None:
    cheap = NumpyKernel("cheap", np.dtype(np.float64), 2**53, 0.0)
    terms, _ = contribute(world, 2)
    with capture_logs() as logs:
        found = fold_group(world.store, world.parent, TRAINED, terms, LOG2, kernels=(cheap,))
    assert {entry["path"] for entry in logs if entry["event"] == "tensor_folded"} == {"cheap"}
    assert found == fold_group(world.store, world.parent, TRAINED, terms, LOG2)


def test_a_momentum_that_no_file_holds_stops_the_fold(world: World) -> None:
    terms, _ = contribute(world, 1)
    parent = child_of(world.parent, *fold(world.store, world.parent, terms, NESTEROV))
    group = parent.groups[TRAINED - 1]
    without = group.model_copy(update={"momentum": None})
    groups = tuple(without if each == group else each for each in parent.groups)
    with pytest.raises(IntegrityError, match="no file of them"):
        fold_group(world.store, parent.model_copy(update={"groups": groups}), TRAINED, [], LOG2, outer=NESTEROV)
    master_as_state = group.model_copy(update={"momentum": world.parent.groups[0].master})
    groups = tuple(master_as_state if each == group else each for each in parent.groups)
    with pytest.raises(IntegrityError, match="does not hold"):
        fold_group(world.store, parent.model_copy(update={"groups": groups}), TRAINED, [], LOG2, outer=NESTEROV)


def test_folding_needs_neither_ray_nor_torch() -> None:
    script = "import sys, aggregator.fold; print({'ray', 'torch', 'boto3'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "set()"
