"""Robust rules: which weight each contribution of a cohort gets, decided from their Gram matrix alone.

    weights(rule, gram, tokens, *, clip_norm_ratio, byzantine_share) -> (n,) float64
    integer_coefficients(weights, denominator_log2) -> list of n integers

The aggregate is sum_i w_i X_i for contributions X_i with the Gram matrix G[i, j] = <X_i, X_j>. Every rule here keeps
its answer inside the span of the contributions, so distances, means and medians are quadratic forms in G:
|sum_i c_i X_i|^2 = c' G c. No vector is ever formed, and n contributions cost O(n^3) whatever the size of the model.

What always holds:
- weights are finite and not negative; before the clip they sum to one, after it to one or less;
- a permutation of the contributions permutes the weights, contributions that tie share what they tie for, and a power
  of two on all contributions, or an integer on all token counts, changes nothing;
- robust rules count heads, not tokens: a token count is what the volunteer states, and a rule that is weighed by what
  an attacker states has no breakdown point. Only "mean_by_tokens" looks at tokens, as do cohorts of one or two.

The weights are float64 and only steer decisions: the integers made of them stand in the manifest, so nobody has to
repeat a float to replay a version. This module does not build Gram matrices or say who takes part. No I/O, no chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rankup.errors import InputError

Array: TypeAlias = NDArray[np.float64]
Rule: TypeAlias = Callable[[Array, Sequence[int], int], Array]
"""(Gram matrix (n, n) after the clip, tokens, f) -> weights (n,) that sum to one; n >= 3, 0 <= f < n / 2."""

NOISE: Final = 1e-12
"""A squared distance below this share of the two squared norms is cancellation, and counts as zero."""
TIE: Final = 1e-9
"""Distances and scores that differ by less than this share are tied: the order of a sum must not choose among them."""
SMOOTHING: Final = 1e-6
"""Least distance in Weiszfeld's weights, as a share of the median distance between two contributions."""
WEISZFELD_STEPS: Final = 1000
WEISZFELD_CHANGE: Final = 1e-12
"""Weiszfeld ends when no weight moves further than this."""
CENTRED_CLIPPING_STEPS: Final = 3


def weights(rule: str, gram: Array, tokens: Sequence[int], *, clip_norm_ratio: float, byzantine_share: float) -> Array:
    """Weights (n,) float64 of the contributions whose Gram matrix is `gram` (n, n).

    The clip comes first: with m the median norm, a contribution longer than `clip_norm_ratio` · m is scaled down to
    that length, and the others are not scaled up to fill what it lost. The rule sees the clipped contributions; the
    scale is inside the weights that come out, so they apply to the contributions as they were handed in.

    Args:
        rule: a key of `RULES`. A cohort of one or two has no majority: it gets "mean_by_tokens".
        tokens: how many tokens each contribution was trained on, at least 1.
        clip_norm_ratio: above 0; infinity clips nothing.
        byzantine_share: at most so many of the contributions may be hostile, 0 <= share < 1/2; see `byzantine_count`.

    Raises InputError: an unknown rule, sizes that differ, no contribution, a Gram matrix that is not finite or not
    symmetric or has a negative diagonal, a parameter out of its range.
    """
    if rule not in RULES:
        raise InputError(f"no rule {rule!r}", remedy=f"The rules are {', '.join(sorted(RULES))}.")
    if not clip_norm_ratio > 0:
        raise InputError(f"a clip at {clip_norm_ratio} times the median norm leaves nothing")
    matrix = _checked(gram, tokens)
    scale = clip_scales(np.sqrt(np.diagonal(matrix)), clip_norm_ratio)
    clipped = matrix * scale[:, None] * scale[None, :]
    count = len(tokens)
    chosen = RULES[rule] if count > 2 else mean_by_tokens
    return chosen(clipped, tokens, byzantine_count(count, byzantine_share)) * scale


def clip_scales(norms: Array, ratio: float) -> Array:
    """min(1, ratio · median / norm) for each norm (n,): the median-norm clip. Zero norms keep 1."""
    if math.isinf(ratio):
        return np.ones_like(norms)
    limit = ratio * float(np.median(norms))
    return np.where(norms > limit, limit / np.where(norms > 0, norms, 1.0), 1.0)


