"""What the parts of benchmarks/worker.py have in common: how much is measured, the model, the rows, the job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from aggregate_run import FOLDER, QUIET
from rounds import shards

from aggregator.bases import fetch_base
from aggregator.skeleton import Skeleton
from rankup.protocol import DeviceKind
from rankup.recipe import Precision, Recipe
from rankup.targets import select_targets, target_of
from worker.device import profile
from worker.job import Job

LEASE_S: Final = 1200.0
"""How long the server makes a lease by default."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    scratch: Path
    model: str = "smollm2"
    steps: int = 14
    """Of a training that is timed; the first `WARM_UP` are not."""
    repeat: int = 3
    """Of every way, in turn."""
    threads: int = len(os.sched_getaffinity(0))
    device: DeviceKind = profile().kind
    """A card where torch can compute on one."""
    pauses: int = 3
    rows: int = 256


WARM_UP: Final = 2


def recipe_of(scale: Scale) -> Recipe:
    """Rank 8 on all linear layers, batches of 4 x 128 tokens: a round's default."""
    return Recipe(steps=scale.steps)


def base_of(scale: Scale) -> Path:
    """The model's folder, made once."""
    return fetch_base(scale.model, scale.scratch / "base").folder


def shard_of(scale: Scale) -> Path:
    """Docstrings, written once: what is imported meanwhile may change what there is."""
    path = scale.scratch / "shard.jsonl"
    if not path.exists():
        path.write_text(shards(1, scale.rows)[0])
    return path


def job_of(
    scale: Scale, folder: Path, *, checkpoint_every_s: float = 60.0, precision: Precision | Literal["auto"] = "auto"
) -> Job:
    """A lease's job in an empty `folder`."""
    folder.mkdir(parents=True)
    shard = shard_of(scale)
    base, recipe = base_of(scale), recipe_of(scale)
    weights = {name: target_of(weight.role, weight.shape) for name, weight in Skeleton.of(base).parameters.items()}
    return Job(
        round_id="bench",
        lease_id="bench",
        fence=1,
        model=scale.model,
        base_manifest="0" * 64,
        base_folder=base,
        shard_files=(shard,),
        delta_file=folder / "finished.delta",
        recipe=recipe,
        seed=1,
        targets=select_targets(
            {name: target_of(weight.role, weight.shape) for name, weight in weights.items()}, recipe
        ),
        device=scale.device,
        precision=precision,
        threads=scale.threads,
        checkpoint_file=folder / "checkpoint",
        checkpoint_every_s=checkpoint_every_s,
    )


def environment(job: Job) -> dict[str, str]:
    """As the agent starts its trainer, on the modules of this checkout."""
    return {
        **os.environ,
        **QUIET,
        "OMP_NUM_THREADS": str(job.threads),
        "PYTHONPATH": str(FOLDER.parent),
    }
