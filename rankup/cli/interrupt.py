"""Ctrl-C and SIGTERM for commands that own processes: the first ends the work, later ones cannot cut the cleaning."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within the block the first SIGINT or SIGTERM raises KeyboardInterrupt in the main thread and sets the event.

    Later ones are swallowed, so an impatient second Ctrl-C cannot leave half of the children running.
    """
    stopped = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if not stopped.is_set():
            stopped.set()
            raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
