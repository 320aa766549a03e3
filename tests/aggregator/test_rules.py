"""Rules decided from a Gram matrix against textbook algorithms on the vectors themselves, and the laws of weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aggregator.rules import RULES, byzantine_count, clip_scales, integer_coefficients, weights
from rankup.errors import InputError

ROBUST = ("multi_krum", "geometric_median", "centred_clipping")
DENOMINATOR_LOG2 = 16
seeds = st.integers(0, 2**32)
counts = st.integers(3, 24)
shares = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.49])


def vectors(seed: int, count: int, size: int = 7) -> np.ndarray:
    """(count, size): a common direction plus noise, as contributions have it."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size) + rng.standard_normal((count, size))


def aggregate(rule: str, x: np.ndarray, share: float, clip: float = math.inf) -> np.ndarray:
    chosen = weights(rule, x @ x.T, [1] * len(x), clip_norm_ratio=clip, byzantine_share=share)
    return np.asarray(chosen @ x)


# -- the textbook on vectors -------------------------------------------------------------------------------------------


def dense_multi_krum(x: np.ndarray, f: int) -> np.ndarray:
    n = len(x)
    f = min(f, (n - 3) // 2)
    mixed = np.array([x[np.argsort(np.linalg.norm(x - own, axis=1))[: n - f]].mean(axis=0) for own in x])
    scores = []
    for i in range(n):
        others = [float(np.sum((mixed[i] - mixed[j]) ** 2)) for j in range(n) if j != i]
        scores.append(sum(sorted(others)[: n - f - 2]))
    ordered = np.sort(scores)
    # Mixes share most of their members, so their scores may tie; the textbook then takes the earlier place.
    assume(f == 0 or ordered[n - f] > ordered[n - f - 1] * (1 + 1e-6))
    return np.asarray(mixed[np.argsort(scores)[: n - f]].mean(axis=0))


def sum_of_distances(x: np.ndarray, point: np.ndarray) -> float:
    return float(np.linalg.norm(x - point, axis=1).sum())


def dense_geometric_median(x: np.ndarray, f: int) -> np.ndarray:
    point = np.median(x, axis=0)
    for _ in range(1000):
        inverse = 1 / np.maximum(np.linalg.norm(x - point, axis=1), 1e-9)
        point = (inverse[:, None] * x).sum(axis=0) / inverse.sum()
    return np.asarray(point)


def dense_centred_clipping(x: np.ndarray, f: int) -> np.ndarray:
    centre = dense_geometric_median(x, f)
    radius = np.median(np.linalg.norm(x - centre, axis=1))
    for _ in range(3):
        differences = x - centre
        lengths = np.linalg.norm(differences, axis=1, keepdims=True)
        centre = centre + (differences * np.minimum(1, radius / lengths)).mean(axis=0)
    return np.asarray(centre)


ORACLES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "mean_by_tokens": lambda x, f: np.asarray(x.mean(axis=0)),
    "multi_krum": dense_multi_krum,
    "geometric_median": dense_geometric_median,
    "centred_clipping": dense_centred_clipping,
}


@pytest.mark.parametrize("rule", sorted(RULES))
@given(seed=seeds, count=counts, share=shares, clip=st.sampled_from([1.0, math.inf]))
@settings(max_examples=25, deadline=None)
def test_a_rule_gives_what_its_textbook_gives_on_the_clipped_vectors(
    rule: str, seed: int, count: int, share: float, clip: float
) -> None:
    x = vectors(seed, count)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    clipped = x * np.minimum(1, clip * np.median(norms) / norms)
    expected = ORACLES[rule](clipped, byzantine_count(count, share))
    np.testing.assert_allclose(aggregate(rule, x, share, clip), expected, atol=2e-4 * np.abs(x).max())


@given(seeds, counts)
@settings(max_examples=25, deadline=None)
def test_no_point_has_a_smaller_sum_of_distances_than_the_geometric_median(seed: int, count: int) -> None:
    x = vectors(seed, count, size=3)
    found = sum_of_distances(x, aggregate("geometric_median", x, 0.3))
    rivals = [*x, x.mean(axis=0), dense_geometric_median(x, 0)]
    assert found <= min(sum_of_distances(x, rival) for rival in rivals) * (1 + 1e-5)


