"""Late deltas: made for an earlier round of the campaign, counted by a later one, and found again by a replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_world import MAX_DELTA_BYTES, NOW, RANK, World, make_world
from undo_world import LocalPipeline

from aggregator.cohort import (
    DENOMINATOR_LOG2,
    Measured,
    accepted_receipts,
    blob_of,
    bucket_gram,
    decide,
    settle,
    terms_of,
)
from aggregator.intake import admit
from aggregator.published import latest_version
from aggregator.tasks import TrainedIn
from rankup.message import canonical_json
from rankup.protocol import VersionRef
from rankup.recipe import Aggregation
from rankup.records import Manifest, Receipt, RoundRecord
from rankup.replay import verify_version
from rankup.signing import public_key_hex, save_private_key
from rankup.sources import StoreSource
from rankup.versions import manifest_digest, round_key

LATE, TIER = 9, 2
"""The shard that a late delta names, which the later round does not have; the rank of its volunteer's tier."""


class Campaign:
    """Rounds that follow each other; each admits, weighs, folds and publishes what it is given."""

    def __init__(self, folder: Path) -> None:
        self.world = make_world(folder)
        request = self.world.record.request
        aggregation = Aggregation(max_staleness=1, max_cosine=None)
        recipe = request.recipe.model_copy(update={"aggregation": aggregation})
        request = request.model_copy(update={"recipe": recipe})
        self.first = self.world.record.model_copy(update={"request": request})
        self.key_file = folder / "server" / "publisher.key"
        save_private_key(self.key_file, self.world.key_pem)
        self.pipeline = LocalPipeline(self.world.store, self.key_file)

    def at(self, record: RoundRecord) -> World:
        return replace(self.world, record=record)

    def after(self, published: Manifest | None) -> RoundRecord:
        """The round after the first one, whose version is `published`, if it made one."""
        based = {} if published is None else {"base_version": 1, "base_manifest": manifest_digest(published)}
        older = () if published is None else (self.first.base_manifest,)
        ids = {"round_id": "round-2", "index": 1, "older_bases": older, "earlier_rounds": ("round-1",)}
        return self.first.model_copy(update={**ids, **based})

    def bring(self, trained_in: RoundRecord, counted_in: RoundRecord, shard: int, **submission: int) -> Receipt:
        world = self.at(trained_in)
        path, ref = world.delta(shard, world.factors(shard, rank=submission.get("rank", RANK)))
        made = world.submission(shard, ref).model_copy(update=submission)
        world.upload(made, path)
        return admit(world.store, counted_in, made, max_delta_bytes=MAX_DELTA_BYTES, now=NOW)

    def publish(self, record: RoundRecord, receipts: list[Receipt]) -> Manifest:
        members = accepted_receipts(record, receipts)
        gram = bucket_gram(self.world.store, [blob_of(receipt) for receipt in members], sorted(record.targets))
        cohort = settle(self.world.store, decide(record, members, [gram], Measured(), NOW))
        manifest = self.pipeline.fold_here(record, terms_of(record, cohort, members))
        self.pipeline.publish_here(manifest)
        return latest_version(self.world.store, "toy", publisher_key=public_key_hex(self.world.publisher)).manifest


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path)


@pytest.mark.parametrize("staleness", [1, 0], ids=["its round made a version", "its round was rejected"])
def test_a_late_delta_counts_by_its_age_and_the_version_is_its_replay(
    campaign: Campaign, tmp_path: Path, staleness: int
) -> None:
    first = campaign.first
    published = None
    if staleness:
        published = campaign.publish(first, [campaign.bring(first, first, shard) for shard in (0, 1)])
    second = campaign.after(published)
    late = campaign.bring(first, second, LATE, shards=2, rank=TIER)
    assert late.accepted, late.reason
    assert next(check.value for check in late.checks if check.name == "round") == staleness
    manifest = campaign.publish(second, [late, *(campaign.bring(second, second, shard) for shard in (2, 3))])
    terms = {term.shard: term for term in manifest.terms}
    assert set(terms) == {LATE, 2, 3}
    weights = {shard: term.coefficient for shard, term in terms.items()}
    assert abs(weights[LATE] - weights[2] * 0.5**staleness) <= 1
    assert sum(weights.values()) == 2**DENOMINATOR_LOG2
    assert (terms[LATE].round_id, terms[LATE].shards) == ("round-1", 2)
    assert terms[LATE].base_manifest == (first.base_manifest if staleness else None)
    assert {(terms[n].round_id, terms[n].shards, terms[n].base_manifest) for n in (2, 3)} == {(None, 1, None)}
    source, key = StoreSource(campaign.world.store), public_key_hex(campaign.world.publisher)
    report = verify_version(source, "toy", manifest.version, cache=tmp_path / "cache", publisher_key=key)
    assert report.ok, report.mismatches
    assert (report.level, report.contributions) == ("round", 3)


def test_a_late_delta_counts_once(campaign: Campaign) -> None:
    """Its round may have taken it at the last moment, or another round between."""
    first, second = campaign.first, campaign.after(None)
    assert campaign.bring(first, first, 0).accepted
    again = campaign.bring(first, second, 0)
    assert (again.accepted, again.checks[-1].name) == (False, "duplicate")
    assert "accepted before" in again.reason
    third = second.model_copy(update={"round_id": "round-3", "earlier_rounds": ("round-2", "round-1")})
    assert campaign.bring(first, second, 1).accepted
    assert not campaign.bring(first, third, 1).accepted


def test_an_audit_trains_for_the_round_and_on_the_version_that_the_statement_names(campaign: Campaign) -> None:
    """So nobody escapes it by handing in late, or by stating an older base."""
    first = campaign.first
    published = campaign.publish(first, [campaign.bring(first, first, 0)])
    second, store = campaign.after(published), campaign.world.store

    def retrain(*given: Any) -> Path:
        pytest.fail(f"trained in vain: {given}")

    pipeline = LocalPipeline(store, campaign.key_file, retrain)

    def audited(trained_in: RoundRecord, **changes: Any) -> TrainedIn | None:
        world = campaign.at(trained_in)
        _, ref = world.delta(0)
        return pipeline._audited(second, world.submission(0, ref, **changes), 0)

    assert audited(second) == (second, published, None)
    assert audited(first) is None, "nobody knows its shards"
    store.put(round_key(first.round_id), canonical_json(first))
    assert audited(first) == (first, campaign.world.parent, None)
    assert audited(second, base_manifest=first.base_manifest) == (second, campaign.world.parent, None)
    assert audited(second, base_manifest="0" * 64) is None, "admission refuses it"


def test_an_audit_has_the_teacher_of_the_round(campaign: Campaign) -> None:
    parent = campaign.world.parent
    teacher = VersionRef(model=parent.model, version=parent.version, manifest=manifest_digest(parent))
    taught = campaign.first.model_copy(update={"teacher": teacher})
    pipeline = LocalPipeline(campaign.world.store, campaign.key_file, lambda *_: pytest.fail("trained in vain"))
    _, ref = campaign.world.delta(0)
    assert pipeline._audited(taught, campaign.world.submission(0, ref), 0) == (taught, parent, parent)
