"""What a check of `rankup doctor` or `rankup worker doctor` finds: ok, a warning or a failure, with a remedy.

It makes no check itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from rankup.errors import RankupError


class Grade(StrEnum):
    OK = "ok"
    WARN = "warn"
    """It works all the same."""
    FAIL = "fail"
    """It cannot work."""


@dataclass(frozen=True)
class Finding:
    """One check: its name, its grade, what was found, and what to do about it."""

    check: str
    grade: Grade
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, Grade.OK, found)


def warn(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, Grade.WARN, found, remedy)


def fail(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, Grade.FAIL, found, remedy)


def guarded(check: str, make: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; where it cannot be made, one that says why."""
    found: list[Finding] = []
    try:
        found.extend(make())
    except RankupError as exc:
        found.append(fail(check, exc.cause, exc.remedy))
    except OSError as exc:
        found.append(fail(check, f"cannot be checked: {exc.strerror or exc}", "Check the machine and try again."))
    return found
