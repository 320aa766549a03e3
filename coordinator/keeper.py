"""The keeper drives every round forward: reap, admit, aggregate, evaluate, publish, open the next one.

    every tick_s: for each round that owes something and is not being driven
        tick it (pure `rounds.step`, stored by the ledger)  ->  commands  ->  carry them out  ->  report back as events

What always holds:
- the keeper keeps nothing that cannot be lost: what to do next follows from the ledger (`rounds.owed`), what was done
  lies in object storage. Killed at any point and started again, it does the same things again with the same bits;
- one round never waits for another: each is driven by a coroutine of its own;
- a failure changes no state. It is shown as the round's reason, and the round is tried again, later each time.

It does no arithmetic and moves no pointer itself: that is the aggregator's, which is handed in where the process is
assembled. The Ray actor at the end of this module is only the shell around `Keeper`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import ray
import structlog

from coordinator.ending import end_of, keep_end
from coordinator.ledger import Ledger, RoundStatus
from coordinator.metrics import Tally
from coordinator.opening import open_round
from coordinator.people_settling import SETTLE_S, Bookkeeper
from coordinator.reporter import Reporter
from coordinator.rounds import (
    Admit,
    Aggregate,
    Command,
    Evaluate,
    Evaluated,
    Failed,
    Folded,
    OpenNext,
    Overtaken,
    Publish,
    Published,
    ReapLeases,
    Recorded,
    RecordEnd,
    Tick,
    owed,
)
from coordinator.stages import MeasuredAggregator
from coordinator.unjudged import forget_submission
from rankup.errors import ConflictError, NotFoundError, RankupError, RetryableError, StateError
from rankup.logs import configure_server
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.records import Evaluation, Manifest, Receipt, RoundRecord, Submission
from rankup.settings import CoordinatorSettings, LedgerSettings, StoreSettings
from rankup.signing import load_private_key, public_key_hex
from rankup.store import Store, open_store
from rankup.versions import MAX_ENVELOPE_BYTES, draft_key

ACTOR_NAME = "rankup-keeper"
MAX_BACKOFF_S = 60.0
PARALLEL_ADMISSIONS = 4
STOP_S = 10.0
"""How long the command under way may take to finish when the server stops."""

log = structlog.get_logger(__name__)


class Aggregator(Protocol):
    """What the keeper needs done with contributions; each method may be repeated after a crash and gives the same."""

    async def admit(self, record: RoundRecord, submission: Submission, now: float, valid_in_a_row: int) -> Receipt:
        """Judge a delta and write the receipt to object storage; `valid_in_a_row` is the worker's record so far, less
        where its reputation is bad (`reputation.trust`)."""

    async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
        """Add the accepted contributions to the base, or to the latest version where only undone or re-signed versions
        came since; the manifest has no evaluation yet."""

    async def evaluate(self, record: RoundRecord, manifest: Manifest) -> Evaluation:
        """Held-out loss of the folded version and of its parent."""

    async def publish(self, manifest: Manifest) -> Pointer:
        """Seal and write the manifest, then move the pointer. Raises ConflictError: its parent is not the latest."""


class Keeper:
    """One tick of it looks at every round once. Everything it touches is handed in."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        aggregator: Aggregator,
        *,
        publisher_key: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._aggregator = aggregator
        self._publisher_key = publisher_key
        self._clock = clock
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._stopping = False
        self._not_before: dict[str, float] = {}

    async def run(self, tick_s: float) -> None:
        """Tick until cancelled. A ledger that does not answer is waited for."""
        while True:
            try:
                await self.tick()
            except RetryableError as exc:
                log.warning("keeper_waits", cause=exc.cause)
            except Exception:
                log.exception("keeper_tick_failed")
            await asyncio.sleep(tick_s)

    async def tick(self) -> None:
        """Start a driver for every round that needs one and has none."""
        if self._stopping:
            return
        for status in await self._ledger.unfinished():
            round_id = status.record.round_id
            if round_id in self._driving or self._clock() < self._not_before.get(round_id, 0.0):
                continue
            self._driving[round_id] = asyncio.create_task(self._drive(status))

    async def settle(self) -> None:
        """Wait until nothing is being driven (for tests and for an orderly stop)."""
        while self._driving:
            await asyncio.gather(*self._driving.values())

    async def stop(self, patience_s: float) -> bool:
        """Begin no further command, and wait for those under way; whether they ended within `patience_s`.

        What is still running then may be killed: it is done again by the next keeper.
        """
        self._stopping = True
        driving = list(self._driving.values())
        if not driving:
            return True
        _, running = await asyncio.wait(driving, timeout=patience_s)
        return not running

    async def _drive(self, status: RoundStatus) -> None:
        round_id = status.record.round_id
        with structlog.contextvars.bound_contextvars(round_id=round_id):
            try:
                if status.facts.state.ended:
                    commands = owed(status.facts)
                else:
                    status, commands = await self._ledger.apply(round_id, Tick(), self._clock())
                for command in commands:
                    if self._stopping:
                        return
                    await self._carry_out(status, command)
                self._not_before.pop(round_id, None)
            except Exception as exc:  # noqa: BLE001 - whatever fails, the round must stay able to finish
                await self._on_failure(status, exc)
            finally:
                del self._driving[round_id]

    async def _on_failure(self, status: RoundStatus, exc: Exception) -> None:
        failures = status.facts.failures + 1
        pause_s = min(MAX_BACKOFF_S, 2.0 ** min(failures, 6) / 2)
        self._not_before[status.record.round_id] = self._clock() + pause_s
        if isinstance(exc, StateError | ConflictError):
            log.info("round_moved_meanwhile", cause=exc.cause)
            return
        log.error("round_failed", error=str(exc), failures=failures, retry_in_s=pause_s, exc_info=exc)
        # Everybody may read the reason of a round: no addresses of servers, no text of foreign exceptions.
        if isinstance(exc, RetryableError):
            reason = "a server or task that the round needs does not answer"
        else:
            reason = exc.cause if isinstance(exc, RankupError) else f"an unforeseen {type(exc).__name__}"
        with contextlib.suppress(RankupError):  # the ledger itself may be what does not answer
            if not status.facts.state.ended:
                failed = Failed(f"{reason} (try {failures}; trying again)"[:500])
                await self._ledger.apply(status.record.round_id, failed, self._clock())

    async def _carry_out(self, status: RoundStatus, command: Command) -> None:
        record, facts = status.record, status.facts
        match command:
            case ReapLeases():
                for lease_id in await self._ledger.reap(record.round_id, self._clock()):
                    log.info("lease_expired", lease_id=lease_id)
            case Admit():
                await self._admit(record)
            case Aggregate():
                receipts = await self._ledger.receipts(record.round_id)
                # The time of closing, not of folding: a fold that is done again must give the same manifest.
                closed_at = facts.closed_at if facts.closed_at is not None else facts.opened_at
                manifest = await self._aggregator.fold(record, receipts, closed_at)
                await self._report(record, Folded(await self._keep_draft(record, manifest)))
            case Evaluate():
                manifest = await self._draft(record, facts.folded_manifest)
                await self._report(record, Evaluated(await self._aggregator.evaluate(record, manifest)))
            case Publish(evaluation=evaluation):
                manifest = await self._draft(record, facts.folded_manifest)
                try:
                    pointer = await self._aggregator.publish(manifest.model_copy(update={"evaluation": evaluation}))
                except ConflictError as exc:
                    log.info("round_overtaken", cause=exc.cause)
                    await self._report(record, Overtaken())
                    return
                await self._report(record, Published(pointer.version))
                log.info("version_published", model=pointer.model, version=pointer.version)
            case RecordEnd():
                await asyncio.to_thread(keep_end, self._store, end_of(record.round_id, facts, self._clock()))
                await self._report(record, Recorded())
            case OpenNext(index=index, paused=paused):
                await open_round(
                    self._ledger,
                    self._store,
                    record.request,
                    index=index,
                    previous=record,
                    now=self._clock(),
                    paused=paused,
                    publisher_key=self._publisher_key,
                )

    async def _report(self, record: RoundRecord, event: Folded | Evaluated | Published | Overtaken | Recorded) -> None:
        await self._ledger.apply(record.round_id, event, self._clock())

    async def _admit(self, record: RoundRecord) -> None:
        gate = asyncio.Semaphore(PARALLEL_ADMISSIONS)

        async def judge(submission: Submission) -> None:
            async with gate:
                if self._stopping:
                    return
                trusted = await self._ledger.people.scores.trust(submission.worker_id, record.request.model)
                receipt = await self._aggregator.admit(record, submission, self._clock(), trusted)
                lease = await self._ledger.judge(submission.statement.lease_id, receipt, self._clock())
                await asyncio.to_thread(forget_submission, self._store, record.round_id, submission)
            log.info(
                "contribution_judged",
                lease_id=lease.lease_id,
                contribution=submission.statement.sha256,
                state=lease.state.value,
                reason=receipt.reason,
            )

        pending = await self._ledger.pending(record.round_id)
        outcomes = await asyncio.gather(*(judge(submission) for submission in pending), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _keep_draft(self, record: RoundRecord, manifest: Manifest) -> str:
        data = canonical_json(manifest)
        await asyncio.to_thread(self._store.put, draft_key(record.round_id), data, content_type="application/json")
        return hashlib.sha256(data).hexdigest()

    async def _draft(self, record: RoundRecord, digest: str | None) -> Manifest:
        """The folded manifest; raises NotFoundError when object storage lost it or holds another one."""
        data = await asyncio.to_thread(self._store.get, draft_key(record.round_id), max_bytes=MAX_ENVELOPE_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise NotFoundError(
                f"the folded manifest of {record.round_id} is not the one that was folded",
                remedy="Cancel the round and open it again: its contributions are kept.",
            )
        return Manifest.model_validate_json(data)


# -- the Ray actor -----------------------------------------------------------------------------------------------------


class KeeperActor:
    """Runs a Keeper for as long as the actor lives; Ray restarts it when it dies."""

    async def __init__(self, store_wire: str, ledger_wire: str, settings_wire: str, aggregator: Aggregator) -> None:  # type: ignore[misc]
        # Ray awaits the constructor of an async actor, so that a restarted keeper starts its loop by itself.
        configure_server("keeper")
        settings = CoordinatorSettings.from_wire(settings_wire)
        ledger = await Ledger.connect(LedgerSettings.from_wire(ledger_wire))
        store = open_store(StoreSettings.from_wire(store_wire))
        publisher_key = public_key_hex(load_private_key(settings.publisher_key_file))
        tally = Tally()

        async def the_ledger() -> Ledger:
            return ledger

        self._reporter = Reporter(tally, the_ledger, role="keeper", clock=time.time)
        self._reporter.start()
        self._keeper = Keeper(ledger, store, MeasuredAggregator(aggregator, tally), publisher_key=publisher_key)
        loop: Coroutine[Any, Any, None] = self._keeper.run(settings.tick_s)
        self._loop = asyncio.create_task(loop)
        books: Coroutine[Any, Any, None] = Bookkeeper(ledger, store, publisher_key).run(SETTLE_S)
        self._books = asyncio.create_task(books)

    async def alive(self) -> bool:
        """Whether the loop runs; raises what ended it."""
        if self._loop.done():
            self._loop.result()
        return not self._loop.done()

    async def stop(self, patience_s: float) -> bool:
        """As `Keeper.stop`; the last counts are reported."""
        ended = await self._keeper.stop(patience_s)
        await self._reporter.stop()
        return ended


def start_keeper(
    store: StoreSettings, ledger: LedgerSettings, settings: CoordinatorSettings, aggregator: Aggregator
) -> None:
    """Start the one keeper of this cluster as a detached actor, or leave the running one alone."""
    actor = ray.remote(KeeperActor).options(
        name=ACTOR_NAME,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        num_cpus=0,
    )
    handle = actor.remote(store.to_wire(), ledger.to_wire(), settings.to_wire(), aggregator)
    ray.get(handle.alive.remote(), timeout=120)


def stop_keeper() -> None:
    """End the keeper between two commands, or after `STOP_S`; nothing happens when there is none."""
    with contextlib.suppress(ValueError, RuntimeError):
        actor = ray.get_actor(ACTOR_NAME)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.stop.remote(STOP_S), timeout=STOP_S + 5.0)
        ray.kill(actor, no_restart=True)
