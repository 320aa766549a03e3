"""Submissions that await their verdict, in object storage: what a ledger that loses its data would forget otherwise.

What always holds: a submission is written before it is acknowledged, under the round that judges it, and goes once the
ledger has the verdict. One that is left behind has a receipt, or its round has ended: it is queued for nobody.

The delta itself waits under `uploads/`; the queue is the ledger's.
"""

from __future__ import annotations

import contextlib
from typing import Final

from pydantic import ValidationError

from rankup.errors import ConflictError, IntegrityError
from rankup.message import canonical_json
from rankup.records import Submission
from rankup.store import Store
from rankup.versions import submission_key

MAX_SUBMISSION_BYTES: Final = 64 * 1024


def keep_submission(store: Store, round_id: str, submission: Submission) -> None:
    """Write it down; the first one of a lease stays. Raises what the store raises: then it must not be acknowledged."""
    key = submission_key(round_id, submission.statement.lease_id)
    with contextlib.suppress(ConflictError):
        store.put(key, canonical_json(submission), if_absent=True, content_type="application/json")


def forget_submission(store: Store, round_id: str, submission: Submission) -> None:
    """It has its verdict."""
    store.delete(submission_key(round_id, submission.statement.lease_id))


def read_submission(store: Store, round_id: str, key: str) -> Submission:
    """What lies under a key of `versions.submission_prefix`. Raises NotFoundError, IntegrityError."""
    data = store.get(key, max_bytes=MAX_SUBMISSION_BYTES)
    with contextlib.suppress(ValidationError):
        submission = Submission.model_validate_json(data)
        if key == submission_key(round_id, submission.statement.lease_id):
            return submission
    raise IntegrityError(
        f"{key} in object storage cannot be read, or is not what its name says",
        remedy="Restore it from a backup, or move it away: its delta is not judged then.",
    )
