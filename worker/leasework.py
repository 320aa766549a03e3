"""One lease from its grant to a delta in the outbox, with pauses and failures of the trainer on the way.

    base ─> shards ─> trainer ──────────────> outbox
     ^        ^          │  ^ checkpoint, a teacher's answers
     └────────┴─ pause ──┘  └─ failed: again, smaller or later, if `worker.recovery` says so

What always holds:
- while the governor holds the work up, no trainer runs and nothing is downloaded; the heartbeat goes on, so the lease
  stays ours; a pause of more than `worker.limits.hold_s` ends the lease instead;
- what a pause, a crash or the end of the worker leaves in the lease's folder is enough to go on;
- a delta goes into the outbox only after it has been checked as admission will.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rankup.errors import InputError, IntegrityError, TooLargeError
from rankup.message import PublicKey
from rankup.protocol import MAX_LEASE_BYTES, MAX_SHARDS_PER_LEASE, LeaseGrant, SubmitStatement, VersionRef
from rankup.settings import WorkerSettings
from worker import cache, device
from worker.base import PullBase
from worker.client import GatewayClient, StopRequested
from worker.events import Answering, Downloading, Paused, Resumed, Retrying, Starting, Step, WorkerEvent
from worker.governor import Governor
from worker.heart import Heart
from worker.job import Answered, Finished, Job, Line, Ready, StepDone, TrainerExit
from worker.leasefolder import Lease
from worker.limits import hold_s
from worker.outbox import Outbox
from worker.precision import may_narrow
from worker.recovery import MEMORY_EXITS, after_failure
from worker.tracking import run_folder
from worker.traffic import Traffic
from worker.training import TrainerError, check_result, run_trainer

_LOOK_S = 0.2


class LeaseOverError(Exception):
    """The server wants no delta of this lease any more; carries its reason."""


class PausedTooLongError(Exception):
    """The pause takes longer than a lease is worth keeping; carries the words for the server, which
    are not why."""


class _HeldError(Exception):
    """The governor holds the work up; carries its reason."""


class LeaseWork:
    """Trains leases, one at a time."""

    def __init__(
        self,
        server: str,
        settings: WorkerSettings,
        *,
        outbox: Outbox,
        client: GatewayClient,
        governor: Governor,
        traffic: Traffic,
        stop: threading.Event,
        report: Callable[[WorkerEvent], None],
        trainer_command: Sequence[str],
        pull: PullBase,
    ) -> None:
        self._server = server
        self._settings = settings
        self._outbox = outbox
        self._client = client
        self._governor = governor
        self._traffic = traffic
        self._stop = stop
        self._report = report
        self._trainer_command = trainer_command
        self._pull = pull
        self._micro_batch: int | None = None
        """What fitted into memory last, where a whole batch did not."""
        self._narrowed: set[str] = set()
        """Models whose base did not fit into memory in 16 bits, though it should have."""
        self._loaded: Ready | None = None
        """How the running trainer holds base and batch."""

    def train(self, lease: Lease, heart: Heart, publisher_key: PublicKey) -> None:
        """From the grant to a delta in the outbox.

        Raises `LeaseOverError`, `PausedTooLongError`, `StopRequested`, and what downloads and trainer raise.
        """
        while True:
            try:
                job = self._prepare(lease, heart, publisher_key)
                result = self._train(lease, job, heart)
            except _HeldError as exc:
                self._sit_out(lease, heart, str(exc))
            else:
                check_result(job, result, max_bytes=lease.grant.max_delta_bytes)
                self._outbox.put(result.path, _statement(job, result), lease.grant.voucher)
                return

    # -- before ------------------------------------------------------------------------------------------------------

    def _prepare(self, lease: Lease, heart: Heart, publisher_key: PublicKey) -> Job:
        grant, limits = lease.grant, self._governor.limits
        _require_bounded(grant)
        self._check_wanted(heart, transfers=True)
        folders = self._versions(grant, heart, publisher_key)
        job = Job(
            round_id=grant.round_id,
            lease_id=grant.lease_id,
            fence=grant.fence,
            model=grant.model,
            base_manifest=grant.base_manifest,
            base_folder=folders[0],
            teacher_folder=folders[1] if grant.teacher is not None else None,
            shard_files=tuple(lease.folder / f"shard-{grant.shard + n}.jsonl" for n in range(grant.shards)),
            delta_file=lease.folder / "finished.delta",
            recipe=grant.recipe,
            seed=grant.seed,
            targets=grant.targets,
            device=self._settings.device,
            threads=device.usable_threads(limits.threads or self._settings.threads),
            checkpoint_file=lease.checkpoint_file,
            checkpoint_every_s=self._settings.checkpoint_every_s,
            micro_batch=self._micro_batch,
            precision="nf4" if grant.model in self._narrowed else self._settings.precision,
            report_to=self._settings.report_to,
            report_folder=run_folder(self._settings.home, grant.lease_id),
            nice=limits.nice,
            share_percent=limits.gpu_usage_limit,
        )
        self._fetch_shards(grant, job.shard_files, heart)
        self._check_wanted(heart)
        return job

    def _fetch_shards(self, grant: LeaseGrant, files: Sequence[Path], heart: Heart) -> None:
        """Download the shards that are not there yet."""
        total, before = sum(link.size_bytes for link in grant.shard_links), 0

        def progress(done: int, _size: int) -> None:
            self._downloading("shard", before + done, total, heart)

        for link, file in zip(grant.shard_links, files, strict=True):
            # A link that was signed for an earlier run may have ended; the bytes it led to were checked when they came.
            if not file.exists():
                wanted = partial(self._check_wanted, heart, transfers=True)
                self._client.download(link, file, max_bytes=MAX_LEASE_BYTES, progress=progress, check=wanted)
            before += link.size_bytes

    def _versions(self, grant: LeaseGrant, heart: Heart, publisher_key: PublicKey) -> list[Path]:
        """The folders of the lease's base version and of its teacher, where it has one, pulled when they are not in the
        cache, with room made for both."""
        store = self._settings.home / "cache"
        quota = int(self._governor.limits.disk_max_used_gb * 1e9) or self._settings.cache_bytes
        wanted = [VersionRef(model=grant.model, version=grant.base_version, manifest=grant.base_manifest)]
        wanted += [grant.teacher] if grant.teacher is not None else []
        folders = [cache.version_folder(store, version.manifest) for version in wanted]
        for what, version, folder in zip(("base", "teacher"), wanted, folders, strict=False):
            folder.mkdir(parents=True, exist_ok=True)
            cache.mark_used(folder)
            cache.make_room(store, quota, keep=folders)
            self._pull_version(what, version, folder, heart, publisher_key)
            cache.mark_used(folder)
            cache.make_room(store, quota, keep=folders)
        return folders

    def _pull_version(
        self, what: str, version: VersionRef, folder: Path, heart: Heart, publisher_key: PublicKey
    ) -> None:
        digest = self._client.patiently(
            lambda: self._pull(
                self._server,
                version.model,
                version.version,
                folder,
                publisher_key=publisher_key,
                progress=lambda done, total: self._downloading(what, done, total, heart),
                working=lambda: self._check_wanted(heart),
                limit=_WatchedRate(self._traffic, lambda: self._check_wanted(heart, transfers=True)),
            )
        )
        if digest != version.manifest:
            raise IntegrityError(f"version {version.version} is {digest[:16]}…, not {version.manifest[:16]}…")

    def _downloading(self, what: str, done: int, total: int, heart: Heart) -> None:
        self._check_wanted(heart, transfers=True)
        self._report(Downloading(what, done, total))

    def _check_wanted(self, heart: Heart, *, transfers: bool = False) -> None:
        if self._stop.is_set():
            raise StopRequested
        if heart.abandon is not None:
            raise LeaseOverError(heart.abandon)
        if (held := self._held(transfers=transfers)) is not None:
            raise _HeldError(held)

    def _held(self, *, transfers: bool) -> str | None:
        return self._governor.hold() or (self._governor.transfer_hold() if transfers else None)

    # -- the trainer -------------------------------------------------------------------------------------------------

    def _train(self, lease: Lease, job: Job, heart: Heart) -> Finished:
        """Run the trainer, again and again if need be, until it has finished."""
        tries = device_failures = 0
        begun = lease.begun()
        while True:
            tries += 1
            self._loaded = None
            self._report(Starting(lease.grant.lease_id))
            try:
                result = run_trainer(
                    job,
                    lease.folder / "job.json",
                    lease.log_file,
                    command=self._trainer_command,
                    on_line=lambda line: self._on_line(line, heart),
                    stop_reason=lambda: self._stop_reason(heart),
                    keep=lambda: heart.abandon is None and not self._governor.leaving,
                    share_percent=lambda: self._governor.limits.gpu_usage_limit,
                )
            except TrainerError as exc:
                before, begun = begun, lease.begun()
                device_failures += exc.trainer_exit == TrainerExit.DEVICE_FAILED
                loaded, asked = self._loaded, job.micro_batch or job.recipe.batch_size
                again = after_failure(
                    exc.trainer_exit,
                    tries=tries,
                    micro_batch=(loaded.micro_batch if loaded is not None else None) or asked,
                    checkpointing=loaded is None or loaded.checkpointing,
                    four_bit=loaded is not None and may_narrow(job.recipe, job.precision, loaded.precision),
                    new_checkpoint=begun != before,
                    device_failures=device_failures,
                )
                if again is None:
                    raise
                if again.four_bit:
                    self._narrowed.add(job.model)
                    self._micro_batch = None
                    job = job.model_copy(update={"precision": "nf4", "micro_batch": None})
                elif exc.trainer_exit in MEMORY_EXITS:
                    self._micro_batch = again.micro_batch
                    job = job.model_copy(update={"micro_batch": again.micro_batch})
                why = exc.cause.partition("\n")[0]
                self._report(Retrying(lease.grant.lease_id, why, begun.step, again.micro_batch))
                self._wait(again.pause_s, heart)
                continue
            if result is not None:
                return result
            self._check_wanted(heart)
            raise _HeldError("a moment ago something spoke against it")

    def _stop_reason(self, heart: Heart) -> str | None:
        if self._stop.is_set():
            return "the worker stops"
        return heart.abandon or self._governor.hold()

    def _on_line(self, line: Line, heart: Heart) -> None:
        if isinstance(line, Ready):
            self._loaded = line
        if isinstance(line, StepDone):
            heart.note(line.step, line.loss, line.tokens_per_s, grad_norm=line.grad_norm, energy_j=line.energy_j)
            self._report(Step(line.step, line.steps, line.loss, line.tokens_per_s, line.grad_norm, line.energy_j))
        elif isinstance(line, Answered):
            self._report(Answering(line.done, line.total))

    def _wait(self, seconds: float, heart: Heart) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check_wanted(heart)
            self._stop.wait(min(left, _LOOK_S))

    # -- pauses ------------------------------------------------------------------------------------------------------

    def _sit_out(self, lease: Lease, heart: Heart, reason: str) -> None:
        """Return when work may go on."""
        self._report(Paused(reason, lease.grant.lease_id))
        begun = lease.begun()
        limit_s = hold_s(begun.seconds)
        began = time.monotonic()
        while self._held(transfers=not begun) is not None:
            if self._stop.is_set():
                raise StopRequested
            if heart.abandon is not None:
                raise LeaseOverError(heart.abandon)
            if time.monotonic() - began > limit_s:
                raise PausedTooLongError(f"paused for more than {limit_s / 60:.0f} minutes")
            self._stop.wait(_LOOK_S)
        self._report(Resumed(lease.grant.lease_id))


class _WatchedRate:
    """How fast versions may be fetched, asked often enough to end a fetch that is not wanted any more at once."""

    def __init__(self, traffic: Traffic, check: Callable[[], None]) -> None:
        self._traffic = traffic
        self._check = check

    def take(self, count: int) -> float:
        wait_s = self._traffic.received(count)
        self._check()
        return wait_s


def _require_bounded(grant: LeaseGrant) -> None:
    """Raise unless the grant brings a link for each of its shards, and no more bytes than fit into memory."""
    if len(grant.shard_links) != grant.shards or grant.shards > MAX_SHARDS_PER_LEASE:
        raise InputError(
            f"the lease is for {grant.shards} shards and brings {len(grant.shard_links)} links; "
            f"{MAX_SHARDS_PER_LEASE} is the most"
        )
    size = sum(link.size_bytes for link in grant.shard_links)
    if size > MAX_LEASE_BYTES:
        raise TooLargeError(f"the shards of the lease have {size} bytes, the limit is {MAX_LEASE_BYTES}")


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
        device=result.device,
        precision=result.precision,
        tokens_per_s=result.tokens_per_s,
        grad_norm=result.grad_norm,
        energy_j=result.energy_j,
    )
