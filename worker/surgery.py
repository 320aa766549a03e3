"""The surgery on a base model: every target of a job gets something to train, and gives it back as fixed-point factors.

Factors of a target are those of its stored weight, `weight += B @ A`, whatever the layer does with it:

    role        what is trained                       starts at zero          B            A
    linear      peft's lora_A (r, in), lora_B         lora_B                  s·lora_B     lora_A
                a Conv1D stores (in, out)             lora_B                  s·lora_Aᵀ    lora_Bᵀ
    embedding   peft's lora_embedding_A (r, V), _B    lora_embedding_A        s·lora_eA_ᵀ  lora_eB_ᵀ
    head        B (V, r) and A (r, d) of its own      B                       s·B          A
    experts     peft's pair of each expert            lora_B                  as linear, one pair a slice
    vector      the parameter itself, in float32      the difference          trained - base, (n, 1)      ((1))

with s = alpha / r (arXiv:2106.09685), or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732), r being the target's own rank.

What always holds:
- the factor that does not start at zero comes from the job's seed and the target's name alone (numpy's Philox), the
  same on every device and for every version of torch;
- the job's targets are trained, each with its rank, and nothing else is;
- base plus B·A is the model that was trained, also where the output head shares the embedding's weight.

torch and its libraries are handed in, so the agent can import this room without them.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import InputError
from rankup.fixedpoint import Factors, quantise
from rankup.recipe import Recipe
from rankup.targets import Target
from worker.job import Job

_ADAPTER = "default"

Pair: TypeAlias = tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.floating[Any]]]
"""B (d_out, r) with the scaling inside, and A (r, d_in)."""


@dataclass(frozen=True)
class Adapted:
    """A model in which exactly the job's targets are trained."""

    model: Any
    """peft's wrapper, or the base itself where no target needs one."""
    base: Any
    trained: Mapping[str, Callable[[], Iterator[Pair]]]
    """Target -> its factors as they are now, one pair a slice; A may be the model's own memory."""

    def factors(self, bits: Literal[8, 16]) -> dict[str, list[Factors]]:
        """What was trained, in fixed point, one for each slice. Raises DeltaError where a value is not finite."""
        return {name: [quantise(b, a, bits=bits) for b, a in pairs()] for name, pairs in sorted(self.trained.items())}


