"""A lesson: all that a method of training needs to build its trainer, and the settings that every method shares.

What always holds: seed, batches, schedule and optimiser are the recipe's for every method, so methods differ in what
they minimise and in nothing else; a batch is the recipe's whatever fits into memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankup.chat import needs
from worker import tracking
from worker.checkpoint import Checkpoint
from worker.job import Job
from worker.precision import Fit
from worker.progress import Progress
from worker.surgery import Adapted


@dataclass(frozen=True)
class Lesson:
    """What one training run has been given and has loaded."""

    job: Job
    adapted: Adapted
    tokenizer: Any
    rows: Sequence[Mapping[str, Any]]
    """Examples of all shards, of one shape."""
    device: str
    """As torch names it, without a number."""
    progress: Progress
    scratch: Path
    """A folder for temporary files."""
    checkpoint: Checkpoint | None
    """What to go on from."""
    fit: Fit
    """Precision, and how many examples are in memory at a time."""
    teacher: Any = None
    """A frozen model on the device whose probabilities are learned from, beside what it answered."""


def shared_arguments(lesson: Lesson) -> dict[str, Any]:
    """Arguments of the TRL configs that are the same for every method."""
    job, recipe, fit = lesson.job, lesson.job.recipe, lesson.fit
    return {
        "output_dir": str(lesson.scratch / "out"),
        "max_steps": job.steps,
        "per_device_train_batch_size": fit.micro_batch,
        "gradient_accumulation_steps": recipe.batch_size // fit.micro_batch,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": min(recipe.warmup_steps, job.steps),
        "lr_scheduler_type": recipe.lr_schedule,
        "max_length": recipe.max_tokens,
        "max_grad_norm": recipe.max_grad_norm,
        "weight_decay": recipe.weight_decay,
        "optim": "adamw_torch",
        "seed": job.seed % 2**32,
        "data_seed": job.seed % 2**32,
        "bf16": fit.compute == "bfloat16",
        "fp16": fit.compute == "float16",
        "gradient_checkpointing": fit.checkpointing,
        "use_cpu": lesson.device == "cpu",
        "dataloader_pin_memory": lesson.device == "cuda",
        "dataset_num_proc": None,
        **tracking.arguments(job.report_to, job.report_folder),
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }


def dataset_of(rows: Iterable[Mapping[str, Any]]) -> Any:
    """The rows as TRL's trainers take them, a `datasets.Dataset`.

    Where a row has tools, calls or settings, its objects stay JSON: as columns each would get the fields of all others.
    """
    import datasets

    listed = [dict(row) for row in rows]
    if not any(map(needs, listed)):
        return datasets.Dataset.from_list(listed)
    names = dict.fromkeys(name for row in listed for name in row)
    # TRL unpacks the settings of every row.
    absent: dict[str, Any] = {"chat_template_kwargs": {}}
    filled = [{name: row.get(name, absent.get(name)) for name in names} for row in listed]
    kinds = {name: next(row[name] for row in listed if name in row) for name in names}
    features = datasets.Features({name: _feature(datasets, value) for name, value in kinds.items()})
    return datasets.Dataset.from_list(filled, features=features)


def _feature(datasets: Any, value: object) -> Any:
    if isinstance(value, list):
        return datasets.List(datasets.Json())
    if isinstance(value, dict):
        return datasets.Json()
    return datasets.Value("bool" if isinstance(value, bool) else "string")
