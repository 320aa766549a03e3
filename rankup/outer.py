"""The outer step: what the sum of a round does to the weights and to the momentum beside them, row by row.

With W the master, M the momentum, D the round's sum (`rankup.exactsum.Sum.delta`), all float32, and fl(·) one rounding
to float32, to nearest even:

    m  = fl( fl(beta · M) + D )                the new momentum
    u  = fl( D + fl(beta · m) )                Nesterov's look ahead
    W' = fl( W + fl(lr · u) )                  the new master

This is Nesterov momentum as DiLoCo uses it (arXiv:2311.08105). With beta = 0 no momentum is kept and u = D. With lr = 1
the multiplication by lr is left out; it would change no bit.

What always holds:
- every operation is one IEEE 754 operation on one element, in this order and never fused with the next, so rows, tiles
  and machines cannot matter; beta and lr are dyadic, so float32 holds them exactly;
- a momentum that is not there is +0.0 everywhere, and so is the sum of no contribution where a momentum is kept. A new
  momentum is therefore -0.0 only where both beta·M and D are -0.0, and a master of -0.0 becomes +0.0 unless lr·u is
  -0.0 too;
- with beta = 0 and no sum the master keeps its bits, even -0.0.

It does not sum, hash or read; docs/numerics.md has the reasons ("The outer step").
"""

from __future__ import annotations

from typing import Final

import numpy as np

from rankup.bfloat16 import Float32Array
from rankup.errors import DeltaError, IntegrityError, SetupError
from rankup.recipe import OuterStep

_BLOCK: Final = 2**15
"""Numbers at once: the arrays of all operations stay in the processor's cache."""


def outer_step(
    master: Float32Array, delta: Float32Array | None, momentum: Float32Array | None, step: OuterStep
) -> tuple[Float32Array, Float32Array | None]:
    """The new master and the new momentum (None where `step` keeps none) of some rows.

    master, delta, momentum: float32 of one shape, C-contiguous, left as they are. `delta` None is the sum of nothing,
    `momentum` None a state that is not there yet. A momentum is ignored where `step` keeps none.

    Raises IntegrityError (the master or the momentum is not finite), DeltaError (a result leaves float32), SetupError
    (this process does not round as IEEE 754 says).
    """
    if delta is None and not step.keeps_state:
        return master, None
    _require_ieee_rounding()
    new_master = np.empty(master.shape, dtype=np.float32)
    new_momentum = np.empty(master.shape, dtype=np.float32) if step.keeps_state else None
    flat = [None if array is None else array.reshape(-1) for array in (delta, momentum, new_momentum)]
    old, new = master.reshape(-1), new_master.reshape(-1)
    for start in range(0, old.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        d, m, new_m = (None if array is None else array[block] for array in flat)
        _step(old[block], d, m, step, new[block], new_m)
    for name, before, after in (("momentum", momentum, new_momentum), ("master", master, new_master)):
        if after is not None and not np.isfinite(after).all():
            if before is not None and not np.isfinite(before).all():
                raise IntegrityError(f"the {name} holds a value that is not finite")
            raise DeltaError(
                f"the outer step takes the {name} out of the range of float32",
                remedy="Reject the contribution with the largest norm and fold again.",
            )
    return new_master, new_momentum


def _step(
    master: Float32Array,
    delta: Float32Array | None,
    momentum: Float32Array | None,
    step: OuterStep,
    new_master: Float32Array,
    new_momentum: Float32Array | None,
) -> None:
    """Fill `new_master` and `new_momentum`; what leaves float32 becomes infinite or NaN."""
    d = np.float32(0.0) if delta is None else delta
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        update = d
        if new_momentum is not None:
            beta = np.float32(step.momentum)
            if momentum is None:
                new_momentum[...] = 0.0
            else:
                np.multiply(beta, momentum, out=new_momentum)
            new_momentum += d
            update = np.multiply(beta, new_momentum)
            np.add(d, update, out=update)
        if step.learning_rate != 1:
            update = np.multiply(np.float32(step.learning_rate), update)
        np.add(master, update, out=new_master)


def _require_ieee_rounding() -> None:
    """Refuse flush-to-zero and directed rounding, which a library may have switched on for the whole thread.

    `Sum` looks at the sum's own operations; the products are only here, and a step without a sum is only here.
    """
    tiny, below, above = np.float32(2.0**-149), np.float32(2.0**-24), np.float32(1 + 2.0**-23)
    with np.errstate(under="ignore"):
        products = np.array([2.0**-126, tiny, 3 * tiny], dtype=np.float32) * np.float32(0.5)
        rounded = np.array([above, -above], dtype=np.float32) * np.float32(0.875)
        sums = np.array([1.0, -1.0, above, -above, tiny], dtype=np.float32)
        sums += np.array([below, -below, below, -below, tiny], dtype=np.float32)
    if (
        products.view(np.uint32).tolist() != [0x00400000, 0, 2]
        or rounded.view(np.uint32).tolist() != [0x3F600002, 0xBF600002]
        or sums.view(np.uint32).tolist() != [0x3F800000, 0xBF800000, 0x3F800002, 0xBF800002, 2]
    ):
        raise SetupError(
            "this process flushes subnormal numbers to zero or does not round to nearest even",
            remedy="Fold in a fresh process, without libraries built with -ffast-math or torch.set_flush_denormal.",
        )
