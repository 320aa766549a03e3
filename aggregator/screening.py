"""Screening: which accepted contributions of a round take part in its sum, judged beside each other.

    screen(cohort, gram, *, base_loss, max_cosine, max_loss_mads, min_descent) -> a Verdict for each Candidate, in order
    screened_weights(verdicts, gram, tokens, *, rule, clip_norm_ratio, byzantine_share) -> (n,) float64

What always holds:
- a verdict depends on the contributions, their losses and the limits alone, not on the order in which they are given;
- every check that was made is in the verdict with the value that it measured, whether it passed or not;
- a contribution that fails gets weight 0 and is not seen by the rule: the others are weighed as if it were not there.

Admission (`aggregator.admission`) has judged each contribution alone before. This module measures nothing itself and
does no I/O.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.lowrank import cosines
from aggregator.rules import weights
from rankup.errors import InputError, StateError
from rankup.recipe import MAX_COSINE, MAX_LOSS_MADS, MIN_DESCENT
from rankup.records import Check

MIN_COMPARED = 4
"""A median of fewer losses says nothing: one bad contribution of three moves it, and the deviation with it."""
MAD_FLOOR = 0.002
"""Least median absolute deviation, as a share of the base's loss. Of five honest contributions to `aggregator.tiny`,
which lower the loss by 15 %, the worst was 0.3 % of the base's loss above the median, at a deviation of 0.07 %: without
a floor it would be out. With it the limit is 0.6 %. Half of the steps were 1.5 % above the median, and 5 % for
SmolLM2-135M, where honest losses were within 0.2 %."""


@dataclass(frozen=True)
class Candidate:
    """An accepted contribution, as the screening sees it."""

    contribution: str
    """Its digest."""
    tokens: int
    submitted_at: float
    """Unix seconds, by the gateway's clock."""
    norm: float
    """Frobenius norm of the whole delta."""
    shards: int = 1
    """How many it was trained on: as many times the steps."""
    loss: float | None = None
    """Held-out loss of base + delta, in nats per scored token; None where it was not measured."""
    descent: float | None = None
    """How fast the held-out loss falls along the delta at first, in nats per scored token (`aggregator.descent`); None
    where it was not measured."""


@dataclass(frozen=True)
class Verdict:
    """What the checks found about one contribution."""

    contribution: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def screen(
    cohort: Sequence[Candidate],
    gram: NDArray[np.float64],
    *,
    base_loss: float | None = None,
    max_cosine: float | None = MAX_COSINE,
    max_loss_mads: float | None = MAX_LOSS_MADS,
    min_descent: float | None = MIN_DESCENT,
) -> list[Verdict]:
    """Judge a cohort by the checks "near_duplicate", "heldout" and "descent"; a limit of None leaves its check out.

    `gram` (n, n) is that of the whole deltas, in the cohort's order. `base_loss` is the held-out loss of the base on
    the same rows. Copies are dropped before losses are compared, so nobody moves the median by handing in copies.

    Raises InputError: sizes that differ, one digest twice, a loss of the base that is not finite.
    """
    if gram.shape != (len(cohort), len(cohort)):
        raise InputError(f"{len(cohort)} contributions do not fit a Gram matrix of shape {gram.shape}")
    if len({candidate.contribution for candidate in cohort}) < len(cohort):
        raise InputError("a contribution stands twice in the cohort")
    if base_loss is not None and not math.isfinite(base_loss):
        raise InputError(f"the base's held-out loss is {base_loss}")
    found: list[list[Check]] = [[] for _ in cohort]
    if max_cosine is not None:
        for checks, check in zip(found, _near_duplicates(cohort, gram, max_cosine), strict=True):
            checks.append(check)
    if max_loss_mads is not None:
        compared = [place for place, checks in enumerate(found) if all(check.passed for check in checks)]
        limit_for = _loss_limits([cohort[place] for place in compared], base_loss, max_loss_mads)
        for candidate, checks in zip(cohort, found, strict=True):
            if candidate.loss is not None:
                checks.append(_heldout(candidate.loss, limit_for(candidate.shards)))
    if min_descent is not None:
        compared = [place for place, checks in enumerate(found) if all(check.passed for check in checks)]
        least = _descent_limit([_slope(cohort[place]) for place in compared], min_descent)
        for candidate, checks in zip(cohort, found, strict=True):
            slope = _slope(candidate)
            if slope is not None:
                checks.append(_descent(slope, least))
    return [Verdict(candidate.contribution, tuple(checks)) for candidate, checks in zip(cohort, found, strict=True)]


