"""One run of the robustness benchmark: rounds of volunteers and attackers against one defence.

All that decides goes through the product: factors through `rankup.fixedpoint.quantise` and `Factors.verify`, norms and
the Gram matrix through `aggregator.lowrank`, the limits of `aggregator.admission`, the cohort's screening through
`aggregator.screening`, weights through `aggregator.rules`, the sum through `rankup.exactsum`, on float32 masters.

What always holds: a run is a function of its `Case`; it draws from generators seeded by the case's seed and the round,
the same for every attack and defence. It writes nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from poison_attacks import TRAINED, Deltas, corrupt, forge, prepare, secret_after_trigger
from poison_model import RANK, TARGETS, Recipe, Text, Weights, evaluate, held_out_gradient, train_lora

from aggregator.admission import MAX_CANCELLATION, MAX_NORM
from aggregator.lowrank import cosines, gram, product_norm
from aggregator.rules import integer_coefficients, weights
from aggregator.screening import Candidate, screen
from rankup.errors import DeltaError, InputError
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors, quantise

VOLUNTEERS: Final = 20
DENOMINATOR_LOG2: Final = 16
TEST_ROWS: Final = 512
SLOPE_ROWS: Final = 192
"""Rows of the screening text for one gradient; it costs less than `screening_rows` for each volunteer."""
SECRET_ROWS: Final = 64
AT_ONCE: Final = 10
"""Volunteers in one batched pass: what fits the processor's cache is faster than all at once."""


@dataclass(frozen=True)
class Defence:
    """What a round does with its contributions; the fields are those of a recipe's aggregation."""

    rule: str = "mean_by_tokens"
    clip_norm_ratio: float = 1.5
    byzantine_share: float = 0.4
    screened: bool = False
    """Admission's limits, near-duplicates and held-out loss, before the rule."""
    max_cosine: float = 0.98
    max_loss_mads: float = 3.0
    min_descent: float | None = None
    """Least slope of the held-out loss, as a share of the cohort's median; None leaves slopes unmeasured."""
    screening_rows: int = 32


@dataclass(frozen=True)
class Case:
    attack: str
    """One of `poison_attacks.ATTACKS`, or "none"."""
    share: float
    seed: int
    defence: Defence
    rounds: int = 8
    momentum: float = 0.0
    outer_rate: float = 1.0
    recipe: Recipe = field(default_factory=Recipe)


def run(case: Case, base: Weights, text: Text) -> dict[str, Any]:
    """All rounds of a case. Losses are nats per byte; None stands for a model that no longer gives a number."""
    started = time.process_time()
    count = round(case.share * VOLUNTEERS) if case.attack != "none" else 0
    bad = list(range(VOLUNTEERS - count, VOLUNTEERS))
    state = _State(case, dict(base), bad)
    order = torch.randperm(text.train.shape[0], generator=torch.Generator().manual_seed(case.seed))
    recipe = case.recipe
    shards = VOLUNTEERS * recipe.steps * recipe.batch
    assert shards * case.rounds <= len(order), "not enough text for fresh shards in every round"
    losses_after = {0: _loss_before(base, text)}
    for number in range(case.rounds):
        rng = np.random.default_rng([case.seed, number])
        rows = text.train[order[number * shards : (number + 1) * shards]]
        rows = rows.view(VOLUNTEERS, recipe.steps, recipe.batch, -1)
        screening = text.screening[rng.choice(len(text.screening), case.defence.screening_rows, replace=False)]
        apart = np.random.default_rng([case.seed, number, 1])
        more = text.screening[apart.choice(len(text.screening), SLOPE_ROWS, replace=False)]
        deltas = _train(case, state, rows, number, rng)
        try:
            state.aggregate(deltas, screening, more, number)
        except (DeltaError, InputError):  # what attackers sent leaves the numbers that the product can hold
            losses_after[case.rounds] = None
            break
        if (number + 1) % 8 == 0 or number + 1 == case.rounds:
            losses_after[number + 1] = _finite(evaluate(state.model, text.test[:TEST_ROWS]))
    nats, greedy = secret_after_trigger(state.model, text.test[:SECRET_ROWS])
    return {
        "losses": losses_after,
        "secret_nats": nats if math.isfinite(nats) else None,
        "secret_greedy": greedy,
        **state.counts,
        "refusals": state.refusals,
        "likeness": {group: float(np.mean(values)) for group, values in state.likeness.items()},
        "cpu_s": time.process_time() - started,
    }


_before: dict[int, float | None] = {}


def _loss_before(base: Weights, text: Text) -> float | None:
    """The base's loss, measured once in a process."""
    if id(base) not in _before:
        _before[id(base)] = _finite(evaluate(base, text.test[:TEST_ROWS]))
    return _before[id(base)]


