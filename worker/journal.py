"""What happened, as lines with the time, in a file that stays small: for `rankup worker logs` and the page.

What always holds: the file has mode 600 and at most `MAX_BYTES`; then it becomes `….old` and a new one begins; a
journal that cannot be written is given up silently, since the work is worth more.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from worker.display import PlainDisplay
from worker.events import WorkerEvent
from worker.training import log_tail

FILE_NAME = "agent.log"
MAX_BYTES = 1024**2
RECENT_LINES = 40


class Journal:
    """Passes events on to `report` and writes them down in `folder`."""

    def __init__(self, folder: Path, report: Callable[[WorkerEvent], None]) -> None:
        self._file = folder / FILE_NAME
        self._report = report
        self._display = PlainDisplay(self._write, quiet_s=30.0)
        self._lock = threading.Lock()
        self._recent = deque(log_tail(self._file, RECENT_LINES), maxlen=RECENT_LINES)

    def __call__(self, event: WorkerEvent) -> None:
        self._display(event)
        self._report(event)

    def recent(self) -> tuple[str, ...]:
        """The last lines, of earlier runs too."""
        with self._lock:
            return tuple(self._recent)

    def _write(self, words: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}"
        with self._lock:
            self._recent.append(line)
        with contextlib.suppress(OSError):
            if self._file.exists() and self._file.stat().st_size > MAX_BYTES:
                self._file.replace(self._file.with_name(FILE_NAME + ".old"))
            with os.fdopen(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
                file.write(line + "\n")
