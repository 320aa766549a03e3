"""Volunteers in threads: the worker's own client, outbox and delivery over real HTTP; only the training is made up.

What a volunteer hands in for a shard is a function of (round of the campaign, shard) alone, and the weights of the
shards are exact fractions: so the versions of a campaign have the same bits whoever trained what, and however often.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hand_volunteer import header_of, random_factors

from rankup.delta import write_delta
from rankup.errors import FatalError, RetryableError, UnauthenticatedError
from rankup.protocol import (
    ClaimRequest,
    DeviceProfile,
    EnrolRequest,
    EnrolStatement,
    LeaseGrant,
    SubmitStatement,
)
from rankup.signing import generate_private_key, parse_private_key, public_key_hex, sign
from worker.client import GatewayClient, StopRequested
from worker.delivery import Delivery
from worker.events import Dropped, Submitted, Verdict, WorkerEvent
from worker.outbox import Outbox
from worker.retry import RetryPolicy

T = TypeVar("T")

TOKENS = (64, 128, 256, 64, 128, 256, 64, 64)
"""Of the shards of a round. Their sum is a power of two, so that every coefficient is exact."""
THINK_S = (0.1, 0.5)
"""How long a training takes."""
PATIENCE = RetryPolicy(patience_s=300.0, base_s=0.2, cap_s=2.0)
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Event:
    """Something that a volunteer saw."""

    at: float
    """Monotonic seconds."""
    kind: str
    """enrol, answer (to a claim, with a lease or without), claim, submit, accepted, rejected, dropped or refused."""
    lease_id: str = ""
    contribution: str = ""
    detail: str = ""


class Crowd:
    """Everybody who takes part in one campaign. `start`, then `stop`; `events` is what happened, in order."""

    def __init__(
        self, url: str, invite: str, model: str, folder: Path, *, size: int, seed: int, oversleep_s: float = 0.0
    ) -> None:
        """`oversleep_s`: every third training takes this much longer."""
        self.events: list[Event] = []
        self.errors: list[BaseException] = []
        self.stopping = threading.Event()
        self._volunteers = [
            _Volunteer(
                url, invite, f"v{n}", model, folder / f"v{n}", random.Random(f"{seed}|{n}"), self._note, oversleep_s
            )
            for n in range(size)
        ]
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in self._volunteers]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the work and wait for the threads; raise what ended one of them early."""
        self.stopping.set()
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    def verdicts_awaited(self) -> bool:
        return any(each.delivery.awaits_verdicts() for each in self._volunteers)

    def _note(self, kind: str, lease_id: str = "", contribution: str = "", detail: str = "") -> None:
        self.events.append(Event(time.monotonic(), kind, lease_id, contribution, detail))

    def _run(self, volunteer: _Volunteer) -> None:
        try:
            volunteer.work(self.stopping)
        except StopRequested:
            pass
        except BaseException as exc:  # noqa: BLE001 - raised again by `stop`
            self.errors.append(exc)


class _Volunteer:
    def __init__(
        self,
        url: str,
        invite: str,
        name: str,
        model: str,
        folder: Path,
        rng: random.Random,
        note: Callable[..., None],
        oversleep_s: float,
    ) -> None:
        self._oversleep_s = oversleep_s
        self._invite, self._name, self._model, self._rng, self._note = invite, name, model, rng, note
        self._folder = folder
        self._key = parse_private_key(generate_private_key())
        self._outbox = Outbox(folder / "outbox")
        self._stop = threading.Event()
        self._patient = GatewayClient(url, policy=PATIENCE, stop=self._stop, timeout_s=TIMEOUT_S)
        self._steady = GatewayClient(url, policy=RetryPolicy(patience_s=0.0), timeout_s=TIMEOUT_S)
        self.delivery = Delivery(
            self._outbox, self._key, patient=self._patient, steady=self._steady, report=self._on_event
        )

    def work(self, stopping: threading.Event) -> None:
        """Claim, train, deliver, until `stopping` is set."""
        threading.Thread(target=lambda: stopping.wait() and self._stop.set(), daemon=True).start()
        try:
            self._enrol()
            while not self._stop.is_set():
                try:
                    self._turn()
                except FatalError as exc:
                    # Of a lease that the server no longer knows, or of a round that is over: on to the next.
                    self._note("refused", detail=f"{exc.code}: {exc.cause}")
                    self._stop.wait(0.2)
        finally:
            self._outbox.close()
            self._patient.close()
            self._steady.close()

    def _turn(self) -> None:
        self._with_token(self.delivery.deliver)
        self._with_token(self.delivery.ask_verdicts)
        answer = self._with_token(lambda: self._patient.claim(ClaimRequest(models=(self._model,))))
        self._note("answer")
        if answer.lease is None:
            self._stop.wait(self._rng.uniform(0.2, 0.4))
            return
        self._note("claim", answer.lease.lease_id)
        self._train(answer.lease)

    def _train(self, lease: LeaseGrant) -> None:
        for link in lease.shard_links:
            path = self._folder / "shard"
            self._patient.download(link, path, max_bytes=2**20, progress=lambda _done, _total: None)
        self._stop.wait(self._rng.uniform(*THINK_S) + self._rng.choice((0.0, 0.0, self._oversleep_s)))
        delta = self._folder / f"{lease.lease_id}.delta"
        write_delta(delta, header_of(lease), random_factors(lease, seed=seed_of(lease)))
        data = delta.read_bytes()
        statement = SubmitStatement(
            round_id=lease.round_id,
            lease_id=lease.lease_id,
            fence=lease.fence,
            base_manifest=lease.base_manifest,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            tokens=TOKENS[lease.shard],
            steps=1,
            first_loss=3.0,
            last_loss=2.0,
            seconds=1.0,
        )
        self._outbox.put(delta, statement, lease.voucher)

    def _enrol(self) -> None:
        statement = EnrolStatement(
            public_key=public_key_hex(self._key),
            name=self._name,
            invite=self._invite,
            device=DeviceProfile(),
            issued_at=time.time(),
        )
        request = EnrolRequest(statement=statement, signature=sign(self._key, "enrol", statement))
        token = self._patient.enrol(request).token
        for client in (self._patient, self._steady):
            client.use_token(token)
        self._note("enrol")

    def _with_token(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except UnauthenticatedError:
            self._enrol()
            return call()
        except RetryableError:
            # Patience is over; in a campaign of minutes that is a finding, and ends the run.
            raise RuntimeError(f"{self._name} waited {PATIENCE.patience_s} s for nothing") from None

    def _on_event(self, event: WorkerEvent) -> None:
        match event:
            case Submitted(lease_id=lease_id, contribution=sha256):
                self._note("submit", lease_id, sha256)
            case Verdict(lease_id=lease_id, accepted=accepted, reason=reason):
                self._note("accepted" if accepted else "rejected", lease_id, detail=reason)
            case Dropped(lease_id=lease_id, reason=reason):
                self._note("dropped", lease_id, detail=reason)
            case _:
                pass


def seed_of(lease: LeaseGrant) -> int:
    """Of the delta: nothing but the place of the work in the campaign. Each round of it makes one version, from 0."""
    return 1000 * lease.base_version + lease.shard