def _finite(loss: torch.Tensor) -> float | None:
    value = float(loss[0])
    return value if math.isfinite(value) else None


def _train(case: Case, state: _State, rows: torch.Tensor, number: int, rng: np.random.Generator) -> Deltas:
    """The deltas of the round, poisoned, in float64; those of attackers that need no training begin as zeros."""
    inputs, targets = prepare(case.attack, rows, state.bad, rng)
    who = [v for v in range(VOLUNTEERS) if v not in state.bad or case.attack in TRAINED]
    deltas = {
        name: (np.zeros((VOLUNTEERS, d_out, RANK), np.float64), np.zeros((VOLUNTEERS, RANK, d_in), np.float64))
        for name, (d_out, d_in) in TARGETS.items()
    }
    for start in range(0, len(who), AT_ONCE):
        part = who[start : start + AT_ONCE]
        seeds = [(case.seed * 1000 + number) * 1000 + volunteer for volunteer in part]
        for name, (b, a) in train_lora(state.model, inputs[part], targets[part], case.recipe, seeds).items():
            deltas[name][0][part], deltas[name][1][part] = b.numpy(), a.numpy()
    corrupt(case.attack, deltas, state.bad, rng)
    return deltas


def descents(model: Weights, rows: torch.Tensor, deltas: Deltas, present: list[int]) -> NDArray[np.float64]:
    """How fast the held-out loss falls along each delta at first, as `aggregator.descent`: -<gradient, B A>.

    One backward pass over the rows serves the whole cohort, whatever its size; each delta then costs an inner product
    with a low-rank matrix.
    """
    gradient = held_out_gradient(model, rows)
    found = np.zeros(len(present))
    for name, (b, a) in deltas.items():
        found -= np.einsum("vor,oi,vri->v", b[present], gradient[name].double().numpy(), a[present], optimize=True)
    return found


