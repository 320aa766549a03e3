"""Training a submission's shards again on the organiser's machine, for audits: the volunteer's own trainer as a child.

Aggregator and worker never import each other; the process that is assembled here knows both. The function is handed to
the pipeline and runs in a task of the cluster. Same recipe, seed and targets: only the machine differs. A base that the
volunteer held in 4 bits is held in 4 bits again (bitsandbytes does that on a processor too), since beside the full one
another delta is right.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from rankup.errors import IntegrityError, SetupError
from rankup.records import RoundRecord, Submission
from rankup.store import Store, blob_key
from rankup.targets import targets_at_tier

MAX_THREADS = 4
LIMIT_S = 4 * 3600.0


def retrain(
    store: Store, record: RoundRecord, submission: Submission, base: Path, teacher: Path | None, folder: Path
) -> Path:
    """Train the shards of `submission` from the version in the folder `base`, taught by the one in `teacher` where the
    round has one; returns the delta, a file in `folder`.

    `record` is that of the round that the statement names. Raises IntegrityError where a shard's bytes are not those
    of the record, SetupError where it takes too long, what the store raises, and what `worker.training.run_trainer`
    raises.
    """
    from coordinator.grants import seed_of
    from worker.device import usable_threads
    from worker.job import Job
    from worker.training import run_trainer

    statement = submission.statement
    shards = record.shards[submission.shard : submission.shard + submission.shards]
    recipe = record.request.recipe
    job = Job(
        round_id=record.round_id,
        lease_id=statement.lease_id,
        fence=statement.fence,
        model=record.request.model,
        base_manifest=statement.base_manifest,
        base_folder=base,
        teacher_folder=teacher,
        shard_files=tuple(folder / f"shard-{number}.jsonl" for number in range(len(shards))),
        delta_file=folder / "again.delta",
        recipe=recipe.at_tier(submission.rank),
        seed=seed_of(record.round_id, statement.lease_id),
        targets=targets_at_tier(record.targets, recipe, submission.rank),
        threads=min(MAX_THREADS, usable_threads(0)),
        precision="nf4" if statement.precision == "nf4" else "auto",
    )
    for shard, path in zip(shards, job.shard_files, strict=True):
        store.get_file(blob_key(shard.sha256), path)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise IntegrityError(f"the shard {shard.sha256[:12]}… of round {record.round_id} has other bytes")
    until = time.monotonic() + LIMIT_S
    result = run_trainer(
        job,
        folder / "job.json",
        folder / "trainer.log",
        on_line=lambda _line: None,
        stop_reason=lambda: "out of time" if time.monotonic() > until else None,
    )
    if result is None:
        raise SetupError(f"training the shards again takes more than {LIMIT_S / 3600:g} hours on this machine")
    return job.delta_file
