"""Which module trains which method of a recipe.

What always holds: every method gives a trainer with transformers' loop, which counts its steps by logging each, so
checkpoints, pauses and heartbeats are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from rankup.errors import SetupError
from rankup.recipe import Method
from worker import distillation, preference, sft, vision
from worker.lesson import Lesson

TRAINERS: Final[Mapping[Method, Callable[[Lesson], Any]]] = {
    "sft": sft.make_trainer,
    "dpo": preference.make_dpo_trainer,
    "kto": preference.make_kto_trainer,
    "distillation": distillation.make_trainer,
}


def make_trainer(lesson: Lesson) -> Any:
    """The trainer of the recipe's method. Raises SetupError where this version does not know it."""
    import datasets
    import transformers

    datasets.disable_caching()
    datasets.disable_progress_bars()
    method = lesson.job.recipe.method
    if method not in TRAINERS:
        raise SetupError(f"this worker cannot train the method {method}", remedy="Update it: pip install -U rankup.")
    # Which shapes a method takes was settled when the rows were read: of those with images only sft's are left.
    trainer = vision.make_trainer(lesson) if "images" in lesson.rows[0] else TRAINERS[method](lesson)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
