"""Credit: how many of a volunteer's tokens count, and when.

    shares(manifest)               worker -> tokens and credit of one published round
    taken_back(manifest, earlier)  worker -> credit that a revocation's version takes away again

The credit of a contribution is its tokens times the weight that it got over the weight that its tokens alone would have
got, at most 1. With tokens t_i, T = sum of all t, and the coefficient c_i over 2^d that is

    min(t_i,  t_i · (c_i / 2^d) / (t_i / T))  =  min(t_i,  c_i · T / 2^d)

A coefficient is less than one unit of 2^-d away from the weight that was meant (`aggregator.rules`), so one unit is
given to whoever has a coefficient: rounding takes nobody's credit.

What always holds:
- credit is a whole number of tokens, and a function of signed manifests alone: whoever has them finds the same;
- a contribution that was left out of the sum (coefficient 0) gets none, and nobody gets more than its tokens;
- what a rollback sets aside keeps its credit, as the work was published; what was revoked loses it.

Tokens are in escrow from acceptance until their round's version is published: that is `coordinator.people`. No I/O.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from rankup.records import Manifest, Revocation, Term


@dataclass(frozen=True)
class Share:
    """What one worker has in one published round."""

    tokens: int
    """That leave the escrow."""
    credit: int
    """What they are worth, at most `tokens`."""


def credit_of(term: Term, total_tokens: int, denominator_log2: int) -> int:
    """Credit of one contribution, in tokens; `total_tokens` are those of all terms of its manifest."""
    if term.coefficient == 0:
        return 0
    return min(term.tokens, ((term.coefficient + 1) * total_tokens) >> denominator_log2)


def shares(manifest: Manifest) -> dict[str, Share]:
    """Worker id -> its share of the round that made this version, sorted; empty where no round did."""
    total = sum(term.tokens for term in manifest.terms)
    tokens: defaultdict[str, int] = defaultdict(int)
    credit: defaultdict[str, int] = defaultdict(int)
    for term in manifest.terms:
        tokens[term.worker_id] += term.tokens
        credit[term.worker_id] += credit_of(term, total, manifest.denominator_log2)
    return {worker_id: Share(tokens[worker_id], credit[worker_id]) for worker_id in sorted(tokens)}


def credit_by_worker(manifest: Manifest) -> dict[str, int]:
    """Worker id -> credit that the round of this version gave."""
    return {worker_id: share.credit for worker_id, share in shares(manifest).items()}


def taken_back(manifest: Manifest, earlier: Iterable[Manifest]) -> dict[str, int]:
    """Worker id -> credit, as a positive number, that this version takes back; empty where it revokes nothing.

    `earlier` are the versions before it, newest first; they are read until every revoked contribution was found.
    """
    if not isinstance(manifest.change, Revocation):
        return {}
    sought = set(manifest.change.contributions)
    found: defaultdict[str, int] = defaultdict(int)
    for one in earlier:
        total = sum(term.tokens for term in one.terms)
        for term in one.terms:
            # A contribution may have been left out of one round and stand in another: the one that gave credit counts.
            if term.contribution in sought and term.coefficient:
                found[term.worker_id] += credit_of(term, total, one.denominator_log2)
                sought.discard(term.contribution)
        if not sought:
            break
    return dict(sorted(found.items()))
