"""What a training run measures of itself: losses, gradient norms, tokens, speed, energy.

What always holds: a loss that is not finite ends the run, and every step is reported once, in order. It knows neither
torch nor the model nor the card.
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
    grad_norms: list[float] = field(default_factory=list)
    """Of the same steps; NaN where there was none."""
    started: float = field(default_factory=time.perf_counter)
    """When the process started, less what earlier processes spent on the same training."""
    meter: Callable[[], float | None] = lambda: None
    """Joules of the card on its own scale; None: it does not tell."""
    training_s: float = 0.0
    """Time from the first step's beginning to the last one's end, without what lies between processes."""
    _energy_before_j: float | None = 0.0
    _meter_at_j: float | None = None
    _step_began: float = 0.0
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_SPEED_WINDOW_STEPS + 1))

    def begin(self) -> None:
        """The first step starts now."""
        self._step_began = time.perf_counter()
        self._recent.append((self._step_began, self.tokens))

    def restore(
        self,
        losses: Sequence[float],
        tokens: int,
        seconds: float,
        *,
        grad_norms: Sequence[float] = (),
        training_s: float = 0.0,
        energy_j: float | None = None,
    ) -> None:
        """Go on where an earlier process stopped: its losses, the tokens of their steps, and what they took."""
        self.losses[:] = losses
        self.grad_norms[:] = grad_norms
        self.tokens = tokens
        self.started -= seconds
        self.training_s = training_s
        self._energy_before_j = energy_j

    def read_meter(self) -> None:
        """The energy of this process counts from now on."""
        self._meter_at_j = self.meter()

    def energy_j(self) -> float | None:
        """Joules of this process and those before it; None where the card did not tell all the time."""
        now = self.meter() if self._meter_at_j is not None else None
        if now is None or self._meter_at_j is None or self._energy_before_j is None:
            return None
        return self._energy_before_j + max(0.0, now - self._meter_at_j)

    def seconds(self) -> float:
        """Wall-clock time spent on this training, by this process and those before it."""
        return time.perf_counter() - self.started

    def step_done(self, loss: float, grad_norm: float | None = None) -> None:
        """Count and report one optimiser step. Raises `NotFiniteError`."""
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss} at step {len(self.losses) + 1}")
        # Loss scaling in float16 finds gradients that are not finite: it leaves the step out and scales the next less.
        norm = grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None
        self.losses.append(loss)
        self.grad_norms.append(math.nan if norm is None else norm)
        now = time.perf_counter()
        self.training_s += now - self._step_began
        self._step_began = now
        self._recent.append((now, self.tokens))
        (start, before), (now, after) = self._recent[0], self._recent[-1]
        speed = (after - before) / max(now - start, 1e-9)
        self.emit(
            StepDone(
                step=len(self.losses),
                steps=self.steps,
                loss=loss,
                tokens=self.tokens,
                tokens_per_s=speed,
                grad_norm=norm,
                energy_j=self.energy_j(),
            )
        )

    def ends(self) -> tuple[float, float]:
        """Mean loss over the first and over the last steps: a fifth of all, at least one, at most five."""
        few = self._few()
        return sum(self.losses[:few]) / few, sum(self.losses[-few:]) / few

    def last_grad_norm(self) -> float | None:
        """Mean over the last steps, as `ends`; None where there was none."""
        norms = [norm for norm in self.grad_norms[-self._few() :] if math.isfinite(norm)]
        return sum(norms) / len(norms) if norms else None

    def tokens_per_s(self) -> float | None:
        """Over all steps."""
        return self.tokens / self.training_s if self.training_s > 0 else None

    def _few(self) -> int:
        return max(1, min(5, len(self.losses) // 5))
