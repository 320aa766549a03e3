from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.pace import MAX_POLL_S, beat_interval_s, mean_speed, retry_after_s
from rankup.protocol import NoWorkCode
from rankup.settings import CoordinatorSettings

SETTINGS = CoordinatorSettings(heartbeat_s=15, beats_per_s=200, poll_s=5, polls_per_s=100)

BEATS = {
    "few volunteers": (10, 1200, 15),
    "as many as one pause carries": (3_000, 1200, 15),
    "ten thousand": (10_000, 1200, 50),
    "a short lease": (10, 30, 10),
    "a short lease of many": (10_000, 60, 20),
}


@pytest.mark.parametrize(("live", "lease_s", "pause_s"), BEATS.values(), ids=BEATS)
def test_heartbeats_are_rarer_the_more_there_are_but_three_in_the_life_of_a_lease(
    live: int, lease_s: float, pause_s: float
) -> None:
    assert beat_interval_s(live, lease_s, SETTINGS) == pause_s


POLLS: dict[str, tuple[NoWorkCode, int, float]] = {
    "few wait": ("all_handed_out", 3, 5),
    "many wait": ("no_round", 2_000, 20),
    "a crowd waits": ("paused", 10**6, MAX_POLL_S),
    "for a reason of its own": ("too_little_memory", 3, 30),
    "for the organiser": ("waiting", 3, 30),
}


@pytest.mark.parametrize(("why", "idle", "pause_s"), POLLS.values(), ids=POLLS)
def test_who_has_no_work_asks_again_later_the_more_there_are(why: NoWorkCode, idle: int, pause_s: float) -> None:
    assert retry_after_s(why, idle, SETTINGS) == pause_s


@given(volunteers=st.integers(1, 60_000))
def test_all_together_call_no_more_often_than_the_server_takes(volunteers: int) -> None:
    assert volunteers / beat_interval_s(volunteers, 1200, SETTINGS) <= 200 * (1 + 1e-9)
    if volunteers <= MAX_POLL_S * 100:
        assert volunteers / retry_after_s("no_round", volunteers, SETTINGS) <= 100 * (1 + 1e-9)


def test_a_speed_is_a_mean_in_which_the_latest_lease_counts_half() -> None:
    first = mean_speed(None, 1000, 10.0)
    assert first == 100.0
    assert mean_speed(first, 1000, 5.0) == 150.0


@pytest.mark.parametrize("seconds", [0.0, 1e-9])
def test_a_lease_that_took_no_time_says_nothing_of_a_speed(seconds: float) -> None:
    assert mean_speed(None, 1000, seconds) is None
    assert mean_speed(7.0, 1000, seconds) == 7.0
