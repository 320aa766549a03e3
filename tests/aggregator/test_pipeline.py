"""The pipeline: weights of a round, and one whole round on Ray and S3, checked by an independent replay."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ray.exceptions import WorkerCrashedError
from toy_world import NOW

from aggregator.cohort import DENOMINATOR_LOG2, stored_cohort
from aggregator.pipeline import Pipeline
from aggregator.tasks import result_of
from aggregator.undo import roll_back
from rankup.delta import DeltaHeader, write_delta
from rankup.errors import NotFoundError, UnreachableError
from rankup.fixedpoint import quantise
from rankup.message import canonical_json
from rankup.protocol import RoundRequest, SubmitStatement
from rankup.recipe import Aggregation, OuterStep, Recipe
from rankup.records import BlobRef, DatasetCard, Manifest, Receipt, RoundRecord, Submission
from rankup.settings import CoordinatorSettings, StoreSettings
from rankup.signing import (
    generate_private_key,
    load_private_key,
    parse_private_key,
    public_key_hex,
    save_private_key,
    sign,
    worker_id_of,
)
from rankup.store import S3Store, put_blob
from rankup.targets import select_targets
from rankup.versions import dataset_key, heldout_key, manifest_digest, pointer_key, round_key, upload_key

if TYPE_CHECKING:
    from coordinator.cluster import Cluster
    from rankup.local import LocalServices


def test_a_pipeline_can_be_pickled_and_holds_no_private_key(tmp_path: Path) -> None:
    save_private_key(tmp_path / "key", generate_private_key())
    pipeline = Pipeline(StoreSettings(), tmp_path / "key", CoordinatorSettings())
    data = pickle.dumps(pipeline)
    assert b"PRIVATE KEY" not in data
    assert isinstance(pickle.loads(data), Pipeline)  # noqa: S301


def test_a_task_that_was_killed_is_a_retryable_error() -> None:
    async def killed() -> None:
        raise WorkerCrashedError

    with pytest.raises(UnreachableError, match="WorkerCrashedError"):
        asyncio.run(result_of(killed()))


# -- one round on the real stack ---------------------------------------------------------------------------------------

MODEL, DATASET, ROUND = "pipeline-toy", "pipeline-rows", "pipeline-round"
SHARDS = 7
COPY, TOO_LARGE = 5, 6
"""Shards whose deltas are a copy of another's, and of a rank that the recipe does not allow."""


def open_round(store: S3Store, base: Manifest) -> RoundRecord:
    rows = b"".join(
        json.dumps({"prompt": f"What is {n}?", "completion": f" {n} is a number."}).encode() + b"\n" for n in range(6)
    )
    heldout = BlobRef(sha256=hashlib.sha256(rows).hexdigest(), size_bytes=len(rows))
    shards = tuple(BlobRef(sha256=f"{n:064x}", size_bytes=1) for n in range(SHARDS))
    card = DatasetCard(
        dataset=DATASET,
        source="made up",
        licence="CC0-1.0",
        rows=9,
        heldout_rows=6,
        shards=shards,
        heldout=heldout,
        created_at=1.0,
    )
    store.put(heldout_key(DATASET, heldout.sha256), rows)
    store.put(dataset_key(DATASET), canonical_json(card))
    aggregation = Aggregation(rule="multi_krum", outer=OuterStep(momentum=0.875, learning_rate=0.75))
    recipe = Recipe(rank=2, steps=5, max_tokens=64, aggregation=aggregation)
    request = RoundRequest(model=MODEL, dataset=DATASET, recipe=recipe, shards=SHARDS)
    record = RoundRecord(
        round_id=ROUND,
        request=request,
        index=0,
        base_version=0,
        base_manifest=manifest_digest(base),
        shards=shards,
        targets=select_targets(base.targets(), recipe),
        opened_at=NOW,
    )
    store.put(round_key(ROUND), canonical_json(record))
    return record


def hand_in(store: S3Store, record: RoundRecord, shard: int, folder: Path, *, rank: int = 2) -> Submission:
    rng = np.random.default_rng(0 if shard == COPY else shard)
    factors = {
        name: quantise(1e-3 * rng.standard_normal((t.d_out, rank)), rng.standard_normal((rank, t.d_in)))
        for name, t in record.targets.items()
    }
    lease = f"pipeline-lease-{shard}"
    header = DeltaHeader(model=MODEL, round_id=record.round_id, lease_id=lease, base_manifest=record.base_manifest)
    path = folder / f"{shard}.delta"
    ref = write_delta(path, header, factors)
    private = parse_private_key(generate_private_key())
    statement = SubmitStatement(
        round_id=record.round_id,
        lease_id=lease,
        fence=1,
        base_manifest=record.base_manifest,
        sha256=ref.sha256,
        size_bytes=ref.size_bytes,
        tokens=100 + shard,
        steps=5,
        first_loss=3.0,
        last_loss=2.0,
        seconds=1.0,
    )
    store.put_file(upload_key(lease, ref.sha256), path)
    public = public_key_hex(private)
    return Submission(
        statement=statement,
        signature=sign(private, "submit", statement),
        public_key=public,
        worker_id=worker_id_of(public),
        worker_name=f"volunteer {shard}",
        shard=shard,
        submitted_at=NOW + shard,
    )


