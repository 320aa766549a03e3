"""How fast bytes go: what is sent, for how long, what is remembered, and what that gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.errors import BusyError
from rankup.protocol import LinkMeasured
from worker.links import GOOD_FOR_S, LONGEST_S, SIZES, Links, measure, remember, remembered


class Line:
    """A line with a rate each way and a round trip, on a clock of its own."""

    def __init__(self, up: float, down: float, trip_s: float, told: float = 0.0) -> None:
        self.up, self.down, self.trip_s, self.told = up, down, trip_s, told
        self.now = 0.0
        self.sent: list[int] = []
        self.got: list[int] = []

    def link_up(self, data: bytes) -> LinkMeasured:
        self.sent.append(len(data))
        self.now += self.trip_s + len(data) / self.up
        return LinkMeasured(size_bytes=len(data), seconds=self.told * len(data) / self.up)

    def link_down(self, size_bytes: int) -> int:
        self.got.append(size_bytes)
        self.now += self.trip_s + size_bytes / self.down
        return size_bytes

    def clock(self) -> float:
        return self.now


@settings(max_examples=25)
@given(st.floats(1e4, 1e8), st.floats(1e4, 1e8), st.floats(0.0, 0.5))
def test_the_rates_are_those_of_the_line_whatever_its_distance(up: float, down: float, trip_s: float) -> None:
    line = Line(up, down, trip_s)
    found = measure(line, clock=line.clock, now=lambda: 5.0)
    assert found.up == pytest.approx(up, rel=0.05)
    assert found.down == pytest.approx(down, rel=0.05)
    assert (found.trouble, found.measured_at) == ("", 5.0)


@settings(max_examples=25)
@given(st.floats(1e3, 1e9), st.floats(0.0, 0.5))
def test_a_slow_line_is_not_kept_busy_for_long(rate: float, trip_s: float) -> None:
    line = Line(rate, rate, trip_s)
    measure(line, clock=line.clock)
    assert sum(line.sent) <= sum(SIZES)
    assert SIZES[1] not in line.sent or SIZES[1] / rate <= LONGEST_S + 0.1
    assert line.now <= 2 * (max(LONGEST_S, SIZES[0] / rate) + SIZES[0] / rate) + 8 * trip_s + 1


def test_what_the_other_end_saw_is_believed_where_the_round_trip_was_slow_by_chance() -> None:
    line = Line(1e6, 1e6, 0.0, told=2.0)
    assert measure(line, clock=line.clock).up == pytest.approx(0.5e6, rel=0.01)


def test_a_refusal_keeps_what_was_measured_before_it() -> None:
    class Refusing(Line):
        def link_down(self, size_bytes: int) -> int:
            if size_bytes > 1:
                raise BusyError("too many measurements", retry_after_s=30)
            return super().link_down(size_bytes)

    line = Refusing(1e6, 1e6, 0.01)
    found = measure(line, clock=line.clock)
    assert found.up == pytest.approx(1e6, rel=0.01)
    assert (found.down, found.trouble) == (None, "too many measurements")


@pytest.mark.parametrize(("age_s", "kept"), [(0.0, True), (GOOD_FOR_S - 1, True), (GOOD_FOR_S, False), (-1.0, False)])
def test_a_measurement_is_good_for_a_day(tmp_path: Path, age_s: float, kept: bool) -> None:
    links = Links(up=1e6, down=2e6, measured_at=1_000_000.0)
    remember(tmp_path, links)
    assert remembered(tmp_path, 1_000_000.0 + age_s) == (links if kept else None)


@pytest.mark.parametrize("text", ["", "{", '{"up": -1}', '{"up": 1, "measured_at": 1}', "x" * 10_000, '{"up": 1e99}'])
def test_a_damaged_or_partial_memory_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "links.json").write_text(text)
    assert remembered(tmp_path, 2.0) is None
    assert remembered(tmp_path / "none", 2.0) is None
