"""The worker's main loop: one machine, one server, one lease at a time, until it is told to stop.

    join     key and token from the home folder, or enrol; pin the publisher key; same protocol or no work at all
    deliver  whatever the outbox still holds from before, first
    claim    ── nothing to do: ask for verdicts, wait as long as the server says, claim again
    base     pull the exact version that the lease names into the cache, every hash checked against the pinned key
    shard    download, size and hash checked
    train    child process; its steps go to the heartbeat and to the display
    keep     the finished delta goes into the outbox before anything else
    deliver  upload, submit; the verdict is asked for later, the next lease does not wait for it

What always holds (the protocol's invariants first):
- every message about a lease repeats its fence; a lease is delivered, returned, or told to be over by the server;
- at most one delta a lease is submitted, signed by the key that enrolled;
- finished work is never dropped but by a fatal answer of the server: outages, Ctrl-C and crashes leave it in the
  outbox, and the next run delivers it first;
- training goes on while the server is away; waiting is jittered, told as `Waiting`, and ends after `patience_s`;
- whatever ends a run, the trainer is gone when `run` returns, and an unfinished lease has been returned if the server
  could be reached;
- three leases in a row that fail here stop the worker: the machine has a trouble that more leases do not cure.

No torch here, and no code from the server: JSON, safetensors and presigned URLs are all it takes.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rankup import signing
from rankup.errors import (
    DeniedError,
    DiskFullError,
    IntegrityError,
    NotFoundError,
    RankupError,
    RetryableError,
    SetupError,
    StateError,
    UnauthenticatedError,
)
from rankup.message import DisplayName
from rankup.protocol import EnrolRequest, EnrolStatement, LeaseGrant, ReturnRequest, SubmitStatement
from rankup.settings import WorkerSettings
from worker import cache, device, identity
from worker.base import PullBase, pull_base
from worker.client import GatewayClient, StopRequested
from worker.delivery import Delivery
from worker.disk import full_disk_means_disk_full
from worker.events import (
    Abandoned,
    Claimed,
    Downloading,
    Enrolled,
    NoWork,
    Problem,
    Starting,
    Step,
    Summary,
    Waiting,
    WorkerEvent,
)
from worker.heart import Heart
from worker.job import Finished, Job, Line, StepDone
from worker.outbox import Outbox
from worker.retry import RetryPolicy
from worker.tally import Tally
from worker.training import TRAINER_COMMAND, check_result, run_trainer

MAX_SHARD_BYTES = 256 * 1024**2
MAX_FAILURES_IN_A_ROW = 3
_KEPT_LOGS = 20
_LAST_WORDS_TIMEOUT_S = 10.0
_VERDICT_LOOK_S = 0.5
_STOPPED = "the volunteer stopped the worker"


T = TypeVar("T")


class _LeaseOverError(Exception):
    """The server wants no delta of this lease any more; carries its reason."""


def run(
    url: str,
    *,
    invite: str = "",
    name: DisplayName | None = None,
    settings: WorkerSettings,
    max_leases: int | None = None,
    stop: threading.Event,
    report: Callable[[WorkerEvent], None],
    trainer_command: Sequence[str] = TRAINER_COMMAND,
    pull: PullBase = pull_base,
    verdict_wait_s: float = 60.0,
) -> Summary:
    """Work for the server at `url` until `stop` is set, Ctrl-C, or `max_leases` leases are done.

    `name`: how the leaderboard shows this machine (default: the one of the last time, or made up from its key). With
    `max_leases` the last verdicts are waited for, at most `verdict_wait_s`. `report` may be called from two threads,
    never at the same time.

    Raises `UnreachableError` (no answer for `patience_s`; the outbox keeps what is done), `DeniedError` (wrong invite),
    `SetupError` (this machine or its version cannot work here), `IntegrityError` (publisher key changed),
    `DiskFullError`, and the error of the third failed lease in a row.
    """
    server = identity.normalise_url(url)
    tally = Tally(report)
    try:
        with ExitStack() as stack, full_disk_means_disk_full(settings.home):
            folder = identity.open_folder(settings.home, server)
            stack.enter_context(folder.lock())
            outbox = stack.enter_context(Outbox(folder.outbox))
            agent = _Agent(server, invite, name, settings, stop, tally, folder, outbox, trainer_command, pull)
            stack.callback(agent.close)
            try:
                agent.work(max_leases)
                if max_leases is not None:
                    agent.await_verdicts(verdict_wait_s)
            except (StopRequested, KeyboardInterrupt):
                stop.set()
            return tally.summary(outbox)
    except (OSError, sqlite3.Error) as exc:
        raise SetupError(
            f"the worker cannot use its folder: {exc}", remedy=f"Check {settings.home} and its permissions."
        ) from exc


@dataclass(frozen=True)
class _Lease:
    """One granted lease and its place on this machine."""

    grant: LeaseGrant
    folder: Path
    log_file: Path


class _Agent:
    """State of one run: clients, identity, delivery, and how many leases failed in a row."""

    def __init__(
        self,
        server: str,
        invite: str,
        name: str | None,
        settings: WorkerSettings,
        stop: threading.Event,
        tally: Tally,
        folder: identity.ServerFolder,
        outbox: Outbox,
        trainer_command: Sequence[str],
        pull: PullBase,
    ) -> None:
        self._server = server
        self._invite = invite
        self._name = name
        self._settings = settings
        self._stop = stop
        self._report = tally
        self._folder = folder
        self._outbox = outbox
        self._trainer_command = trainer_command
        self._pull = pull
        self._failures = 0
        self._key = identity.load_or_create_key(folder)
        self._pinned = identity.load_identity(folder)
        token = self._pinned.token if self._pinned else ""
        self._patient = GatewayClient(
            server,
            token=token,
            timeout_s=settings.timeout_s,
            policy=RetryPolicy(settings.patience_s),
            stop=stop,
            on_waiting=lambda error, pause_s: self._report(Waiting(error.cause, pause_s)),
        )
        # Not bound to `stop`: it says the last words about a lease after the user has asked to stop.
        self._steady = GatewayClient(
            server,
            token=token,
            timeout_s=min(settings.timeout_s, _LAST_WORDS_TIMEOUT_S),
            policy=RetryPolicy(patience_s=0.0),
        )
        self._delivery = Delivery(outbox, self._key, patient=self._patient, steady=self._steady, report=tally)
        shutil.rmtree(folder.jobs, ignore_errors=True)
        folder.jobs.mkdir()

    def close(self) -> None:
        self._patient.close()
        self._steady.close()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def work(self, max_leases: int | None) -> None:
        """Join, then deliver and claim in turn until `max_leases` are done. Ends with `StopRequested` on stop."""
        self._join()
        leases = 0
        while True:
            self._with_token(self._delivery.deliver)
            self._delivery.ask_verdicts()
            if max_leases is not None and leases >= max_leases:
                return
            answer = self._with_token(self._patient.claim)
            if answer.lease is None:
                self._report(NoWork(answer.reason, answer.retry_after_s))
                self._wait(answer.retry_after_s * random.uniform(1.0, 1.25))  # noqa: S311 - jitter, not a secret
                continue
            leases += 1
            self._work_on(answer.lease)

    def await_verdicts(self, seconds: float) -> None:
        """Ask for the verdicts that are still to come, for at most `seconds`."""
        until = time.monotonic() + seconds
        while self._delivery.awaits_verdicts() and time.monotonic() < until:
            self._wait(_VERDICT_LOOK_S)
            self._delivery.ask_verdicts()

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise StopRequested

    # -- joining -----------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        info = self._patient.info()
        identity.check_publisher(self._pinned, info.publisher_key)
        known = self._pinned
        if known is None or (self._name is not None and self._name != known.name):
            self._enrol()
        else:
            self._report(Enrolled(known.worker_id, known.name, self._server, new=False))

    def _enrol(self) -> identity.Identity:
        public_key = signing.public_key_hex(self._key)
        name = self._name or (self._pinned.name if self._pinned else f"volunteer-{public_key[:6]}")
        statement = EnrolStatement(
            public_key=public_key,
            name=name,
            invite=self._invite,
            device=device.profile(self._settings.device, self._settings.threads),
            issued_at=time.time(),
        )
        signature = signing.sign(self._key, "enrol", statement)
        answer = self._patient.enrol(EnrolRequest(statement=statement, signature=signature))
        identity.check_publisher(self._pinned, answer.publisher_key)
        self._pinned = identity.save_identity(self._folder, self._server, statement.name, answer)
        for client in (self._patient, self._steady):
            client.use_token(answer.token)
        self._report(Enrolled(answer.worker_id, statement.name, self._server, new=True))
        return self._pinned

    def _with_token(self, call: Callable[[], T]) -> T:
        """The call's result; when the server does not know the token any more, enrol again and repeat once."""
        try:
            return call()
        except UnauthenticatedError:
            self._enrol()
            return call()

    # -- one lease ---------------------------------------------------------------------------------------------------

    def _work_on(self, grant: LeaseGrant) -> None:
        """Train and deliver one lease, or end it; raises only what ends the run."""
        self._report(
            Claimed(grant.lease_id, grant.round_id, grant.model, grant.base_version, grant.shard, grant.recipe.steps)
        )
        with (
            self._job_folder(grant) as lease,
            Heart(self._steady, grant, self._report, self._delivery.ask_verdicts) as heart,
        ):
            try:
                with full_disk_means_disk_full(self._settings.home):
                    self._train(lease, heart)
            except _LeaseOverError as exc:
                self._report(Abandoned(grant.lease_id, str(exc), returned=False))
                return
            except (DiskFullError, SetupError, RetryableError) as exc:
                self._give_back(grant, exc.cause)
                raise
            except RankupError as exc:
                self._give_back(grant, exc.cause)
                self._report(Problem(exc))
                self._count_failure(exc)
                return
            except BaseException:
                self._give_back(grant, _STOPPED)
                raise
            self._failures = 0
            self._with_token(self._delivery.deliver)

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

    def _train(self, lease: _Lease, heart: Heart) -> None:
        """From the grant to a delta in the outbox."""
        grant = lease.grant
        job = Job(
            round_id=grant.round_id,
            lease_id=grant.lease_id,
            fence=grant.fence,
            model=grant.model,
            base_manifest=grant.base_manifest,
            base_folder=self._base(grant, heart),
            shard_file=lease.folder / "shard.jsonl",
            delta_file=lease.folder / "finished.delta",
            recipe=grant.recipe,
            seed=grant.seed,
            targets=grant.targets,
            device=self._settings.device,
            threads=device.usable_threads(self._settings.threads),
        )
        self._patient.download(
            grant.shard_link,
            job.shard_file,
            max_bytes=MAX_SHARD_BYTES,
            progress=lambda done, total: self._downloading("shard", done, total, heart),
        )
        self._check_wanted(heart)
        self._report(Starting(grant.lease_id))
        result = run_trainer(
            job,
            lease.folder / "job.json",
            lease.log_file,
            command=self._trainer_command,
            on_line=lambda line: self._on_line(line, heart),
            stop_reason=lambda: _STOPPED if self._stop.is_set() else heart.abandon,
        )
        if result is None:
            self._check_wanted(heart)
            raise _LeaseOverError("the trainer was stopped")
        check_result(job, result, max_bytes=grant.max_delta_bytes)
        self._outbox.put(result.path, _statement(job, result))

    def _base(self, grant: LeaseGrant, heart: Heart) -> Path:
        """The folder of the lease's base version, pulled when it is not in the cache, with room made before."""
        if self._pinned is None:
            raise SetupError("the worker has not enrolled")
        pinned = self._pinned
        store = self._settings.home / "cache"
        folder = cache.version_folder(store, grant.base_manifest)
        folder.mkdir(parents=True, exist_ok=True)
        cache.mark_used(folder)
        cache.make_room(store, self._settings.cache_bytes, keep=folder)
        digest = self._patient.patiently(
            lambda: self._pull(
                self._server,
                grant.model,
                grant.base_version,
                folder,
                publisher_key=pinned.publisher_key,
                progress=lambda done, total: self._downloading("base", done, total, heart),
            )
        )
        if digest != grant.base_manifest:
            raise IntegrityError(f"version {grant.base_version} is {digest[:16]}…, not {grant.base_manifest[:16]}…")
        cache.mark_used(folder)
        cache.make_room(store, self._settings.cache_bytes, keep=folder)
        return folder

    def _downloading(self, what: str, done: int, total: int, heart: Heart) -> None:
        self._check_wanted(heart)
        self._report(Downloading(what, done, total))

    def _check_wanted(self, heart: Heart) -> None:
        if self._stop.is_set():
            raise StopRequested
        if heart.abandon is not None:
            raise _LeaseOverError(heart.abandon)

    def _on_line(self, line: Line, heart: Heart) -> None:
        if isinstance(line, StepDone):
            heart.note(line.step, line.loss, line.tokens_per_s)
            self._report(Step(line.step, line.steps, line.loss, line.tokens_per_s))

    def _give_back(self, grant: LeaseGrant, reason: str) -> None:
        """Return the lease; a server that does not take it back lets it run out."""
        returned = False
        with suppress(RankupError):
            self._steady.give_back(grant.lease_id, ReturnRequest(fence=grant.fence, reason=reason[:512]))
            returned = True
        self._report(Abandoned(grant.lease_id, reason, returned=returned))

    @contextmanager
    def _job_folder(self, grant: LeaseGrant) -> Iterator[_Lease]:
        """A folder for the lease, removed afterwards, and its log, of which the last `_KEPT_LOGS` stay."""
        folder = self._folder.jobs / grant.lease_id
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(self._folder.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)[: 1 - _KEPT_LOGS]:
            old.unlink()
        try:
            yield _Lease(grant, folder, self._folder.logs / f"{grant.lease_id}.log")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _statement(job: Job, result: Finished) -> SubmitStatement:
    return SubmitStatement(
        round_id=job.round_id,
        lease_id=job.lease_id,
        fence=job.fence,
        base_manifest=job.base_manifest,
        sha256=result.sha256,
        size_bytes=result.size_bytes,
        tokens=result.tokens,
        steps=result.steps,
        first_loss=result.first_loss,
        last_loss=result.last_loss,
        seconds=result.seconds,
    )
