"""What a worker is told with its lease, and what it may hand in for it: pure functions of lease, record and settings.

What always holds:
- the seed follows from round and lease alone, so an audit repeats the training with the same numbers;
- `delta_bound_bytes` is never below the size of an honest delta file of these targets;
- a submission passes only if it names this very lease, round, base and no more work than the recipe has in it.

No I/O here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from coordinator.leases import TAKES_SUBMISSIONS, Lease
from rankup.delta import HEADER_MAX_BYTES
from rankup.errors import DeniedError, InputError, IntegrityError, StateError, TooLargeError
from rankup.protocol import BlobLink, LeaseGrant, LeaseState, RoundState, SubmitRequest
from rankup.records import BlobRef, RoundRecord
from rankup.signing import verify
from rankup.targets import Target

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


def max_upload_bytes(record: RoundRecord, cap_bytes: int) -> int:
    """What a delta of this round may weigh on a server that takes at most `cap_bytes`."""
    return min(delta_bound_bytes(record.targets), cap_bytes)


def shard_of(record: RoundRecord, lease: Lease) -> BlobRef:
    """The bytes of the lease's shard. Raises IntegrityError where the round has no such shard."""
    if not 0 <= lease.shard < len(record.shards):
        raise IntegrityError(f"lease {lease.lease_id} is for shard {lease.shard} of {len(record.shards)}")
    return record.shards[lease.shard]


def grant_of(lease: Lease, record: RoundRecord, *, shard_url: str, cap_bytes: int, heartbeat_s: float) -> LeaseGrant:
    """The lease as its worker gets it; `shard_url` reads the bytes of `shard_of`."""
    shard = shard_of(record, lease)
    return LeaseGrant(
        lease_id=lease.lease_id,
        fence=lease.fence,
        round_id=lease.round_id,
        model=record.request.model,
        base_version=record.base_version,
        base_manifest=record.base_manifest,
        shard=lease.shard,
        shard_links=(BlobLink(sha256=shard.sha256, size_bytes=shard.size_bytes, url=shard_url),),
        recipe=record.request.recipe,
        seed=seed_of(lease.round_id, lease.lease_id),
        targets=record.targets,
        max_delta_bytes=max_upload_bytes(record, cap_bytes),
        expires_at=lease.expires_at,
        heartbeat_s=heartbeat_s,
    )


def beat_interval_s(lease_s: float, heartbeat_s: float) -> float:
    """How often a worker reports: as the server is set, but at least three times within the life of a lease."""
    return min(heartbeat_s, lease_s / 3)


def require_own(lease: Lease, worker_id: str) -> None:
    """Raises DeniedError where the lease is another worker's."""
    if lease.worker_id != worker_id:
        raise DeniedError("This lease belongs to another worker.", remedy="Act on your own leases only.")


def require_uploadable(
    lease: Lease,
    record: RoundRecord,
    *,
    round_state: RoundState,
    fence: int,
    sha256: str,
    size_bytes: int,
    cap_bytes: int,
) -> None:
    """Return if the worker may upload these bytes for its lease.

    An expired or returned lease may, while its round takes submissions: finished work is not thrown away. So may one
    that has handed in the same bytes already.

    Raises:
        DeniedError: an old fence.
        TooLargeError: more bytes than a delta of this round can have.
        StateError: the lease has handed in another delta, or the round takes no more.
    """
    if fence != lease.fence:
        raise DeniedError(
            f"Lease {lease.lease_id} has fence {lease.fence}, the message carries {fence}.",
            remedy="Use the fence that came with the lease; if it is lost, claim again.",
        )
    require_size(record, size_bytes, cap_bytes)
    if lease.contribution is not None:
        if lease.contribution == sha256:
            return
        raise StateError(
            f"Lease {lease.lease_id} has handed in another delta.",
            remedy="Wait for its verdict; one lease hands in one delta.",
        )
    if lease.state in (LeaseState.ACCEPTED, LeaseState.REJECTED) or round_state not in TAKES_SUBMISSIONS:
        raise StateError(
            f"Lease {lease.lease_id} is {lease.state.value} and its round {round_state.value}: no delta is taken.",
            remedy="Drop this delta and claim a lease of the round that is open now.",
        )


def require_size(record: RoundRecord, size_bytes: int, cap_bytes: int) -> None:
    """Raises TooLargeError above `max_upload_bytes`."""
    limit = max_upload_bytes(record, cap_bytes)
    if size_bytes > limit:
        raise TooLargeError(
            f"A delta of this round has at most {limit} bytes; this one has {size_bytes}.",
            remedy="Train with the recipe and the targets of the lease.",
        )


def require_submission(
    request: SubmitRequest, lease: Lease, record: RoundRecord, *, public_key: str, cap_bytes: int
) -> None:
    """Return if the statement is about this lease and signed by its worker.

    Raises:
        InputError: it names another lease, round or base, or more steps or tokens than the recipe has.
        DeniedError: an old fence, or a signature that is not the worker's.
        TooLargeError: more bytes than a delta of this round can have.
    """
    said, recipe = request.statement, record.request.recipe
    for what, stated, wanted in (
        ("lease", said.lease_id, lease.lease_id),
        ("round", said.round_id, lease.round_id),
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
    most = recipe.steps * recipe.batch_size * recipe.max_tokens
    if said.steps > recipe.steps or said.tokens > most:
        raise InputError(
            f"The statement claims {said.steps} steps and {said.tokens} tokens; "
            f"the recipe has {recipe.steps} steps and at most {most} tokens.",
            remedy="Train as the recipe says and count only tokens that contribute to the loss.",
        )
    require_size(record, said.size_bytes, cap_bytes)
    try:
        verify(public_key, "submit", said, request.signature)
    except (IntegrityError, InputError) as exc:
        raise DeniedError(
            "The statement is not signed by the key that this worker enrolled with.",
            remedy="Sign with the key of the enrolment, or join again.",
        ) from exc
