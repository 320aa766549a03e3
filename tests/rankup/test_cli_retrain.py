"""An audit's training is that of the lease: all of its shards, the steps of all of them, and the rank of its tier."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import worker.training
from rankup.cli.retrain import retrain
from rankup.errors import IntegrityError
from rankup.protocol import RoundRequest, SubmitStatement
from rankup.recipe import Precision, Recipe
from rankup.records import BlobRef, RoundRecord, Submission
from rankup.store import MemoryStore, blob_key
from rankup.targets import Target
from worker.job import Job

SHARDS = [b'{"text": "%d"}\n' % number for number in range(5)]
RECIPE = Recipe(rank=8, alpha=16.0, steps=5)


def make_record() -> RoundRecord:
    return RoundRecord(
        round_id="round-1",
        request=RoundRequest(model="tiny", dataset="docs", recipe=RECIPE, shards=len(SHARDS)),
        index=0,
        base_version=0,
        base_manifest="ab" * 32,
        shards=tuple(BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) for data in SHARDS),
        targets={"up.weight": Target(d_out=8, d_in=6, rank=8), "bias": Target(role="vector", d_out=8, d_in=1, rank=1)},
        opened_at=1.0,
    )


def make_submission(shard: int, shards: int, rank: int | None) -> Submission:
    statement = SubmitStatement(
        round_id="round-1",
        lease_id="lease-1",
        fence=1,
        base_manifest="ab" * 32,
        sha256="cd" * 32,
        size_bytes=1,
        tokens=1,
        steps=1,
        first_loss=1.0,
        last_loss=1.0,
        seconds=1.0,
    )
    return Submission(
        statement=statement,
        signature="00" * 64,
        public_key="00" * 32,
        worker_id="w-1",
        worker_name="ada",
        shard=shard,
        shards=shards,
        rank=rank,
        submitted_at=1.0,
    )


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would be trained."""
    seen: list[Job] = []

    def run_trainer(job: Job, *_: Any, **__: Any) -> Job:
        seen.append(job)
        return job

    monkeypatch.setattr(worker.training, "run_trainer", run_trainer)
    return seen


def stored(shards: list[bytes]) -> MemoryStore:
    store = MemoryStore()
    for right, data in zip(SHARDS, shards, strict=True):
        store.put(blob_key(hashlib.sha256(right).hexdigest()), data)
    return store


@pytest.mark.parametrize(("rank", "alpha", "ranks"), [(None, 16.0, (8, 1)), (2, 4.0, (2, 1))])
def test_the_job_is_that_of_the_lease(
    tmp_path: Path, jobs: list[Job], rank: int | None, alpha: float, ranks: tuple[int, int]
) -> None:
    teacher = None if rank is None else tmp_path / "teacher"
    delta = retrain(stored(SHARDS), make_record(), make_submission(2, 3, rank), tmp_path / "base", teacher, tmp_path)
    (job,) = jobs
    assert delta == job.delta_file
    assert (job.base_folder, job.teacher_folder) == (tmp_path / "base", teacher)
    assert [path.read_bytes() for path in job.shard_files] == SHARDS[2:5]
    assert job.steps == 3 * RECIPE.steps
    assert (job.recipe.rank, job.recipe.alpha) == (rank or RECIPE.rank, alpha)
    assert (job.targets["up.weight"].rank, job.targets["bias"].rank) == ranks


def test_a_shard_with_other_bytes_is_not_trained_on(tmp_path: Path, jobs: list[Job]) -> None:
    store = stored([*SHARDS[:3], b"other", SHARDS[4]])
    with pytest.raises(IntegrityError, match="other bytes"):
        retrain(store, make_record(), make_submission(2, 3, None), tmp_path / "base", None, tmp_path)
    assert jobs == []


@pytest.mark.parametrize(("stated", "asked"), [("nf4", "nf4"), ("bfloat16", "auto"), ("float32", "auto")])
def test_a_base_that_was_held_in_four_bits_is_so_again(
    tmp_path: Path, jobs: list[Job], stated: Precision, asked: str
) -> None:
    submission = make_submission(0, 1, None)
    statement = submission.statement.model_copy(update={"precision": stated})
    submission = submission.model_copy(update={"statement": statement})
    retrain(stored(SHARDS), make_record(), submission, tmp_path / "base", None, tmp_path)
    assert [job.precision for job in jobs] == [asked]
