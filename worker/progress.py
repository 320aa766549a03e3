"""What a training run measures of itself: losses, tokens, speed.

What always holds: a loss that is not finite ends the run, and every step is reported once, in order. It knows neither
torch nor the model.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rankup.errors import RankupError
from worker.job import Line, StepDone

_SPEED_WINDOW_STEPS = 8


class NotFiniteError(RankupError):
    """The loss or a factor became NaN or infinite: this shard cannot be trained with this recipe."""

    code = "not-finite"
    default_remedy = "Nothing to do here; if it happens to many, the organiser should lower the learning rate."


@dataclass
class Progress:
    """What the training loop measures; one instance a run."""

    emit: Callable[[Line], None]
    steps: int
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    """When the process started, less what earlier processes spent on the same training."""
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_SPEED_WINDOW_STEPS + 1))

    def begin(self) -> None:
        """The first step starts now."""
        self._recent.append((time.perf_counter(), self.tokens))

    def restore(self, losses: Sequence[float], tokens: int, seconds: float) -> None:
        """Go on where an earlier process stopped: its losses, the tokens of their steps, and the time it took."""
        self.losses[:] = losses
        self.tokens = tokens
        self.started -= seconds

    def seconds(self) -> float:
        """Wall-clock time spent on this training, by this process and those before it."""
        return time.perf_counter() - self.started

    def step_done(self, loss: float) -> None:
        """Count and report one optimiser step. Raises `NotFiniteError`."""
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss} at step {len(self.losses) + 1}")
        self.losses.append(loss)
        self._recent.append((time.perf_counter(), self.tokens))
        (start, before), (now, after) = self._recent[0], self._recent[-1]
        speed = (after - before) / max(now - start, 1e-9)
        self.emit(StepDone(step=len(self.losses), steps=self.steps, loss=loss, tokens=self.tokens, tokens_per_s=speed))

    def ends(self) -> tuple[float, float]:
        """Mean loss over the first and over the last steps: a fifth of all, at least one, at most five."""
        few = max(1, min(5, len(self.losses) // 5))
        return sum(self.losses[:few]) / few, sum(self.losses[-few:]) / few
