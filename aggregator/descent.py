"""How the held-out loss changes along each delta at first: one backward pass for a whole cohort.

    heldout_descents(folder, rows, deltas, names, *, max_tokens, max_rows, ...) -> one number a delta

With L the held-out loss of the base W and G its gradient, the loss of W + s·B·A is L + s·<G, B·A> + O(s^2). The descent
of a delta is -<G, B·A>: positive where a small step along it makes the model better. A delta with flipped signs has a
negative one, a random one about none. The loss of the whole step (`aggregator.losses`) tells less of these two: it also
has the volunteer's overfitting to its own shard in it, which bends the loss upwards further out. It cannot be left out
either: harm that only begins further out has no slope.

What always holds: rows are scored as `aggregator.evaluate` does, in float32 on the CPU; the weights are not changed.
Where the loss is no weighted sum of log-probabilities, a pass before gives the weights that it has here. Memory is the
model, one gradient for each weight of `names`, and one delta's factors.

It does not decide which descent is enough: `aggregator.screening` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.evaluate import (
    batch_log_probs,
    in_batches,
    limited_threads,
    load_model,
    load_tokenizer,
    padding_of,
    weights_of,
)
from aggregator.heldout import read_heldout
from aggregator.losses import balanced, require_shape, weight_places
from aggregator.lowrank import Source
from rankup.errors import InputError


def heldout_descents(
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
) -> list[float]:
    """-<gradient of the held-out loss, B·A> of each delta, in the unit of `aggregator.heldout`.

    Args:
        deltas, names: as `aggregator.losses.heldout_losses` takes them.
        max_rows: only so many rows, the first ones, are looked at.
        assistant_only: of `messages`, score the assistant's words alone.

    Raises InputError: the rows cannot be scored, the folder holds no usable model, a name is no weight of it, or
    factors do not have the shape of their weight; and what a delta raises when it is read.
    """
    tokenizer = load_tokenizer(folder, rows)
    heldout = read_heldout(tokenizer, rows, max_tokens=max_tokens, max_rows=max_rows, assistant_only=assistant_only)
    pad = padding_of(tokenizer)
    with limited_threads(threads):
        model = load_model(folder)
        places = weight_places(model)
        unknown = sorted(set(names) - places.keys())
        if unknown:
            raise InputError(f"the base has no weight {unknown[0]}")
        model.requires_grad_(False)
        for name in names:
            places[name].weight.requires_grad_(True)
        weights = iter(weights_of(model, heldout, batch_size, pad))
        for batch in in_batches(heldout.examples, batch_size, int(model.config.get_text_config().vocab_size)):
            log_probs = batch_log_probs(model, batch, pad)
            sum(log_prob * next(weights) for log_prob in log_probs).backward()
        gradients = {name: places[name].weight.grad for name in names}
        return [_descent(gradients, delta) for delta in deltas]


def _descent(gradients: Mapping[str, Any], delta: Source) -> float:
    parts: list[float] = []
    for name, gradient in gradients.items():
        factors = delta(name)
        if not factors or gradient is None:  # a weight that no scored token reaches has no gradient
            continue
        require_shape(name, factors, tuple(gradient.shape))
        slices = gradient.numpy().reshape(len(factors), factors[0].d_out, factors[0].d_in)
        for part, factor in zip(slices, factors, strict=True):
            b, a = balanced(factor)
            # <G, B A> = sum over components k of b_k' G a_k
            parts.append(-float(np.sum((b.T @ part) * a, dtype=np.float64)))
    return math.fsum(parts)