def test_mixing_uses_the_nearest_ones_and_krum_leaves_the_stranger_out() -> None:
    """Five points on a line, f = 1: each mix is the mean of four, and the stranger's own mix is the one left out."""
    x = np.array([[0.0], [1.0], [2.0], [3.0], [100.0]])
    # The mixes: 1.5 of the four near ones, and (1 + 2 + 3 + 100) / 4 = 26.5 of the stranger.
    found = weights("multi_krum", x @ x.T, [1] * 5, clip_norm_ratio=math.inf, byzantine_share=0.2)
    np.testing.assert_allclose(found, [0.25, 0.25, 0.25, 0.25, 0.0], atol=1e-12)


# -- laws --------------------------------------------------------------------------------------------------------------

clips = st.sampled_from([1.0, 1.5, 3.0, math.inf])


@pytest.mark.parametrize("rule", sorted(RULES))
@given(seed=seeds, count=st.integers(1, 24), share=shares, clip=clips, data=st.data())
@settings(max_examples=25, deadline=None)
def test_weights_are_not_negative_sum_to_one_before_the_clip_and_follow_a_permutation(
    rule: str, seed: int, count: int, share: float, clip: float, data: st.DataObject
) -> None:
    x, tokens = vectors(seed, count), data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))

    def chosen(places: list[int]) -> np.ndarray:
        y = x[places]
        return weights(rule, y @ y.T, [tokens[i] for i in places], clip_norm_ratio=clip, byzantine_share=share)

    plain = chosen(list(range(count)))
    assert plain.min() >= 0
    assert plain.sum() <= 1 + 1e-9
    if math.isinf(clip):
        assert plain.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(chosen(order), plain[order], atol=1e-6)


@pytest.mark.parametrize("rule", sorted(RULES))
@given(seed=seeds, count=counts, clip=clips, shift=st.integers(-40, 40), factor=st.integers(1, 1000))
@settings(max_examples=25, deadline=None)
def test_units_of_norm_and_tokens_change_no_bit(
    rule: str, seed: int, count: int, clip: float, shift: int, factor: int
) -> None:
    x = vectors(seed, count)
    gram, tokens = x @ x.T, [int(n) for n in np.random.default_rng(seed).integers(1, 1000, count)]
    plain = weights(rule, gram, tokens, clip_norm_ratio=clip, byzantine_share=0.3)
    scaled_tokens = [count * factor for count in tokens]
    scaled = weights(rule, gram * 4.0**shift, scaled_tokens, clip_norm_ratio=clip, byzantine_share=0.3)
    np.testing.assert_array_equal(plain, scaled)


@pytest.mark.parametrize("rule", ROBUST)
@given(seed=seeds, count=counts, data=st.data())
@settings(max_examples=25, deadline=None)
def test_equal_contributions_get_equal_weights(rule: str, seed: int, count: int, data: st.DataObject) -> None:
    copies = data.draw(st.lists(st.integers(0, count - 1), min_size=3, max_size=count))
    x = vectors(seed, count)[copies]
    chosen = weights(rule, x @ x.T, [1] * len(x), clip_norm_ratio=math.inf, byzantine_share=0.3)
    for i, j in zip(*np.nonzero(np.equal.outer(copies, copies)), strict=True):
        assert chosen[i] == pytest.approx(chosen[j], abs=1e-6)


def bound(rule: str, n: int, f: int, spread: float) -> float:
    """How far from the honest mean the rule's docstring lets f hostile contributions move the result."""
    if rule == "multi_krum":
        return (3 + 6 * math.sqrt((n - f - 2) / (n - 2 * f - 1))) * spread
    median = 2 * (n - f) / (n - 2 * f) * spread
    # Three steps, none longer than the radius, which is at most the distance of the farthest honest one.
    return median if rule == "geometric_median" else median + 3 * (median + spread)


