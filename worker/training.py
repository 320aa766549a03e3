"""The agent's side of the trainer: start the child, read its lines, end it, and judge what it leaves.

What always holds:
- the child runs in a session of its own, so a Ctrl-C in the terminal reaches the agent only, and the agent ends the
  child with everything it started;
- its environment forbids the hub (`HF_HUB_OFFLINE`) and bounds its threads; its stderr is a log file, not the terminal;
- a child that can pause is asked to before it is ended, and has `PAUSE_GRACE_S` to write its checkpoint;
- a delta counts only after its size, hash, header, weights, shapes and ranks have been checked here;
- when `run_trainer` returns or raises, the child is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.errors import DeltaError, DiskFullError, FatalError, SetupError, TooLargeError
from worker.job import PAUSE, Answered, Failed, Finished, Job, Line, Paused, Ready, TrainerExit, parse_line, share_order

TRAINER_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "worker.trainer")
"""`-P` keeps the current folder off the module path: nothing that lies about there is imported."""
PAUSE_GRACE_S = 4.5
"""After this a child that is still writing its checkpoint is ended; the checkpoint before it stays."""
_GRACE_S = 5.0
_LOOK_S = 0.2
_MAX_LINE_BYTES = 64 * 1024
_TAIL_LINES = 6


class TrainerError(FatalError):
    """The trainer ended without a delta; the cause has its words and the last lines of its log."""

    code = "trainer"
    default_remedy = "The lease goes back and the worker tries another; the log named in the message has the details."

    def __init__(self, cause: str, *, remedy: str | None = None, exit_code: int = TrainerExit.CRASHED) -> None:
        super().__init__(cause, remedy=remedy)
        self.trainer_exit = exit_code
        """What the child ended with: a `TrainerExit`, or minus the number of a signal."""


def run_trainer(
    job: Job,
    job_file: Path,
    log_file: Path,
    *,
    command: Sequence[str] = TRAINER_COMMAND,
    on_line: Callable[[Line], None],
    stop_reason: Callable[[], str | None],
    keep: Callable[[], bool] = lambda: False,
    share_percent: Callable[[], int] | None = None,
) -> Finished | None:
    """Train `job` in a child process and return its result; None when `stop_reason` gave one and the child was ended.

    `keep`: whether such a stop is a pause, so that the child first writes its checkpoint. `share_percent`: how much of
    the time to compute, asked again and again.

    Raises `TrainerError`, `DiskFullError`, and `SetupError` when the child lacks a library or device, or cannot start.
    """
    job_file.write_text(job.model_dump_json(), encoding="utf-8")
    with log_file.open("ab") as log:
        try:
            child = subprocess.Popen(
                [*command, str(job_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=job_file.parent,
                env=child_environment(os.environ, job.threads),
                start_new_session=True,
            )
        except OSError as exc:
            raise SetupError(f"the trainer cannot be started: {exc}") from exc
    last: Finished | Failed | None = None
    pausable = False
    share = job.share_percent
    try:
        lines = _read_lines(child)
        while True:
            if stop_reason() is not None:
                if pausable and keep():
                    _pause(child, lines, on_line)
                return None
            if pausable and share_percent is not None and share_percent() != share:
                share = share_percent()
                _order(child, share_order(share))
            try:
                line = lines.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if line is None:
                break
            if isinstance(line, Finished | Failed):
                last = line
            if isinstance(line, Answered):
                pausable = True
            elif isinstance(line, Ready):
                pausable = line.pausable
            on_line(line)
        while child.poll() is None:  # its output is closed, it may still be leaving
            if stop_reason() is not None:
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_LOOK_S)
    except KeyboardInterrupt:
        if pausable and keep():
            _pause(child, lines, on_line)
        raise
    finally:
        _end(child)
    if child.returncode == TrainerExit.DONE and isinstance(last, Finished):
        return last
    raise _failure(child.returncode, last, log_file)


def check_result(job: Job, result: Finished, *, max_bytes: int) -> None:
    """Check the delta that the trainer left, as admission will.

    Raises `DeltaError` or `TooLargeError`.
    """
    if result.path != job.delta_file or result.path.stat().st_size != result.size_bytes:
        raise DeltaError("the trainer's delta is not the file that it reported")
    if result.size_bytes > max_bytes:
        raise TooLargeError(f"the delta has {result.size_bytes} bytes, the round takes {max_bytes}")
    with result.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != result.sha256:
            raise DeltaError("the trainer's delta does not have the hash that it reported")
    header = DeltaHeader(model=job.model, round_id=job.round_id, lease_id=job.lease_id, base_manifest=job.base_manifest)
    with DeltaReader.open(result.path) as reader:
        check_structure(reader, targets=job.targets, header=header, mantissa_bits=job.recipe.mantissa_bits)


def child_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """The trainer's environment: the agent's, without a way to the hub and with bounded thread pools."""
    return {
        **environment,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }


def log_tail(log_file: Path, lines: int = _TAIL_LINES) -> list[str]:
    """The last lines of the trainer's log that are not empty, each cut at 300 characters."""
    try:
        with log_file.open(encoding="utf-8", errors="replace") as file:
            return list(deque((line.rstrip()[:300] for line in file if line.strip()), maxlen=lines))
    except OSError:
        return []


def _read_lines(child: subprocess.Popen[bytes]) -> queue.Queue[Line | None]:
    """The child's lines as they come; None when its output has ended. A thread reads, so the child never blocks."""
    lines: queue.Queue[Line | None] = queue.Queue()
    output = child.stdout
    if output is None:
        raise FatalError("the trainer was started without a pipe for its output")

    def read(pipe: IO[bytes]) -> None:
        while text := pipe.readline(_MAX_LINE_BYTES):
            # A line that is not the protocol's says nothing the agent could act on.
            with contextlib.suppress(ValidationError):
                lines.put(parse_line(text))
        lines.put(None)

    threading.Thread(target=read, args=(output,), name="trainer-output", daemon=True).start()
    return lines


def _order(child: subprocess.Popen[bytes], order: str) -> None:
    """Say something to the child; one that is leaving does not hear it."""
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.write(order.encode() + b"\n")
            child.stdin.flush()


def _pause(child: subprocess.Popen[bytes], lines: queue.Queue[Line | None], on_line: Callable[[Line], None]) -> None:
    """Ask the child to write its checkpoint and wait until it has said so, at most `PAUSE_GRACE_S`.

    Steps that it finished before it heard of it are in the checkpoint, so they are told as well.
    """
    _order(child, PAUSE)
    until = time.monotonic() + PAUSE_GRACE_S
    while (left := until - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            return
        if line is None:
            return
        on_line(line)
        if isinstance(line, Paused | Failed):
            return


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole session: asked first, forced after `_GRACE_S`."""
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
            if sign is signal.SIGKILL:
                break


def _failure(code: int, last: Finished | Failed | None, log_file: Path) -> FatalError:
    if isinstance(last, Failed):
        if code == TrainerExit.DISK_FULL:
            return DiskFullError(f"the trainer found no room left on the disk: {last.cause}")
        if code == TrainerExit.MISSING_EXTRA:
            return SetupError(last.cause, remedy=last.remedy)
        if code != TrainerExit.CRASHED:
            return TrainerError(last.cause, remedy=last.remedy, exit_code=code)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    if code == -signal.SIGKILL:
        how += " (the system does that when memory runs out)"
    words = f": {last.cause}" if isinstance(last, Failed) else ""
    tail = "".join(f"\n    {line}" for line in log_tail(log_file))
    return TrainerError(f"the trainer {how}{words}\n{log_file} ends with:{tail or ' nothing'}", exit_code=code)
