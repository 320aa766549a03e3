"""Intake: brings an uploaded delta in, has it judged, and keeps the verdict and, if it is good, the bytes.

What always holds:
- an existing receipt of the same lease wins: admitting twice gives the first answer;
- an accepted delta is a blob before its receipt exists, and its receipt exists before the upload is removed, so a crash
  anywhere leaves either the upload or everything;
- no more than the round's size limit is ever downloaded;
- an accepted receipt is never replaced; a rejected one only by the acceptance of the same bytes under another lease.

The checks themselves are `aggregator.admission`; this module moves bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from aggregator.admission import judge, refuse
from rankup.errors import ConflictError, NotFoundError
from rankup.message import canonical_json
from rankup.records import Check, Receipt, RoundRecord, Submission
from rankup.store import Store, blob_key, put_blob_file
from rankup.stored import find_record_with_etag
from rankup.versions import receipt_key, upload_key

Audit = Callable[[Path], Check]
"""Trains the shards of a delta again and compares."""


def admit(
    store: Store,
    record: RoundRecord,
    submission: Submission,
    *,
    max_delta_bytes: int,
    now: float,
    audit: Audit | None = None,
) -> Receipt:
    """Judge one submission and store the receipt under `receipt_key`; idempotent.

    `now` is Unix seconds; `audit` is the last check of a delta that passed all others. Raises what the store raises,
    DiskFullError, and ConflictError when somebody else wrote another receipt for the same bytes
    meanwhile; trying again then gives theirs.
    """
    statement = submission.statement
    upload = upload_key(statement.lease_id, statement.sha256)
    key = receipt_key(record.round_id, statement.sha256)
    stored = find_record_with_etag(store, key, Receipt)
    before, etag = stored if stored is not None else (None, None)
    if before is not None and before.submission.statement.lease_id == statement.lease_id:
        store.delete(upload)
        return before
    taken = (before is not None and before.accepted) or _accepted_before(store, record, submission)
    with tempfile.TemporaryDirectory(prefix="rankup-admit-") as folder:
        path = Path(folder) / "delta"
        refusal = _download(store, upload, path, submission, max_delta_bytes)
        if refusal:
            receipt = refuse(submission, refusal, now)
        else:
            receipt = judge(path, record, submission, max_delta_bytes=max_delta_bytes, seen=lambda _: taken, now=now)
            if receipt.accepted and audit is not None:
                receipt = _with(receipt, audit(path))
        if receipt.accepted:
            put_blob_file(store, path)
    if before is None:
        try:
            store.put(key, canonical_json(receipt), if_absent=True, content_type="application/json")
        except ConflictError:
            stored = find_record_with_etag(store, key, Receipt)
            if stored is None or stored[0].submission.statement.lease_id != statement.lease_id:
                raise
            receipt = stored[0]
    elif receipt.accepted:
        store.swap(key, canonical_json(receipt), etag=etag)
    store.delete(upload)
    return receipt


def _accepted_before(store: Store, record: RoundRecord, submission: Submission) -> bool:
    """Whether a late delta was accepted in its own round after all, or by another round that took it."""
    statement = submission.statement
    if statement.round_id == record.round_id:
        return False
    keys = (receipt_key(round_id, statement.sha256) for round_id in record.earlier_rounds)
    return any(
        found is not None and found[0].accepted
        for found in (find_record_with_etag(store, key, Receipt) for key in keys)
    )


def _with(receipt: Receipt, check: Check) -> Receipt:
    """The receipt with one more check, which may turn it into a refusal."""
    checks = (*receipt.checks, check)
    if not check.passed:
        return refuse(receipt.submission, check.detail, receipt.judged_at, checks)
    return receipt.model_copy(update={"checks": checks})


def _download(store: Store, upload: str, path: Path, submission: Submission, max_delta_bytes: int) -> str:
    """Bring the delta to `path`; why it cannot be judged, or an empty string."""
    statement = submission.statement
    # A worker whose bytes the bucket holds already was told not to send them again.
    for key in (upload, blob_key(statement.sha256)):
        info = store.head(key)
        if info is None:
            continue
        if info.size_bytes > max_delta_bytes:
            return f"the delta has {info.size_bytes} bytes; the limit is {max_delta_bytes}"
        if info.size_bytes != statement.size_bytes:
            return f"the delta has {info.size_bytes} bytes, but {statement.size_bytes} were signed for"
        try:
            store.get_file(key, path)
        except NotFoundError:
            continue
        return ""
    return "the delta was never uploaded"
