"""When a guest works: one look at a time, then how looks follow each other."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from worker.limits import (
    CLEAR_S,
    MIN_PAUSE_S,
    MIN_RUN_S,
    Cause,
    Limits,
    Readings,
    Stance,
    UserPause,
    available_s,
    first_reason,
    hold_s,
    step,
    transfer_reason,
    within_hours,
)

WEDNESDAY_NOON = datetime(2026, 7, 1, 12, 0).astimezone()


def readings(**more: Any) -> Readings:
    return Readings(**{"now": WEDNESDAY_NOON} | more)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Cause | None]] = {
    "nothing speaks against it": ({}, {}, None),
    "nothing can be read": ({"exclusive_app": ["cs2"]}, {"gpu": True}, None),
    "on battery": ({}, {"on_battery": True}, Cause.BATTERY),
    "on battery, allowed": ({"run_on_batteries": True}, {"on_battery": True}, None),
    "card, somebody types": ({}, {"gpu": True, "idle_s": 179.0}, Cause.ACTIVE),
    "card, nobody for three minutes": ({}, {"gpu": True, "idle_s": 180.0}, None),
    "card, nobody at the seat": ({}, {"gpu": True, "idle_s": float("inf")}, None),
    "card, another time": ({"idle_time_to_run": 10}, {"gpu": True, "idle_s": 599.0}, Cause.ACTIVE),
    "card, allowed": ({"run_gpu_if_user_active": True}, {"gpu": True, "idle_s": 0.0}, None),
    "processor, somebody types": ({}, {"idle_s": 0.0}, None),
    "processor, not allowed": ({"run_if_user_active": False}, {"idle_s": 0.0}, Cause.ACTIVE),
    "a game": ({"exclusive_app": ["Cs2", "x"]}, {"programs": frozenset({"bash", "cs2"})}, Cause.APP),
    "a game under Wine": ({"exclusive_app": ["witcher3"]}, {"programs": frozenset({"witcher3.exe"})}, Cause.APP),
    "another program": ({"exclusive_app": ["cs2"]}, {"programs": frozenset({"cs2d"})}, None),
    "too hot": ({"gpu_temp_limit_c": 80}, {"gpu_temp_c": 80.0}, Cause.HOT),
    "warm": ({"gpu_temp_limit_c": 80}, {"gpu_temp_c": 79.0}, None),
    "outside hours": ({"start_hour": 22, "end_hour": 7}, {}, Cause.HOURS),
    "the day is off": ({"week": {"wed": "off"}}, {}, Cause.HOURS),
    "a bare off of YAML": ({"week": {"wed": False}}, {}, Cause.HOURS),
}


@pytest.mark.parametrize("name", CASES)
def test_one_look_gives_one_reason_in_plain_words(name: str) -> None:
    limits, found, cause = CASES[name]
    reason = first_reason(Limits.model_validate(limits), readings(**found), None, was_hot=False)
    assert (reason.cause if reason else None) is cause
    assert reason is None or len(reason.words) > 20


@pytest.mark.parametrize(
    ("limits", "day", "hour", "allowed"),
    [
        ({}, 1, 3, True),
        ({"start_hour": 9, "end_hour": 17}, 1, 8.99, False),
        ({"start_hour": 9, "end_hour": 17}, 1, 9, True),
        ({"start_hour": 9, "end_hour": 17}, 1, 17, False),
        ({"start_hour": 22, "end_hour": 7}, 1, 23, True),
        ({"start_hour": 22, "end_hour": 7}, 1, 6.5, True),
        ({"start_hour": 22, "end_hour": 7}, 1, 7, False),
        # 1 July 2026 is a Wednesday. The night that began on Tuesday ends on Wednesday, whatever Wednesday says.
        ({"start_hour": 22, "end_hour": 7, "week": {"wed": "off"}}, 1, 6.5, True),
        ({"start_hour": 22, "end_hour": 7, "week": {"wed": "off"}}, 1, 23, False),
        ({"start_hour": 22, "end_hour": 7, "week": {"tue": "off"}}, 1, 6.5, False),
        ({"start_hour": 9, "end_hour": 10, "week": {"wed": [0, 24]}}, 1, 23.9, True),
        ({"start_hour": 9, "end_hour": 10, "week": {"wed": [0, 24]}}, 2, 12, False),
    ],
)
def test_hours_follow_the_day_they_began_on(limits: dict[str, Any], day: int, hour: float, allowed: bool) -> None:
    now = datetime(2026, 7, day).astimezone() + timedelta(hours=hour)
    assert within_hours(Limits.model_validate(limits), now) is allowed


@pytest.mark.parametrize(
    ("limits", "hour", "left_h"),
    [
        ({}, 12, None),
        ({"start_hour": 5, "end_hour": 5}, 12, None),
        ({"start_hour": 9, "end_hour": 17}, 12, 5),
        ({"start_hour": 9, "end_hour": 17}, 17, 0),
        ({"start_hour": 9, "end_hour": 17}, 3, 0),
        ({"start_hour": 22, "end_hour": 7}, 23.5, 7.5),
        ({"start_hour": 22, "end_hour": 7}, 6, 1),
        ({"start_hour": 0, "end_hour": 24}, 12, None),
        ({"start_hour": 8.1, "end_hour": 17.7}, 12, 5.7),
        # 1 July 2026 is a Wednesday.
        ({"week": {"sun": "off"}}, 12, 12 + 3 * 24),
        ({"start_hour": 22, "end_hour": 7, "week": {"thu": [0, 24], "fri": [3, 9]}}, 23, 1 + 24),
        ({"start_hour": 9, "end_hour": 17, "week": {"wed": [0, 24], "thu": [0, 12]}}, 1, 23 + 12),
    ],
)
def test_what_is_left_is_the_time_to_the_next_hour_that_is_not_allowed(
    limits: dict[str, Any], hour: float, left_h: float | None
) -> None:
    now = datetime(2026, 7, 1).astimezone() + timedelta(hours=hour)
    left_s = available_s(Limits.model_validate(limits), now)
    assert left_s == (None if left_h is None else pytest.approx(left_h * 3600))


HALF_HOURS = st.integers(0, 48).map(lambda halves: halves / 2)
DAYS_OF_THE_WEEK = st.sampled_from(["mon", "tue", "wed", "thu", "fri", "sat", "sun"])


@given(
    st.builds(
        lambda start, end, week: Limits.model_validate({"start_hour": start, "end_hour": end, "week": week}),
        HALF_HOURS,
        HALF_HOURS,
        st.dictionaries(DAYS_OF_THE_WEEK, st.just("off") | st.tuples(HALF_HOURS, HALF_HOURS), max_size=4),
    ),
    st.integers(0, 7 * 96 - 1),
)
def test_until_then_every_hour_is_allowed_and_then_none_is(limits: Limits, quarter: int) -> None:
    now = datetime(2026, 7, 1).astimezone() + timedelta(minutes=15 * quarter)
    left_s = available_s(limits, now)
    quarters = 8 * 96 if left_s is None else int(left_s // 900)
    assert all(within_hours(limits, now + timedelta(minutes=15 * n + 1)) for n in range(quarters))
    if left_s is not None:
        assert not within_hours(limits, now + timedelta(seconds=left_s + 1))


def test_the_owners_pause_ends_by_itself_or_by_their_word() -> None:
    pause = UserPause(WEDNESDAY_NOON + timedelta(hours=2))
    running = Stance()
    paused = step(running, Limits(), readings(), pause, 0.0)
    assert paused.reason is not None
    assert "14:00" in paused.reason.words
    assert not step(paused, Limits(), readings(now=WEDNESDAY_NOON + timedelta(minutes=119)), pause, 1.0).running
    assert step(paused, Limits(), readings(now=WEDNESDAY_NOON + timedelta(hours=2)), pause, 2.0).running
    assert step(paused, Limits(), readings(), None, 3.0).running
    assert first_reason(Limits(), readings(now=WEDNESDAY_NOON + timedelta(days=9)), UserPause(), was_hot=False)


def test_a_card_that_was_too_hot_cools_down_first() -> None:
    limits = Limits(gpu_temp_limit_c=80)
    stance = step(Stance(), limits, readings(gpu_temp_c=81.0), None, 0.0)
    for now_s, celsius, running in ((40.0, 79.0, False), (60.0, 69.0, False), (70.0, 69.0, True), (200.0, 79.0, True)):
        stance = step(stance, limits, readings(gpu_temp_c=celsius), None, now_s)
        assert stance.running is running, (now_s, celsius)


def test_a_training_that_has_just_begun_is_not_ended_for_its_temperature_but_for_a_game() -> None:
    limits = Limits(gpu_temp_limit_c=80, exclusive_app=("cs2",))
    begun = Stance(None, since_s=100.0)
    hot, game = readings(gpu_temp_c=90.0), readings(programs=frozenset({"cs2"}))
    assert step(begun, limits, hot, None, 100.0 + MIN_RUN_S - 1).running
    assert not step(begun, limits, hot, None, 100.0 + MIN_RUN_S).running
    assert not step(begun, limits, game, None, 101.0).running


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_nothing_flaps_whatever_a_program_does(running_each_second: list[bool]) -> None:
    limits = Limits(exclusive_app=("cs2",))
    stance, changes, last_seen = Stance(), [], -1e9
    for second, there in enumerate(running_each_second):
        found = readings(programs=frozenset({"cs2"} if there else ()))
        before, stance = stance, step(stance, limits, found, None, float(second))
        if there:
            last_seen = second
            assert not stance.running, "a game is never in the way"
        if before.running != stance.running:
            changes.append((second, stance.running))
            if stance.running:
                assert second - last_seen >= CLEAR_S
    pauses = [after[0] - before[0] for before, after in pairwise(changes) if after[1]]
    assert all(length >= MIN_PAUSE_S for length in pauses)


@pytest.mark.parametrize(
    ("limits", "megabytes", "stance", "held"),
    [
        ({}, 10**6, Stance(), False),
        ({"daily_xfer_limit_mb": 100}, 99, Stance(), False),
        ({"daily_xfer_limit_mb": 100}, 100, Stance(), True),
        ({}, 0, step(Stance(), Limits(), readings(on_battery=True), None, 0.0), False),
        ({}, 0, step(Stance(), Limits(), readings(), UserPause(), 0.0), True),
    ],
)
def test_transfers_wait_for_tomorrow_and_for_whoever_wants_quiet(
    limits: dict[str, Any], megabytes: int, stance: Stance, held: bool
) -> None:
    found = readings(transferred_bytes=megabytes * 10**6)
    assert (transfer_reason(Limits.model_validate(limits), found, stance) is not None) is held


@pytest.mark.parametrize(
    "wrong",
    [
        {"idle_time_to_run": -1},
        {"start_hour": 25},
        {"week": {"someday": "off"}},
        {"week": {"sat": [1, 2, 3]}},
        {"gpu_usage_limit": 0},
        {"exclusive_app": [""]},
        {"max_bytes_sec_up": float("nan")},
        {"no_such_limit": 1},
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate(wrong)


@pytest.mark.parametrize(("trained_s", "kept_s"), [(0, 900), (901, 901), (10**6, 14400)])
def test_a_paused_lease_is_kept_as_long_as_its_training_took(trained_s: float, kept_s: float) -> None:
    assert hold_s(trained_s) == kept_s