@pytest.mark.stack
@pytest.mark.slow
def test_a_round_is_admitted_folded_measured_published_and_replayed(
    local_services: LocalServices,
    s3_store: S3Store,
    ray_cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aggregator.bases import fetch_base
    from aggregator.genesis import make_version_zero
    from rankup.replay import verify_version
    from rankup.sources import StoreSource

    monkeypatch.setenv("RANKUP_HOME", str(tmp_path / "home"))
    key_file = tmp_path / "publisher.key"
    save_private_key(key_file, generate_private_key())
    private = load_private_key(key_file)
    s3_store.ensure_bucket()
    base_model = fetch_base("tiny", tmp_path / "base")
    base = make_version_zero(s3_store, private, model=MODEL, base=base_model, group_bytes=200_000, now=1.0)
    assert len(base.groups) > 1
    record = open_round(s3_store, base)
    pipeline = Pipeline(local_services.store_settings, key_file, CoordinatorSettings(heldout_examples=4))

    async def a_round() -> None:
        submissions = [hand_in(s3_store, record, n, tmp_path, rank=3 if n == TOO_LARGE else 2) for n in range(SHARDS)]
        receipts = list(await asyncio.gather(*(pipeline.admit(record, one, NOW, 0) for one in submissions)))
        assert [one.accepted for one in receipts] == [n != TOO_LARGE for n in range(SHARDS)]
        assert await pipeline.admit(record, submissions[0], NOW + 9, 0) == receipts[0]

        draft = await pipeline.fold(record, receipts, NOW)
        assert await pipeline.fold(record, receipts[::-1], NOW) == draft
        assert sum(term.coefficient for term in draft.terms) == 2**DENOMINATOR_LOG2
        assert {term.shard for term in draft.terms if term.coefficient == 0} >= {COPY}
        decided = stored_cohort(s3_store, ROUND)
        assert decided is not None
        assert decided.base_loss is not None
        assert all(
            {check.name for check in one.checks} == {"near_duplicate", "heldout", "descent"} for one in decided.members
        )
        assert all(
            group.momentum is not None
            for group in draft.groups
            if any(draft.tensors[n].momentum for n in group.tensors)
        )
        assert any(group.momentum is not None for group in draft.groups)
        assert draft.version == 1
        assert draft.datasets == (DATASET,)

        evaluation = await pipeline.evaluate(record, draft)
        assert evaluation.examples == 4
        assert evaluation.parent_heldout_loss is not None
        assert 0 < abs(evaluation.heldout_loss - evaluation.parent_heldout_loss) < 1

        measured = draft.model_copy(update={"evaluation": evaluation})
        pointer = await pipeline.publish(measured)
        assert await pipeline.publish(measured) == pointer
        assert pointer.version == 1

        # The next round's parent is not measured again: its own round did.
        following = measured.model_copy(update={"version": 2, "parent": pointer.manifest})
        again = await pipeline.evaluate(record, following)
        assert again.parent_heldout_loss == evaluation.heldout_loss

        # What comes after its version changes nothing for a round that is driven once more.
        undone = roll_back(s3_store, private, model=MODEL, to=0, now=NOW)
        assert await pipeline.fold(record, receipts, NOW) == draft
        assert await pipeline.publish(measured) == pointer

        # A round of the same base that is still open is added to what the rollback left.
        open_ = record.model_copy(update={"base_version": 1, "base_manifest": pointer.manifest, "round_id": "late"})
        late = [receipt_of(hand_in(s3_store, open_, n, tmp_path)) for n in range(2)]
        added = await pipeline.fold(open_, late, NOW)
        assert (added.version, added.parent) == (3, manifest_digest(undone))
        assert {term.base_manifest for term in added.terms} == {pointer.manifest}
        assert (await pipeline.publish(added)).version == 3

        # A missing blob arrives as our own error.
        unknown = record.model_copy(update={"request": record.request.model_copy(update={"dataset": "absent"})})
        with pytest.raises(NotFoundError):
            await pipeline.evaluate(unknown, draft)

    def receipt_of(submission: Submission) -> Receipt:
        ref = submission.statement
        put_blob(s3_store, s3_store.get(upload_key(ref.lease_id, ref.sha256), max_bytes=10**8))
        return Receipt(submission=submission, accepted=True, reason="accepted", checks=(), norm=1.0, judged_at=NOW)

    asyncio.run(a_round())

    for version in (1, 3):
        source = StoreSource(s3_store)
        report = verify_version(source, MODEL, version, cache=tmp_path, publisher_key=public_key_hex(private))
        assert report.ok, report.mismatches
        assert (report.version, report.level) == (version, "round")
    assert s3_store.head(pointer_key(MODEL)) is not None
