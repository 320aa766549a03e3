"""The skeleton of a model: the names, shapes and roles of its weights, from a config alone.

What always holds:
- the model is built on torch's "meta" device, so no memory is taken for a weight, and no code of the folder runs;
- a weight has a role only if the worker can train it there with the peft library: see `rankup.targets.Role`;
- buffers never have a role.

It reads no weights; whether they are stored under these names is for `aggregator.genesis` to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankup.errors import InputError
from rankup.targets import Role, fits_role


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

    @classmethod
    def of(cls, folder: Path) -> Skeleton:
        """Of the model whose config lies in `folder`. Raises InputError where transformers cannot build it."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as exc:
            raise InputError(f"{folder} holds no language model that transformers can build: {exc}") from exc
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        weight_of = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
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
        )

    def model_name(self, stored_name: str) -> str:
        """The model's name for a stored tensor: files of a bare backbone leave the prefix out."""
        longer = self.prefix + stored_name
        return longer if stored_name not in self.names and longer in self.names else stored_name


def _parameters(model: Any) -> dict[str, Parameter]:
    """Every weight of the model that has a role, by name."""
    head = model.get_output_embeddings()
    found: dict[str, Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(int(size) for size in parameter.shape)
            role = _role(module, name, shape, is_head=module is head) if parameter.is_floating_point() else None
            if role is not None and fits_role(role, shape):
                found[f"{module_name}.{name}" if module_name else name] = Parameter(shape, role)
    return found


def _role(module: Any, parameter_name: str, shape: tuple[int, ...], *, is_head: bool) -> Role | None:
    import torch
    from transformers.pytorch_utils import Conv1D

    if len(shape) == 1:
        return "vector"
    if parameter_name == "weight" and isinstance(module, torch.nn.Linear | Conv1D):
        return "head" if is_head else "linear"
    if parameter_name == "weight" and isinstance(module, torch.nn.Embedding):
        # A subclass that looks up other rows than it is asked for is not a product of rows with this weight; one that
        # only scales what it finds is, and peft knows how.
        plain = type(module).forward is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if plain else None
    # A convolution has three dimensions too; experts say how many they are.
    if len(shape) == 3 and shape[0] > 1 and getattr(module, "num_experts", None) == shape[0]:
        return "experts"
    return None