def initial_a(seed: int, name: str, rank: int, d_in: int) -> npt.NDArray[np.float32]:
    """The factor of target `name` that does not start at zero: (rank, d_in) float32, uniform in ±1/sqrt(d_in).

    That is Kaiming-uniform with a = sqrt(5), the LoRA default (arXiv:2106.09685, as in peft), drawn from Philox keyed
    by sha256 of seed and name: no weight's values depend on another's or on any library's global state.
    """
    key = hashlib.sha256(f"rankup.lora_A/1:{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    bound = 1.0 / math.sqrt(d_in)
    return ((generator.random((rank, d_in)) * 2.0 - 1.0) * bound).astype(np.float32)


def scaling_of(recipe: Recipe, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    return recipe.alpha / (math.sqrt(rank) if recipe.rslora else rank)


def adapt(torch: Any, transformers: Any, peft: Any, base: Any, job: Job) -> Adapted:
    """Make exactly the job's targets of `base` trainable, in float32, starting at the base's own function.

    Raises InputError: a target is not in the base, or has another role, shape or name there.
    """
    located = {name: _locate(torch, transformers, base, name, target) for name, target in job.targets.items()}
    # Objects are kept, since peft moves parameters to other names.
    parameters = {name: getattr(module, attribute) for name, (module, attribute) in located.items()}
    by_role: dict[str, list[str]] = defaultdict(list)
    for name, target in sorted(job.targets.items()):
        by_role[target.role].append(name)
    model = _add_pairs(peft, base, job, by_role, located)
    pairs = _pairs(base)
    trained: dict[str, Callable[[], Iterator[Pair]]] = {}
    for name, layer in pairs.items():
        trained[name] = _start(torch, transformers, layer, job, name)
    for name in by_role["embedding"]:
        _follow_tied_head(torch, base, located[name][0], pairs[name])
    for name in by_role["head"]:
        trained[name] = _adapt_head(torch, located[name][0], job, name)
    for name in by_role["vector"]:
        trained[name] = _free_vector(torch, parameters[name])
    return Adapted(model=model, base=base, trained=trained)


# -- what is there -----------------------------------------------------------------------------------------------------


def _locate(torch: Any, transformers: Any, base: Any, name: str, target: Target) -> tuple[Any, str]:
    """The module of a target and the name of its parameter there."""
    module_name, _, attribute = name.rpartition(".")
    try:
        module = base.get_submodule(module_name)
        parameter = module.get_parameter(attribute)
    except AttributeError as exc:
        raise InputError(f"the base has no weight {name}") from exc
    linear = isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
    is_head = module is base.get_output_embeddings()
    fits = {
        "linear": attribute == "weight" and linear and not is_head,
        "head": attribute == "weight" and isinstance(module, torch.nn.Linear) and is_head,
        "embedding": attribute == "weight" and isinstance(module, torch.nn.Embedding),
        "vector": True,
        "experts": target.slices > 1,
    }[target.role]
    if not fits:
        raise InputError(f"{name} is no weight of the role {target.role!r} in the base, which the round says it has")
    if _stored_shape(transformers, module, parameter) != target.shape:
        raise InputError(f"{name} is {tuple(parameter.shape)}, the round says {target.shape}")
    return module, attribute


def _stored_shape(transformers: Any, module: Any, parameter: Any) -> tuple[int, ...]:
    """Shape of the weight in the base's file; what bitsandbytes packs lies there as (n, 1), a Conv1D's turned round."""
    packed = getattr(parameter, "quant_state", None)
    if packed is None:
        return tuple(parameter.shape)
    shape = tuple(packed.shape)
    return shape[::-1] if _was_conv1d(transformers, module) else shape


def _was_conv1d(transformers: Any, module: Any) -> bool:
    """Whether a layer in 4 bits stands for one that stores (in, out)."""
    return getattr(module, "source_cls", None) is transformers.pytorch_utils.Conv1D


def _pairs(base: Any) -> dict[str, Any]:
    """Target -> its peft layer. Layers of several parameters of one module are nested in each other."""
    found = {}
    for name, module in base.named_modules():
        if hasattr(module, "lora_embedding_A"):
            own = name.split(".base_layer")[0]
            found[f"{own}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


# -- peft's layers -----------------------------------------------------------------------------------------------------


def _add_pairs(
    peft: Any,
    base: Any,
    job: Job,
    by_role: Mapping[str, list[str]],
    located: Mapping[str, tuple[Any, str]],
) -> Any:
    """The base with a pair for each target that peft can adapt; everything else in it is frozen."""
    base.requires_grad_(False)
    wanted = sorted([*by_role["linear"], *by_role["embedding"], *by_role["experts"]])
    if not wanted:
        return base
    modules = [name.removesuffix(".weight") for name in by_role["linear"] + by_role["embedding"]]
    keys = {name: name if job.targets[name].role == "experts" else name.removesuffix(".weight") for name in wanted}
    by_rank: dict[int, list[str]] = defaultdict(list)
    for name in wanted:
        by_rank[job.targets[name].rank].append(keys[name])
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=job.recipe.rank,
        rank_pattern={f"(?<!.)({_one_of(names)})": rank for rank, names in sorted(by_rank.items())},
        lora_alpha=job.recipe.alpha,
        use_rslora=job.recipe.rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=_one_of(modules) if modules else [],
        target_parameters=by_role["experts"] or None,
        fan_in_fan_out=any(not hasattr(located[name][0], "in_features") for name in by_role["linear"]),
    )
    with _names_as_they_are(base.config), warnings.catch_warnings():
        # It does not look for rank patterns among parameters, and warns of Conv1D layers; what it did is checked below.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    found = {name: layer.r[_ADAPTER] for name, layer in _pairs(base).items()}
    odd = sorted(found.items() ^ {(name, job.targets[name].rank) for name in wanted})
    if odd:
        raise InputError(f"peft adapts {odd[0][0]} otherwise than the round says, and {len(odd) - 1} more")
    return model


def _one_of(names: list[str]) -> str:
    """A pattern for these names. peft takes a list of names for the ends of names."""
    return "|".join(re.escape(name) for name in names)


@contextmanager
def _names_as_they_are(config: Any) -> Iterator[None]:
    """Keep peft from translating names for model types whose experts once were layers apart.

    It would cut our names to their last parts, and take the gate_proj of a dense layer for that of the experts. It
    does so by the type that the config states.
    """
    model_type = config.model_type
    config.model_type = "rankup"
    try:
        yield
    finally:
        config.model_type = model_type


def _start(torch: Any, transformers: Any, layer: Any, job: Job, name: str) -> Callable[[], Iterator[Pair]]:
    """Set a fresh pair to its first values; gives the function that reads it."""
    target = job.targets[name]
    scaling = scaling_of(job.recipe, target.rank)
    if target.role == "embedding":
        a, b = layer.lora_embedding_B[_ADAPTER], layer.lora_embedding_A[_ADAPTER]
        _fill(torch, a, initial_a(job.seed, name, target.rank, target.d_in).T)
        _fill(torch, b, None)
        return lambda: iter([_pair(b.T, a.T, scaling)])
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    _fill(torch, a, initial_a(job.seed, name, *a.shape))
    _fill(torch, b, None)
    if target.role == "experts":
        return lambda: _expert_pairs(layer, target.slices, scaling)
    if layer.fan_in_fan_out or _was_conv1d(transformers, layer.get_base_layer()):
        return lambda: iter([_pair(a.T, b.T, scaling)])
    return lambda: iter([_pair(b, a, scaling)])


def _expert_pairs(layer: Any, slices: int, scaling: float) -> Iterator[Pair]:
    """The pairs of all experts lie in one pair of peft: A expert after expert, B component after component."""
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    a = a.reshape(slices, -1, a.shape[-1])  # (slices, r, in)
    b = b.reshape(b.shape[0], -1, slices)  # (out, r, slices)
    stored_as_out_in = layer._did_swap_in_out_features
    for index in range(slices):
        if stored_as_out_in:
            yield _pair(b[:, :, index], a[index], scaling)
        else:
            yield _pair(a[index].T, b[:, :, index].T, scaling)


def _fill(torch: Any, parameter: Any, values: npt.NDArray[np.float32] | None) -> None:
    with torch.no_grad():
        if values is None:
            parameter.zero_()
        else:
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _array(tensor: Any) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


def _pair(b: Any, a: Any, scaling: float) -> Pair:
    return _array(b).astype(np.float64) * scaling, _array(a)


# -- what peft does not do ---------------------------------------------------------------------------------------------


def _add_product(torch: Any, module: Any, product: Callable[[Any], Any], parameters: Mapping[str, Any]) -> None:
    """Let `module.weight` be its frozen weight plus `product(owner)`, where `owner` has these parameters.

    For output heads: the trainer multiplies with `head.weight` itself, in tiles, so a layer around it would be ignored.
    """

    class Plus(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, parameter in parameters.items():
                self.register_parameter(name, parameter)

        def forward(self, weight: Any) -> Any:
            return weight + product(self).to(weight.dtype)

    torch.nn.utils.parametrize.register_parametrization(module, "weight", Plus())


def _adapt_head(torch: Any, head: Any, job: Job, name: str) -> Callable[[], Iterator[Pair]]:
    target = job.targets[name]
    scaling = scaling_of(job.recipe, target.rank)
    start = initial_a(job.seed, name, target.rank, target.d_in)
    device = head.weight.device
    a = torch.nn.Parameter(torch.from_numpy(start).to(device))
    b = torch.nn.Parameter(torch.zeros((target.d_out, target.rank), device=device))
    _add_product(torch, head, lambda owner: scaling * (owner.lora_B @ owner.lora_A), {"lora_A": a, "lora_B": b})
    return lambda: iter([_pair(b, a, scaling)])


def _follow_tied_head(torch: Any, base: Any, embedding: Any, layer: Any) -> None:
    """Where the head multiplies with the weight of this embedding, let it do so with the trained one."""
    head = base.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return

    def product(_: Any) -> Any:
        a, b = layer.lora_embedding_A[_ADAPTER], layer.lora_embedding_B[_ADAPTER]  # (r, V) and (d, r)
        return layer.scaling[_ADAPTER] * (b @ a).T

    _add_product(torch, head, product, {})


def _free_vector(torch: Any, parameter: Any) -> Callable[[], Iterator[Pair]]:
    before = _array(parameter).copy()
    parameter.data = parameter.data.to(torch.float32)
    parameter.requires_grad_(True)

    def read() -> Iterator[Pair]:
        yield (_array(parameter).astype(np.float64) - before)[:, None], np.ones((1, 1), dtype=np.float32)

    return read
