"""The fold: exact against a float64 oracle, and the same hashes however the work is cut and ordered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_world import LORA, SHAPES, World, make_world, random_model, store_model

from aggregator.fold import fold_group, next_tensors
from aggregator.groups import read_tensor
from rankup.errors import IntegrityError, UnreachableError
from rankup.fixedpoint import Factors, dequantise
from rankup.records import Group, Manifest, TensorEntry, Term
from rankup.store import MemoryStore, blob_key

LOG2 = 16


def contribute(world: World, count: int) -> tuple[list[Term], list[dict[str, Factors]]]:
    """Blobs and terms of `count` contributions with different weights."""
    terms, all_factors = [], []
    for shard in range(count):
        factors = world.factors(shard + 10)
        path, ref = world.delta(shard, factors)
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
    store: MemoryStore, parent: Manifest, terms: Sequence[Term], *, row_tile: int | None = None
) -> tuple[tuple[Group, ...], dict[str, TensorEntry]]:
    total = len(parent.groups)
    parts = [
        fold_group(store, parent, group, number, total, terms, LOG2, row_tile=row_tile)
        for number, group in enumerate(parent.groups, start=1)
    ]
    groups, entries = next_tensors(parts)
    return groups, dict(entries)


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
        assert (entry.shape, entry.export_dtype, entry.lora) == (before.shape, before.export_dtype, before.lora)
        assert (entry == before) == (name not in LORA)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(4)), row_tile=st.integers(1, 50))
def test_neither_the_order_of_contributions_nor_the_tiles_change_a_byte(
    tmp_path: Path, order: list[int], row_tile: int
) -> None:
    world = make_world(tmp_path)
    terms, _ = contribute(world, 4)
    plain = fold(world.store, world.parent, terms)
    assert fold(world.store, world.parent, [terms[i] for i in order], row_tile=row_tile) == plain


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
    group, entries = fold_group(world.store, world.parent, embed[1], embed[0], len(world.parent.groups), terms, LOG2)
    assert group == embed[1]
    assert entries == {"embed.weight": world.parent.tensors["embed.weight"]}


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
    frozen = world.parent.tensors[name].model_copy(update={"lora": False})
    parent = world.parent.model_copy(update={"tensors": {**world.parent.tensors, name: frozen}})
    with pytest.raises(IntegrityError, match="does not let"):
        fold(world.store, parent, terms)
