"""The cohort: a round's accepted contributions judged beside each other, and the weight that each gets.

    accepted_receipts     who is in it
    buckets               large cohorts are weighed in parts, so the work stays linear in their number
    bucket_gram           one Gram matrix, from ranges of the deltas' blobs
    decide                screening, the recipe's rule, staleness, integer coefficients
    settle                the decision that counts: the first one written; what was found goes into the receipts too
    terms_of              the sum that follows

What always holds:
- a decision is written once; whoever decides again after a crash gets the first one, floats and all;
- a contribution that a check leaves out gets the coefficient 0 and stays named, with the reason in its receipt;
- the members of a part share its weight by the rule. Parts count by their tokens under "mean_by_tokens", else by their
  members, so a cohort of one part is weighed exactly as the rule says.

It does not measure losses (`aggregator.losses`) and does not fold. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from aggregator.groups import ReadAhead, plan_groups
from aggregator.lowrank import Source, gram_of
from aggregator.rules import integer_coefficients
from aggregator.screening import Candidate, Verdict, screen, screened_weights
from rankup.delta import DeltaReader
from rankup.errors import ConflictError, InputError, IntegrityError, StateError
from rankup.fixedpoint import Factors
from rankup.message import canonical_json
from rankup.records import BlobRef, Cohort, Member, Receipt, RoundRecord, Term
from rankup.store import Store
from rankup.stored import find_record, find_record_with_etag
from rankup.versions import cohort_key, receipt_key

DENOMINATOR_LOG2 = 16
BUCKET = 1024
"""Contributions that are compared with each other: a Gram matrix of 8 MiB."""
PARALLEL_REQUESTS = 8
STRETCH_BYTES = 256 * 1024**2
"""Factors of neighbouring weights, of all contributions, that are read at once: a request for each weight of each
contribution would take longer than the arithmetic."""


@dataclass(frozen=True)
class Measured:
    """What was measured of contributions on held-out rows, in nats per scored token; empty where nothing was."""

    base_loss: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    """Contribution -> loss of base + delta."""
    descents: Mapping[str, float] = field(default_factory=dict)
    """Contribution -> how fast the loss falls along it at first."""


def accepted_receipts(record: RoundRecord, receipts: Sequence[Receipt]) -> list[Receipt]:
    """Those that count, sorted by contribution.

    Raises StateError when no receipt is an accepted one, IntegrityError for a receipt of a round or base that this
    round does not take.
    """
    accepted = {r.submission.statement.sha256: r for r in receipts if r.accepted}
    if not accepted:
        raise StateError(f"round {record.round_id} has no accepted contribution to fold")
    rounds = {record.round_id, *record.earlier_rounds}
    for digest, receipt in accepted.items():
        statement = receipt.submission.statement
        if statement.round_id not in rounds or record.staleness(statement.base_manifest) is None:
            raise IntegrityError(f"contribution {digest[:12]}… belongs to another round or base")
    return [accepted[digest] for digest in sorted(accepted)]


def blob_of(receipt: Receipt) -> BlobRef:
    """Where the delta lies."""
    statement = receipt.submission.statement
    return BlobRef(sha256=statement.sha256, size_bytes=statement.size_bytes)


def buckets(count: int) -> list[slice]:
    """Places 0 … count in parts of nearly equal size, at most `BUCKET` each.

    Contributions come sorted by digest, so nobody can choose whom a delta is compared with.
    """
    parts = -(-count // BUCKET)
    return [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]


def factors_of(reader: DeltaReader) -> Source:
    """A delta's factors by weight name: one for a matrix or vector, one for each slice of a stack, else none."""

    def factors(name: str) -> Sequence[Factors]:
        if name not in reader.layouts:
            return ()
        return [reader.factors(name, part) for part in range(reader.slices(name))]

    return factors


