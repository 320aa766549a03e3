"""A finished delta on its way to the server while the next lease is trained: one delivery at a time, in a thread.

What always holds:
- the heartbeat of a lease goes on until its delta has been handed in, or does not get there now;
- who sends the next one waits for the one before, so no more than two leases are ever under way;
- what ends a delivery early is raised where the agent waits for it or asks about it, and nowhere else;
- a delivery that is called off ends between two pieces; its delta stays in the outbox.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from worker.client import StopRequested

_LOOK_S = 0.2


class Courier:
    """Runs `deliver` beside the agent's own work. `stop` ends every wait."""

    def __init__(self, deliver: Callable[[], None], stop: threading.Event) -> None:
        self._deliver = deliver
        self._stop = stop
        self._off = threading.Event()
        self._thread: threading.Thread | None = None
        self._lease_id: str | None = None
        self._error: BaseException | None = None

    @property
    def lease_id(self) -> str | None:
        """The lease whose delta is on its way."""
        return self._lease_id

    @property
    def called_off(self) -> bool:
        """Whether the delivery under way should end; `deliver` has to look."""
        return self._off.is_set()

    def send(self, lease_id: str, heart: ExitStack) -> None:
        """Begin to deliver, and close `heart` at the end. Raises as `finish`."""
        self.finish()
        self._lease_id = lease_id
        self._thread = threading.Thread(target=self._run, args=(heart,), name=f"courier-{lease_id}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether nothing is on its way, after at most `seconds`. Raises `StopRequested`, and what ended a delivery."""
        until = time.monotonic() + seconds
        while self._thread is not None:
            left = until - time.monotonic()
            self._thread.join(max(0.0, min(left, _LOOK_S)))
            if not self._thread.is_alive():
                self._thread = self._lease_id = None
            elif self._stop.is_set():
                raise StopRequested
            elif left <= 0:
                return False
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def finish(self) -> None:
        """Return when nothing is on its way. Raises as `wait`."""
        while not self.wait(_LOOK_S):
            pass

    def call_off(self, seconds: float) -> None:
        """End the delivery under way, and wait for that for at most `seconds`."""
        self._off.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, heart: ExitStack) -> None:
        try:
            with heart:
                self._deliver()
        except BaseException as exc:  # noqa: BLE001 - raised again where the agent waits
            self._error = exc