def screened_weights(
    verdicts: Sequence[Verdict],
    gram: NDArray[np.float64],
    tokens: Sequence[int],
    *,
    rule: str,
    clip_norm_ratio: float,
    byzantine_share: float,
) -> NDArray[np.float64]:
    """Weights (n,) by `rules.weights` of those that passed, 0 for the others.

    Raises StateError when nobody passed, and what `rules.weights` raises.
    """
    kept = [place for place, verdict in enumerate(verdicts) if verdict.passed]
    if not kept:
        raise StateError(
            f"none of the {len(verdicts)} contributions passed the screening",
            remedy="Look at their checks; cancel the round, or let it wait for more contributions.",
        )
    result = np.zeros(len(verdicts))
    result[kept] = weights(
        rule,
        gram[np.ix_(kept, kept)],
        [tokens[place] for place in kept],
        clip_norm_ratio=clip_norm_ratio,
        byzantine_share=byzantine_share,
    )
    return result


# -- the checks --------------------------------------------------------------------------------------------------------


def _near_duplicates(cohort: Sequence[Candidate], gram: NDArray[np.float64], limit: float) -> list[Check]:
    """The first to come is kept, and whoever is closer than `limit` to one that is kept is dropped.

    First is the earliest by submission, then by digest. The value is the largest cosine with an earlier one that is
    kept.
    """
    alike = cosines(gram)
    checks: dict[int, Check] = {}
    kept: list[int] = []
    for place in sorted(range(len(cohort)), key=lambda i: (cohort[i].submitted_at, cohort[i].contribution)):
        nearest = max(kept, key=lambda other: float(alike[place, other]), default=None)
        value = 0.0 if nearest is None else float(alike[place, nearest])
        passed = nearest is None or value <= limit
        if passed:
            kept.append(place)
        detail = "" if passed else f"a copy of {cohort[nearest or 0].contribution[:12]}…, which came first"
        checks[place] = Check(name="near_duplicate", passed=passed, value=value, detail=detail)
    return [checks[place] for place in range(len(cohort))]


def _loss_limits(compared: Sequence[Candidate], base_loss: float | None, mads: float) -> Callable[[int], float]:
    """The highest good loss of a contribution, by its number of shards: more shards are more steps and a lower loss.

    It is `_loss_limit` of those trained on half as many shards to as many; where they are too few, of those trained on
    as many or fewer; where they are too few too, of everybody, but no lower than the base's loss.
    """
    known = [(each.shards, each.loss) for each in compared if each.loss is not None and math.isfinite(each.loss)]

    def limit_for(shards: int) -> float:
        for least in (shards / 2, 0):
            peers = [loss for count, loss in known if least <= count <= shards]
            if len(peers) >= MIN_COMPARED:
                return _loss_limit(peers, base_loss, mads)
        everybody = _loss_limit([loss for _, loss in known], base_loss, mads)
        return math.inf if base_loss is None else max(everybody, base_loss)

    return limit_for


def _loss_limit(known: Sequence[float], base_loss: float | None, mads: float) -> float:
    """median + mads · MAD of finite losses; infinity where there are fewer than `MIN_COMPARED`."""
    if len(known) < MIN_COMPARED:
        return math.inf
    median = statistics.median(known)
    deviation = statistics.median(abs(loss - median) for loss in known)
    return median + mads * max(deviation, MAD_FLOOR * (median if base_loss is None else base_loss))


def _slope(candidate: Candidate) -> float | None:
    """The descent for each unit of the delta's norm."""
    return None if candidate.descent is None or not candidate.norm > 0 else candidate.descent / candidate.norm


def _descent_limit(slopes: Sequence[float | None], share: float) -> float:
    """`share` of the median of the finite slopes; -infinity where there are too few or the median is not above 0."""
    known = [slope for slope in slopes if slope is not None and math.isfinite(slope)]
    if len(known) < MIN_COMPARED:
        return -math.inf
    median = statistics.median(known)
    return share * median if median > 0 else -math.inf


def _descent(slope: float, least: float) -> Check:
    if not math.isfinite(slope):
        return Check(name="descent", passed=False, detail="the held-out loss has no finite slope along this delta")
    if slope < least:
        detail = f"the held-out loss falls by {slope:.3g} along each unit of this delta; {least:.3g} is the least"
        return Check(name="descent", passed=False, value=slope, detail=detail)
    return Check(name="descent", passed=True, value=slope)


def _heldout(loss: float, limit: float) -> Check:
    if not math.isfinite(loss):
        return Check(name="heldout", passed=False, detail="the held-out loss with this delta is not finite")
    if loss > limit:
        detail = f"the held-out loss with this delta is {loss:.4f}; the limit beside its like is {limit:.4f}"
        return Check(name="heldout", passed=False, value=loss, detail=detail)
    return Check(name="heldout", passed=True, value=loss)
