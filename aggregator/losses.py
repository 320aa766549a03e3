"""Held-out loss of base + delta for many deltas, from one loaded base and without merging any of them.

    heldout_losses(folder, rows, deltas, names, *, max_tokens, max_rows, ...) -> (loss of the base, one loss a delta)

How a delta B·A is added, by the module that holds the weight (factors are in the orientation of the stored weight):

    Linear, W (out, in)        y + (x A') B'        forward hook
    Conv1D, W (in, out)        y + (x B) A          forward hook
    Embedding, W (rows, dim)   y + B[ids] A         forward hook
    anything else              W + B A, in place    vectors (biases, norms), stacked experts (E, d1, d2), subclasses

What always holds:
- rows are scored as `aggregator.evaluate` does, and with the same rows the base's loss is the same number; weights and
  arithmetic are float32 on the CPU;
- a weight that two modules share (an embedding tied to the head) changes in both;
- after each delta the model is the base again, bit for bit: hooks are removed, and what was changed in place is put
  back from a copy. Memory is the base, one delta's factors, and copies of the weights that are changed in place.

It does not decide which loss is good enough: `aggregator.screening` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.evaluate import limited_threads, load_model, load_tokenizer, log_probs_of, padding_of
from aggregator.heldout import read_heldout
from aggregator.lowrank import Source
from rankup.errors import InputError
from rankup.fixedpoint import Factors


@dataclass
class _Place:
    """A weight of the model and the modules that hold it, each with the weight's name there."""

    weight: Any
    holders: list[tuple[Any, str]] = field(default_factory=list)


def heldout_losses(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    deltas: Iterable[Source],
    names: Sequence[str],
    *,
    max_tokens: int,
    max_rows: int,
    assistant_only: bool = False,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[float, list[float]]:
    """Losses, in the unit of `aggregator.heldout`, of the model in `folder`, and of it with each delta alone.

    Args:
        deltas: each is asked for the factors of every name in `names`; none for a weight that it does not change.
            Taken one by one, so a delta may be read when its turn comes.
        names: the weights, as the model's state dict names them.
        max_tokens: longer rows are cut; a row whose prompt fills them all is left out.
        max_rows: only so many rows, the first ones, are looked at.
        assistant_only: of `messages`, score the assistant's words alone.
        threads: of the arithmetic; None leaves torch's setting.
        progress: called with (0, the base's loss), then with (i, loss) after the i-th delta, from 1.

    A delta that drives the model to NaN has a loss that is not finite, which is an answer and no error.

    Raises InputError: the rows cannot be scored, the folder holds no usable model, a name is no weight of it, or
    factors do not have the shape of their weight; and what a delta raises when it is read.
    """
    import torch

    if max_tokens < 2 or max_rows < 1 or batch_size < 1:
        raise InputError(f"cannot score {max_rows} rows of {max_tokens} tokens in batches of {batch_size}")
    tokenizer = load_tokenizer(folder, rows)
    heldout = read_heldout(tokenizer, rows, max_tokens=max_tokens, max_rows=max_rows, assistant_only=assistant_only)
    with limited_threads(threads), torch.inference_mode():
        model = load_model(folder)
        places = weight_places(model)
        pad = padding_of(tokenizer)

        def measure(number: int) -> float:
            loss = float(heldout.loss(log_probs_of(model, heldout, batch_size, pad)))
            if progress is not None:
                progress(number, loss)
            return loss

        base, losses = measure(0), []
        for number, delta in enumerate(deltas, start=1):
            with added(places, delta, names):
                losses.append(measure(number))
    return base, losses


# -- base + delta ------------------------------------------------------------------------------------------------------


def weight_places(model: Any) -> dict[str, _Place]:
    """Every name of a weight -> the weight and all modules that hold it; names of one shared weight share a place."""
    by_identity: dict[int, _Place] = {}
    result: dict[str, _Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            place = by_identity.setdefault(id(weight), _Place(weight))
            if not any(holder is module and name == local for holder, name in place.holders):
                place.holders.append((module, local))
            result[f"{prefix}.{local}" if prefix else local] = place
    return result


@contextmanager
def added(places: Mapping[str, _Place], delta: Source, names: Sequence[str]) -> Iterator[None]:
    """While this context lasts, the model behind `places` computes with base + delta. Use it in inference mode."""
    with ExitStack() as stack:
        for name in names:
            factors = delta(name)
            if not factors:
                continue
            place = places.get(name)
            if place is None:
                raise InputError(f"the base has no weight {name}")
            require_shape(name, factors, tuple(place.weight.shape))
            hooks = [_hook(module, local, factors) for module, local in place.holders]
            if len(factors) == 1 and all(hook is not None for hook in hooks):
                for (module, _), hook in zip(place.holders, hooks, strict=True):
                    handle = module.register_forward_hook(hook)
                    stack.callback(handle.remove)
            else:
                stack.enter_context(_changed_in_place(place.weight, factors))
        yield


def require_shape(name: str, factors: Sequence[Factors], shape: tuple[int, ...]) -> None:
    """Raise InputError unless these products change a weight of `shape`."""
    found = {(factor.d_out, factor.d_in) for factor in factors}
    wanted = {1: (shape[0], 1), 2: shape, 3: shape[1:]}.get(len(shape))
    if found != {wanted} or len(factors) != (shape[0] if len(shape) == 3 else 1):
        raise InputError(f"{name}: {len(factors)} products of shapes {sorted(found)} do not change a weight of {shape}")


def _hook(module: Any, local: str, factors: Sequence[Factors]) -> Callable[..., Any] | None:
    """The forward hook that adds B·A to what `module` computes; None where only the weight itself can be changed."""
    import torch
    from transformers.pytorch_utils import Conv1D

    # A subclass may compute something else with its weight, such as an embedding that scales its rows.
    if local != "weight" or type(module) not in (torch.nn.Linear, Conv1D, torch.nn.Embedding):
        return None
    b, a = (torch.from_numpy(part) for part in balanced(factors[0]))
    if type(module) is torch.nn.Linear:
        return lambda _, inputs, output: output + (inputs[0] @ a.T) @ b.T
    if type(module) is Conv1D:
        return lambda _, inputs, output: output + (inputs[0] @ b) @ a
    return lambda _, inputs, output: output + b[inputs[0]] @ a


@contextmanager
def _changed_in_place(weight: Any, factors: Sequence[Factors]) -> Iterator[None]:
    import torch

    before = weight.detach().clone()
    slices = weight.detach().view(len(factors), factors[0].d_out, factors[0].d_in)
    try:
        for part, factor in zip(slices, factors, strict=True):
            b, a = (torch.from_numpy(half) for half in balanced(factor))
            part.addmm_(b, a)
        yield
    finally:
        weight.detach().copy_(before)


def balanced(factors: Factors) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B (d_out, r), A (r, d_in) in float32 with the product of `factors`, each component's power of two shared equally:
    a tiny factor beside a huge one would leave float32's range alone, although their product does not."""
    total = factors.b_exp.astype(np.int32) + factors.a_exp.astype(np.int32)
    half = total // 2
    b = np.ldexp(factors.b.astype(np.float32), half[None, :])
    a = np.ldexp(factors.a.astype(np.float32), (total - half)[:, None])
    return b, a
