"""One delta on its way to object storage: whole where it is small, else in parts that stay where they have arrived.

What always holds:
- every attempt begins with a ticket, which tells what is there: that is not sent again, so a cut line, a pause or a
  crash costs at most the part that was on its way;
- there is no state but the file: its hashes are computed anew by every process, and nothing is sent of a file that does
  not have the hash that was stated;
- a store that refuses again and again, or loses what it has taken, is given up.

It speaks no HTTP: `ask` and `put` are the client's, and so is trying again after an error.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rankup.errors import InputError, IntegrityError, RetryableError
from rankup.parts import Part, cut
from rankup.protocol import UploadRequest, UploadTicket

READ_BYTES: Final = 16 * 1024
"""Sent at once: few enough that a slow rate leaves no gap that a server takes for the end."""
_TELL_BYTES: Final = 64 * 1024
_MAX_REFUSALS: Final = 4
"""4xx answers of the object store without a part taken in between, before it counts as refused."""
_MAX_TIMES: Final = 4
"""How often one part is sent to the end before the store counts as broken."""
_REMEDY: Final = "Tell the organiser: the object store refuses what the gateway allowed."


class StorageRefusedError(RetryableError):
    """The object store answers that the request is wrong: an address that ran out, damage on the way, or for good."""


class Upload:
    """One delta. `accepted` grows with every part that the store has taken.

    `ask` gives a ticket; `put` sends the bytes that it is handed to an address and raises `RetryableError` where that
    fails; `pace` is told of bytes that went out, and waits or raises; `progress` is told of the bytes that are there or
    on their way, and of all of them.
    """

    def __init__(
        self,
        path: Path,
        request: UploadRequest,
        *,
        ask: Callable[[UploadRequest], UploadTicket],
        put: Callable[[str, dict[str, str], Iterator[bytes]], None],
        pace: Callable[[int], None],
        progress: Callable[[int, int], None],
    ) -> None:
        self.accepted = 0
        self._path = path
        self._request = request
        self._ask = ask
        self._put = put
        self._pace = pace
        self._progress = progress
        self._parts = cut(request.size_bytes)
        self._times: Counter[int] = Counter()
        self._refusals = 0

    def attempt(self) -> None:
        """Send what is missing; may be called again after an error.

        Raises `IntegrityError` where the file is not the one that was stated, `InputError` where the store is given
        up, and what `ask`, `put` and `pace` raise.
        """
        if len(self._parts) > 1 and not self._request.parts:
            digests = digests_of(self._path, self._request.sha256, self._parts)
            self._request = self._request.model_copy(update={"parts": digests})
        size_bytes = self._request.size_bytes
        while True:
            ticket = self._ask(self._request)
            if ticket.already_there:
                self._progress(size_bytes, size_bytes)
                return
            if not ticket.parts:
                self._send(ticket.url, ticket.headers, Part(1, 0, size_bytes), 0)
                return
            done = ticket.there_bytes
            self._progress(done, size_bytes)
            for granted in ticket.parts:
                part = self._part(granted.number)
                self._send(granted.url, granted.headers, part, done)
                done += part.size_bytes

    def _part(self, number: int) -> Part:
        if not 1 <= number <= len(self._parts):
            raise InputError(f"the ticket is for part {number} of {len(self._parts)}", remedy=_REMEDY)
        self._times[number] += 1
        if self._times[number] > _MAX_TIMES:
            raise InputError(f"the object store has lost part {number} {_MAX_TIMES} times", remedy=_REMEDY)
        return self._parts[number - 1]

    def _send(self, url: str, headers: dict[str, str], part: Part, done: int) -> None:
        # Without a length, a body in pieces would be sent chunked.
        if "content-length" not in {name.lower() for name in headers}:
            headers = {**headers, "Content-Length": str(part.size_bytes)}
        try:
            self._put(url, headers, self._pieces(part, done))
        except StorageRefusedError as exc:
            self._times[part.number] -= 1
            self._refusals += 1
            if self._refusals >= _MAX_REFUSALS:
                raise InputError(exc.cause, remedy=_REMEDY) from exc
            raise
        except BaseException:
            self._times[part.number] -= 1
            raise
        self._refusals = 0
        self.accepted += 1

    def _pieces(self, part: Part, done: int) -> Iterator[bytes]:
        left = part.size_bytes
        self._pace(0)
        with self._path.open("rb") as file:
            file.seek(part.start)
            while left and (piece := file.read(min(READ_BYTES, left))):
                yield piece
                left -= len(piece)
                self._pace(len(piece))
                sent = part.size_bytes - left
                if not left or sent % _TELL_BYTES == 0:
                    self._progress(done + sent, self._request.size_bytes)


def digests_of(path: Path, sha256: str, parts: tuple[Part, ...]) -> tuple[str, ...]:
    """The sha256 of every part of a file, in hex. Raises `IntegrityError` where the whole has another one."""
    whole, found = hashlib.sha256(), []
    with path.open("rb") as file:
        for part in parts:
            digest, left = hashlib.sha256(), part.size_bytes
            while left and (piece := file.read(min(1024**2, left))):
                digest.update(piece)
                whole.update(piece)
                left -= len(piece)
            found.append(digest.hexdigest())
        rest = file.read(1)
    if rest or whole.hexdigest() != sha256:
        raise IntegrityError(f"{path.name} is not the file any more that was finished: it was changed or damaged")
    return tuple(found)
