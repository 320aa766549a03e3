"""When a guest may work: limits, readings and the clock in; "run", or "pause" with the reason in plain words, out.

The names are those of BOINC's preferences wherever BOINC has one (github.com/BOINC/boinc/wiki/PrefsOverride), so people
who lend computers know them. Pure: no file, no clock, no process here.

What always holds:
- a reason to pause counts at once, except temperature and hours, which let a training that has just begun go on for
  `MIN_RUN_S`, so it gets something done;
- a pause lasts at least `MIN_PAUSE_S`, and work starts again only when every reason has been gone for `CLEAR_S`; a card
  that was too hot must first have cooled down to `gpu_temp_resume_c`. So nothing flaps;
- what could not be read does not hold work up: it is listed in `Readings.unread`, and `status` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from rankup.message import Finite, Message

MIN_PAUSE_S = 30.0
MIN_RUN_S = 30.0
CLEAR_S = 10.0

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Hour = Annotated[Finite, Field(ge=0, le=24)]
Hours = tuple[Hour, Hour]
"""From and to, in hours of the local day; equal ones mean the whole day, and 22 to 7 goes over midnight."""
Rate = Annotated[Finite, Field(ge=0, le=1e12)]
ProgramName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=128)]


class Limits(Message):
    """What the owner of a machine allows; every field has a default, and 0 means "no limit" where it is a number."""

    run_on_batteries: bool = False
    """Train while the machine runs on its battery."""
    run_if_user_active: bool = True
    """Train on the processor while somebody uses the machine."""
    run_gpu_if_user_active: bool = False
    """Train on the graphics card while somebody uses the machine."""
    idle_time_to_run: Annotated[Finite, Field(ge=0, le=1440)] = 3.0
    """Minutes without keyboard and mouse after which nobody uses the machine."""
    start_hour: Hour = 0.0
    end_hour: Hour = 0.0
    """Train from start_hour to end_hour of every day; equal: all day."""
    week: Annotated[dict[Day, Hours | Literal["off"]], Field(max_length=7)] = Field(default_factory=dict)
    """Other hours for single days: {sat: [0, 24], sun: off}."""
    max_bytes_sec_up: Rate = 0.0
    max_bytes_sec_down: Rate = 0.0
    """Bytes a second for deltas, and for base versions and shards."""
    daily_xfer_limit_mb: Annotated[Finite, Field(ge=0, le=1e9)] = 0.0
    """Megabytes a day, both directions; what is over it waits until tomorrow."""
    exclusive_app: Annotated[tuple[ProgramName, ...], Field(max_length=256)] = ()
    """Names of programs while which nothing is trained or transferred: games, for one."""
    gpu_usage_limit: Annotated[int, Field(ge=1, le=100)] = 100
    """Per cent of the time that training computes; it rests between steps."""
    gpu_temp_limit_c: Annotated[Finite, Field(ge=0, le=120)] = 0.0
    """Pause at this temperature of the graphics card."""
    gpu_temp_resume_c: Annotated[Finite, Field(ge=0, le=120)] = 0.0
    """Go on at this one; 0: ten degrees below the limit."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """Processor threads of the trainer, from its next start on; 0: what the command or the settings say."""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """Niceness of the trainer, from its next start on: 19 is the politest."""
    disk_max_used_gb: Annotated[Finite, Field(ge=0, le=1e6)] = 0.0
    """Most room for base versions; 0: RANKUP_WORKER_CACHE_BYTES."""

    @field_validator("week", mode="before")
    @classmethod
    def _plain_words(cls, value: object) -> object:
        # YAML reads a bare `off` as False.
        return (
            {day: "off" if hours is False else hours for day, hours in value.items()}
            if isinstance(value, dict)
            else value
        )

    @property
    def resume_below_c(self) -> float:
        """The temperature at which a card that was too hot is cool again."""
        wanted = self.gpu_temp_resume_c or self.gpu_temp_limit_c - 10.0
        return min(wanted, self.gpu_temp_limit_c)

    def for_dedicated(self) -> Limits:
        """Of a machine that does nothing else: batteries and people at the keyboard do not count."""
        everything = {"run_on_batteries": True, "run_if_user_active": True, "run_gpu_if_user_active": True}
        return self.model_copy(update=everything)

    def hours_of(self, weekday: int) -> Hours | None:
        """Hours of the day (0 is Monday) in which to train; None: not on that day."""
        chosen = self.week.get(DAYS[weekday], (self.start_hour, self.end_hour))  # type: ignore[call-overload]
        return None if chosen == "off" else chosen


@dataclass(frozen=True)
class Readings:
    """What a look at the machine found; None: it cannot be read here."""

    now: datetime
    """Local time."""
    on_battery: bool | None = None
    idle_s: float | None = None
    """Since the last key or movement of the mouse."""
    programs: frozenset[str] = frozenset()
    """Names of running programs, in lower case."""
    gpu_temp_c: float | None = None
    gpu: bool = False
    """Whether training would use a graphics card."""
    transferred_bytes: int = 0
    """Today, both directions."""
    unread: tuple[str, ...] = ()
    """What was wanted and could not be read, in plain words."""


class Cause(StrEnum):
    """Why there is a pause."""

    USER = "paused by you"
    APP = "exclusive app"
    ACTIVE = "user active"
    BATTERY = "on battery"
    HOT = "too hot"
    HOURS = "outside hours"


PATIENT_CAUSES = frozenset({Cause.HOT, Cause.HOURS})
"""Causes that let a training that has just begun get something done."""
QUIET_CAUSES = frozenset({Cause.USER, Cause.APP})
"""Causes for which nothing is transferred either."""


@dataclass(frozen=True)
class Reason:
    """Why there is a pause, for programs and for people."""

    cause: Cause
    words: str


@dataclass(frozen=True)
class UserPause:
    """The owner said so: until `until` (local time), or until they say otherwise."""

    until: datetime | None = None


@dataclass(frozen=True)
class Stance:
    """Running or paused, and since when (`since_s`, `clear_since_s` are of a monotonic clock)."""

    reason: Reason | None = None
    since_s: float = float("-inf")
    clear_since_s: float | None = None
    """During a pause: since when nothing speaks against work; None while something does."""

    @property
    def running(self) -> bool:
        return self.reason is None


def first_reason(limits: Limits, readings: Readings, pause: UserPause | None, *, was_hot: bool) -> Reason | None:
    """What speaks against training now; the owner's own word comes first."""
    if pause is not None and (pause.until is None or readings.now < pause.until):
        day = "" if pause.until is None or pause.until.date() == readings.now.date() else f"{pause.until:%a %d %b} "
        until = f" until {day}{pause.until:%H:%M}" if pause.until else ""
        return Reason(Cause.USER, f"you paused it{until}; `rankup worker resume` goes on")
    wanted = {_program(name) for name in limits.exclusive_app}
    if running := sorted(name for name in readings.programs if _program(name) in wanted):
        return Reason(Cause.APP, f"{running[0]} is running (exclusive_app)")
    if readings.on_battery and not limits.run_on_batteries:
        return Reason(Cause.BATTERY, "the machine runs on its battery (run_on_batteries is off)")
    name = "run_gpu_if_user_active" if readings.gpu else "run_if_user_active"
    may_while_active = limits.run_gpu_if_user_active if readings.gpu else limits.run_if_user_active
    if not may_while_active and readings.idle_s is not None and readings.idle_s < limits.idle_time_to_run * 60.0:
        return Reason(
            Cause.ACTIVE,
            f"somebody uses the machine: training starts {limits.idle_time_to_run:g} min after the last key "
            f"({name} is off)",
        )
    if limits.gpu_temp_limit_c and readings.gpu_temp_c is not None:
        limit = limits.resume_below_c if was_hot else limits.gpu_temp_limit_c
        if readings.gpu_temp_c >= limit:
            return Reason(
                Cause.HOT,
                f"the graphics card has {readings.gpu_temp_c:.0f} °C (gpu_temp_limit_c is {limits.gpu_temp_limit_c:g},"
                f" it goes on below {limits.resume_below_c:g})",
            )
    if not within_hours(limits, readings.now):
        return Reason(Cause.HOURS, f"it is {readings.now:%a %H:%M}, outside the hours that you allow")
    return None


