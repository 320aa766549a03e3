"""Targets: the weights that a delta may change, and which of them a recipe trains.

A target's factors are in the orientation of the weight as it is stored, whatever the layer does with it. A vector is
a matrix with one column, so its full delta is a product of rank 1; fused expert weights are a stack of matrices, each
with factors of its own. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal

from pydantic import Field

from rankup.errors import InputError
from rankup.message import Message
from rankup.recipe import MAX_RANK, Recipe

MAX_TARGETS: Final = 8192
MAX_SLICES: Final = 4096

Role = Literal["linear", "head", "embedding", "vector", "experts"]
"""linear: weight of a linear layer or of a Conv1D. head: the output head's, where it is not the embedding's. embedding:
(vocabulary, width). vector: a bias or the scale of a norm. experts: linear weights of all experts, stacked."""

DIMENSIONS: Final[Mapping[str, int]] = {"linear": 2, "head": 2, "embedding": 2, "vector": 1, "experts": 3}
"""Role -> number of dimensions of the stored weight."""


class Target(Message):
    """A weight that a delta may change: `slices` matrices (d_out, d_in), as they are stored.

    Stored shapes: (d_out, d_in) for matrices, (d_out,) with d_in = 1 for a vector, (slices, d_out, d_in) for experts.
    """

    role: Role = "linear"
    d_out: Annotated[int, Field(ge=1, le=2**24)]
    d_in: Annotated[int, Field(ge=1, le=2**24)]
    slices: Annotated[int, Field(ge=1, le=MAX_SLICES)] = 1
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = MAX_RANK
    """Highest rank that a delta may have here; a vector's is 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as it is stored."""
        if self.role == "vector":
            return (self.d_out,)
        return (self.slices, self.d_out, self.d_in) if self.role == "experts" else (self.d_out, self.d_in)


def fits_role(role: Role, shape: tuple[int, ...]) -> bool:
    """Whether a stored weight of this shape can have the role."""
    return (
        len(shape) == DIMENSIONS[role] and min(shape) > 0 and max(shape) <= 2**24 and target_slices(shape) <= MAX_SLICES
    )


def target_slices(shape: tuple[int, ...]) -> int:
    """How many matrices a stored weight is: its experts, or one."""
    return shape[0] if len(shape) == 3 else 1


def target_of(role: Role, shape: tuple[int, ...]) -> Target:
    """The target that a stored weight is. `shape` has the dimensions of its role."""
    if role == "vector":
        return Target(role=role, d_out=shape[0], d_in=1, rank=1)
    if role == "experts":
        return Target(role=role, d_out=shape[1], d_in=shape[2], slices=shape[0])
    return Target(role=role, d_out=shape[0], d_in=shape[1])


def select_targets(targets: Mapping[str, Target], recipe: Recipe) -> dict[str, Target]:
    """What a delta of this recipe changes: name -> target with its highest rank, sorted by name.

    `target_modules` works as in peft: an entry selects every module whose dotted name is the entry or ends with
    `.entry`; "all-linear" selects the role "linear". `target_parameters` selects stacked experts in the same way, by
    the name of the parameter. `train_vectors` adds every vector.

    Raises InputError: an entry selects nothing, or there are no targets, or too many.
    """
    chosen: set[str] = set()
    if recipe.target_modules == "all-linear":
        chosen |= {name for name, target in targets.items() if target.role == "linear"}
    else:
        modules = {
            name.removesuffix(".weight"): name
            for name, target in targets.items()
            if target.role in ("linear", "head", "embedding")
        }
        chosen |= {modules[name] for name in _select(modules, recipe.target_modules, "target_modules")}
    experts = [name for name, target in targets.items() if target.role == "experts"]
    chosen.update(_select(experts, recipe.target_parameters, "target_parameters"))
    if recipe.train_vectors:
        chosen |= {name for name, target in targets.items() if target.role == "vector"}
    if not chosen:
        raise InputError("the model has no weight that this recipe trains", remedy="Import a model with linear layers.")
    if len(chosen) > MAX_TARGETS:
        raise InputError(
            f"the recipe selects {len(chosen)} weights; {MAX_TARGETS} is the most",
            remedy="Name fewer layers in target_modules.",
        )
    ranks = rank_of(recipe, {name.removesuffix(".weight"): name for name in chosen if targets[name].role != "vector"})
    return {name: targets[name].model_copy(update={"rank": ranks.get(name, 1)}) for name in sorted(chosen)}


def targets_at_tier(targets: Mapping[str, Target], recipe: Recipe, tier: int | None) -> dict[str, Target]:
    """The targets of a round with the ranks that volunteers of a tier train: see `Recipe.tier_rank`."""
    return {
        name: target.model_copy(update={"rank": recipe.tier_rank(target.rank, tier)})
        for name, target in targets.items()
    }


def expected_delta_bytes(targets: Mapping[str, Target], mantissa_bits: int) -> int:
    """About what a delta of these targets weighs: factors B (d_out, r) and A (r, d_in), without scales and header."""
    numbers = sum(t.slices * t.rank * (t.d_out + t.d_in) for t in targets.values())
    return numbers * mantissa_bits // 8


def rank_of(recipe: Recipe, modules: Mapping[str, str]) -> dict[str, int]:
    """Rank of each weight: the longest entry of `rank_pattern` that fits its module, else the recipe's rank.

    modules: dotted module name -> weight name. Raises InputError where an entry fits no module.
    """
    ranks = dict.fromkeys(modules.values(), recipe.rank)
    for entry in sorted(recipe.rank_pattern, key=lambda entry: (len(entry), entry)):
        for module in _select(modules, (entry,), "rank_pattern"):
            ranks[modules[module]] = recipe.rank_pattern[entry]
    return ranks


def _select(names: Iterable[str], entries: Iterable[str], field: str) -> set[str]:
    names = sorted(names)
    found: set[str] = set()
    for entry in entries:
        hits = {name for name in names if name == entry or name.endswith(f".{entry}")}
        if not hits:
            known = sorted({name.rpartition(".")[2] for name in names})
            raise InputError(
                f"the entry {entry!r} of {field} fits no layer of this model",
                remedy=f"Choose among: {', '.join(known[:20]) or 'none, the model has no such layer'}.",
            )
        found |= hits
    return found
