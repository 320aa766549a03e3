"""What the agent is doing, for whoever asks over the control socket or looks at the page: put together from its events.

What always holds: `seen` is cheap and never raises, so events may pass through it from any thread; an answer is a
consistent picture of one moment; it carries no secret. Nothing is decided here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from rankup.message import Answer
from worker.events import (
    Abandoned,
    Answering,
    Claimed,
    Downloading,
    Dropped,
    Enrolled,
    Kept,
    NoWork,
    PageOpened,
    Paused,
    Starting,
    Step,
    Submitted,
    Uploading,
    Waiting,
    WorkerEvent,
)
from worker.governor import Governor
from worker.history import LossCurve
from worker.limits import Limits
from worker.outbox import Outbox, OutboxState
from worker.traffic import Traffic


class Doing(StrEnum):
    """What goes on."""

    STARTING = "starting"
    IDLE = "waiting for work"
    DOWNLOADING = "downloading"
    LOADING = "loading the model"
    ANSWERING = "letting the teacher answer"
    TRAINING = "training"
    UPLOADING = "handing in"
    WAITING = "waiting for the server"
    PAUSED = "paused"


class LeaseStatus(Answer):
    """The present lease."""

    lease_id: str
    round_id: str
    model: str
    base_version: int
    shard: int
    """The first one."""
    shards: int = 1
    step: int
    steps: int
    loss: float | None = None
    """Nats per token, of the last step."""
    tokens_per_s: float | None = None
    grad_norm: float | None = None
    energy_j: float | None = None
    """Joules so far; None: the card does not tell."""
    eta_s: float | None = None
    """Seconds until the last step, at the pace of the steps so far; None before the second one."""


class UploadStatus(Answer):
    """A delta on its way, of the present lease or of the one before."""

    lease_id: str
    done: int
    """Bytes."""
    total: int


class Credit(Answer):
    """What this machine has done for the server so far, this run and earlier ones."""

    handed_in: int = 0
    accepted: int = 0
    rejected: int = 0
    tokens: int = 0
    """Of the accepted deltas."""


class Status(Answer):
    """The whole picture."""

    pid: int
    server: str
    worker_id: str = ""
    name: str = ""
    doing: Doing
    reason: str = ""
    """Why it is paused or waiting, in plain words."""
    paused_by_you: bool = False
    """The owner said so; other reasons may speak against work as well."""
    pause_ends_at: datetime | None = None
    """When the owner's pause is over by itself; None: when they say so."""
    finishing: bool = False
    """It ends after the present lease."""
    leaving: bool = False
    """It ends now, and the lease goes back."""
    lease: LeaseStatus | None = None
    upload: UploadStatus | None = None
    outbox_ready: int = 0
    """Finished deltas still to be uploaded."""
    outbox_submitted: int = 0
    """Deltas that wait for their verdict."""
    bytes_up: int = 0
    bytes_down: int = 0
    """Today."""
    credit: Credit = Credit()
    limits: Limits
    unread: tuple[str, ...] = ()
    """What the limits ask for and cannot be read on this machine."""
    uptime_s: float
    page: str = ""
    """Address of the page, which `rankup worker page` opens; empty where there is none."""


@dataclass(frozen=True)
class _Picture:
    worker_id: str = ""
    name: str = ""
    page: str = ""
    doing: Doing = Doing.STARTING
    reason: str = ""
    claimed: Claimed | None = None
    upload: Uploading | None = None
    step: Step | None = None
    first: tuple[int, float] | None = None
    """Step and time at which this training was first seen."""
    last_s: float = 0.0


