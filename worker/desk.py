"""Orders carried out, whether they come over the control socket or from the page.

What always holds: an order only sets what the agent looks at anyway, and the answer is the status after it; limits that
make no sense change nothing and are answered with the reason. Nothing waits for the agent's work here.
"""

from __future__ import annotations

import threading
from pathlib import Path

from rankup.errors import RankupError
from worker.control import Reply, Request
from worker.governor import Governor
from worker.journal import Journal
from worker.limitsfile import change_limits
from worker.outbox import Outbox
from worker.page import Scene
from worker.status import Board
from worker.traffic import Traffic


class Desk:
    """Takes the orders of one agent; its methods may be called from several threads."""

    def __init__(
        self,
        home: Path,
        stop: threading.Event,
        governor: Governor,
        board: Board,
        journal: Journal,
        outbox: Outbox,
        traffic: Traffic,
    ) -> None:
        self._home = home
        self._stop = stop
        self._governor = governor
        self._board = board
        self._journal = journal
        self._outbox = outbox
        self._traffic = traffic

    def obey(self, request: Request) -> Reply:
        """Carry out an order."""
        match request.order:
            case "pause":
                self._governor.pause(request.seconds)
            case "resume":
                self._governor.resume()
            case "finish":
                self._governor.finish()
            case "leave":
                self._governor.leave()
                self._stop.set()
            case "limits":
                try:
                    change_limits(self._home, request.changes)
                except RankupError as exc:
                    return Reply(error=exc.cause)
                self._governor.look()
        return Reply(status=self._board.status(self._governor, self._outbox, self._traffic))

    def show(self) -> Scene:
        """What the page shows."""
        status = self._board.status(self._governor, self._outbox, self._traffic)
        return Scene(status=status, curve=self._board.curve(), journal=self._journal.recent())
