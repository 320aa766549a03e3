"""The cohort: who takes part in a round's sum, with which weight, and what is written down about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_world import LORA, NOW, World

from aggregator import cohort
from aggregator.cohort import (
    DENOMINATOR_LOG2,
    Measured,
    accepted_receipts,
    blob_of,
    bucket_gram,
    buckets,
    decide,
    settle,
    stored_cohort,
    terms_of,
)
from aggregator.lowrank import product_norm
from rankup.errors import InputError, IntegrityError, StateError
from rankup.fixedpoint import dequantise
from rankup.message import canonical_json
from rankup.recipe import Aggregation
from rankup.records import Receipt
from rankup.store import put_blob_file
from rankup.versions import receipt_key

UNIT = 2**DENOMINATOR_LOG2
OLDER = "0d" * 32


def contribute(world: World, shard: int, *, seed: int | None = None, tokens: int = 100, **changes: object) -> Receipt:
    """A delta in the store with an accepted receipt."""
    factors = world.factors(shard if seed is None else seed)
    path, ref = world.delta(shard, factors)
    put_blob_file(world.store, path)
    submission = world.submission(shard, ref, tokens=tokens, **changes).model_copy(update={"submitted_at": NOW + shard})
    norm = float(np.sqrt(sum(product_norm(factor) ** 2 for factor in factors.values())))
    receipt = Receipt(submission=submission, accepted=True, reason="accepted", checks=(), norm=norm, judged_at=NOW)
    world.store.put(receipt_key(world.record.round_id, ref.sha256), canonical_json(receipt))
    return receipt


def by_shard(world: World, receipts: list[Receipt], found: cohort.Cohort) -> dict[int, int]:
    return {term.shard: term.coefficient for term in terms_of(world.record, found, receipts)}


def weigh(world: World, receipts: list[Receipt], measured: Measured | None = None) -> dict[int, int]:
    members = accepted_receipts(world.record, receipts)
    grams = [
        bucket_gram(world.store, [blob_of(r) for r in members[part]], sorted(LORA)) for part in buckets(len(members))
    ]
    return by_shard(world, receipts, decide(world.record, members, grams, measured or Measured(), NOW))


def with_aggregation(world: World, **changes: object) -> World:
    recipe = world.record.request.recipe
    recipe = recipe.model_copy(update={"aggregation": Aggregation.model_validate(changes)})
    request = world.record.request.model_copy(update={"recipe": recipe})
    return replace(world, record=world.record.model_copy(update={"request": request, "older_bases": (OLDER,)}))


def test_the_mean_by_tokens_is_what_the_tokens_say_whatever_the_order_of_receipts(world: World) -> None:
    receipts = [contribute(world, n, tokens=tokens) for n, tokens in enumerate((100, 300, 100))]
    weights = weigh(world, receipts)
    assert weights == weigh(world, receipts[::-1]) == weigh(world, [*receipts, receipts[0]])
    assert sum(weights.values()) == UNIT
    assert abs(weights[1] - 0.6 * UNIT) <= 1


def test_a_gram_matrix_from_ranges_is_that_of_the_dense_products(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "STRETCH_BYTES", 300)
    receipts = [contribute(world, n) for n in range(3)]
    found = bucket_gram(world.store, [blob_of(receipt) for receipt in receipts], sorted(LORA))
    dense = [
        np.concatenate([np.ravel(np.matmul(*dequantise(factor))) for _, factor in sorted(world.factors(n).items())])
        for n in range(3)
    ]
    np.testing.assert_allclose(found, [[x @ y for y in dense] for x in dense], rtol=1e-5, atol=1e-6)


def test_a_copy_that_came_later_is_left_out_and_its_receipt_says_so(world: World) -> None:
    first, other, copy = contribute(world, 0), contribute(world, 1), contribute(world, 2, seed=0)
    weights = weigh(world, [first, other, copy])
    assert weights[2] == 0
    assert weights[0] == weights[1] == UNIT // 2
    members = accepted_receipts(world.record, [first, other, copy])
    gram = bucket_gram(world.store, [blob_of(r) for r in members], sorted(LORA))
    settle(world.store, decide(world.record, members, [gram], Measured(), NOW))
    key = receipt_key(world.record.round_id, copy.submission.statement.sha256)
    noted = Receipt.model_validate_json(world.store.get(key, max_bytes=10**6))
    assert noted.accepted
    assert [(check.name, check.passed) for check in noted.checks] == [("near_duplicate", False)]
    assert first.submission.statement.sha256[:12] in noted.reason


def test_a_contribution_that_hurts_the_held_out_loss_is_left_out(world: World) -> None:
    receipts = [contribute(world, n) for n in range(4)]
    digests = [receipt.submission.statement.sha256 for receipt in receipts]
    losses = Measured(3.0, dict(zip(digests, (2.9, 2.91, 2.92, 3.4), strict=True)))
    weights = weigh(world, receipts, losses)
    assert weights[3] == 0
    assert sum(weights.values()) == UNIT
    nobody = Measured(3.0, dict.fromkeys(digests, float("nan")))
    with pytest.raises(InputError, match="none of the 4"):
        weigh(world, receipts, nobody)


def test_a_contribution_along_which_the_loss_does_not_fall_is_left_out(world: World) -> None:
    receipts = [contribute(world, n) for n in range(4)]
    digests = [receipt.submission.statement.sha256 for receipt in receipts]
    descents = dict(zip(digests, (0.5, 0.4, 0.6, -0.3), strict=True))
    weights = weigh(world, receipts, Measured(descents=descents))
    assert weights[3] == 0
    assert sum(weights.values()) == UNIT


def test_the_first_decision_stands_and_its_checks_are_noted_once(world: World) -> None:
    receipts = accepted_receipts(world.record, [contribute(world, n) for n in range(2)])
    gram = bucket_gram(world.store, [blob_of(receipt) for receipt in receipts], sorted(LORA))
    first = settle(world.store, decide(world.record, receipts, [gram], Measured(), NOW))
    again = settle(world.store, decide(world.record, receipts, [gram], Measured(), NOW + 50))
    assert again == first == stored_cohort(world.store, world.record.round_id)
    for receipt in receipts:
        key = receipt_key(world.record.round_id, receipt.submission.statement.sha256)
        noted = Receipt.model_validate_json(world.store.get(key, max_bytes=10**6))
        assert [check.name for check in noted.checks] == ["near_duplicate"]


def test_a_delta_of_an_older_base_counts_less_by_the_decay_and_names_its_base(world: World) -> None:
    aged = with_aggregation(world, max_staleness=1, staleness_decay=0.25)
    receipts = [contribute(aged, 0), contribute(aged, 1, base_manifest=OLDER)]
    members = accepted_receipts(aged.record, receipts)
    weights = weigh(aged, receipts)
    assert sum(weights.values()) == UNIT
    assert abs(weights[1] - weights[0] / 4) <= 1
    gram = bucket_gram(aged.store, [blob_of(r) for r in members], sorted(LORA))
    terms = terms_of(aged.record, decide(aged.record, members, [gram], Measured(), NOW), receipts)
    assert {term.shard: term.base_manifest for term in terms} == {0: None, 1: OLDER}


def test_a_receipt_of_another_round_or_base_is_refused(world: World) -> None:
    receipt = contribute(world, 0)
    other = world.record.model_copy(update={"round_id": "round-2"})
    with pytest.raises(IntegrityError, match="another round"):
        accepted_receipts(other, [receipt])
    with pytest.raises(IntegrityError, match="another round or base"):
        accepted_receipts(world.record, [contribute(world, 1, base_manifest=OLDER)])
    with pytest.raises(StateError):
        accepted_receipts(world.record, [receipt.model_copy(update={"accepted": False})])


@pytest.mark.parametrize("rule", ["mean_by_tokens", "geometric_median"])
def test_parts_of_a_large_cohort_share_the_weight_by_what_they_hold(
    world: World, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setattr(cohort, "BUCKET", 3)
    apart = with_aggregation(world, rule=rule, clip_norm_ratio=1e6)
    tokens = [100, 200, 300, 400, 500, 600, 700]
    receipts = [contribute(apart, n, tokens=count) for n, count in enumerate(tokens)]
    weights = weigh(apart, receipts)
    assert sum(weights.values()) == UNIT
    if rule == "mean_by_tokens":
        assert all(abs(weights[n] - UNIT * count / sum(tokens)) <= 1 for n, count in enumerate(tokens))


@given(st.integers(1, 10_000))
def test_buckets_hold_everybody_once_and_are_of_nearly_equal_size(count: int) -> None:
    parts = buckets(count)
    places = [place for part in parts for place in range(count)[part]]
    sizes = [part.stop - part.start for part in parts]
    assert places == list(range(count))
    assert max(sizes) <= cohort.BUCKET
    assert max(sizes) - min(sizes) <= 1


def test_a_decision_about_other_contributions_is_refused(world: World, tmp_path: Path) -> None:
    receipts = [contribute(world, n) for n in range(2)]
    members = accepted_receipts(world.record, receipts)
    gram = bucket_gram(world.store, [blob_of(r) for r in members], sorted(LORA))
    decided = decide(world.record, members, [gram], Measured(), NOW)
    with pytest.raises(IntegrityError, match="other contributions"):
        terms_of(world.record, decided, [*receipts, contribute(world, 2)])
