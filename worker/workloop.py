"""The worker's main loop: one machine, one server, one lease after the other, until it is told to stop.

    join     `worker.membership`: key and token from the home folder, or enrol; same protocol or no work at all
    deliver  whatever the outbox still holds from before, first
    go on    with a training that an earlier run left a checkpoint of, if its lease is still of use
    claim    ── paused: wait, without a lease
             ── nothing to do, or not approved yet: ask for verdicts, wait as long as the server says, claim again
    base     pull the exact version that the lease names into the cache, every hash checked against the pinned key
    shards   download, sizes and hashes checked
    train    child process; its steps go to the heartbeat and to the display; pauses and retries (`worker.leasework`)
    keep     the finished delta goes into the outbox before anything else
    deliver  upload, submit; the verdict is asked for later, the next lease does not wait for it, nor for an upload that
             takes longer than a moment (`worker.courier`)

What always holds (the protocol's invariants first):
- every message about a lease repeats its fence; a lease is delivered, returned, or told to be over by the server;
- at most one delta a lease is submitted, signed by the key that enrolled;
- finished work is never dropped but by a fatal answer of the server: outages, Ctrl-C and crashes leave it in the
  outbox, and the next run delivers it first;
- a server that lost its data is shown the lease's voucher (`worker.vouching`), by heartbeat, delivery and a new start;
- training goes on while the server is away; waiting is jittered, told as `Waiting`, and ends after `patience_s`;
- whatever ends a run, the trainer is gone when `work` returns, and an unfinished lease has been returned if the server
  could be reached; where it was not returned, because of that or because the caller wants to go on with it, the
  checkpoint is kept for the next run, and the server frees the lease when it runs out;
- no lease is claimed while the governor holds the work up, and none is trained;
- three leases in a row that fail here stop the worker: the machine has a trouble that more leases do not cure.

No torch here, and no code from the server: JSON, safetensors and presigned URLs are all it takes.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from rankup.errors import (
    DeniedError,
    DiskFullError,
    FatalError,
    NotFoundError,
    RankupError,
    RetryableError,
    SetupError,
    StateError,
    UnauthenticatedError,
)
from rankup.protocol import ClaimRequest, Heartbeat, LeaseGrant, ReturnRequest
from rankup.settings import WorkerSettings
from worker import device, identity
from worker.base import PullBase
from worker.client import GatewayClient, StopRequested
from worker.courier import Courier
from worker.delivery import Delivery, TransferHeld
from worker.disk import full_disk_means_disk_full
from worker.events import (
    Abandoned,
    Claimed,
    Kept,
    NoWork,
    Paused,
    Problem,
    Resumed,
    Waiting,
)
from worker.governor import Governor
from worker.heart import Heart
from worker.leasefolder import Lease, begun_in, kept_grants, lease_folder
from worker.leasework import LeaseOverError, LeaseWork, PausedTooLongError
from worker.leaves import public_reason
from worker.membership import Membership
from worker.outbox import Outbox, OutboxState
from worker.retry import RetryPolicy
from worker.tally import Tally
from worker.traffic import Traffic
from worker.vouching import with_voucher

MAX_FAILURES_IN_A_ROW = 3
OVERLAP_AFTER_S = 3.0
"""An upload that takes longer goes on beside the next lease."""
_LAST_WORDS_TIMEOUT_S = 10.0
_VERDICT_LOOK_S = 0.5
_PAUSE_LOOK_S = 0.2
_CALLED_OFF = "the worker ends"
_STOPPED = "the volunteer stopped the worker"
_LEFT = "the volunteer left"


class WorkLoop:
    """State of one run: clients, membership, delivery, and how many leases failed in a row."""

    def __init__(
        self,
        server: str,
        invite: str,
        name: str | None,
        team: str | None,
        settings: WorkerSettings,
        stop: threading.Event,
        tally: Tally,
        folder: identity.ServerFolder,
        outbox: Outbox,
        governor: Governor,
        traffic: Traffic,
        trainer_command: Sequence[str],
        pull: PullBase,
        keep_lease: Callable[[], bool],
    ) -> None:
        self._server = server
        self._settings = settings
        self._stop = stop
        self._report = tally
        self._folder = folder
        self._outbox = outbox
        self._governor = governor
        self._keep_lease = keep_lease
        self._failures = 0
        self._patient = GatewayClient(
            server,
            timeout_s=settings.timeout_s,
            policy=RetryPolicy(settings.patience_s),
            stop=stop,
            meter=traffic,
            on_waiting=lambda error, pause_s: self._report(Waiting(error.cause, pause_s)),
        )
        # Not bound to `stop`: it says the last words about a lease after the user has asked to stop.
        self._steady = GatewayClient(
            server,
            timeout_s=min(settings.timeout_s, _LAST_WORDS_TIMEOUT_S),
            policy=RetryPolicy(patience_s=0.0),
        )
        self._membership = Membership(
            server,
            settings,
            folder,
            invite=invite,
            name=name,
            team=team,
            patient=self._patient,
            steady=self._steady,
            report=tally,
        )
        self._delivery = Delivery(
            outbox,
            self._membership.key,
            patient=self._patient,
            steady=self._steady,
            report=tally,
            hold=lambda: _CALLED_OFF if self._courier.called_off else governor.transfer_hold(),
        )
        self._courier = Courier(self._deliver, stop)
        self._leases = LeaseWork(
            server,
            settings,
            outbox=outbox,
            client=self._patient,
            governor=governor,
            traffic=traffic,
            stop=stop,
            report=tally,
            trainer_command=trainer_command,
            pull=pull,
        )

    def close(self) -> None:
        self._courier.call_off(_LAST_WORDS_TIMEOUT_S)
        self._patient.close()
        self._steady.close()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def work(self, max_leases: int | None) -> None:
        """Join, then deliver and claim in turn until `max_leases` are done, or the owner wants no more after this one.

        Ends with `StopRequested` on stop.
        """
        self._membership.join()
        leases = 0
        kept = kept_grants(self._folder)
        while True:
            enough = (max_leases is not None and leases >= max_leases) or self._governor.finishing
            if enough:
                self._courier.finish()
            if self._courier.wait(0):
                self._deliver()
            if enough:
                return
            if kept:
                leases += self._go_on_with(kept.pop(0))
                continue
            held = self._governor.hold() or self._governor.transfer_hold()
            if held is not None:
                self._sit_out(held)
                continue
            if self._undelivered():
                continue  # What held its upload up is over.
            answer = self._membership.with_token(lambda: self._patient.claim(self._wishes()))
            if answer.lease is None:
                self._report(NoWork(answer.reason, answer.retry_after_s, answer.why))
                self._rest(answer.retry_after_s * random.uniform(1.0, 1.25))  # noqa: S311 - jitter, not a secret
                continue
            leases += 1
            self._work_on(answer.lease)

    def _wishes(self) -> ClaimRequest:
        """What is asked for with a claim, as the machine is now."""
        return ClaimRequest(
            models=self._settings.models,
            memory_bytes=device.free_memory(self._settings.device),
            available_s=self._governor.available_s(),
            delivering=self._courier.lease_id,
        )

    def _undelivered(self) -> bool:
        """Whether a delta is ready and nobody is delivering."""
        return self._courier.lease_id is None and bool(self._outbox.items(OutboxState.READY))

    def _deliver(self) -> None:
        """Upload and submit what is ready, if anything may be uploaded now, and ask for verdicts."""
        if self._governor.transfer_hold() is None:
            with suppress(TransferHeld):
                self._membership.with_token(self._delivery.deliver)
        self._ask_verdicts()

    def _ask_verdicts(self) -> None:
        """Without waiting for a server that is away, or that lets nobody in just now."""
        with suppress(RetryableError, UnauthenticatedError):
            self._membership.with_token_if_possible(self._delivery.ask_verdicts)

    def _sit_out(self, reason: str) -> None:
        """Return when a lease may be claimed, or a finished delta may be delivered, or the owner wants no more."""
        self._report(Paused(reason))
        while not self._governor.finishing:
            transfer_held = self._governor.transfer_hold() is not None
            if not transfer_held and (self._governor.hold() is None or self._undelivered()):
                break
            self._wait(_PAUSE_LOOK_S)
        self._report(Resumed())

    def _rest(self, seconds: float) -> None:
        """Wait, but no longer than until the owner wants no more."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._governor.finishing:
            self._wait(min(left, _PAUSE_LOOK_S))

    def await_verdicts(self, seconds: float) -> None:
        """Ask for the verdicts that are still to come, for at most `seconds`."""
        until = time.monotonic() + seconds
        while self._delivery.awaits_verdicts() and time.monotonic() < until:
            self._wait(_VERDICT_LOOK_S)
            self._ask_verdicts()

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise StopRequested

    # -- one lease ---------------------------------------------------------------------------------------------------

    def _go_on_with(self, grant: LeaseGrant) -> bool:
        """Finish a lease that an earlier run left a checkpoint of; False when it is of no use any more."""
        beat = Heartbeat(fence=grant.fence, step=begun_in(self._folder.jobs / grant.lease_id).step)
        try:
            answer = self._membership.with_token(
                lambda: with_voucher(
                    self._patient, grant.lease_id, grant.voucher, lambda: self._patient.heartbeat(grant.lease_id, beat)
                )
            )
            useful, reason = answer.go_on, answer.reason
        except FatalError as exc:
            useful, reason = False, exc.cause
        if useful:
            self._work_on(grant)
        else:
            with lease_folder(self._folder, grant):
                self._report(Abandoned(grant.lease_id, reason, returned=False))
        return useful

    def _work_on(self, grant: LeaseGrant) -> None:
        """Train and deliver one lease, or end it; raises only what ends the run."""
        self._report(
            Claimed(
                grant.lease_id,
                grant.round_id,
                grant.model,
                grant.base_version,
                grant.shard,
                grant.recipe.steps * grant.shards,
                grant.shards,
                begun_in(self._folder.jobs / grant.lease_id).step,
            )
        )
        with (
            lease_folder(self._folder, grant) as lease,
            ExitStack() as beating,
        ):
            heart = beating.enter_context(
                Heart(
                    self._steady,
                    grant,
                    self._report,
                    self._ask_verdicts,
                    with_token=self._membership.with_token_if_possible,
                )
            )
            try:
                with full_disk_means_disk_full(self._settings.home):
                    self._leases.train(lease, heart, self._membership.publisher_key)
            except LeaseOverError as exc:
                self._report(Abandoned(grant.lease_id, str(exc), returned=False))
                return
            except PausedTooLongError as exc:
                self._give_back(grant, str(exc))
                return
            except DiskFullError as exc:
                # Who makes room and starts again goes on from what is kept; else the lease runs out.
                begun = lease.begun()
                lease.kept = bool(begun)
                if lease.kept:
                    self._report(Kept(grant.lease_id, begun.step, grant.recipe.steps * grant.shards))
                else:
                    self._give_back(grant, exc.cause)
                raise
            except (SetupError, RetryableError) as exc:
                self._give_back(grant, exc.cause)
                raise
            except RankupError as exc:
                self._give_back(grant, exc.cause)
                self._report(Problem(exc))
                self._count_failure(exc)
                return
            except (StopRequested, KeyboardInterrupt):
                self._keep_or_give_back(lease)
                raise
            except BaseException:
                self._give_back(grant, _STOPPED)
                raise
            self._failures = 0
            self._courier.finish()
            self._courier.send(grant.lease_id, beating.pop_all())
            self._courier.wait(OVERLAP_AFTER_S)

    def _keep_or_give_back(self, lease: Lease) -> None:
        """The worker ends in the middle of a lease. What was trained is kept as long as the lease may still be ours."""
        begun = lease.begun()
        wanted = bool(begun) and not self._governor.leaving
        if wanted and self._keep_lease():
            lease.kept = True
        else:
            returned = self._give_back(lease.grant, _LEFT if self._governor.leaving else _STOPPED)
            lease.kept = wanted and not returned
        if lease.kept:
            self._report(Kept(lease.grant.lease_id, begun.step, lease.grant.recipe.steps * lease.grant.shards))

    def _count_failure(self, error: RankupError) -> None:
        """Go on after a failed lease, ever more slowly; raise after the third in a row that failed on this machine."""
        self._failures += 1
        own_fault = not isinstance(error, DeniedError | StateError | NotFoundError)
        if own_fault and self._failures >= MAX_FAILURES_IN_A_ROW:
            raise SetupError(
                f"{self._failures} leases in a row failed, the last one because {error.cause}",
                remedy=f"Run `rankup worker doctor`, look into {self._folder.logs}, then join again.",
            ) from error
        self._wait(min(30.0, 0.25 * 2.0**self._failures) * random.random())  # noqa: S311 - jitter, not a secret

    def _give_back(self, grant: LeaseGrant, reason: str) -> bool:
        """Return the lease, and whether that worked; a server that does not take it back lets it run out."""
        returned = False
        with suppress(RankupError):
            self._steady.give_back(grant.lease_id, ReturnRequest(fence=grant.fence, reason=public_reason(reason)))
            returned = True
        self._report(Abandoned(grant.lease_id, reason, returned=returned))
        return returned
