"""Admission: what is checked before a contribution counts, cheapest first, each check small and named.

What always holds:
- nothing of a file is parsed before its size and its sha256 are what the worker signed;
- the first check that fails decides; the receipt keeps every check made so far, with what it measured;
- a verdict depends on the delta, the round's record and the submission alone, so it can be repeated by anyone;
- a bad delta never raises: the receipt says so in plain words. Only trouble on our side (disk, store) raises.

It does not know leases and fences (the ledger does), does not move bytes (`aggregator.intake` does) and does not
compare a contribution with its cohort: clipping happens when the round folds.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aggregator.lowrank import product_norm
from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.errors import BusyError, DeltaError, InputError, IntegrityError, TooLargeError
from rankup.records import Check, Receipt, RoundRecord, Submission
from rankup.signing import verify, worker_id_of
from rankup.targets import targets_at_tier

MAX_NORM = 1e9
"""A delta with a larger Frobenius norm comes from a diverged run; below it no sum of a round leaves float32."""

MAX_CANCELLATION = 2.0**10
"""How far the bound of a product's entries, sum over k of max|b_k| max|a_k|, may exceed the product's norm. Components
that are orthogonal stay below sqrt(rank); ones that cancel each other hide a coarse grid for everybody's sum behind a
small norm (docs/numerics.md)."""


@dataclass(frozen=True)
class Case:
    """Everything that a check may look at."""

    path: Path
    """The delta's bytes on local disk."""
    record: RoundRecord
    submission: Submission
    max_delta_bytes: int
    seen: Callable[[str], bool]
    """Whether the digest was accepted before, under another lease."""

    @cached_property
    def products(self) -> tuple[tuple[str, float, float], ...]:
        """Of every tensor: its name, the bound of its product's entries, and its product's norm; measured once."""
        with DeltaReader.open(self.path) as reader:
            parts = (
                (name if reader.slices(name) == 1 else f"{name}[{part}]", reader.factors(name, part))
                for name in reader.names
                for part in range(reader.slices(name))
            )
            return tuple((name, factors.entry_bound, product_norm(factors)) for name, factors in parts)


@dataclass(frozen=True)
class Finding:
    """What a check measured, and why it fails; an empty `reason` passes. `detail` explains a pass, if need be."""

    reason: str = ""
    value: float | None = None


@dataclass(frozen=True)
class NamedCheck:
    name: str
    look: Callable[[Case], Finding]


def _size(case: Case) -> Finding:
    size, stated = case.path.stat().st_size, case.submission.statement.size_bytes
    if size > case.max_delta_bytes:
        return Finding(f"the delta has {size} bytes; the limit is {case.max_delta_bytes}", size)
    if size != stated:
        return Finding(f"the delta has {size} bytes, but {stated} were signed for", size)
    return Finding(value=size)


def _round(case: Case) -> Finding:
    """Its round is this one, or an earlier one whose late deltas this one takes: that one's record knows its shards."""
    submission, statement, record = case.submission, case.submission.statement, case.record
    if statement.round_id != record.round_id and statement.round_id not in record.earlier_rounds:
        return Finding(f"the delta was made for round {statement.round_id}, not for {record.round_id}")
    staleness = record.staleness(statement.base_manifest)
    if staleness is None:
        return Finding(f"the delta was trained on version {statement.base_manifest[:12]}…, not on a base of the round")
    last = submission.shard + submission.shards - 1
    if statement.round_id == record.round_id and last >= len(record.shards):
        return Finding(f"shard {last} is not one of the round's {len(record.shards)} shards")
    return Finding(value=staleness)


def _work(case: Case) -> Finding:
    """Tokens are the weight of a contribution, so nobody may claim more than the recipe can process in their shards."""
    statement, recipe = case.submission.statement, case.record.request.recipe
    if statement.precision == "nf4" and recipe.four_bit == "never":
        return Finding("it was trained beside a base in 4 bits, which the recipe does not take")
    steps = recipe.steps * case.submission.shards
    if statement.steps > steps:
        return Finding(f"{statement.steps} steps are stated; the recipe has {steps}", statement.steps)
    limit = steps * recipe.batch_size * recipe.max_tokens
    if statement.tokens > limit:
        return Finding(f"{statement.tokens} tokens are stated; the recipe allows {limit}", statement.tokens)
    return Finding(value=statement.tokens)