def step(stance: Stance, limits: Limits, readings: Readings, pause: UserPause | None, now_s: float) -> Stance:
    """The stance after a look at the machine at `now_s`."""
    was_hot = stance.reason is not None and stance.reason.cause is Cause.HOT
    reason = first_reason(limits, readings, pause, was_hot=was_hot)
    if stance.running:
        if reason is None or (reason.cause in PATIENT_CAUSES and now_s - stance.since_s < MIN_RUN_S):
            return stance
        return Stance(reason, now_s)
    if reason is not None:
        return replace(stance, reason=reason, clear_since_s=None)
    if stance.reason is not None and stance.reason.cause is Cause.USER:
        return Stance(None, now_s)  # Their word ends as it began: at once.
    clear_since_s = now_s if stance.clear_since_s is None else stance.clear_since_s
    if now_s - stance.since_s >= MIN_PAUSE_S and now_s - clear_since_s >= CLEAR_S:
        return Stance(None, now_s)
    return replace(stance, clear_since_s=clear_since_s)


def transfer_reason(limits: Limits, readings: Readings, stance: Stance) -> str | None:
    """What speaks against uploads and downloads now, in plain words; heartbeats go on in any case."""
    if stance.reason is not None and stance.reason.cause in QUIET_CAUSES:
        return stance.reason.words
    limit = limits.daily_xfer_limit_mb * 1e6
    if limit and readings.transferred_bytes >= limit:
        return (
            f"{readings.transferred_bytes / 1e6:.0f} MB were transferred today (daily_xfer_limit_mb is "
            f"{limits.daily_xfer_limit_mb:g})"
        )
    return None


