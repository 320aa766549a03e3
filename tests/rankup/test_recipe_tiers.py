from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.recipe import Recipe
from rankup.targets import Target, select_targets, targets_at_tier

MODEL = {
    "layers.0.q_proj.weight": Target(d_out=8, d_in=8),
    "layers.0.up_proj.weight": Target(d_out=32, d_in=8),
    "norm.weight": Target(role="vector", d_out=8, d_in=1, rank=1),
}


def scaling(recipe: Recipe, rank: int) -> float:
    return recipe.alpha / (math.sqrt(rank) if recipe.rslora else rank)


@given(tier=st.integers(1, 64), rslora=st.booleans(), alpha=st.floats(0.1, 1e3))
def test_a_tier_has_a_lower_rank_and_the_same_scaling(tier: int, rslora: bool, alpha: float) -> None:
    recipe = Recipe(rank=64, alpha=alpha, rslora=rslora)
    lower = recipe.at_tier(tier)
    assert lower.rank == tier
    assert scaling(lower, tier) == pytest.approx(scaling(recipe, 64))
    assert lower.model_copy(update={"rank": 64, "alpha": alpha}) == recipe


def test_no_tier_and_the_highest_one_are_the_recipe_itself() -> None:
    recipe = Recipe(rank=8, rank_pattern={"q_proj": 4})
    assert recipe.at_tier(None) == recipe.at_tier(8) == recipe
    assert targets_at_tier(MODEL, recipe, None) == MODEL


def test_ranks_of_single_layers_shrink_alike_and_a_vector_keeps_its_one() -> None:
    recipe = Recipe(rank=8, rank_pattern={"q_proj": 4}, train_vectors=True)
    ranks = {name: target.rank for name, target in targets_at_tier(select_targets(MODEL, recipe), recipe, 2).items()}
    assert ranks == {"layers.0.q_proj.weight": 1, "layers.0.up_proj.weight": 2, "norm.weight": 1}
    lower = recipe.at_tier(2)
    assert {name: target.rank for name, target in select_targets(MODEL, lower).items()} == ranks
    assert scaling(lower, ranks["layers.0.q_proj.weight"]) == scaling(recipe, 4)
