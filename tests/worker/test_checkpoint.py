"""A training that stops and goes on, on a random Llama of 60 thousand weights, without a process of its own."""

from __future__ import annotations

import errno
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_llama, write_rows

from rankup.recipe import Recipe
from rankup.targets import Target, select_targets
from worker import checkpoint, trainer
from worker.checkpoint import CheckpointError, Keeper, checkpoint_progress, read_checkpoint
from worker.job import Finished, Job, Line, Ready, StepDone, parse_share, share_order

ROWS = [{"text": f"the {n}th list of files, sorted by name"[: 20 + n]} for n in range(10)]
RECIPE = Recipe(rank=2, steps=9, learning_rate=2e-2, batch_size=4, max_tokens=48, warmup_steps=2, train_vectors=True)
"""Ten rows in batches of four: an epoch has three steps, its last batch is a short one."""


class _StoppedError(Exception):
    """The process ended here."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Target]]:
    folder = tmp_path_factory.mktemp("base")
    return folder, select_targets(save_tiny_llama(folder), RECIPE)


@pytest.fixture(scope="module")
def forgetful(base: tuple[Path, dict[str, Target]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base with dropout, so that random states count."""
    folder = tmp_path_factory.mktemp("forgetful")
    for path in base[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    return folder


def make_job(folder: Path, base: tuple[Path, dict[str, Target]], **more: Any) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "round_id": "round-1",
        "lease_id": "lease-1",
        "fence": 1,
        "model": "tiny",
        "base_manifest": "ab" * 32,
        "base_folder": base[0],
        "shard_files": (write_rows(folder / "shard.jsonl", ROWS),),
        "delta_file": folder / "finished.delta",
        "recipe": RECIPE,
        "seed": 5,
        "targets": base[1],
        "device": "cpu",
        "checkpoint_file": folder / "checkpoint",
    }
    return Job(**fields | more)


def train(job: Job, stop_after: int | None = None, *, share: int = 100) -> list[Line]:
    """Train from the checkpoint on; with `stop_after`, write one in the middle of the step after that and end."""
    lines: list[Line] = []
    orders = trainer.Orders(share_percent=share)

    def emit(line: Line) -> None:
        if isinstance(line, StepDone) and stop_after is not None and line.step == stop_after + 1:
            raise _StoppedError
        lines.append(line)

    class Interrupted(Keeper):
        def before_update(self) -> None:
            # Gradients of the next step are there, its update is not: what a pause finds in the middle of a step.
            if stop_after is not None and len(self._progress.losses) == stop_after:
                assert self.save() == stop_after
            super().before_update()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Keeper", Interrupted)
        scratch = job.delta_file.with_name(f"scratch-{len(list(job.delta_file.parent.iterdir()))}")
        with suppress(_StoppedError):
            trainer.train(job, emit, started=time.perf_counter(), scratch=scratch, orders=orders)
    return lines


def losses(lines: list[Line]) -> list[tuple[int, float]]:
    return [(line.step, line.loss) for line in lines if isinstance(line, StepDone)]


@pytest.mark.slow
def test_a_training_stopped_anywhere_gives_the_same_curve_and_the_same_bits(
    base: tuple[Path, dict[str, Target]], forgetful: Path, tmp_path: Path
) -> None:
    at_one_go = train(make_job(tmp_path / "one", base, base_folder=forgetful))
    job = make_job(tmp_path / "many", base, base_folder=forgetful)
    # In the first epoch, at the end of the second one, and before the last step.
    parts = [train(job, stop) for stop in (1, 6, 8)]
    assert [line.step for part in parts for line in part if isinstance(line, Ready)] == [0, 1, 6]
    parts.append(train(job.model_copy(update={"checkpoint_every_s": 1e-9})))
    assert [entry for part in parts for entry in losses(part)] == losses(at_one_go)
    assert isinstance(at_one_go[-1], Finished)
    finished = parts[-1][-1]
    assert isinstance(finished, Finished)
    assert finished.sha256 == at_one_go[-1].sha256
    assert (finished.tokens, finished.first_loss, finished.last_loss) == (
        at_one_go[-1].tokens,
        at_one_go[-1].first_loss,
        at_one_go[-1].last_loss,
    )
    assert checkpoint_progress(tmp_path / "many" / "checkpoint")[0] == 9
    job.delta_file.unlink()
    only_written = train(job)
    assert losses(only_written) == []
    assert isinstance(only_written[-1], Finished)
    assert only_written[-1].sha256 == finished.sha256


