"""Audits: the shards of a contribution are trained once more, and the two deltas are compared by angle, not by bits.

    chosen(secret, contribution, consecutive_valid) -> whether this contribution is audited
    agreement(left, right, names) -> cosine of two whole deltas
    judge(cosine, limit) -> Check "audit"

How often is BOINC's adaptive replication (Anderson, "BOINC: A Platform for Volunteer Computing", J. Grid Computing 18,
2020): a worker with n accepted contributions since its last failed audit is audited with probability 1 / n, and always
the first two times. One that begins to cheat is caught within k more with probability k / (n - 1 + k); one that stays
honest for n contributions costs about ln(n) retrainings in all.

What always holds:
- whether a contribution is audited depends on the secret, its digest and n alone: a retry decides the same, and nobody
  without the secret can tell before;
- the verdict depends on the products alone, so another rank, or other factors with the same product, agree.

It does not train the shards again, and does not remember workers: callers do.

The limit lies between what rounding does and what skipped work does. Cosine of a delta (25 steps of 4 rows of
docstrings, rank 8) with another, on one x86-64 CPU, in float32 where nothing else is said:

    the other one                          aggregator.tiny     SmolLM2-135M
    again, or on two threads               1 (same bits)       1 (same bits)
    in bfloat16                            0.99992             0.9971
    half of the steps                      0.932               0.932
    the same seed, another shard           0.835               0.629
    another seed, the same shard           0.391
    another seed, another shard            0.368               0.066

Beside a base in 4 bits (nf4) another delta is right: at cosine 0.65 to that of the full base with SmolLM2-135M (12
steps, rank 8, 2e-4), 0.70 with a random Llama of 60 thousand weights. Trained in nf4 again it agrees as above: 0.9998
between products in float32 and in bfloat16 (the random Llama). So whoever trains again does it in the precision that
the statement names.

To repeat it, write `worker.job.Job` files that differ in `threads`, `recipe.steps`, `shard_files` or `seed`, run
`python -m worker.trainer JOB.json` on each and give pairs to `agreement`. A GPU trains in bfloat16 by itself. The
learning rates were 5e-3 and 5e-4. Longer runs may drift further: measure before you audit rounds of many more steps. A
delta that was only made longer has the same angle: that is what the clip is for.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from aggregator.lowrank import Source, cosines, gram_of
from rankup.errors import InputError
from rankup.records import Check

MIN_AGREEMENT: Final = 0.98
"""Least cosine of a contribution and its repetition: 11 degrees apart."""


def probability(consecutive_valid: int) -> float:
    """1 / max(1, n) for a worker with n valid results in a row."""
    return 1 / max(1, consecutive_valid)


def chosen(secret: bytes, contribution: str, consecutive_valid: int) -> bool:
    """Whether to audit the contribution with this digest: true with `probability(consecutive_valid)`.

    HMAC-SHA256 of the digest under `secret` is a number below 2^256, which nobody else can tell from a random one; the
    contribution is chosen when n times that number is below 2^256. Raises InputError for an empty secret.
    """
    if not secret:
        raise InputError("audits that are chosen without a secret can be foreseen")
    mac = hmac.new(secret, b"rankup.audit/1:" + contribution.encode(), hashlib.sha256).digest()
    return int.from_bytes(mac) * max(1, consecutive_valid) < 1 << 256


def agreement(left: Source, right: Source, names: Sequence[str]) -> float:
    """Cosine of two whole deltas over the weights `names`, -1 ... 1; 0 where one of them is zero.

    Raises InputError when a weight has different shapes in the two.
    """
    return float(cosines(gram_of([left, right], names))[0, 1])


def judge(cosine: float, limit: float = MIN_AGREEMENT) -> Check:
    """The check "audit": passed where the repetition agrees to `limit` at least."""
    passed = cosine >= limit
    detail = "" if passed else f"training the shards again gives a delta at cosine {cosine:.4f}; {limit} is the least"
    return Check(name="audit", passed=passed, value=cosine, detail=detail)