class StoredDelta:
    """A delta in object storage, read by range: its factors by weight name."""

    def __init__(self, store: Store, ref: BlobRef) -> None:
        self._blob = ReadAhead(store, ref.sha256)
        self._reader = DeltaReader(self._blob, ref.size_bytes)
        self._factors = factors_of(self._reader)

    def size_bytes(self, name: str) -> int:
        """Of the factors of one weight; 0 where the delta does not change it."""
        return self._reader.layouts[name].size_bytes if name in self._reader.layouts else 0

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch the factors of neighbouring weights in one request, and forget what was fetched before."""
        layouts = [self._reader.layouts[name] for name in names if name in self._reader.layouts]
        self._blob.fetch(extent for layout in layouts for extent in layout.extents)

    def __call__(self, name: str) -> Sequence[Factors]:
        """See `factors_of`."""
        return self._factors(name)


def bucket_gram(store: Store, contributions: Sequence[BlobRef], names: Iterable[str]) -> NDArray[np.float64]:
    """Gram matrix (n, n) of whole deltas over the weights `names`; at most `STRETCH_BYTES` of factors are held."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        deltas = list(pool.map(partial(StoredDelta, store), contributions))
        sizes = {name: sum(delta.size_bytes(name) for delta in deltas) for name in names}
        total = np.zeros((len(deltas), len(deltas)))
        for stretch in plan_groups(sizes, STRETCH_BYTES):
            list(pool.map(lambda delta, stretch=stretch: delta.fetch(stretch), deltas))
            total += gram_of(deltas, stretch)
    return total


def decide(
    record: RoundRecord,
    receipts: Sequence[Receipt],
    grams: Sequence[NDArray[np.float64]],
    measured: Measured,
    now: float,
) -> Cohort:
    """Screen and weigh `accepted_receipts`; `grams` has one matrix for each of their `buckets`.

    Raises InputError when no contribution passed the screening.
    """
    aggregation = record.request.recipe.aggregation
    verdicts: list[Verdict] = []
    shares: list[NDArray[np.float64]] = []
    for part, gram in zip(buckets(len(receipts)), grams, strict=True):
        members = receipts[part]
        found = screen(
            [_candidate(receipt, measured) for receipt in members],
            gram,
            base_loss=measured.base_loss,
            max_cosine=aggregation.max_cosine,
            max_loss_mads=aggregation.max_loss_mads,
            min_descent=aggregation.min_descent,
        )
        verdicts += found
        shares.append(_weigh_part(record, members, found, gram))
    total = sum(float(share.sum()) for share in shares)
    if total == 0:
        raise InputError(
            f"none of the {len(receipts)} contributions of round {record.round_id} passed the screening",
            remedy="Their receipts say why. Cancel the round, or open it again with other limits in its recipe.",
        )
    size = _part_size(record, receipts, verdicts)
    sizes = [size(part) for part in buckets(len(receipts))]
    scaled = [share * (weight / sum(sizes)) for share, weight in zip(shares, sizes, strict=True)]
    coefficients = integer_coefficients(np.concatenate(scaled), DENOMINATOR_LOG2)
    return Cohort(
        round_id=record.round_id,
        rule=aggregation.rule,
        denominator_log2=DENOMINATOR_LOG2,
        base_loss=measured.base_loss,
        members=tuple(
            Member(contribution=verdict.contribution, checks=verdict.checks, coefficient=coefficient)
            for verdict, coefficient in zip(verdicts, coefficients, strict=True)
        ),
        decided_at=now,
    )


def _candidate(receipt: Receipt, measured: Measured) -> Candidate:
    statement = receipt.submission.statement
    return Candidate(
        contribution=statement.sha256,
        tokens=statement.tokens,
        submitted_at=receipt.submission.submitted_at,
        norm=receipt.norm,
        shards=receipt.submission.shards,
        loss=measured.losses.get(statement.sha256),
        descent=measured.descents.get(statement.sha256),
    )


