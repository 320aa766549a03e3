"""A trainer without a model whose teacher takes its time: `python teaching_trainer.py JOB.json`, with a real file of
answers. Each start adds a line to the file `starts` of the server's folder: how many answers it found."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from fake_trainer import hand_over, say

from worker.answers import Answer, AnswersFile
from worker.job import PAUSE, Answered, Job, Paused, Ready, StepDone, TrainerExit

PROMPTS = 8


def main(job_file: str) -> int:
    job = Job.model_validate_json(Path(job_file).read_text())
    assert job.teacher_folder is not None
    assert (job.teacher_folder / "config.json").read_text() == '{"of": "sage"}'
    paused = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == PAUSE:
                paused.set()

    threading.Thread(target=listen, daemon=True).start()
    with AnswersFile(job.answers_file, job.training_digest()) as file:
        with (Path(job_file).parents[2] / "starts").open("a") as starts:
            starts.write(f"{len(file.answers)}\n")
        say(Answered(done=len(file.answers), total=PROMPTS))
        for row in range(len(file.answers), PROMPTS):
            if paused.wait(0.1):
                say(Paused(step=0))
                return TrainerExit.PAUSED
            file.add([Answer(row=row, text="so", ended=True)], 0.1)
            say(Answered(done=len(file.answers), total=PROMPTS))
    say(Ready(device="cpu", examples=PROMPTS, import_s=0.0, setup_s=0.0))
    for step in range(1, job.steps + 1):
        say(StepDone(step=step, steps=job.steps, loss=3.0 / step, tokens=8 * step, tokens_per_s=100.0))
    hand_over(job, job.steps)
    return TrainerExit.DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
