"""Bytes that come and go: counted by day, and how long to wait for what the limits allow.

What always holds: a day is a local one; the count survives the process (`traffic.json`, written at most every few
seconds, and at the end); a damaged count starts anew. What is counted: bodies of messages, shards, deltas, and the base
versions' bytes; not headers. It says how long to wait and never waits itself: who moves bytes has more to look at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from rankup.download import RateLimit
from rankup.durable import write_file
from rankup.message import Message

FILE_NAME = "traffic.json"
_SAVE_EVERY_S = 5.0
_MAX_FILE_BYTES = 4096
_BURST_S = 0.5
"""What a transfer that was held up by a busy machine makes up for, in seconds of its rate."""
Count = Annotated[int, Field(ge=0, le=2**62)]


class Day(Message):
    """Bytes of one local day."""

    date: str = ""
    up: Count = 0
    down: Count = 0

    @property
    def total(self) -> int:
        return self.up + self.down


class Traffic:
    """Counts and knows the rates; its methods may be called from several threads. `today` gives the date as
    YYYY-MM-DD."""

    def __init__(
        self,
        home: Path,
        *,
        today: Callable[[], str] = lambda: time.strftime("%Y-%m-%d"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = home / FILE_NAME
        self._today = today
        self._clock = clock
        self._lock = threading.Lock()
        self._saved_at = clock()
        self._rates: dict[str, RateLimit] = {}
        self._day = self._load()

    def day(self) -> Day:
        """The bytes of today."""
        with self._lock:
            return self._now()

    def set_rates(self, *, up: float, down: float) -> None:
        """Bytes a second from now on; 0: as fast as they go."""
        with self._lock:
            for way, rate in (("up", up), ("down", down)):
                if rate <= 0:
                    self._rates.pop(way, None)
                elif way in self._rates:
                    self._rates[way].change(rate)
                else:
                    self._rates[way] = RateLimit(rate, burst_s=_BURST_S, clock=self._clock)

    def sent(self, count: int) -> float:
        """Count bytes that went out; seconds to wait before more do. With 0: what is left of that."""
        return self._take("up", count)

    def received(self, count: int) -> float:
        """Count bytes that came in; seconds to wait before more do. With 0: what is left of that."""
        return self._take("down", count)

    def save(self) -> None:
        """Write today's count."""
        with self._lock:
            self._save()

    def _take(self, way: str, count: int) -> float:
        with self._lock:
            if count > 0:
                day = self._now()
                self._day = day.model_copy(update={way: getattr(day, way) + count})
                if self._clock() - self._saved_at >= _SAVE_EVERY_S:
                    self._save()
            rate = self._rates.get(way)
        return rate.take(max(0, count)) if rate is not None else 0.0

    def _now(self) -> Day:
        date = self._today()
        if self._day.date != date:
            self._day = Day(date=date)
        return self._day

    def _load(self) -> Day:
        try:
            with self._file.open("rb") as file:
                return Day.model_validate_json(file.read(_MAX_FILE_BYTES))
        except (OSError, ValidationError):
            return Day()

    def _save(self) -> None:
        self._saved_at = self._clock()
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the doctor counts before anybody has joined
        write_file(self._file, self._day.model_dump_json().encode())