class _State:
    """The model between rounds, and what was counted."""

    def __init__(self, case: Case, model: Weights, bad: list[int]) -> None:
        self.case, self.model, self.bad = case, model, bad
        self.momentum = {name: np.zeros(shape, np.float32) for name, shape in TARGETS.items()}
        self.counts = {"honest": 0, "honest_rejected": 0, "bad": 0, "bad_accepted": 0, "bad_weight": 0.0}
        self.refusals: dict[str, int] = {}
        self.likeness: dict[str, list[float]] = {}
        """Median cosine of two honest, and of two hostile contributions, in each round."""

    def aggregate(self, deltas: Deltas, screening: torch.Tensor, slope_rows: torch.Tensor, number: int) -> None:
        defence = self.case.defence
        verdicts: dict[int, str] = {}
        contributions: dict[int, dict[str, Factors]] = {}
        for volunteer in range(VOLUNTEERS):
            forged = self.case.attack == "malformed" and volunteer in self.bad
            try:
                contributions[volunteer] = _factors(deltas, volunteer, volunteer + number if forged else None)
            except DeltaError:
                verdicts[volunteer] = "format"
        if defence.screened:
            for volunteer, factors in list(contributions.items()):
                reason = _admission(factors)
                if reason:
                    verdicts[volunteer] = reason
                    del contributions[volunteer]
        present = sorted(contributions)
        matrix = np.zeros((len(present), len(present)))
        for name in TARGETS:
            matrix += gram([contributions[volunteer][name] for volunteer in present])
        self._measure_likeness(matrix, present)
        if defence.screened and present:
            reasons = self._screen(deltas, screening, slope_rows, matrix, present)
            verdicts.update(reasons)
            kept = [place for place, volunteer in enumerate(present) if volunteer not in reasons]
            present, matrix = [present[place] for place in kept], matrix[np.ix_(kept, kept)]
        shares = np.zeros(0)
        if present:
            tokens = [self.case.recipe.steps * self.case.recipe.batch] * len(present)
            shares = weights(
                defence.rule,
                matrix,
                tokens,
                clip_norm_ratio=defence.clip_norm_ratio,
                byzantine_share=defence.byzantine_share,
            )
            self._fold(contributions, present, integer_coefficients(shares, DENOMINATOR_LOG2))
        self._count(verdicts, present, shares)

    def _measure_likeness(self, matrix: NDArray[np.float64], present: list[int]) -> None:
        if not present:
            return
        alike = cosines(matrix)
        for group, hostile in (("honest", False), ("bad", True)):
            places = [place for place, volunteer in enumerate(present) if (volunteer in self.bad) == hostile]
            if len(places) > 1:
                part = alike[np.ix_(places, places)][np.triu_indices(len(places), 1)]
                self.likeness.setdefault(group, []).append(float(np.median(part)))

    def _screen(
        self,
        deltas: Deltas,
        rows: torch.Tensor,
        slope_rows: torch.Tensor,
        matrix: NDArray[np.float64],
        present: list[int],
    ) -> dict[int, str]:
        """Who fails the cohort's checks, and at which; the order of arrival is that of the volunteers."""
        defence = self.case.defence
        found = self._losses(deltas, rows, present)
        falls: list[float | None] = [None] * len(present)
        if defence.min_descent is not None:
            falls = [float(fall) for fall in descents(self.model, slope_rows, deltas, present)]
        norms = np.sqrt(np.diagonal(matrix))
        cohort = [
            Candidate(f"{volunteer:064d}", 1, float(volunteer), float(norm), float(loss), fall)
            for volunteer, norm, loss, fall in zip(present, norms, found, falls, strict=True)
        ]
        verdicts = screen(
            cohort,
            matrix,
            base_loss=float(evaluate(self.model, rows)[0]),
            max_cosine=defence.max_cosine,
            max_loss_mads=defence.max_loss_mads,
            min_descent=defence.min_descent,
        )
        return {
            volunteer: next(check.name for check in verdict.checks if not check.passed)
            for volunteer, verdict in zip(present, verdicts, strict=True)
            if not verdict.passed
        }

    def _losses(self, deltas: Deltas, rows: torch.Tensor, present: list[int]) -> NDArray[np.float64]:
        """Held-out loss of base + delta of each contribution: (n,)."""
        parts = []
        for start in range(0, len(present), AT_ONCE):
            part = present[start : start + AT_ONCE]
            lora = {
                name: (torch.from_numpy(b[part]).float(), torch.from_numpy(a[part]).float())
                for name, (b, a) in deltas.items()
            }
            parts.append(evaluate(self.model, rows, lora, volunteers=len(part), batch=8).numpy())
        return np.concatenate(parts)

    def _fold(self, contributions: dict[int, dict[str, Factors]], present: list[int], coefficients: list[int]) -> None:
        for name in TARGETS:
            terms = [(c, contributions[v][name]) for c, v in zip(coefficients, present, strict=True)]
            master = self.model[name].numpy()
            if self.case.momentum == 0 and self.case.outer_rate == 1:
                new = fold_tensor(master, terms, DENOMINATOR_LOG2)
            else:  # each operation a float32 operation of its own, as docs/numerics.md has it
                beta, rate = np.float32(self.case.momentum), np.float32(self.case.outer_rate)
                delta = fold_tensor(np.zeros_like(master), terms, DENOMINATOR_LOG2)
                self.momentum[name] = beta * self.momentum[name] + delta
                new = master + rate * (delta + beta * self.momentum[name])
            self.model[name] = torch.from_numpy(new)

    def _count(self, verdicts: dict[int, str], present: list[int], shares: NDArray[np.float64]) -> None:
        for volunteer in range(VOLUNTEERS):
            hostile = volunteer in self.bad
            self.counts["bad" if hostile else "honest"] += 1
            if volunteer in verdicts:
                key = ("bad " if hostile else "honest ") + verdicts[volunteer]
                self.refusals[key] = self.refusals.get(key, 0) + 1
                self.counts["honest_rejected"] += not hostile
            else:
                self.counts["bad_accepted"] += hostile
        if shares.size and shares.sum() > 0:
            self.counts["bad_weight"] += float(
                sum(s for s, v in zip(shares, present, strict=True) if v in self.bad) / shares.sum() / self.case.rounds
            )


def _factors(deltas: Deltas, volunteer: int, forged: int | None) -> dict[str, Factors]:
    """One volunteer's contribution in the product's format; DeltaError where the product refuses it."""
    result = {}
    for name, (b, a) in deltas.items():
        if forged is not None:
            rng = np.random.default_rng(volunteer)
            b, a = rng.standard_normal(b.shape), rng.standard_normal(a.shape)
            result[name] = forge(forged, b[volunteer], a[volunteer])
        else:
            result[name] = quantise(b[volunteer], a[volunteer])
        result[name].verify()
    return result


def _admission(factors: dict[str, Factors]) -> str:
    """The two checks of `aggregator.admission` that look at numbers; its own functions read a file."""
    norms = {name: product_norm(each) for name, each in factors.items()}
    total = math.hypot(*norms.values())
    if not math.isfinite(total) or total == 0 or total > MAX_NORM:
        return "norm"
    if any(each.entry_bound > MAX_CANCELLATION * norms[name] for name, each in factors.items()):
        return "cancellation"
    return ""
