"""A training in transformers' loop, taken up from a checkpoint and kept ready to stop: the callback and its parts.

What always holds: the loop goes on at the step, the example and the random numbers of the checkpoint; steps are counted
when their update is done, and the share of the time is kept between steps. What a checkpoint holds is
`worker.checkpoint`'s subject; torch and transformers are handed in.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from worker.checkpoint import Checkpoint, CheckpointError, Keeper, read_checkpoint
from worker.job import Job
from worker.orders import Orders
from worker.progress import Progress


def checkpoint_of(torch: Any, job: Job) -> Checkpoint | None:
    """What to go on from; a checkpoint that cannot be used is told in the log and left to be replaced."""
    if job.checkpoint_file is None:
        return None
    try:
        return read_checkpoint(torch, job.checkpoint_file, job.training_digest())
    except CheckpointError as exc:
        sys.stderr.write(f"the training starts anew: {exc}\n")
        return None


def resume_folder(transformers: Any, scratch: Path, checkpoint: Checkpoint | None, config: Any) -> str | None:
    """A folder from which transformers learns at which step, and so at which example, to go on."""
    if checkpoint is None:
        return None
    folder = scratch / "resume"
    folder.mkdir(parents=True)
    state = transformers.TrainerState(
        global_step=checkpoint.step, max_steps=config.max_steps, train_batch_size=config.per_device_train_batch_size
    )
    state.compute_steps(config, config.max_steps)
    state.save_to_json(str(folder / "trainer_state.json"))
    return str(folder)


def pausing(
    transformers: Any,
    torch: Any,
    progress: Progress,
    keeper: Keeper | None,
    checkpoint: Checkpoint | None,
    orders: Orders,
) -> Any:
    """The callback that counts steps, restores a checkpoint, keeps new ones, and rests between steps."""

    class Pausing(transformers.TrainerCallback):  # type: ignore[misc]
        step_began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parts = kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"]
            if checkpoint is not None:
                checkpoint.restore(torch, *parts)
            if keeper is not None:
                keeper.attach(*parts)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if orders.share_percent < 100 and self.step_began:
                took = time.perf_counter() - self.step_began
                time.sleep(took * (100.0 / orders.share_percent - 1.0))
            self.step_began = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if keeper is not None:
                keeper.before_update()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                progress.step_done(float(logs["loss"]), logs.get("grad_norm"))
                if keeper is not None:
                    keeper.after_update()

    return Pausing()


def going_on(trainer: type, torch: Any, checkpoint: Checkpoint | None) -> type:
    """The trainer class, told by transformers to resume, taking what was trained from `checkpoint` alone."""

    class GoingOn(trainer):  # type: ignore[misc]
        def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            """The folder it is given holds a step only; what was trained comes back when the training begins."""

        def _load_rng_state(self, *args: Any, **kwargs: Any) -> None:
            """Called at the place where no iterator over the examples draws numbers any more."""
            if checkpoint is not None:
                checkpoint.restore_random(torch)

    return GoingOn
