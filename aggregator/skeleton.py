"""The skeleton of a model: the names, shapes and roles of its weights, from a config alone.

What always holds:
- the model is built on torch's "meta" device, so no memory is taken for a weight, and no code of the folder runs;
- a weight has a role only if the worker can train it there with the peft library: see `rankup.targets.Role`;
- buffers never have a role, and of a vision-language model nothing of the part that sees has one: it stays as it is,
  while the language model and what joins both are trained.

It reads no weights; whether they are stored under these names is for `aggregator.baseweights` to find out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankup.errors import InputError
from rankup.targets import Role, fits_role
from rankup.vision import auto_model, is_vision_model


@dataclass(frozen=True)
class Parameter:
    """One weight that a delta may change."""

    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True)
class Skeleton:
    """What a config says about the weights of its model."""

    names: frozenset[str]
    """Of all tensors, buffers too."""
    prefix: str
    """Of the backbone's names, with a dot at its end."""
    parameters: Mapping[str, Parameter]
    embedding: str | None
    """Name of the input embedding's weight."""
    tied_head: str | None
    """Name of the head's weight where the config ties it to the embedding."""
    conversions: tuple[Any, ...] = ()
    """What transformers does to the names and weights of older files when it loads them."""
    sees: bool = False
    """Whether it is a vision-language model."""

    @classmethod
    def of(cls, folder: Path) -> Skeleton:
        """Of the model whose config lies in `folder`. Raises InputError where transformers cannot build it."""
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping

        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = auto_model(transformers, folder).from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as exc:
            raise InputError(f"{folder} holds no language model that transformers can build: {exc}") from exc
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        weight_of = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        tied = bool(getattr(config, "tie_word_embeddings", False))
        tied_head = weight_of.get(id(head)) if tied else None
        found = _parameters(model)
        if tied_head is not None:
            found.pop(tied_head, None)
        return cls(
            names=frozenset(model.state_dict()),
            prefix=f"{model.base_model_prefix}.",
            parameters=found,
            embedding=weight_of.get(id(embedding)),
            tied_head=tied_head,
            conversions=tuple(get_model_conversion_mapping(model)),
            sees=is_vision_model(folder),
        )

    def model_name(self, stored_name: str) -> str:
        """The model's name for a stored tensor: files of a bare backbone leave the prefix out, and those of most
        vision-language models have names of older days."""
        longer = self.prefix + stored_name
        if stored_name in self.names or longer in self.names:
            return stored_name if stored_name in self.names else longer
        renamed = self._renamed(stored_name) if self.sees else stored_name
        # A name that loading would change again is no name for a version's file.
        return renamed if renamed in self.names and self._renamed(renamed) == renamed else stored_name

    def _renamed(self, name: str) -> str:
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamed: str = apply_renamings(name, [rule for rule in self.conversions if isinstance(rule, WeightRenaming)])
        return renamed

    def stacks(self, stored_names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Experts that are stored one by one: the model's name for all of a layer -> their names, in the stack's order.

        Only where loading puts them below each other and does nothing else.
        """
        from transformers.core_model_loading import WeightConverter

        stacking = [rule for rule in self.conversions if isinstance(rule, WeightConverter) and _only_stacks(rule)]
        found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for name in stored_names if stacking else ():
            renamed = self._renamed(name)
            for rule in stacking:
                target, pattern = rule.rename_source_key(renamed)
                target = self.model_name(target)
                if pattern is not None and target in self.parameters and self.parameters[target].role == "experts":
                    expert = int(re.findall(r"(?<=\.)\d+(?=\.)", name)[-1])
                    found[target].append((expert, rule.source_patterns.index(pattern), name))
        return {target: tuple(name for _, _, name in sorted(parts)) for target, parts in found.items()}


def _parameters(model: Any) -> dict[str, Parameter]:
    """Every weight of the model that has a role, by name."""
    head, eyes = model.get_output_embeddings(), _eyes(model)
    found: dict[str, Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(int(size) for size in parameter.shape)
            role = _role(module, name, shape, is_head=module is head) if parameter.is_floating_point() else None
            role = None if module in eyes else role
            if role is not None and fits_role(role, shape):
                found[f"{module_name}.{name}" if module_name else name] = Parameter(shape, role)
    return found


def _eyes(model: Any) -> frozenset[Any]:
    """The modules that see; none where nothing does."""
    eyes = model.get_encoder("image")
    return frozenset() if eyes is model or eyes is model.base_model else frozenset(eyes.modules())


def _role(module: Any, parameter_name: str, shape: tuple[int, ...], *, is_head: bool) -> Role | None:
    import torch
    from transformers.pytorch_utils import Conv1D

    if len(shape) == 1:
        return "vector"
    if parameter_name == "weight" and isinstance(module, torch.nn.Linear | Conv1D):
        return None if not _only_multiplies(module) else "head" if is_head else "linear"
    if parameter_name == "weight" and isinstance(module, torch.nn.Embedding):
        # A subclass that looks up other rows than it is asked for is not a product of rows with this weight; one that
        # only scales what it finds is, and peft knows how.
        plain = type(module).forward is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if plain else None
    # A convolution has three dimensions too; experts say how many they are.
    if len(shape) == 3 and shape[0] > 1 and getattr(module, "num_experts", None) == shape[0]:
        return "experts"
    return None


def _only_multiplies(module: Any) -> bool:
    """Whether a linear layer gives numbers for each of its rows. Some routers are made from one, and give choices."""
    import torch

    if type(module).forward is torch.nn.Linear.forward or not isinstance(module, torch.nn.Linear):
        return True
    try:
        found = module(torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, module.out_features)


def _only_stacks(rule: Any) -> bool:
    """Whether the rule makes (E, rows of all patterns, columns) from matrices, expert after expert."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *rest = rule.operations
    joined = not rest or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)
    return isinstance(first, MergeModulelist) and first.dim == 0 and joined and len(rule.target_patterns) == 1
