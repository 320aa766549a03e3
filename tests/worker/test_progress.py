"""What a training measures of itself, without a training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from worker import progress
from worker.job import Line, StepDone
from worker.progress import NotFiniteError, Progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock on which every look is a second after the one before."""
    clock = map(float, itertools.count(100))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    return lambda: next(clock)


def measured(lines: list[Line]) -> list[tuple[float | None, float | None]]:
    return [(line.grad_norm, line.energy_j) for line in lines if isinstance(line, StepDone)]


def test_each_step_tells_its_gradient_and_the_joules_so_far() -> None:
    lines: list[Line] = []
    meter = iter([1000.0, 1010.0, 1025.0, 1025.0])
    run = Progress(lines.append, 2, meter=lambda: next(meter))
    run.read_meter()
    run.begin()
    run.step_done(3.0, 1.5)
    run.step_done(2.0, math.inf)
    assert measured(lines) == [(1.5, 10.0), (None, 25.0)]
    assert run.energy_j() == 25.0
    assert run.last_grad_norm() is None


def test_measures_go_on_after_a_pause_and_the_pause_is_in_none_of_them(seconds: Callable[[], float]) -> None:
    """Three looks at the clock of a second each: begin, and one a step."""
    meter = iter([5.0, 8.0, 9.0])
    run = Progress(lambda line: None, 7, started=0.0, meter=lambda: next(meter))
    run.restore([3.0] * 5, 50, 60.0, grad_norms=[9.0] * 5, training_s=10.0, energy_j=100.0)
    run.read_meter()
    seconds()
    run.begin()
    for norm in (2.0, 4.0):
        run.tokens += 10
        run.step_done(2.0, norm)
    assert run.training_s == 12.0
    assert run.tokens_per_s() == 70 / 12
    assert run.grad_norms[-2:] == [2.0, 4.0]
    # A fifth of seven steps is one.
    assert run.last_grad_norm() == 4.0
    meter = iter([11.0])
    run.meter = lambda: next(meter)
    assert run.energy_j() == 106.0


METERS: dict[str, tuple[list[float | None], float | None, float | None]] = {
    "no card": ([None, None], 0.0, None),
    "a card that stops telling": ([5.0, None], 0.0, None),
    "a card that begins to tell": ([None, 5.0], 0.0, None),
    "an earlier process that did not know": ([5.0, 7.0], None, None),
    "a driver that was loaded anew": ([5.0, 1.0], 3.0, 3.0),
}


@pytest.mark.parametrize("case", METERS)
def test_energy_is_told_where_all_of_it_is_known(case: str) -> None:
    answers, before, told = METERS[case]
    meter = iter(answers)
    run = Progress(lambda line: None, 1, meter=lambda: next(meter))
    run.restore([], 0, 0.0, energy_j=before)
    run.read_meter()
    assert run.energy_j() == told


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    run = Progress(lambda line: None, 1)
    run.begin()
    with pytest.raises(NotFiniteError):
        run.step_done(math.nan, 1.0)