class Board:
    """Sees the agent's events on their way to the display, and answers with a `Status`."""

    def __init__(
        self, server: str, report: Callable[[WorkerEvent], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._report = report
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._now = _Picture()
        self._curve = LossCurve()

    def __call__(self, event: WorkerEvent) -> None:
        with self._lock:
            self._now = self._after(self._now, event)
            if isinstance(event, Claimed):
                self._curve = LossCurve()
            elif isinstance(event, Step):
                self._curve.add(event.step, event.loss)
        self._report(event)

    def curve(self) -> tuple[tuple[int, float], ...]:
        """(step, loss) of the present training, or of the last one."""
        with self._lock:
            return self._curve.points()

    def status(self, governor: Governor, outbox: Outbox, traffic: Traffic) -> Status:
        """The picture now."""
        with self._lock:
            now = self._now
        items = outbox.items()
        accepted = [item for item in items if item.state is OutboxState.ACCEPTED]
        count = {state: sum(item.state is state for item in items) for state in OutboxState}
        hold = governor.hold() or (governor.transfer_hold() if now.claimed is None else None)
        day = traffic.day()
        readings, pause = governor.verdict.readings, governor.user_pause
        return Status(
            pid=os.getpid(),
            server=self._server,
            worker_id=now.worker_id,
            name=now.name,
            doing=Doing.PAUSED if hold else now.doing,
            reason=hold or now.reason,
            paused_by_you=pause is not None,
            pause_ends_at=pause.until if pause is not None else None,
            finishing=governor.finishing,
            leaving=governor.leaving,
            lease=self._lease(now),
            upload=UploadStatus(lease_id=now.upload.lease_id, done=now.upload.done, total=now.upload.total)
            if now.upload is not None
            else None,
            outbox_ready=count[OutboxState.READY],
            outbox_submitted=count[OutboxState.SUBMITTED],
            bytes_up=day.up,
            bytes_down=day.down,
            credit=Credit(
                handed_in=len(items) - count[OutboxState.READY] - count[OutboxState.DROPPED],
                accepted=count[OutboxState.ACCEPTED],
                rejected=count[OutboxState.REJECTED],
                tokens=sum(item.statement.tokens for item in accepted),
            ),
            limits=governor.limits,
            unread=readings.unread if readings is not None else (),
            uptime_s=round(self._clock() - self._began, 1),
            page=now.page,
        )

    def _after(self, now: _Picture, event: WorkerEvent) -> _Picture:
        match event:
            case Enrolled():
                return replace(now, worker_id=event.worker_id, name=event.name)
            case PageOpened():
                return replace(now, page=event.address)
            case Claimed():
                return replace(now, doing=Doing.DOWNLOADING, reason="", claimed=event, step=None, first=None)
            case Downloading():
                return replace(now, doing=Doing.DOWNLOADING, reason="")
            case Starting():
                return replace(now, doing=Doing.LOADING, reason="", first=None)
            case Answering():
                return replace(now, doing=Doing.ANSWERING, reason=f"{event.done} of {event.total} prompts")
            case Step():
                at = self._clock()
                return replace(
                    now, doing=Doing.TRAINING, reason="", step=event, first=now.first or (event.step, at), last_s=at
                )
            case Uploading():
                # The next lease may be trained meanwhile, until it waits for this upload.
                beside = now.claimed is not None and now.claimed.lease_id != event.lease_id
                trained = now.claimed is not None and now.step is not None and now.step.step >= now.claimed.steps
                if beside and not trained:
                    return replace(now, upload=event)
                return replace(now, doing=Doing.UPLOADING, reason="", upload=event)
            case Paused():
                # What follows the pause; while it lasts, the governor's word is shown.
                return replace(now, doing=Doing.LOADING if now.claimed is not None else Doing.IDLE, reason="")
            case NoWork():
                return replace(now, doing=Doing.IDLE, reason=event.reason, claimed=None)
            case Waiting():
                training = now.doing is Doing.TRAINING
                return replace(now, doing=now.doing if training else Doing.WAITING, reason=event.reason)
            case Submitted() | Abandoned() | Dropped() | Kept():
                upload = now.upload if now.upload is None or now.upload.lease_id != event.lease_id else None
                if now.claimed is not None and now.claimed.lease_id != event.lease_id:
                    return replace(now, upload=upload)
                return replace(now, doing=Doing.IDLE, reason="", claimed=None, upload=upload)
        return now

    def _lease(self, now: _Picture) -> LeaseStatus | None:
        if now.claimed is None:
            return None
        more: dict[str, Any] = {"step": now.claimed.step}
        if now.step is not None:
            more = {"step": now.step.step, "loss": now.step.loss, "tokens_per_s": now.step.tokens_per_s}
            more |= {"grad_norm": now.step.grad_norm, "energy_j": now.step.energy_j}
            if now.first is not None and now.step.step > now.first[0]:
                pace_s = (now.last_s - now.first[1]) / (now.step.step - now.first[0])
                more["eta_s"] = round(pace_s * (now.claimed.steps - now.step.step), 1)
        claimed = now.claimed
        return LeaseStatus(
            lease_id=claimed.lease_id,
            round_id=claimed.round_id,
            model=claimed.model,
            base_version=claimed.base_version,
            shard=claimed.shard,
            shards=claimed.shards,
            steps=claimed.steps,
            **more,
        )