def _weigh_part(
    record: RoundRecord, members: Sequence[Receipt], verdicts: Sequence[Verdict], gram: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights of one part by the rule; a delta of an older base counts less beside the others."""
    aggregation = record.request.recipe.aggregation
    if not any(verdict.passed for verdict in verdicts):
        return np.zeros(len(members))
    shares = screened_weights(
        verdicts,
        gram,
        [receipt.submission.statement.tokens for receipt in members],
        rule=aggregation.rule,
        clip_norm_ratio=aggregation.clip_norm_ratio,
        byzantine_share=aggregation.byzantine_share,
    )
    ages = [record.staleness(receipt.submission.statement.base_manifest) or 0 for receipt in members]
    if not any(ages):
        return shares
    faded = shares * np.power(aggregation.staleness_decay, ages)
    return np.asarray(faded * (shares.sum() / faded.sum()))


def _part_size(record: RoundRecord, receipts: Sequence[Receipt], verdicts: Sequence[Verdict]) -> Callable[[slice], int]:
    """How much a part counts beside the others: what its members that passed have, in tokens or in heads."""
    by_tokens = record.request.recipe.aggregation.rule == "mean_by_tokens"
    counts = [
        (receipt.submission.statement.tokens if by_tokens else 1) if verdict.passed else 0
        for receipt, verdict in zip(receipts, verdicts, strict=True)
    ]
    return lambda part: sum(counts[part])


# -- records -----------------------------------------------------------------------------------------------------------


def stored_cohort(store: Store, round_id: str) -> Cohort | None:
    """What was decided before. Raises IntegrityError where it cannot be read."""
    return find_record(store, cohort_key(round_id), Cohort)


def settle(store: Store, cohort: Cohort) -> Cohort:
    """Write the decision, or return the one that was written before; put its checks into the receipts."""
    try:
        store.put(cohort_key(cohort.round_id), canonical_json(cohort), if_absent=True, content_type="application/json")
    except ConflictError:
        cohort = stored_cohort(store, cohort.round_id) or cohort
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(partial(_note, store, cohort.round_id), cohort.members))
    return cohort


def _note(store: Store, round_id: str, member: Member) -> None:
    """Add the cohort's checks to a receipt, which stays accepted: the work was good enough to be looked at."""
    key = receipt_key(round_id, member.contribution)
    found = find_record_with_etag(store, key, Receipt)
    if found is None:
        return
    receipt, etag = found
    known = {check.name for check in receipt.checks}
    fresh = tuple(check for check in member.checks if check.name not in known)
    if not fresh:
        return
    failed = [check.detail for check in fresh if not check.passed]
    reason = f"accepted, but left out of the sum: {failed[0]}" if failed else receipt.reason
    noted = receipt.model_copy(update={"checks": (*receipt.checks, *fresh), "reason": reason[:4096]})
    store.swap(key, canonical_json(noted), etag=etag)


def terms_of(record: RoundRecord, cohort: Cohort, receipts: Sequence[Receipt]) -> tuple[Term, ...]:
    """The sum, sorted by contribution. Raises IntegrityError where the decision is about other contributions."""
    by_digest = {receipt.submission.statement.sha256: receipt.submission for receipt in receipts}
    if [member.contribution for member in cohort.members] != sorted(by_digest):
        raise IntegrityError(f"the cohort of round {record.round_id} was decided for other contributions")
    terms = []
    for member in cohort.members:
        submission = by_digest[member.contribution]
        base, made_for = submission.statement.base_manifest, submission.statement.round_id
        terms.append(
            Term(
                contribution=member.contribution,
                size_bytes=submission.statement.size_bytes,
                worker_id=submission.worker_id,
                worker_name=submission.worker_name,
                shard=submission.shard,
                shards=submission.shards,
                tokens=submission.statement.tokens,
                coefficient=member.coefficient,
                base_manifest=None if base == record.base_manifest else base,
                round_id=None if made_for == record.round_id else made_for,
            )
        )
    return tuple(terms)
