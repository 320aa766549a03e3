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
from toy_world import NOW, World

from aggregator.admission import refuse
from aggregator.pipeline import DENOMINATOR_LOG2, Pipeline, _result, weigh
from rankup.delta import DeltaHeader, write_delta
from rankup.errors import IntegrityError, NotFoundError, StateError, UnreachableError
from rankup.fixedpoint import quantise
from rankup.protocol import Recipe, RoundRequest, SubmitStatement, canonical_json
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
from rankup.store import S3Store
from rankup.versions import dataset_key, heldout_key, manifest_digest, pointer_key, round_key, upload_key

if TYPE_CHECKING:
    from coordinator.cluster import Cluster
    from rankup.local import LocalServices


def receipt(world: World, shard: int, *, norm: float = 1.0, tokens: int = 100) -> Receipt:
    ref = BlobRef(sha256=hashlib.sha256(bytes([shard])).hexdigest(), size_bytes=10)
    submission = world.submission(shard, ref, tokens=tokens)
    return Receipt(submission=submission, accepted=True, reason="accepted", checks=(), norm=norm, judged_at=NOW)


def test_terms_are_sorted_and_weighted_by_tokens_whatever_the_order_of_receipts(world: World) -> None:
    receipts = [receipt(world, 0, tokens=100), receipt(world, 1, tokens=300), receipt(world, 2, tokens=100, norm=150.0)]
    terms = weigh(world.record, receipts)
    assert terms == weigh(world.record, receipts[::-1]) == weigh(world.record, [*receipts, receipts[0]])
    assert [term.contribution for term in terms] == sorted(term.contribution for term in terms)
    by_shard = {term.shard: term.coefficient for term in terms}
    assert by_shard[1] == round(0.6 * 2**DENOMINATOR_LOG2)
    assert by_shard[2] == by_shard[0] // 100, "the norm is 100 times the limit of 1.5"


def test_rejected_receipts_have_no_weight_and_a_round_needs_an_accepted_one(world: World) -> None:
    good, bad = receipt(world, 0), refuse(receipt(world, 1).submission, "malformed", NOW)
    assert [term.shard for term in weigh(world.record, [bad, good])] == [0]
    with pytest.raises(StateError):
        weigh(world.record, [bad])


def test_a_receipt_of_another_round_is_refused(world: World) -> None:
    foreign = receipt(world, 0)
    other = world.record.model_copy(update={"round_id": "round-2"})
    with pytest.raises(IntegrityError):
        weigh(other, [foreign])


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
        asyncio.run(_result(killed()))


# -- one round on the real stack ---------------------------------------------------------------------------------------

MODEL, DATASET, ROUND = "pipeline-toy", "pipeline-rows", "pipeline-round"


def open_round(store: S3Store, base: Manifest) -> RoundRecord:
    rows = b"".join(
        json.dumps({"prompt": f"What is {n}?", "completion": f" {n} is a number."}).encode() + b"\n" for n in range(6)
    )
    heldout = BlobRef(sha256=hashlib.sha256(rows).hexdigest(), size_bytes=len(rows))
    shards = tuple(BlobRef(sha256=f"{n:064x}", size_bytes=1) for n in range(3))
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
    request = RoundRequest(model=MODEL, dataset=DATASET, recipe=Recipe(rank=2, steps=5, max_tokens=64), shards=3)
    record = RoundRecord(
        round_id=ROUND,
        request=request,
        index=0,
        base_version=0,
        base_manifest=manifest_digest(base),
        shards=shards,
        targets=base.targets(),
        opened_at=NOW,
    )
    store.put(round_key(ROUND), canonical_json(record))
    return record


def hand_in(store: S3Store, record: RoundRecord, shard: int, folder: Path, *, rank: int = 2) -> Submission:
    rng = np.random.default_rng(shard)
    factors = {
        name: quantise(1e-3 * rng.standard_normal((t.d_out, rank)), rng.standard_normal((rank, t.d_in)))
        for name, t in record.targets.items()
    }
    lease = f"pipeline-lease-{shard}"
    header = DeltaHeader(model=MODEL, round_id=ROUND, lease_id=lease, base_manifest=record.base_manifest)
    path = folder / f"{shard}.delta"
    ref = write_delta(path, header, factors)
    private = parse_private_key(generate_private_key())
    statement = SubmitStatement(
        round_id=ROUND,
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
        submitted_at=NOW,
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
        submissions = [hand_in(s3_store, record, n, tmp_path, rank=2 if n < 2 else 3) for n in range(3)]
        receipts = list(await asyncio.gather(*(pipeline.admit(record, one, NOW) for one in submissions)))
        assert [one.accepted for one in receipts] == [True, True, False], [one.reason for one in receipts]
        assert await pipeline.admit(record, submissions[0], NOW + 9) == receipts[0]

        draft = await pipeline.fold(record, receipts, NOW)
        assert await pipeline.fold(record, receipts[::-1], NOW) == draft
        assert sum(term.coefficient for term in draft.terms) == 2**DENOMINATOR_LOG2
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
        follow_up = record.model_copy(update={"base_version": 1, "base_manifest": pointer.manifest})
        again = await pipeline.evaluate(follow_up, measured)
        assert again.parent_heldout_loss == evaluation.heldout_loss

    async def a_missing_blob_arrives_as_our_own_error() -> None:
        unknown = record.model_copy(update={"request": record.request.model_copy(update={"dataset": "absent"})})
        with pytest.raises(NotFoundError):
            await pipeline.evaluate(unknown, base)

    asyncio.run(a_round())
    asyncio.run(a_missing_blob_arrives_as_our_own_error())

    report = verify_version(StoreSource(s3_store), MODEL, None, cache=tmp_path, publisher_key=public_key_hex(private))
    assert report.ok, report.mismatches
    assert (report.version, report.level, report.contributions) == (1, "replay", 2)
    assert s3_store.head(pointer_key(MODEL)) is not None
