"""What a worker is told with its lease, and what it may hand in for it: pure functions of lease, record and settings.

What always holds:
- the seed follows from round and lease alone, so an audit repeats the training with the same numbers;
- `delta_bound_bytes` is never below the size of an honest delta file of these targets;
- a submission passes only if it names this very lease, its round, a base of that round and no more work than the recipe
  has in it for so many shards.

No I/O here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from coordinator.leases import Lease
from rankup.delta import HEADER_MAX_BYTES
from rankup.errors import DeniedError, InputError, IntegrityError, StateError, TooLargeError
from rankup.protocol import BlobLink, LeaseGrant, LeaseState, SubmitRequest
from rankup.records import BlobRef, RoundRecord
from rankup.signing import verify
from rankup.targets import Target, targets_at_tier

MANTISSA_BYTES = 2
SCALE_ROWS = 4
LENGTH_PREFIX_BYTES = 8
"""A safetensors file starts with the length of its header."""


def seed_of(round_id: str, lease_id: str) -> int:
    """63 bits of sha256 of `round|lease`: fits a signed 64-bit integer everywhere."""
    return int.from_bytes(hashlib.sha256(f"{round_id}|{lease_id}".encode()).digest()[:8]) >> 1


def delta_bound_bytes(targets: Mapping[str, Target]) -> int:
    """Largest delta file: int16 factors B (d_out, r) and A (r, d_in), int16 scales (4, r), and the largest header."""
    numbers = sum(t.slices * t.rank * (t.d_out + t.d_in + SCALE_ROWS) for t in targets.values())
    return numbers * MANTISSA_BYTES + LENGTH_PREFIX_BYTES + HEADER_MAX_BYTES


def max_upload_bytes(lease: Lease, record: RoundRecord, cap_bytes: int) -> int:
    """What a delta of this lease may weigh on a server that takes at most `cap_bytes`."""
    return min(delta_bound_bytes(_targets(lease, record)), cap_bytes)


def _targets(lease: Lease, record: RoundRecord) -> dict[str, Target]:
    return targets_at_tier(record.targets, record.request.recipe, lease.rank)


def shards_of(record: RoundRecord, lease: Lease) -> tuple[BlobRef, ...]:
    """The bytes of the lease's shards. Raises IntegrityError where the round has no such shards."""
    if not 0 <= lease.shard < lease.numbers.stop <= len(record.shards):
        raise IntegrityError(
            f"lease {lease.lease_id} is for {lease.shards} shards from {lease.shard} on of {len(record.shards)}"
        )
    return record.shards[lease.shard : lease.numbers.stop]


def grant_of(
    lease: Lease, record: RoundRecord, *, shard_urls: Sequence[str], cap_bytes: int, heartbeat_s: float, voucher: str
) -> LeaseGrant:
    """The lease as its worker gets it; `shard_urls` read the bytes of `shards_of`, one after the other."""
    shards = zip(shards_of(record, lease), shard_urls, strict=True)
    return LeaseGrant(
        lease_id=lease.lease_id,
        fence=lease.fence,
        round_id=lease.round_id,
        model=record.request.model,
        base_version=record.base_version,
        base_manifest=record.base_manifest,
        shard=lease.shard,
        shards=lease.shards,
        shard_links=tuple(BlobLink(sha256=blob.sha256, size_bytes=blob.size_bytes, url=url) for blob, url in shards),
        recipe=record.request.recipe.at_tier(lease.rank),
        seed=seed_of(lease.round_id, lease.lease_id),
        teacher=record.teacher,
        targets=_targets(lease, record),
        max_delta_bytes=max_upload_bytes(lease, record, cap_bytes),
        expires_at=lease.expires_at,
        heartbeat_s=heartbeat_s,
        voucher=voucher,
    )


def require_own(lease: Lease, worker_id: str) -> None:
    """Raises DeniedError where the lease is another worker's."""
    if lease.worker_id != worker_id:
        raise DeniedError("This lease belongs to another worker.", remedy="Act on your own leases only.")


