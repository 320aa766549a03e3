"""What `rankup up` looks after while it runs: its embedded servers, and the head of its Ray cluster.

What always holds:
- an embedded server that dies is started again on the same data and at the same address, at once the first time, later
  each time it dies again soon; every start and every failure is a line on the terminal;
- a ledger that came back without its data is restored from object storage before anything else is looked at;
- a head that dies is reported by HeadLostError: Ray cannot start its daemons again, and this process cannot have a
  second cluster. `rankup up` then takes down what is left and begins again as a fresh program (`begin_again`).

Workers of the cluster (gateway, keeper, Serve's proxy and controller, tasks) are not its business: Ray restarts those.
External servers are their operators'.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, Protocol

from rankup.errors import FatalError, RankupError

LOOK_S = 0.25
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
CALM_S = 300.0
"""A server that ran this long counts as well: when it dies it is started again at once."""


class HeadLostError(FatalError):
    """A daemon of the Ray head has died."""


class Servers(Protocol):
    """The embedded servers: `rankup.local.LocalServices`."""

    def dead(self) -> tuple[str, ...]: ...

    def revive(self) -> None: ...


class Watch:
    """Looks every `LOOK_S` seconds.

    `servers`: None where none is embedded. `lost` names a dead daemon of the head. `restore` is called when servers
    came back: it brings back what they have lost, if anything.
    """

    def __init__(
        self,
        servers: Servers | None,
        lost: Callable[[], str | None],
        restore: Callable[[], None],
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._lost = lost
        self._restore = restore
        self._restore_owed = False
        self._say = say
        self._clock = clock
        self._pause_s = 0.0
        self._last_try = float("-inf")

    def run(self, stopped: threading.Event) -> None:
        """Until `stopped` is set. Raises HeadLostError."""
        while not stopped.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """Once. Raises HeadLostError."""
        if name := self._lost():
            raise HeadLostError(f"Ray's {name} has died", remedy="Its logs tell why; memory is the usual reason.")
        if self._servers is None:
            return
        dead = self._servers.dead()
        now = self._clock()
        if not (dead or self._restore_owed) or now < self._last_try + self._pause_s:
            return
        calm = now > self._last_try + CALM_S
        self._pause_s = FIRST_PAUSE_S if calm else min(LONGEST_PAUSE_S, 2 * self._pause_s)
        self._last_try = now
        try:
            if dead:
                self._revive(self._servers, " and ".join(dead))
            self._restore()
            self._restore_owed = False
        except RankupError as exc:
            self._say(f"{exc.cause}; trying again in {self._pause_s:.0f} s")

    def _revive(self, servers: Servers, names: str) -> None:
        self._say(f"{names} died: starting again")
        began = self._clock()
        self._restore_owed = True
        servers.revive()
        self._say(f"{names} back after {self._clock() - began:.1f} s")


def begin_again() -> NoReturn:
    """Become a fresh program with the same command line and number; all that this process started must have ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Ray's library leaves sockets open that a new program would inherit.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command line
