"""Bytes that only measure the way between a volunteer and this server: counted and thrown away, or made up and sent.

What always holds:
- nothing of a body is kept: memory holds one message of it at a time;
- a body ends at `MAX_LINK_BYTES`; a sender that falls silent, or is not done within `LONGEST_S`, is cut off;
- at most `MAX_SENDERS` bodies arrive at a replica at one time;
- what is sent is the same random bytes every time, which no proxy on the way can make shorter.

It knows no routes and asks for no permission: how often anybody may call is `coordinator.ratelimit`'s to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Final

from rankup.errors import BusyError, TooLargeError
from rankup.protocol import MAX_LINK_BYTES, LinkMeasured

SILENCE_S: Final = 5.0
"""How long nothing may arrive."""
LONGEST_S: Final = 30.0
"""How long a body may take: 64 KiB within it are 2 KiB/s."""
MAX_SENDERS: Final = 8
RETRY_AFTER_S: Final = 5.0


class Sink:
    """Takes bodies that nobody wants to keep. For one event loop."""

    def __init__(
        self, *, silence_s: float = SILENCE_S, longest_s: float = LONGEST_S, max_senders: int = MAX_SENDERS
    ) -> None:
        self._silence_s = silence_s
        self._longest_s = longest_s
        self._max_senders = max_senders
        self._senders = 0

    async def swallow(self, body: AsyncIterator[bytes]) -> LinkMeasured:
        """How many bytes `body` has, and how long they took from the first message to the last.

        Raises:
            TooLargeError: more than `MAX_LINK_BYTES`; raised at the first one too many.
            TimeoutError: nothing arrived for `silence_s`, or the body took longer than `longest_s`.
            BusyError: too many others are being measured.
        """
        with self._place():
            clock = asyncio.get_running_loop().time
            first_at = last_at = clock()
            end_at, size_bytes = first_at + self._longest_s, 0
            while True:
                async with asyncio.timeout_at(min(clock() + self._silence_s, end_at)):
                    chunk = await anext(body, None)
                if chunk is None:
                    return LinkMeasured(size_bytes=size_bytes, seconds=last_at - first_at)
                last_at = clock()
                if not size_bytes:
                    first_at = last_at
                size_bytes += len(chunk)
                require_short(size_bytes)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self._senders >= self._max_senders:
            raise BusyError("too many others measure their way here", retry_after_s=RETRY_AFTER_S)
        self._senders += 1
        try:
            yield
        finally:
            self._senders -= 1


def require_short(size_bytes: int) -> None:
    """Raises TooLargeError above `MAX_LINK_BYTES`."""
    if size_bytes > MAX_LINK_BYTES:
        raise TooLargeError(f"A measurement has at most {MAX_LINK_BYTES} bytes.", remedy="Send less.")


@cache
def filler() -> bytes:
    """`MAX_LINK_BYTES` random bytes, made once in a process."""
    return os.urandom(MAX_LINK_BYTES)
