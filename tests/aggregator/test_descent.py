"""Descents are the slopes of the held-out loss: finite differences of `heldout_losses` agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_losses import MODELS, ROWS, SIZES, Delta, load, losses_of, random_delta
from test_losses import folder as folder

from aggregator.descent import heldout_descents
from aggregator.losses import heldout_losses
from rankup.errors import InputError
from rankup.fixedpoint import Factors, dequantise, quantise

__all__ = ["MODELS", "SIZES", "folder"]


def descents_of(folder: Path, deltas: list[Delta], **more: Any) -> list[float]:
    names = sorted({name for delta in deltas for name in delta})
    sources = [lambda name, delta=delta: delta.get(name, ()) for delta in deltas]
    return heldout_descents(folder, ROWS, sources, names, **({"max_tokens": 64, "max_rows": 100, "threads": 1} | more))


def scaled(delta: Delta, by: float) -> Delta:
    def one(factors: Factors) -> Factors:
        b, a = dequantise(factors)
        return quantise(by * b, a)

    return {name: [one(factors) for factors in parts] for name, parts in delta.items()}


def test_a_descent_is_the_slope_of_the_loss_along_the_delta(folder: Path) -> None:
    model = load(folder)
    deltas = [random_delta(model, seed) for seed in range(3)]
    step = 2.0**-9  # below what would send a token to another expert
    _, ahead = losses_of(folder, [scaled(delta, step) for delta in deltas])
    _, behind = losses_of(folder, [scaled(delta, -step) for delta in deltas])
    slopes = [(low - high) / (2 * step) for high, low in zip(ahead, behind, strict=True)]
    np.testing.assert_allclose(descents_of(folder, deltas), slopes, rtol=0.02, atol=5e-3)


def test_a_flipped_delta_has_the_opposite_descent_and_another_basis_the_same(folder: Path) -> None:
    delta = random_delta(load(folder), 5)
    turned = {}
    for name, parts in delta.items():
        turned[name] = []
        for factors in parts:
            b, a = dequantise(factors)
            mix = np.eye(b.shape[1]) + np.triu(np.ones((b.shape[1], b.shape[1])), 1)
            turned[name].append(quantise(b @ mix, np.linalg.solve(mix, a)))
    plain, flipped, disguised = descents_of(folder, [delta, scaled(delta, -1.0), turned])
    assert flipped == pytest.approx(-plain, rel=1e-5)
    assert disguised == pytest.approx(plain, rel=1e-2, abs=1e-3)


def test_factors_of_another_shape_and_unknown_weights_are_refused(folder: Path) -> None:
    factors = quantise(np.ones((3, 1)), np.ones((1, 5)))
    name = next(name for name, weight in load(folder).named_parameters() if weight.ndim == 2)
    with pytest.raises(InputError, match="do not change a weight"):
        descents_of(folder, [{name: [factors]}])
    with pytest.raises(InputError, match="no weight"):
        descents_of(folder, [{"nowhere.weight": [factors]}])
    with pytest.raises(InputError, match="none of the 0"):
        heldout_losses(folder, [], [], [], max_tokens=8, max_rows=4)
