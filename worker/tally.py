"""Counts the agent's events on their way to the display.

What always holds: events reach `report` one at a time, whichever thread they come from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from worker.events import Claimed, Dropped, Submitted, Summary, Verdict, WorkerEvent
from worker.outbox import Outbox, OutboxState


class Tally:
    """A `report` that passes everything on and remembers the numbers."""

    def __init__(self, report: Callable[[WorkerEvent], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._leases = self._submitted = self._accepted = self._rejected = self._dropped = self._tokens = 0

    def __call__(self, event: WorkerEvent) -> None:
        with self._lock:
            match event:
                case Claimed():
                    self._leases += 1
                case Submitted():
                    self._submitted += 1
                    self._tokens += event.tokens
                case Verdict():
                    self._accepted += event.accepted
                    self._rejected += not event.accepted
                case Dropped():
                    self._dropped += 1
            self._report(event)

    def summary(self, outbox: Outbox) -> Summary:
        """What happened since this tally was made."""
        return Summary(
            leases=self._leases,
            submitted=self._submitted,
            accepted=self._accepted,
            rejected=self._rejected,
            dropped=self._dropped,
            tokens=self._tokens,
            waiting=len(outbox.items(OutboxState.READY, OutboxState.SUBMITTED)),
            seconds=self._clock() - self._started,
        )
