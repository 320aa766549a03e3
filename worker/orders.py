"""What the trainer hears on its standard input, and does about it: pause, rest more or less, or end with its agent.

What always holds: orders are obeyed by a thread of their own, so also in the middle of a step; the process ends when
the pipe is closed. The training reads `share_percent` between steps. Nothing here needs torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from worker.checkpoint import Keeper
from worker.exits import exit_code, failed
from worker.job import PAUSE, Line, Paused, TrainerExit, parse_share


@dataclass
class Orders:
    """What standard input has asked of the training; read and written by two threads, one field at a time."""

    keeper: Keeper | None = None
    share_percent: int = 100
    """Of the time, what is spent computing."""


def obey(orders: Orders, emit: Callable[[Line], None], scratch: Path) -> None:
    """Carry out what comes on standard input. Its end means that the agent is gone, and with it everybody who wants the
    result: leave at once."""
    rest = b""
    while data := os.read(0, 4096):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            order = line.decode(errors="replace").strip()
            if order == PAUSE:
                _pause(orders, emit, scratch)
            elif (share := parse_share(order)) is not None:
                orders.share_percent = share
    os._exit(TrainerExit.CRASHED)


def _pause(orders: Orders, emit: Callable[[Line], None], scratch: Path) -> NoReturn:
    code = TrainerExit.PAUSED
    try:
        emit(Paused(step=orders.keeper.save() if orders.keeper is not None else 0))
    except Exception as exc:  # noqa: BLE001 - the process ends here, whatever it was; the words go to the agent
        code = exit_code(exc)
        emit(failed(exc, code))
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(code)
