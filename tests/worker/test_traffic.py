"""Bytes by the day, and slowed down."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.traffic import FILE_NAME, Traffic


def test_a_day_is_counted_and_survives_the_process(tmp_path: Path) -> None:
    dates = ["2026-07-01"]
    first = Traffic(tmp_path, today=lambda: dates[-1])
    first.sent(10)
    first.received(5)
    first.received(-3)
    first.save()
    again = Traffic(tmp_path, today=lambda: dates[-1])
    assert (again.day().up, again.day().down) == (10, 5)
    dates.append("2026-07-02")
    assert again.day().total == 0


def test_a_damaged_count_starts_anew(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    assert Traffic(tmp_path).day().total == 0


def test_a_rate_holds_for_its_own_way_only_and_for_all_together(tmp_path: Path) -> None:
    now = [100.0]
    traffic = Traffic(tmp_path, clock=lambda: now[0])
    traffic.set_rates(up=1000.0, down=0.0)
    assert traffic.received(10**9) == 0.0
    assert traffic.sent(500) == pytest.approx(0.5)
    traffic.set_rates(up=1000.0, down=0.0)
    assert traffic.sent(500) == pytest.approx(1.0)
    now[0] += 0.9
    assert traffic.sent(0) == pytest.approx(0.1)
    now[0] += 0.1
    assert traffic.sent(0) == 0.0
    assert (traffic.day().up, traffic.day().down) == (1000, 10**9)


def test_a_rate_that_changes_holds_from_then_on(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path, clock=lambda: 100.0)
    traffic.set_rates(up=10.0, down=0.0)
    assert traffic.sent(1000) == pytest.approx(100.0)
    traffic.set_rates(up=1000.0, down=0.0)
    assert traffic.sent(0) == pytest.approx(1.0)
    assert traffic.sent(1000) == pytest.approx(2.0)
    traffic.set_rates(up=0.0, down=0.0)
    assert traffic.sent(10**9) == 0.0