@pytest.mark.slow
def test_smaller_pieces_of_a_batch_follow_the_same_curve_and_rest_as_long_as_they_are_told(
    base: tuple[Path, dict[str, Target]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_job(tmp_path / "whole", base))
    rests: list[float] = []
    monkeypatch.setattr(trainer.time, "sleep", rests.append)
    pieces = train(make_job(tmp_path / "pieces", base, micro_batch=1, checkpoint_file=None), share=20)
    assert [step for step, _ in losses(pieces)] == [step for step, _ in losses(whole)]
    for (_, one), (_, other) in zip(losses(whole), losses(pieces), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert isinstance(whole[-1], Finished)
    assert isinstance(pieces[-1], Finished)
    assert whole[-1].tokens == pieces[-1].tokens
    # A step at 20 per cent is followed by a rest of four times its length.
    assert len(rests) == RECIPE.steps - 1
    assert sum(rests) == pytest.approx(4 * pieces[-1].seconds, rel=0.9)
    damage_of(tmp_path, base)


def damage_of(folder: Path, base: tuple[Path, dict[str, Target]]) -> None:
    """What is damaged or belongs to another training is refused, and training then starts anew."""
    import torch

    job = make_job(folder / "whole", base)
    path = folder / "whole" / "checkpoint"
    train(job, 1)
    good = path.read_bytes()
    assert read_checkpoint(torch, path, job.training_digest()) is not None
    other = make_job(folder / "other", base, seed=6)
    with pytest.raises(CheckpointError, match="another training"):
        read_checkpoint(torch, path, other.training_digest())
    for damaged in (b"", good[:7], good[:-1], good[:200], b"\x00" * len(good), good.replace(b'"F32"', b'"F31"')):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_checkpoint(torch, path, job.training_digest())
        assert checkpoint_progress(path) == (0, 0.0) or damaged.startswith(good[:8])
    assert losses(train(job, 1))[0][0] == 1


def test_there_is_no_checkpoint_without_a_step_and_none_in_the_middle_of_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(checkpoint, "_WAIT_FOR_UPDATE_S", 0.05)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    progress = trainer.Progress(lambda line: None, steps=3)
    keeper = Keeper(torch, tmp_path / "checkpoint", "ab" * 32, progress, every_s=1e9)
    assert keeper.save() == 0
    keeper.attach(model, optimizer, schedule)
    assert keeper.save() == 0
    keeper.before_update()
    assert keeper.save() == 0
    progress.begin()
    progress.step_done(1.0)
    keeper.after_update()
    assert keeper.save() == 1
    assert checkpoint_progress(tmp_path / "checkpoint")[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_scale_of_a_loss_in_float16_goes_on_where_it_was(tmp_path: Path) -> None:
    import torch

    def parts(scale: float) -> tuple[Any, Any, Any]:
        model = torch.nn.Linear(2, 2)
        optimizer: Any = torch.optim.AdamW(model.parameters())
        # As accelerate's optimiser has it.
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    progress = trainer.Progress(lambda line: None, steps=3)
    keeper = Keeper(torch, tmp_path / "checkpoint", "ab" * 32, progress, every_s=1e9, precision="float16")
    keeper.attach(*parts(8.0))
    keeper.before_update()
    progress.step_done(1.0, 0.5)
    keeper.after_update()
    assert keeper.save() == 1
    found = read_checkpoint(torch, tmp_path / "checkpoint", "ab" * 32)
    assert found is not None
    assert found.meta.precision == "float16"
    model, optimizer, schedule = parts(65536.0)
    found.restore(torch, model, optimizer, schedule)
    assert optimizer.scaler.get_scale() == 8.0
    optimizer.scaler.scale(model(torch.ones(2)).sum()).backward()
    optimizer.scaler.step(optimizer)
    optimizer.scaler.update()
    assert optimizer.scaler.get_scale() == 8.0


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    progress = trainer.Progress(lambda line: None, steps=3)
    keeper = Keeper(torch, tmp_path / "checkpoint", "ab" * 32, progress, every_s=0.0)
    keeper.attach(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    progress.begin()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensor_file", full)
        keeper.before_update()
        progress.step_done(1.0)
        keeper.after_update()
        assert "No space left" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    keeper.before_update()
    progress.step_done(1.0)
    keeper.after_update()
    assert checkpoint_progress(tmp_path / "checkpoint")[0] == 2


@pytest.mark.parametrize(
    ("order", "percent"),
    [
        (share_order(30), 30),
        ("share 0", 1),
        ("share 999", 100),
        ("share 1000", None),
        ("share x", None),
        ("pause", None),
    ],
)
def test_orders_are_read_as_they_were_meant(order: str, percent: int | None) -> None:
    assert parse_share(order) == percent