@pytest.mark.parametrize("rule", ROBUST)
@given(
    seed=seeds,
    count=st.integers(5, 24),
    length=st.sampled_from([0.1, 1.0, 1e3, 1e6]),
    collude=st.booleans(),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_hostile_contributions_of_any_length_move_a_robust_rule_only_so_far(
    rule: str, seed: int, count: int, length: float, collude: bool, data: st.DataObject
) -> None:
    f = data.draw(st.integers(1, (count - 3) // 2))
    x = vectors(seed, count)
    honest = x[f:].copy()
    rng = np.random.default_rng(seed + 1)
    attack = rng.standard_normal((1 if collude else f, x.shape[1]))
    x[:f] = honest.mean(axis=0) + length * attack / np.linalg.norm(attack, axis=1, keepdims=True)
    mean = honest.mean(axis=0)
    spread = float(np.linalg.norm(honest - mean, axis=1).max())
    moved = float(np.linalg.norm(aggregate(rule, x, (f + 0.5) / count) - mean))
    assert moved <= bound(rule, count, f, spread) * (1 + 1e-6)


@pytest.mark.parametrize("rule", ROBUST)
def test_thirty_per_cent_of_reversed_and_longer_contributions_do_not_turn_a_robust_rule_as_they_turn_the_mean(
    rule: str,
) -> None:
    rng = np.random.default_rng(5)
    good = rng.standard_normal(300)
    x = good + rng.standard_normal((20, 300))
    x[:6] *= -5
    honest = x[6:].mean(axis=0)

    def error(name: str, clip: float = math.inf) -> float:
        return float(np.linalg.norm(aggregate(name, x, 0.3, clip) - honest) / np.linalg.norm(honest))

    assert error("mean_by_tokens") > 1.5
    assert error(rule) < 0.45
    assert error(rule, 1.5) < 0.45


@given(seeds, counts, st.floats(1, 4))
def test_the_clip_holds_every_contribution_to_its_limit_and_lengthens_none(seed: int, count: int, ratio: float) -> None:
    norms = np.exp(3 * np.random.default_rng(seed).standard_normal(count))
    scales = clip_scales(norms, ratio)
    assert (scales <= 1).all()
    assert (norms * scales <= ratio * np.median(norms) * (1 + 1e-12)).all()
    np.testing.assert_array_equal(scales[norms <= ratio * np.median(norms)], 1.0)


COUNTS = {
    "three tenths of ten, in spite of 0.3 * 10 < 3 in binary": (10, 0.3, 3),
    "29 per cent of a hundred": (100, 0.29, 29),
    "rounded down": (7, 0.3, 2),
    "a cohort of one has nobody to fear": (1, 0.49, 0),
    "less than half": (4, 0.499, 1),
}


@pytest.mark.parametrize(("count", "share", "expected"), COUNTS.values(), ids=COUNTS.keys())
def test_the_number_of_hostile_contributions(count: int, share: float, expected: int) -> None:
    assert byzantine_count(count, share) == expected


@pytest.mark.parametrize("rule", sorted(RULES))
def test_small_and_degenerate_cohorts_are_weighed_too(rule: str) -> None:
    def chosen(gram: list[list[float]], tokens: list[int]) -> list[float]:
        return list(weights(rule, np.array(gram), tokens, clip_norm_ratio=1.5, byzantine_share=0.3))

    assert chosen([[7.0]], [5]) == [1.0]
    assert chosen([[1.0, 0.5], [0.5, 1.0]], [1, 3]) == [0.25, 0.75]
    np.testing.assert_allclose(chosen([[2.0] * 4] * 4, [9] * 4), [0.25] * 4, atol=1e-12)
    np.testing.assert_allclose(chosen([[0.0] * 3] * 3, [9] * 3), [1 / 3] * 3, atol=1e-12)
    assert np.isfinite(chosen([[1e300, 0, 0], [0, 1.0, 0], [0, 0, 1e-300]], [1, 1, 1])).all()


REFUSED = {
    "an unknown rule": ("median", np.eye(2), [1, 1], 1.5, 0.3),
    "nobody": ("multi_krum", np.zeros((0, 0)), [], 1.5, 0.3),
    "sizes differ": ("multi_krum", np.eye(3), [1, 1], 1.5, 0.3),
    "no tokens": ("multi_krum", np.eye(2), [1, 0], 1.5, 0.3),
    "no number": ("multi_krum", np.array([[1, math.nan], [math.nan, 1]]), [1, 1], 1.5, 0.3),
    "infinite": ("multi_krum", np.diag([math.inf, 1]), [1, 1], 1.5, 0.3),
    "negative square": ("multi_krum", np.diag([-1.0, 1]), [1, 1], 1.5, 0.3),
    "not symmetric": ("multi_krum", np.array([[1, 0.5], [0, 1]]), [1, 1], 1.5, 0.3),
    "half are hostile": ("multi_krum", np.eye(2), [1, 1], 1.5, 0.5),
    "no room under the clip": ("multi_krum", np.eye(2), [1, 1], 0.0, 0.3),
    "a clip that is no number": ("multi_krum", np.eye(2), [1, 1], math.nan, 0.3),
}


@pytest.mark.parametrize(("rule", "gram", "tokens", "clip", "share"), REFUSED.values(), ids=REFUSED.keys())
def test_senseless_cohorts_are_refused(
    rule: str, gram: np.ndarray, tokens: list[int], clip: float, share: float
) -> None:
    with pytest.raises(InputError):
        weights(rule, gram, tokens, clip_norm_ratio=clip, byzantine_share=share)


# -- integers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(0, 30))
def test_weights_that_sum_to_one_become_integers_that_sum_to_exactly_one(counts: list[int], log2: int) -> None:
    shares = np.array([count / sum(counts) for count in counts])
    result = integer_coefficients(shares, log2)
    assert sum(result) == 2**log2
    for coefficient, count in zip(result, counts, strict=True):
        assert abs(coefficient - count * 2**log2 / sum(counts)) < 1 + 1e-6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 30))
def test_other_weights_are_rounded_down(values: list[float], log2: int) -> None:
    assume(abs(sum(values) - 1) > 1e-6)
    assert integer_coefficients(np.array(values), log2) == [math.floor(value * 2**log2) for value in values]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_the_order_decides_only_between_equal_weights(counts: list[int], random: object) -> None:
    shuffled = list(counts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def outcome(members: list[int]) -> list[tuple[int, int]]:
        result = integer_coefficients(np.array([count / sum(members) for count in members]), DENOMINATOR_LOG2)
        return sorted(zip(members, result, strict=True))

    assert outcome(counts) == outcome(shuffled)


def coefficients_of(norms: list[float], tokens: list[int]) -> list[int]:
    """By tokens and the clip at 1.5, for contributions at right angles to each other."""
    gram = np.diag(np.square(norms))
    chosen = weights("mean_by_tokens", gram, tokens, clip_norm_ratio=1.5, byzantine_share=0.0)
    return integer_coefficients(chosen, DENOMINATOR_LOG2)


CASES = {
    # 300 of 600 tokens are half of 65536; norm 6 against a limit of 1.5 * 1 is a quarter of that.
    "one of three is four times too long": ([1.0, 6.0, 1.0], [150, 300, 150], [16384, 8192, 16384]),
    "one alone is never clipped": ([1e6], [7], [65536]),
    "thirds: the one unit that is left goes to the first": ([1.2, 1.0, 1.1], [5, 5, 5], [21846, 21845, 21845]),
    "a tiny share may round to nothing": ([1.0, 1.0], [1, 10**9], [0, 65536]),
}


@pytest.mark.parametrize(("norms", "tokens", "expected"), CASES.values(), ids=CASES.keys())
def test_coefficients_of_named_cohorts(norms: list[float], tokens: list[int], expected: list[int]) -> None:
    assert coefficients_of(norms, tokens) == expected


@pytest.mark.parametrize(
    ("values", "log2"),
    [([], 16), ([-0.1, 1.1], 16), ([math.nan], 16), ([math.inf], 16), ([1.0], -1), ([1.0], 31)],
    ids=["none", "negative", "no number", "infinite", "denominator below one", "denominator too large"],
)
def test_senseless_weights_are_refused(values: list[float], log2: int) -> None:
    with pytest.raises(InputError):
        integer_coefficients(np.array(values), log2)
