"""The owner's pause, written down so that a restart of the worker or of the machine does not end it.

What always holds: the file is there exactly while there is a pause; what is in it and cannot be read counts as a pause
without an end, since a guest rather waits than disturbs. Whether a pause is over is for `worker.limits` to say.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from rankup.durable import write_file
from rankup.message import Message
from worker.limits import UserPause

FILE_NAME = "pause.json"
_MAX_FILE_BYTES = 4096


class _Record(Message):
    until: AwareDatetime | None


def read_pause(folder: Path) -> UserPause | None:
    """The pause that `folder` remembers, with its end in local time; None where there is none."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            record = _Record.model_validate_json(file.read(_MAX_FILE_BYTES))
        return UserPause(record.until.astimezone() if record.until is not None else None)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, OverflowError):
        return UserPause()


def write_pause(folder: Path, pause: UserPause | None) -> None:
    """Remember `pause` in `folder`, or that there is none. Raises OSError."""
    if pause is None:
        (folder / FILE_NAME).unlink(missing_ok=True)
        return
    write_file(folder / FILE_NAME, _Record(until=pause.until).model_dump_json().encode())
