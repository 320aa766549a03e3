"""Tells the ledger every few seconds what this process counted; see `metrics` for why.

What always holds: a report that may or may not have arrived is sent again as it was, before the next one is made; a
ledger that does not answer costs memory for one more report and nothing else. It never fails its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable

import structlog

from coordinator import ledger_counts
from coordinator.ledger import Ledger
from coordinator.metrics import Cell, Tally
from rankup.errors import RankupError

INTERVAL_S = 5.0

log = structlog.get_logger(__name__)


class Reporter:
    """One for each process. `connect` gives the ledger, `clock` Unix seconds, `role` what the process is."""

    def __init__(
        self, tally: Tally, connect: Callable[[], Awaitable[Ledger]], *, role: str, clock: Callable[[], float]
    ) -> None:
        self._tally = tally
        self._connect = connect
        self._role = role
        self._clock = clock
        self._process = secrets.token_hex(8)
        self._number = 0
        self._unsent: dict[Cell, float] | None = None
        self._turn = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Report from now on, until `stop`; nothing where it has been started."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Report once more, if the ledger answers, and no more after that."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop
        with contextlib.suppress(RankupError):
            await self.report()

    async def report(self) -> None:
        """Report now. Raises what the ledger raises; nothing is lost then."""
        async with self._turn:
            if self._unsent is not None:
                await self._send(self._unsent)
            self._number += 1
            self._unsent = self._tally.take()
            await self._send(self._unsent)

    async def _send(self, increments: dict[Cell, float]) -> None:
        ledger = await self._connect()
        await ledger_counts.report(ledger, self._process, self._number, increments, role=self._role, now=self._clock())
        self._unsent = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.report()
            except RankupError as exc:
                log.debug("counts_not_reported", code=exc.code, cause=exc.cause)
            except Exception:
                log.exception("counts_not_reported")
