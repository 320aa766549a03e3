"""One training in a process of its own, for benchmarks/worker.py: as a lease, as plain TRL, or as a bare PyTorch loop.

    python benchmarks/worker_ways.py SPEC.json     # a `Spec`; one JSON object on standard output

What always holds: all ways train the same model in the same precision, with the same rank on the same layers, on the
same batches of tokens in the same order, with AdamW, schedule and clipping of the recipe. The bare loop has its batches
as tensors before the clock starts, so it loads, shuffles and pads nothing; its first loss shows that they are the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.job import Job, StepDone
from worker.shard import read_rows


class Clock:
    """When each step ended: wall clock and processor time of this process."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def lease(job: Job, clock: Clock) -> None:
    """What a volunteer's trainer does, checkpoints included."""
    from worker.trainer import train

    def emit(line: Any) -> None:
        if isinstance(line, StepDone):
            clock.step(line.loss)

    with tempfile.TemporaryDirectory() as scratch:
        train(job, emit, started=time.perf_counter(), scratch=Path(scratch))


def plain_trl(job: Job, clock: Clock) -> None:
    """TRL's SFTTrainer with a LoRA configuration of peft, as its documentation shows it."""
    import transformers

    class Timing(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                clock.step(float(logs["loss"]))

    trainer = _sft_trainer(job)
    trainer.add_callback(Timing())
    trainer.train()


def bare_loop(job: Job, clock: Clock) -> None:
    """peft's model in a loop of a dozen lines."""
    import torch
    import transformers

    trainer = _sft_trainer(job)
    batches = []
    for batch in trainer.get_train_dataloader():
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        if len(batches) == job.steps:
            break
    model, recipe = trainer.model, job.recipe
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = transformers.get_scheduler(recipe.lr_schedule, optimizer, recipe.warmup_steps, job.steps)
    model.train()
    for batch in batches:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.device == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.step(loss.item())


def _sft_trainer(job: Job) -> Any:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    recipe = job.recipe
    datasets.disable_progress_bars()
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(job.base_folder, dtype=dtype)
    rows = read_rows(job.shard_files)
    config = trl.SFTConfig(
        output_dir=str(job.delta_file.parent / "out"),
        max_steps=job.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type=recipe.lr_schedule,
        max_length=recipe.max_tokens,
        max_grad_norm=recipe.max_grad_norm,
        completion_only_loss=True,
        seed=job.seed,
        data_seed=job.seed,
        bf16=job.device == "cuda",
        gradient_checkpointing=False,
        use_cpu=job.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", bias="none"
    )
    data = datasets.Dataset.from_list(rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.base_folder)
    return trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)


WAYS: dict[str, Callable[[Job, Clock], None]] = {"lease": lease, "plain TRL": plain_trl, "bare loop": bare_loop}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    job = Job.model_validate(spec["job"])
    import torch

    torch.set_num_threads(job.threads)
    clock = Clock()
    answer = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        WAYS[spec["way"]](job, clock)
    json.dump({"losses": clock.losses, "wall": clock.wall, "cpu": clock.cpu}, answer)
    answer.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
