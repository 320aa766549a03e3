"""What a check of `rankup worker doctor` finds: ok, a warning or a failure, with a remedy where it is not ok.

It makes no check itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    OK = "ok"
    WARN = "warn"
    """The worker works all the same."""
    FAIL = "fail"
    """It cannot work: `join` ends here."""


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
