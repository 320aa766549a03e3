"""llama.cpp's programs as child processes: their output kept for the message when they fail, none left behind.

What always holds: the child has ended when the call returns or raises, Ctrl-C included; its output is kept in a
temporary file, of which at most the end is ever read.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Final

from rankup.errors import InputError, SetupError

_POLL_S: Final = 0.1
_TAIL_BYTES: Final = 16 * 1024
_TERMINATE_S: Final = 5.0
_LINES_SHOWN: Final = 3


def run_child(
    command: Sequence[str],
    what: str,
    *,
    remedy: str,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[str], None] | None = None,
) -> str:
    """Run a program to its end; returns the end of what it printed. `watch` gets the same every 0.1 s.

    Raises:
        SetupError: it cannot be started.
        InputError: it failed; the message ends with its last lines.
    """
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                # A Ctrl-C in the terminal reaches this process alone, which then ends the child itself.
                start_new_session=True,
            )
        except OSError as exc:
            raise SetupError(f"cannot start {command[0]}: {exc}", remedy=remedy) from exc
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                if watch is not None:
                    watch(_tail(output))
        except BaseException:
            _end(process)
            raise
        said = _tail(output)
    if process.returncode:
        last = " / ".join([line.strip() for line in said.splitlines() if line.strip()][-_LINES_SHOWN:])
        raise InputError(f"{what} failed with exit code {process.returncode}: {last or 'no output'}", remedy=remedy)
    return said


def _tail(output: IO[bytes]) -> str:
    """The end of the file, read without moving the position at which the child writes."""
    size = os.fstat(output.fileno()).st_size
    return os.pread(output.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_TERMINATE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
