"""Which weights a recipe trains, with which rank: as peft would select them, or a clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rankup.errors import InputError
from rankup.recipe import MAX_RANK, Recipe
from rankup.targets import (
    DIMENSIONS,
    MAX_SLICES,
    MAX_TARGETS,
    Role,
    Target,
    fits_role,
    rank_of,
    select_targets,
    target_of,
    target_slices,
)

LAYER = "model.layers.{}."
MODEL: dict[str, Target] = {
    "lm_head.weight": target_of("head", (64, 8)),
    "model.embed_tokens.weight": target_of("embedding", (64, 8)),
    "model.norm.weight": target_of("vector", (8,)),
}
for _n in (0, 1, 10):
    MODEL |= {
        LAYER.format(_n) + "self_attn.q_proj.weight": target_of("linear", (8, 8)),
        LAYER.format(_n) + "self_attn.q_proj.bias": target_of("vector", (8,)),
        LAYER.format(_n) + "mlp.down_proj.weight": target_of("linear", (8, 24)),
        LAYER.format(_n) + "mlp.experts.down_proj": target_of("experts", (4, 8, 6)),
        LAYER.format(_n) + "mlp.experts.gate_up_proj": target_of("experts", (4, 12, 8)),
    }
LINEAR = sorted(name for name, target in MODEL.items() if target.role == "linear")
VECTORS = sorted(name for name, target in MODEL.items() if target.role == "vector")


def select(**fields: Any) -> dict[str, Target]:
    return select_targets(MODEL, Recipe.model_validate(fields))


# -- what is selected --------------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_and_neither_head_nor_experts() -> None:
    assert list(select()) == LINEAR


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (("q_proj",), [name for name in LINEAR if "q_proj" in name]),
        (("self_attn.q_proj", "lm_head"), ["lm_head.weight", *(name for name in LINEAR if "q_proj" in name)]),
        (("layers.1.self_attn.q_proj",), ["model.layers.1.self_attn.q_proj.weight"]),
        (("model.layers.1.self_attn.q_proj",), ["model.layers.1.self_attn.q_proj.weight"]),
        (("embed_tokens",), ["model.embed_tokens.weight"]),
        (("down_proj",), [name for name in LINEAR if "down_proj" in name]),
    ],
)
def test_an_entry_selects_modules_by_the_last_parts_of_their_names(
    entries: tuple[str, ...], expected: list[str]
) -> None:
    assert list(select(target_modules=entries)) == sorted(expected)


def test_experts_are_selected_by_the_name_of_their_parameter_and_vectors_all_at_once() -> None:
    chosen = select(target_parameters=("experts.down_proj",), train_vectors=True)
    experts = [LAYER.format(n) + "mlp.experts.down_proj" for n in (0, 1, 10)]
    assert list(chosen) == sorted([*LINEAR, *experts, *VECTORS])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ("k_proj",)}, "'k_proj' of target_modules fits no layer"),
        ({"target_modules": ("q_proj", "proj")}, "'proj' of target_modules"),
        ({"target_modules": ("1.self_attn",)}, "'1.self_attn' of target_modules"),
        ({"target_modules": ("norm",)}, "'norm' of target_modules"),
        ({"target_modules": ("experts.down_proj",)}, "of target_modules"),
        ({"target_modules": ("q_proj.weight",)}, "of target_modules"),
        ({"target_parameters": ("q_proj.weight",)}, "of target_parameters"),
        ({"rank_pattern": {"k_proj": 4}}, "'k_proj' of rank_pattern"),
        ({"rank_pattern": {"lm_head": 4}}, "'lm_head' of rank_pattern"),
        ({"rank_pattern": {"norm": 4}, "train_vectors": True}, "'norm' of rank_pattern"),
    ],
)
def test_an_entry_that_fits_nothing_is_refused_and_told_what_there_is(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        select(**fields)
    assert "Choose among: " in caught.value.remedy


def test_a_model_without_experts_says_so() -> None:
    with pytest.raises(InputError, match="target_parameters") as caught:
        select_targets({LINEAR[0]: MODEL[LINEAR[0]]}, Recipe(target_parameters=("down_proj",)))
    assert "no such layer" in caught.value.remedy


def test_a_model_without_linear_layers_has_nothing_to_train() -> None:
    with pytest.raises(InputError, match="no weight that this recipe trains"):
        select_targets({"norm.weight": target_of("vector", (8,))}, Recipe())


def test_more_weights_than_a_delta_can_hold_are_refused() -> None:
    targets = {f"w{number}.weight": Target(d_out=1, d_in=1) for number in range(MAX_TARGETS + 1)}
    with pytest.raises(InputError, match=f"selects {MAX_TARGETS + 1} weights"):
        select_targets(targets, Recipe())
    assert len(select_targets(dict(list(targets.items())[1:]), Recipe())) == MAX_TARGETS


NAMES = st.lists(st.sampled_from(["a", "b", "aa", "layers", "0"]), min_size=1, max_size=3).map(".".join)


@given(modules=st.sets(NAMES, min_size=1, max_size=6), entries=st.lists(NAMES, min_size=1, max_size=3, unique=True))
def test_selection_is_that_of_peft(modules: set[str], entries: list[str]) -> None:
    """A module is chosen where its name is an entry, or ends with a dot and an entry; order does not matter."""
    targets = {f"{module}.weight": Target(d_out=2, d_in=2) for module in modules}
    expected = {module for module in modules for entry in entries if f".{module}".endswith(f".{entry}")}
    useless = [entry for entry in entries if not any(f".{module}".endswith(f".{entry}") for module in modules)]
    recipe = Recipe(target_modules=tuple(entries))
    if useless:
        with pytest.raises(InputError):
            select_targets(targets, recipe)
        return
    chosen = select_targets(targets, recipe)
    assert list(chosen) == sorted(f"{module}.weight" for module in expected)
    assert chosen == select_targets(targets, Recipe(target_modules=tuple(reversed(entries))))


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_the_longest_entry_that_fits_gives_the_rank() -> None:
    pattern = {"q_proj": 2, "layers.1.self_attn.q_proj": 3, "experts.down_proj": 5}
    chosen = select(rank=7, rank_pattern=pattern, target_parameters=("down_proj",))
    assert chosen["model.layers.0.self_attn.q_proj.weight"].rank == 2
    assert chosen["model.layers.1.self_attn.q_proj.weight"].rank == 3
    assert chosen["model.layers.10.self_attn.q_proj.weight"].rank == 2
    assert chosen["model.layers.1.mlp.down_proj.weight"].rank == 7
    assert chosen["model.layers.1.mlp.experts.down_proj"].rank == 5


def test_a_vector_has_rank_one_whatever_the_recipe_says() -> None:
    chosen = select(rank=64, train_vectors=True, rank_pattern={"q_proj": 32})
    assert {chosen[name].rank for name in VECTORS} == {1}


def test_a_rank_may_exceed_both_sides_of_its_weight() -> None:
    assert select(rank=MAX_RANK)[LINEAR[0]].rank == MAX_RANK > max(8, 24)


@given(st.dictionaries(st.sampled_from(["q", "a.q", "0.a.q", "l.0.a.q"]), st.integers(1, MAX_RANK)), st.integers(1, 9))
def test_ranks_do_not_depend_on_the_order_of_the_pattern(pattern: dict[str, int], rank: int) -> None:
    modules = {"l.0.a.q": "l.0.a.q.weight"}
    backwards = dict(reversed(pattern.items()))
    found = rank_of(Recipe(rank=rank, rank_pattern=pattern), modules)
    assert found == rank_of(Recipe(rank=rank, rank_pattern=backwards), modules)
    assert found == {"l.0.a.q.weight": pattern[max(pattern, key=len)] if pattern else rank}


# -- weights -----------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 2**25), max_size=4).map(tuple)


@given(role=st.sampled_from(sorted(DIMENSIONS)), shape=SHAPES)
def test_a_shape_that_fits_its_role_is_a_target_and_no_other_is(role: Role, shape: tuple[int, ...]) -> None:
    dimensions = {"vector": 1, "experts": 3}.get(role, 2)
    possible = len(shape) == dimensions and all(1 <= size <= 2**24 for size in shape)
    if role == "experts" and possible:
        possible = shape[0] <= MAX_SLICES
    assert fits_role(role, shape) == possible
    if possible:
        target = target_of(role, shape)
        assert target.shape == shape
        assert (target.d_in == 1 and target.rank == 1) or role != "vector"
        assert target_slices(shape) == target.slices


@pytest.mark.parametrize(
    "fields", [{"d_out": 0}, {"d_in": 2**24 + 1}, {"slices": 0}, {"slices": MAX_SLICES + 1}, {"rank": 0}, {"role": "x"}]
)
def test_a_target_beyond_the_limits_of_the_format_is_none(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Target(**{"d_out": 1, "d_in": 1} | fields)
