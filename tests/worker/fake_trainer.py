"""A trainer without a model: `python fake_trainer.py MODE JOB.json` speaks the protocol and writes a real delta.

MODE: ok, crash, endless (steps until it is ended), full-disk, liar (reports another hash), noisy (prints more).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from rankup.delta import DeltaHeader, write_delta
from rankup.fixedpoint import quantise
from worker.job import Failed, Finished, Job, Ready, StepDone, TrainerExit, format_line


def say(line: Ready | StepDone | Finished | Failed) -> None:
    sys.stdout.write(format_line(line))
    sys.stdout.flush()


def main(mode: str, job_file: str) -> int:
    job = Job.model_validate_json(Path(job_file).read_text())
    say(Ready(device="cpu", examples=1, import_s=0.0, setup_s=0.0))
    if mode == "crash":
        say(StepDone(step=1, steps=job.steps, loss=3.0, tokens=1, tokens_per_s=1.0))
        sys.stderr.write("something is wrong with the fan\n")
        return 1
    if mode == "full-disk":
        say(Failed(cause="No space left on device", remedy="Free some space."))
        return TrainerExit.DISK_FULL
    if mode == "noisy":
        sys.stdout.write("hello from a library\n")
    step = 0
    while step < job.steps or mode == "endless":
        step += 1
        measured = {"grad_norm": 0.5, "energy_j": 2.0 * step}
        say(StepDone(step=step, steps=job.steps, loss=3.0 / step, tokens=8 * step, tokens_per_s=100.0, **measured))
        time.sleep(0.02)
    hand_over(job, step, liar=mode == "liar")
    return 0


def hand_over(job: Job, step: int, *, liar: bool = False) -> None:
    """Write a delta and say so."""
    rng = np.random.default_rng(job.seed)
    factors = {
        name: quantise(rng.normal(size=(t.d_out, job.recipe.rank)), rng.normal(size=(job.recipe.rank, t.d_in)))
        for name, t in job.targets.items()
    }
    header = DeltaHeader(model=job.model, round_id=job.round_id, lease_id=job.lease_id, base_manifest=job.base_manifest)
    ref = write_delta(job.delta_file, header, factors)
    say(
        Finished(
            path=job.delta_file,
            sha256="0" * 64 if liar else ref.sha256,
            size_bytes=ref.size_bytes,
            tokens=8 * step,
            steps=step,
            first_loss=3.0,
            last_loss=3.0 / step,
            seconds=0.1,
            device="cuda",
            precision="nf4",
            tokens_per_s=90.0,
            grad_norm=0.5,
            energy_j=2.0 * step,
        )
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