def require_uploadable(
    lease: Lease,
    record: RoundRecord,
    *,
    taken: bool,
    fence: int,
    sha256: str,
    size_bytes: int,
    cap_bytes: int,
) -> None:
    """Return if the worker may upload these bytes for its lease; `taken` says whether some round takes its delta.

    An expired or returned lease may: finished work is not thrown away. So may one that has handed in the same bytes
    already.

    Raises:
        DeniedError: an old fence.
        TooLargeError: more bytes than a delta of this lease can have.
        StateError: the lease has handed in another delta, or no round takes it.
    """
    if fence != lease.fence:
        raise DeniedError(
            f"Lease {lease.lease_id} has fence {lease.fence}, the message carries {fence}.",
            remedy="Use the fence that came with the lease; if it is lost, claim again.",
        )
    require_size(lease, record, size_bytes, cap_bytes)
    if lease.contribution is not None:
        if lease.contribution == sha256:
            return
        raise StateError(
            f"Lease {lease.lease_id} has handed in another delta.",
            remedy="Wait for its verdict; one lease hands in one delta.",
        )
    if lease.state in (LeaseState.ACCEPTED, LeaseState.REJECTED) or not taken:
        raise StateError(
            f"Lease {lease.lease_id} is {lease.state.value}, and no round takes its delta any more.",
            remedy="Drop this delta and claim another lease.",
        )


def require_size(lease: Lease, record: RoundRecord, size_bytes: int, cap_bytes: int) -> None:
    """Raises TooLargeError above `max_upload_bytes`."""
    limit = max_upload_bytes(lease, record, cap_bytes)
    if size_bytes > limit:
        raise TooLargeError(
            f"A delta of this lease has at most {limit} bytes; this one has {size_bytes}.",
            remedy="Train with the recipe and the targets of the lease.",
        )


def require_submission(
    request: SubmitRequest, lease: Lease, record: RoundRecord, *, public_key: str, cap_bytes: int
) -> None:
    """Return if the statement is about this lease and signed by its worker; `record` is that of the lease's home.

    Raises:
        InputError: it names another lease, round or base, or more steps or tokens than the recipe has.
        DeniedError: an old fence, or a signature that is not the worker's.
        TooLargeError: more bytes than a delta of this lease can have.
    """
    said, recipe = request.statement, record.request.recipe
    for what, stated, wanted in (
        ("lease", said.lease_id, lease.lease_id),
        ("round", said.round_id, lease.home),
    ):
        if stated != wanted:
            raise InputError(
                f"The statement names the {what} {stated}; this lease has {wanted}.",
                remedy="State what came with the lease.",
            )
    if record.staleness(said.base_manifest) is None:
        raise InputError(
            f"The statement names the base manifest {said.base_manifest}; this round is on {record.base_manifest}.",
            remedy="Train on the version that came with the lease.",
        )
    if said.fence != lease.fence:
        raise DeniedError(
            f"Lease {lease.lease_id} has fence {lease.fence}, the statement carries {said.fence}.",
            remedy="Use the fence that came with the lease; if it is lost, claim again.",
        )
    # Tokens are the weight of a contribution: nobody can have seen more of them than the recipe lets through.
    steps = recipe.steps * lease.shards
    most = steps * recipe.batch_size * recipe.max_tokens
    if said.steps > steps or said.tokens > most:
        raise InputError(
            f"The statement claims {said.steps} steps and {said.tokens} tokens; "
            f"the lease has {steps} steps and at most {most} tokens.",
            remedy="Train as the recipe says and count only tokens that contribute to the loss.",
        )
    require_size(lease, record, said.size_bytes, cap_bytes)
    try:
        verify(public_key, "submit", said, request.signature)
    except (IntegrityError, InputError) as exc:
        raise DeniedError(
            "The statement is not signed by the key that this worker enrolled with.",
            remedy="Sign with the key of the enrolment, or join again.",
        ) from exc
