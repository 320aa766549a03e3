"""The numbers of a training in the owner's own tools; TensorBoard's files as they are read by TensorBoard."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_llama, write_rows

from rankup.errors import SetupError
from rankup.recipe import Recipe
from rankup.settings import WorkerSettings
from rankup.targets import select_targets
from worker import trainer
from worker.checkpoint import Keeper
from worker.job import Finished, Job, Line, StepDone
from worker.tracking import arguments, environment, require, run_folder

RECIPE = Recipe(rank=2, steps=7, learning_rate=2e-2, batch_size=2, max_tokens=32, warmup_steps=3)


class _StoppedError(Exception):
    """The process ended here."""


def test_the_setting_takes_words_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKUP_WORKER_REPORT_TO", "tensorboard, wandb")
    settings = WorkerSettings()
    assert settings.report_to == ("tensorboard", "wandb")
    assert WorkerSettings.from_wire(settings.to_wire()).report_to == ("tensorboard", "wandb")
    monkeypatch.setenv("RANKUP_WORKER_REPORT_TO", "clearml")
    with pytest.raises(ValueError, match="report_to"):
        WorkerSettings()
    monkeypatch.delenv("RANKUP_WORKER_REPORT_TO")
    assert WorkerSettings().report_to == ()


def test_a_tool_that_is_not_there_is_told_before_any_work() -> None:
    require((), lambda name: None)
    require(("tensorboard",), lambda name: name)
    with pytest.raises(SetupError, match="names wandb and trackio") as failed:
        require(("wandb", "tensorboard", "trackio"), lambda name: name if name == "tensorboard" else None)
    assert "pip install wandb trackio" in failed.value.remedy


def test_every_tool_learns_folder_project_and_run_and_the_owners_choice_stays(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "lease-1")
    said = environment(run, {"WANDB_PROJECT": "mine"})
    assert said["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "runs" / "lease-1")
    assert (said["WANDB_RUN_ID"], said["WANDB_PROJECT"], said["WANDB_RESUME"]) == ("lease-1", "mine", "allow")
    assert arguments((), run) == {"report_to": "none"}
    assert arguments(("trackio",), run) == {"report_to": ["trackio"], "run_name": "lease-1", "project": "rankup"}


def shown(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Any = EventAccumulator(str(run))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(f"train/{name}")]


def train(job: Job, scratch: Path, *, stop_after: int | None = None) -> list[Line]:
    """Train from the checkpoint on; with `stop_after`, write one after that step and end without a word."""
    lines: list[Line] = []

    class Interrupted(Keeper):
        def before_update(self) -> None:
            if stop_after is not None and len(self._progress.losses) == stop_after:
                assert self.save() == stop_after
                # What a process that ends here has written.
                assert job.report_folder is not None
                assert [step for step, _ in shown(job.report_folder, "loss")] == list(range(1, stop_after + 1))
                raise _StoppedError
            super().before_update()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Keeper", Interrupted)
        try:
            trainer.train(job, lines.append, started=time.perf_counter(), scratch=scratch)
        except _StoppedError:
            assert stop_after is not None
    return lines


@pytest.mark.slow
def test_tensorboard_shows_one_run_of_every_step_with_the_recipes_warm_up_over_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in environment(tmp_path, {}):
        monkeypatch.setenv(name, "")
    base = tmp_path / "base"
    targets = select_targets(save_tiny_llama(base), RECIPE)
    run = run_folder(tmp_path, "lease-1")
    job = Job(
        round_id="round-1",
        lease_id="lease-1",
        fence=1,
        model="tiny",
        base_manifest="ab" * 32,
        base_folder=base,
        shard_files=(write_rows(tmp_path / "shard.jsonl", [{"text": f"row {n} of a list"} for n in range(8)]),),
        delta_file=tmp_path / "finished.delta",
        recipe=RECIPE,
        seed=5,
        targets=targets,
        device="cpu",
        checkpoint_file=tmp_path / "checkpoint",
        report_to=("tensorboard",),
        report_folder=run,
    )
    lines = train(job, tmp_path / "first", stop_after=4) + train(job, tmp_path / "second")
    steps = [line for line in lines if isinstance(line, StepDone)]
    assert [step for step, _ in shown(run, "loss")] == [line.step for line in steps] == list(range(1, 8))
    assert [value for _, value in shown(run, "loss")] == pytest.approx([line.loss for line in steps])
    assert [value for _, value in shown(run, "grad_norm")] == pytest.approx([line.grad_norm for line in steps])
    # Three steps up from nothing, then half a cosine over the other four.
    rates = [0, 1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    assert [value for _, value in shown(run, "learning_rate")] == pytest.approx([2e-2 * rate for rate in rates])
    assert isinstance(lines[-1], Finished)
    assert lines[-1].grad_norm == pytest.approx(steps[-1].grad_norm)
    assert (lines[-1].device, lines[-1].precision, lines[-1].energy_j) == ("cpu", "float32", None)