def within_hours(limits: Limits, now: datetime) -> bool:
    """Whether the local time is within the hours of its day, or of the day before where those go over midnight."""
    hour = now.hour + now.minute / 60.0 + now.second / 3600.0
    today, yesterday = limits.hours_of(now.weekday()), limits.hours_of((now.weekday() - 1) % 7)
    if today is not None:
        start, end = today
        if start == end or start <= hour < end or (end < start <= hour):
            return True
    return yesterday is not None and yesterday[1] < yesterday[0] and hour < yesterday[1]


def available_s(limits: Limits, now: datetime) -> float | None:
    """Seconds from `now` (local time) to the next hour at which work is not allowed; None where there is no such hour.

    0 where it is not allowed now. A change to summer time in between counts for nothing.
    """
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    ends = [now]
    # From yesterday on, whose hours may end today, to the same day of the next week.
    for day in range(-1, 8):
        for hour in (0.0, *(limits.hours_of((now.weekday() + day) % 7) or ())):
            ends += [midnight + timedelta(days=day, hours=hour), midnight + timedelta(days=day + 1, hours=hour)]
    just_after = timedelta(seconds=1)
    closed = [end for end in sorted(ends) if end >= now and not within_hours(limits, end + just_after)]
    return (closed[0] - now).total_seconds() if closed else None


def hold_s(trained_s: float) -> float:
    """How long a paused lease is kept: as long as its training took so far, at least 15 minutes, at most 4 hours.

    So a pause costs the round no more than giving the shard to somebody else would cost the volunteer.
    """
    return min(4 * 3600.0, max(900.0, trained_s))


def _program(name: str) -> str:
    """A program's name without case and without the ending that Windows programs have under Wine too."""
    return name.strip().lower().removesuffix(".exe")


@dataclass(frozen=True)
class Verdict:
    """What the governor found at its last look."""

    stance: Stance = field(default_factory=Stance)
    transfer: str | None = None
    readings: Readings | None = None