def _signature(case: Case) -> Finding:
    submission = case.submission
    try:
        owner = worker_id_of(submission.public_key)
        verify(submission.public_key, "submit", submission.statement, submission.signature)
    except (IntegrityError, InputError) as exc:
        return Finding(f"the signature is not good: {exc.cause}")
    if owner != submission.worker_id:
        return Finding(f"the key belongs to worker {owner}, not to {submission.worker_id}")
    return Finding()


def _duplicate(case: Case) -> Finding:
    digest = case.submission.statement.sha256
    return Finding(f"the same delta {digest[:12]}… was accepted before") if case.seen(digest) else Finding()


def _digest(case: Case) -> Finding:
    with case.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != case.submission.statement.sha256:
        return Finding(f"the bytes have the sha256 {digest[:12]}…, not the one that was signed")
    return Finding()


def _structure(case: Case) -> Finding:
    """Header, names, shapes, ranks, exponents, stored maxima: all of `rankup.delta`'s rules. Ranks are at most those of
    the volunteer's tier; lower ones are welcome as in any round."""
    statement, record = case.submission.statement, case.record
    recipe = record.request.recipe
    targets = targets_at_tier(record.targets, recipe, case.submission.rank)
    expected = DeltaHeader(
        model=record.request.model,
        round_id=statement.round_id,
        lease_id=statement.lease_id,
        base_manifest=statement.base_manifest,
    )
    try:
        with DeltaReader.open(case.path) as reader:
            check_structure(
                reader,
                targets=targets,
                header=expected,
                partial=recipe.partial,
                mantissa_bits=recipe.mantissa_bits,
            )
            return Finding(value=len(reader.names))
    except (DeltaError, TooLargeError) as exc:
        return Finding(f"the delta is malformed: {exc.cause}")


def _norm(case: Case) -> Finding:
    norm = math.hypot(*(norm for _, _, norm in case.products))
    if not math.isfinite(norm):
        return Finding("the delta's norm is not finite")
    if norm == 0:
        return Finding("the delta changes nothing: its norm is zero", norm)
    if norm > MAX_NORM:
        return Finding(f"the delta's norm is {norm:.3g}, above {MAX_NORM:.0e}: the training diverged", norm)
    return Finding(value=norm)


def _cancellation(case: Case) -> Finding:
    worst = 0.0
    for name, bound, norm in case.products:
        if bound > MAX_CANCELLATION * norm:
            return Finding(f"the components of {name} cancel each other: their bound is {bound:.3g}, not {norm:.3g}")
        worst = max(worst, bound / norm if norm else 0.0)
    return Finding(value=worst)


CHECKS: Sequence[NamedCheck] = (
    NamedCheck("size", _size),
    NamedCheck("round", _round),
    NamedCheck("work", _work),
    NamedCheck("signature", _signature),
    NamedCheck("duplicate", _duplicate),
    NamedCheck("digest", _digest),
    NamedCheck("structure", _structure),
    NamedCheck("norm", _norm),
    NamedCheck("cancellation", _cancellation),
)
"""In this order; only the last two do arithmetic on the factors."""


def judge(
    path: Path,
    record: RoundRecord,
    submission: Submission,
    *,
    max_delta_bytes: int,
    seen: Callable[[str], bool],
    now: float,
) -> Receipt:
    """The verdict on the delta at `path`, handed in by `submission` for the round of `record`.

    `seen(digest)` says whether these bytes were accepted before, under another lease; `now` is Unix seconds.
    Raises RetryableError when the file cannot be read; a delta's own faults never raise.
    """
    case = Case(path, record, submission, max_delta_bytes, seen)
    checks: list[Check] = []
    for check in CHECKS:
        try:
            finding = check.look(case)
        except OSError as exc:
            raise BusyError(f"cannot read the delta to judge: {errno.errorcode.get(exc.errno or 0, exc)}") from exc
        reason = finding.reason[:4096]
        checks.append(Check(name=check.name, passed=not reason, value=finding.value, detail=reason))
        if reason:
            return refuse(submission, reason, now, checks)
    return Receipt(
        submission=submission,
        accepted=True,
        reason="accepted",
        checks=tuple(checks),
        norm=next(check.value or 0.0 for check in checks if check.name == "norm"),
        judged_at=now,
    )


def refuse(submission: Submission, reason: str, now: float, checks: Sequence[Check] = ()) -> Receipt:
    """A receipt that says no, in words that its volunteer can act on."""
    return Receipt(submission=submission, accepted=False, reason=reason, checks=tuple(checks), judged_at=now)
