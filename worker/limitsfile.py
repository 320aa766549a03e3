"""limits.yaml in the worker's home: read, changed, watched.

What always holds: a file above `MAX_LIMITS_BYTES` or with a name or value that `Limits` does not have is refused with
the line to mend; a change replaces the whole file at once, so a running agent never reads half of it. No policy here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rankup.durable import write_file
from rankup.errors import InputError
from worker.limits import Limits

FILE_NAME = "limits.yaml"
MAX_LIMITS_BYTES = 64 * 1024
_HEAD = "# What this machine lends. `rankup worker limits` shows it; a running worker reads changes within a second.\n"


def read_limits(home: Path) -> Limits:
    """The limits of the worker's home; the defaults where there is no file. Raises `InputError`."""
    path = home / FILE_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MAX_LIMITS_BYTES + 1)
    except FileNotFoundError:
        return Limits()
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(text) > MAX_LIMITS_BYTES:
        raise InputError(f"{path} has more than {MAX_LIMITS_BYTES} bytes")
    try:
        found = yaml.safe_load(text.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise InputError(f"{path} is not YAML: {exc}", remedy=f"Mend {path}, or delete it.") from exc
    return _checked(found if found is not None else {}, str(path))


def change_limits(home: Path, changes: Iterable[str]) -> Limits:
    """Apply `NAME=VALUE` pairs to the file and return the new limits; `NAME=` goes back to the default.

    Values are YAML: `exclusive_app=[steam, cs2]`, `week={sun: off}`. Raises `InputError`; nothing is written then.
    """
    data = read_limits(home).model_dump(mode="json", exclude_defaults=True)
    for change in changes:
        name, equals, value = change.partition("=")
        name = name.strip()
        if not equals or name not in Limits.model_fields:
            known = ", ".join(Limits.model_fields)
            raise InputError(f"{change!r} is not a limit", remedy=f"Write NAME=VALUE; the names are {known}.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as exc:
            raise InputError(f"{value!r} is not a value for {name}") from exc
        data.pop(name, None)
        if value.strip():
            data[name] = [parsed] if name == "exclusive_app" and isinstance(parsed, str) else parsed
    limits = _checked(data, "the new limits")
    home.mkdir(parents=True, exist_ok=True)
    chosen = limits.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None) if chosen else ""
    write_file(home / FILE_NAME, (_HEAD + text).encode())
    return limits


class LimitsWatch:
    """The limits as the file says them now; it is read again when it has changed."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._seen = self._mark()
        self.limits = read_limits(home)

    def look(self) -> bool:
        """Read the file again if it has changed; whether it had.

        Raises `InputError` once for a file that cannot be used; the limits stay what they were.
        """
        mark = self._mark()
        if mark == self._seen:
            return False
        self._seen = mark
        self.limits = read_limits(self._home)
        return True

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            stat = (self._home / FILE_NAME).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _checked(data: Any, where: str) -> Limits:
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a list of NAME: VALUE lines")
    try:
        return Limits.model_validate(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        name = ".".join(map(str, first["loc"])) or "limits"
        raise InputError(
            f"{where}: {name}: {first['msg']}", remedy="`rankup worker limits` lists the names with their values."
        ) from exc
