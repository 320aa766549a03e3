"""Bytes by the day, and slowed down."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from worker.traffic import FILE_NAME, Traffic


def test_a_day_is_counted_and_survives_the_process(tmp_path: Path) -> None:
    dates = ["2026-07-01"]
    first = Traffic(tmp_path, threading.Event(), today=lambda: dates[-1])
    first.sent(10)
    first.received(5)
    first.received(-3)
    first.save()
    again = Traffic(tmp_path, threading.Event(), today=lambda: dates[-1])
    assert (again.day().up, again.day().down) == (10, 5)
    dates.append("2026-07-02")
    assert again.day().total == 0


def test_a_damaged_count_starts_anew(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    assert Traffic(tmp_path, threading.Event()).day().total == 0


def test_a_rate_slows_down_its_own_way_only_and_a_stop_ends_the_wait(tmp_path: Path) -> None:
    stop = threading.Event()
    traffic = Traffic(tmp_path, stop)
    traffic.set_rates(up=1000.0, down=0.0)
    began = time.monotonic()
    traffic.received(10**9)
    assert time.monotonic() - began < 0.2
    for _ in range(5):
        traffic.sent(100)
        traffic.set_rates(up=1000.0, down=0.0)
    # 500 bytes at 1000 a second, of which 250 may come in a burst
    assert time.monotonic() - began > 0.2
    threading.Timer(0.1, stop.set).start()
    traffic.sent(10**6)
    assert time.monotonic() - began < 5
