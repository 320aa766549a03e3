"""From the outbox to the verdict: upload, submit, ask what became of it.

What always holds:
- every step may be cut off and repeated: the object store takes the same bytes twice, submitting twice is one
  submission, and the outbox moves only after the server has acknowledged;
- a delta leaves the outbox by a verdict or by a fatal answer of the server, never because a server was away, or forgot
  a lease whose voucher is here;
- an upload ends between two pieces as soon as the machine's owner wants nothing transferred, and what has arrived of it
  is not sent again;
- asking for verdicts never waits for a server that does not answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from rankup import signing
from rankup.errors import FatalError, NotFoundError, RankupError, RetryableError, UnauthenticatedError
from rankup.protocol import LeaseState, ReturnRequest, SubmitRequest, UploadRequest
from worker.client import GatewayClient
from worker.events import Dropped, Submitted, Uploading, Verdict, WorkerEvent
from worker.leaves import public_reason
from worker.outbox import Outbox, OutboxItem, OutboxState
from worker.retry import RetryPolicy
from worker.vouching import with_voucher

_ONCE = RetryPolicy(patience_s=0.0)
_LONGEST_WAIT_FOR_VERDICT_S = 30 * 86_400.0


class TransferHeld(Exception):
    """Nothing may be uploaded now; carries the reason. Not an error, so not in the error tree."""


class Delivery:
    """Delivers what `outbox` holds. `patient` rides out outages, `steady` answers or fails at once. `hold` says why
    nothing may be uploaded now; None: it may."""

    def __init__(
        self,
        outbox: Outbox,
        key: signing.Ed25519PrivateKey,
        *,
        patient: GatewayClient,
        steady: GatewayClient,
        report: Callable[[WorkerEvent], None],
        hold: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox = outbox
        self._key = key
        self._patient = patient
        self._steady = steady
        self._report = report
        self._hold = hold
        self._clock = clock
        self._one_asker = threading.Lock()

    def deliver(self) -> None:
        """Upload and submit everything that is ready, oldest first.

        A delta that the server refuses for good is dropped and reported. Raises `UnauthenticatedError` (enrol again,
        then repeat), `RetryableError` (patience is over, the outbox keeps the rest), `TransferHeld` (it keeps the rest
        too) and `StopRequested`.
        """
        for item in self._outbox.items(OutboxState.READY):
            try:
                self._deliver(item)
            except UnauthenticatedError:
                raise
            except FatalError as exc:
                self._drop(item, exc)

    def ask_verdicts(self) -> None:
        """Ask once about every submitted delta and record the verdicts; a server that is away is asked another time.

        Raises `UnauthenticatedError`: enrol again, then repeat.
        """
        if not self._one_asker.acquire(blocking=False):
            return
        try:
            for item in self._outbox.items(OutboxState.SUBMITTED):
                try:
                    self._ask_verdict(item)
                except RetryableError:
                    return
                except UnauthenticatedError:
                    raise
                except FatalError as exc:
                    self._drop(item, exc)
        finally:
            self._one_asker.release()

    def awaits_verdicts(self) -> bool:
        """Whether a submitted delta has no verdict yet."""
        return bool(self._outbox.items(OutboxState.SUBMITTED))

    def _drop(self, item: OutboxItem, error: FatalError) -> None:
        self._outbox.move(item.lease_id, OutboxState.DROPPED, error.cause)
        # The shard may still be leased to us; while it is, the server would only hand out the same lease again.
        with suppress(RankupError):
            request = ReturnRequest(fence=item.statement.fence, reason=public_reason(error.cause))
            self._steady.give_back(item.lease_id, request)
        self._report(Dropped(item.lease_id, f"{error.cause} {error.remedy}"))

    def _deliver(self, item: OutboxItem) -> None:
        statement = item.statement
        if not item.path.is_file():
            raise NotFoundError(f"the delta file of lease {item.lease_id} is gone from the outbox")
        with_voucher(self._patient, item.lease_id, item.voucher, lambda: self._hand_in(item))
        self._outbox.move(item.lease_id, OutboxState.SUBMITTED)
        self._report(Submitted(item.lease_id, statement.sha256, statement.tokens))

    def _hand_in(self, item: OutboxItem) -> None:
        statement = item.statement
        request = UploadRequest(fence=statement.fence, sha256=statement.sha256, size_bytes=statement.size_bytes)
        self._patient.upload(
            item.lease_id,
            request,
            item.path,
            progress=lambda done, total: self._report(Uploading(item.lease_id, done, total)),
            check=self._require_allowed,
        )
        signature = signing.sign(self._key, "submit", statement)
        self._patient.submit(item.lease_id, SubmitRequest(statement=statement, signature=signature))

    def _require_allowed(self) -> None:
        if (reason := self._hold()) is not None:
            raise TransferHeld(reason)

    def _ask_verdict(self, item: OutboxItem) -> None:
        ask = partial(self._steady.lease, item.lease_id, policy=_ONCE)
        view = with_voucher(self._steady, item.lease_id, item.voucher, ask, policy=_ONCE)
        if view.state in (LeaseState.ACCEPTED, LeaseState.REJECTED):
            accepted = view.state is LeaseState.ACCEPTED
            state = OutboxState.ACCEPTED if accepted else OutboxState.REJECTED
            self._outbox.move(item.lease_id, state, view.verdict)
            self._report(Verdict(item.lease_id, accepted, view.verdict))
        elif view.state is not LeaseState.SUBMITTED:
            # The server was restored to a time before the submission: it has to hear of it again.
            self._outbox.move(item.lease_id, OutboxState.READY)
        elif self._clock() - item.created_at > _LONGEST_WAIT_FOR_VERDICT_S:
            raise NotFoundError(f"no verdict on lease {item.lease_id} within a month", remedy="Nothing to do here.")
