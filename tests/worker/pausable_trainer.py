"""A trainer without a model that can pause: `python pausable_trainer.py MODE JOB.json`, with real checkpoint files.

MODE: slow (just that), crash-once and memory-once (fail after the second step of the first start, with a checkpoint).
Each start adds a line to the file `starts` of the server's folder: the step it goes on from, and its micro-batch.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from fake_trainer import hand_over, say

from rankup.tensorfile import write_tensor_file
from worker.checkpoint import FORMAT, checkpoint_progress
from worker.job import PAUSE, Failed, Job, Paused, Ready, StepDone, TrainerExit


def save(job: Job, step: int) -> None:
    meta = {
        "format": FORMAT,
        "training": job.training_digest(),
        "step": step,
        "tokens": 8 * step,
        "seconds": 1.0,
        "groups": [],
        "schedule": {},
        "python": [],
        "numpy": [],
    }
    text = json.dumps(meta).encode()
    assert job.checkpoint_file is not None
    write_tensor_file(job.checkpoint_file, {"meta": ("U8", (len(text),), text)})


def main(mode: str, job_file: str) -> int:
    job = Job.model_validate_json(Path(job_file).read_text())
    assert job.checkpoint_file is not None
    step, _ = checkpoint_progress(job.checkpoint_file)
    starts = Path(job_file).parents[2] / "starts"
    first = not starts.exists()
    with starts.open("a") as file:
        file.write(f"{step} {job.micro_batch}\n")
    paused = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == PAUSE:
                paused.set()

    threading.Thread(target=listen, daemon=True).start()
    say(Ready(device="cpu", examples=1, import_s=0.0, setup_s=0.0, step=step, pausable=True))
    while step < job.steps:
        if paused.wait(0.07):
            save(job, step)
            say(Paused(step=step))
            return TrainerExit.PAUSED
        step += 1
        say(StepDone(step=step, steps=job.steps, loss=3.0 / step, tokens=8 * step, tokens_per_s=100.0))
        if first and step == 2 and mode != "slow":
            save(job, step)
            if mode == "memory-once":
                say(Failed(cause="out of memory", remedy="none"))
                return TrainerExit.OUT_OF_MEMORY
            return TrainerExit.CRASHED
    hand_over(job, step)
    return TrainerExit.DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
