"""Whether the agent may work now: looks at the machine once a second and holds the owner's orders.

What always holds: `hold` and `transfer_hold` answer at once with what the last look found; the first look is made when
the `with` block is entered, so nothing begins on a machine that is in use, or that its owner has told to pause before
the last restart; a limits file that cannot be used is reported once, and the limits before it stay in force; a look
that fails changes nothing; the thread is gone when the block is left.

The rules are those of `worker.limits`; it starts and stops nothing itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from rankup.errors import RankupError, SetupError
from worker.events import Problem, WorkerEvent
from worker.limits import Limits, UserPause, Verdict, available_s, step, transfer_reason
from worker.limitsfile import LimitsWatch
from worker.readings import Sense
from worker.traffic import Traffic
from worker.userpause import read_pause, write_pause

LOOK_EVERY_S = 1.0


class Governor:
    """Holds limits, orders and the last verdict of one agent. Its methods may be called from several threads.

    `home` has the limits, `folder` the owner's pause: of one server, where a home has agents of several.
    `dedicated`: the machine does nothing else; batteries and people at the keyboard do not count.
    """

    def __init__(
        self,
        home: Path,
        folder: Path,
        traffic: Traffic,
        sense: Sense,
        report: Callable[[WorkerEvent], None],
        *,
        gpu: bool,
        dedicated: bool = False,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        """Raises `InputError` for a limits file that cannot be used."""
        self._watch = LimitsWatch(home)
        self._folder = folder
        self._traffic = traffic
        self._sense = sense
        self._report = report
        self._gpu = gpu
        self._dedicated = dedicated
        self._clock = clock
        self._now = now
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._pause = read_pause(folder)
        self._verdict = Verdict()
        self._thread = threading.Thread(target=self._run, name="governor", daemon=True)
        self.finishing = False
        """The owner wants the worker to end after the present lease."""
        self.leaving = False
        """The owner wants the present lease returned and the worker to end."""

    def __enter__(self) -> Governor:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        self._traffic.save()

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._watch.limits.for_dedicated() if self._dedicated else self._watch.limits

    @property
    def verdict(self) -> Verdict:
        """What the last look found."""
        return self._verdict

    def hold(self) -> str | None:
        """Why nothing may be trained now, in plain words; None when it may."""
        reason = self._verdict.stance.reason
        return reason.words if reason is not None else None

    def transfer_hold(self) -> str | None:
        """Why nothing may be uploaded or downloaded now, in plain words; None when it may.

        The limit of the day holds from its last byte on, not from the next look.
        """
        most_bytes = self._watch.limits.daily_xfer_limit_mb * 1e6
        if self._verdict.transfer is None and 0 < most_bytes <= self._traffic.day().total:
            self.look()
        return self._verdict.transfer

    def available_s(self) -> float | None:
        """Seconds until an hour at which nothing may be trained; None: the owner set no hours."""
        return available_s(self.limits, self._now())

    @property
    def user_pause(self) -> UserPause | None:
        """The owner's pause that is in force."""
        with self._lock:
            return self._pause

    def pause(self, seconds: float | None) -> None:
        """The owner wants a pause, for `seconds` or until `resume`; it outlives this process."""
        self._set_pause(UserPause(self._now() + timedelta(seconds=seconds) if seconds is not None else None))
        self.look()

    def resume(self) -> None:
        """The owner's pause is over; other reasons stay."""
        self._set_pause(None)
        self.look()

    def finish(self) -> None:
        """End after the present lease; a pause by the owner is over."""
        self.finishing = True
        self.resume()

    def leave(self) -> None:
        """The lease goes back and the run ends; a pause by the owner is over with it."""
        self.leaving = True
        self._set_pause(None)

    def look(self) -> None:
        """Read limits and machine, and judge."""
        try:
            self._watch.look()
        except RankupError as exc:
            self._report(Problem(exc))
        with self._lock:
            if self._pause is not None and self._pause.until is not None and self._now() >= self._pause.until:
                self._set_pause(None)
        limits = self.limits
        self._traffic.set_rates(up=limits.max_bytes_sec_up, down=limits.max_bytes_sec_down)
        readings = self._sense(limits, gpu=self._gpu, transferred_bytes=self._traffic.day().total)
        with self._lock:
            stance = step(self._verdict.stance, limits, readings, self._pause, self._clock())
            self._verdict = Verdict(stance, transfer_reason(limits, readings, stance), readings)

    def _set_pause(self, pause: UserPause | None) -> None:
        with self._lock:
            self._pause = pause
            try:
                write_pause(self._folder, pause)
            except OSError as exc:
                self._report(
                    Problem(SetupError(f"a pause cannot be written down: {exc}", remedy="It holds until a restart."))
                )

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            try:
                self.look()
            except (OSError, RankupError):
                continue  # the next look comes in a second, and what the last one found still holds