def byzantine_count(count: int, share: float) -> int:
    """f = floor(share · n), the number of hostile contributions to withstand; InputError unless 0 <= share < 1/2."""
    if not 0 <= share < 0.5:
        raise InputError(f"no rule withstands a share of {share} hostile contributions; it must be below one half")
    return min(math.floor(share * count + TIE), (count - 1) // 2)


# -- the rules ---------------------------------------------------------------------------------------------------------


def mean_by_tokens(gram: Array, tokens: Sequence[int], byzantine: int) -> Array:
    """FedAvg (McMahan et al., arXiv:1602.05629): each contribution by its share of the tokens.

    Breakdown point: 0 of n, one contribution moves the result anywhere. With the clip before it, the f/n-th part of
    `clip_norm_ratio` median norms per attacker is all that is left to move. Cost O(n).
    """
    total = sum(tokens)
    # Division of Python integers is correctly rounded, so a common factor of all counts changes no bit.
    return np.array([count / total for count in tokens])


def multi_krum(gram: Array, tokens: Sequence[int], byzantine: int) -> Array:
    """Nearest-neighbour mixing (arXiv:2302.01772), then multi-Krum (Blanchard et al., arXiv:1703.02757).

    Mixing (Allouah et al.) replaces each contribution by the mean of its n - f nearest, itself among them: Y = P X, so
    the Gram matrix of the mixed ones is P G P'. The score of a mixed one is the sum of its n - f - 2 smallest squared
    distances to the others; the n - f with the lowest scores are averaged. Mixing first is what makes Krum good for
    contributions that differ by nature, as those of different shards do.

    Breakdown point: f < n/2 - 1. Where n is too small for f, f is (n - 3) // 2; f = 0 gives the plain mean. Let D be
    the largest distance of an honest contribution to the honest mean: the result is within
    3 D + 6 D sqrt((n - f - 2) / (n - 2 f - 1)) of that mean, whatever the other f send. (The n - f nearest of an honest
    one lie within 2 D of it, so its mix is within 3 D of the mean and its score at most 36 (n - f - 2) D^2. A chosen
    one has no higher score than the worst honest one, and at least n - 2 f - 1 honest ones among its neighbours.)
    Cost O(n^3).
    """
    count = len(tokens)
    f = min(byzantine, (count - 3) // 2)
    distances = squared_distances(gram)
    mixing = np.stack([_smallest(row, count - f) for row in distances]) / (count - f)  # (n, n), rows sum to one
    mixed = squared_distances(mixing @ gram @ mixing.T)
    # In a sorted row the first is the distance to itself.
    scores = np.sort(mixed, axis=1)[:, 1 : count - f - 1].sum(axis=1)
    chosen = _smallest(scores, count - f) / (count - f)
    return np.asarray(chosen @ mixing)


def geometric_median(gram: Array, tokens: Sequence[int], byzantine: int) -> Array:
    """The point with the least sum of distances, by smoothed Weiszfeld (RFA, Pillutla et al., arXiv:1912.13445).

    One step: w_i is proportional to 1 / max(nu, |X_i - z|) with z = sum_i w_i X_i, and |X_i - z|^2 = G_ii - 2 (G w)_i +
    w' G w. It begins near the majority: w_i by the median distance of i to the others.

    Breakdown point: n/2. With f hostile contributions the result is within 2 (n - f) / (n - 2 f) D of any point p that
    has all honest ones within D, because the sum of distances is not larger at the result than at p. Cost O(n^2) a
    step, at most `WEISZFELD_STEPS` steps.
    """
    count = len(tokens)
    distances = np.sqrt(squared_distances(gram))
    least = SMOOTHING * float(np.median(distances[np.triu_indices(count, 1)]))
    if least == 0.0:
        # At least half of all pairs are equal, so the shortest distance that is left is the only scale there is.
        apart = distances[distances > 0]
        if not apart.size:
            return np.full(count, 1.0 / count)
        least = SMOOTHING * float(apart.min())
    current = _shares(1.0 / np.maximum(np.median(distances, axis=1), least))
    for _ in range(WEISZFELD_STEPS):
        following = _shares(1.0 / np.maximum(_distances_to(gram, current), least))
        moved = float(np.abs(following - current).max())
        current = following
        if moved < WEISZFELD_CHANGE:
            break
    return current


def centred_clipping(gram: Array, tokens: Sequence[int], byzantine: int) -> Array:
    """v <- v + mean_i of clip(X_i - v, tau), three times (Karimireddy et al., arXiv:2012.10333, algorithm 2).

    The paper centres on the last step's aggregate; rounds here start afresh, so v starts at the geometric median, and
    tau is the median distance to it. With lambda_i = min(1, tau / |X_i - v|) and v = sum c_i X_i one step is
    c <- (1 - mean lambda) c + lambda / n, which keeps c a set of shares. Contributions near the centre count in full,
    so without attackers the result is closer to the mean than the geometric median is.

    Breakdown point: that of the start, n/2. A hostile contribution adds at most tau / n to a step, and no step is
    longer than tau. Cost that of the geometric median.
    """
    centre = geometric_median(gram, tokens, byzantine)
    distances = _distances_to(gram, centre)
    radius = float(np.median(distances))
    for _ in range(CENTRED_CLIPPING_STEPS):
        taken = np.where(distances > radius, radius / np.where(distances > 0, distances, 1.0), 1.0)
        centre = _shares((1.0 - float(taken.mean())) * centre + taken / len(tokens))
        distances = _distances_to(gram, centre)
    return centre


RULES: Final[Mapping[str, Rule]] = {
    "mean_by_tokens": mean_by_tokens,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "centred_clipping": centred_clipping,
}


# -- geometry in the Gram matrix ---------------------------------------------------------------------------------------


def squared_distances(gram: Array) -> Array:
    """|X_i - X_j|^2 = G_ii + G_jj - 2 G_ij, (n, n), not negative, zero on the diagonal and below `NOISE`."""
    lengths = np.diagonal(gram)
    sums = lengths[:, None] + lengths[None, :]
    result = sums - 2.0 * gram
    result[result <= NOISE * sums] = 0.0
    np.fill_diagonal(result, 0.0)
    return np.asarray(result)


def _distances_to(gram: Array, centre: Array) -> Array:
    """|X_i - sum_j c_j X_j| for each i: (n,)."""
    products = gram @ centre
    sums = np.diagonal(gram) + centre @ products
    squares = sums - 2.0 * products
    return np.asarray(np.sqrt(np.where(squares <= NOISE * sums, 0.0, squares)))


def _smallest(values: Array, count: int) -> Array:
    """1 where a value is among the `count` smallest, 0 where not; values that tie for the last places share them."""
    last = float(np.partition(values, count - 1)[count - 1])
    below, above = values < last * (1 - TIE), values > last * (1 + TIE)
    tied = ~(below | above)
    return np.where(below, 1.0, np.where(tied, (count - int(below.sum())) / int(tied.sum()), 0.0))


def _shares(values: Array) -> Array:
    return np.asarray(values / values.sum())


def _checked(gram: Array, tokens: Sequence[int]) -> Array:
    """The Gram matrix, exactly symmetric and scaled by a power of four so that no square overflows."""
    matrix = np.asarray(gram, dtype=np.float64)
    if not tokens or matrix.shape != (len(tokens), len(tokens)):
        raise InputError(f"{len(tokens)} token counts do not fit a Gram matrix of shape {matrix.shape}")
    if min(tokens) < 1:
        raise InputError("every contribution needs at least one token")
    if not np.isfinite(matrix).all():
        raise InputError("the Gram matrix holds a value that is not finite")
    lengths = np.diagonal(matrix)
    if float(lengths.min()) < 0:
        raise InputError("the Gram matrix has a negative squared norm")
    _, power = math.frexp(float(lengths.max()))
    matrix = np.ldexp(matrix, -2 * (power // 2))
    if np.abs(matrix - matrix.T).max() > 1e-6:
        raise InputError("the Gram matrix is not symmetric")
    return np.asarray((matrix + matrix.T) / 2.0)


# -- integers ----------------------------------------------------------------------------------------------------------


def integer_coefficients(weights: Array, denominator_log2: int) -> list[int]:
    """Integers c with c_i / 2**denominator_log2 close to weights[i], each less than one unit away.

    Weights that sum to one, within 1e-9, are divided by their sum and made integers by the largest-remainder method, so
    the integers sum to exactly 2**denominator_log2: equal remainders go to the larger weight, then to the earlier
    place. (Sort contributions by digest, and the place does not depend on who came first.) Other weights are rounded
    down: what the clip has taken away is not given to somebody else. All steps are exact rational arithmetic.

    Raises InputError: no weight, one that is negative or not finite, a denominator outside 2**0 ... 2**30.
    """
    if len(weights) == 0 or not np.isfinite(weights).all() or float(np.min(weights)) < 0:
        raise InputError("coefficients need weights that are finite and not negative")
    if not 0 <= denominator_log2 <= 30:
        raise InputError(f"a denominator of 2**{denominator_log2} is outside 2**0 ... 2**30")
    exact = [Fraction(float(weight)) for weight in weights]
    total, unit = sum(exact, Fraction(0)), 1 << denominator_log2
    if abs(total - 1) > Fraction(1, 10**9):
        return [math.floor(weight * unit) for weight in exact]
    targets = [weight / total * unit for weight in exact]
    result = [math.floor(target) for target in targets]
    by_remainder = sorted(range(len(exact)), key=lambda i: (result[i] - targets[i], -exact[i], i))
    for i in by_remainder[: unit - sum(result)]:
        result[i] += 1
    return result
