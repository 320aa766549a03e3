"""Deltas on their way through the gateway: from a request's body over a temporary file into object storage.

What always holds:
- memory holds at most `PIECE_BYTES` and one message of an arriving body, the disk never more than the ticket's size;
- only a body with the ticket's length and sha256 reaches the store, as the delta or as its part of one; the temporary
  file is gone after, come what may;
- a sender that falls silent, or stays below `MIN_BYTES_PER_S`, is cut off; one lease has one upload at a time, and a
  replica has `MAX_UPLOADS`.

It checks no permission: the ticket was checked before.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO

from starlette.concurrency import run_in_threadpool

from coordinator.tickets import Ticket
from rankup.errors import BusyError, DiskFullError, InputError, TooLargeError
from rankup.folder import disk_errors
from rankup.store import Store
from rankup.versions import upload_key

PIECE_BYTES = 1024**2
SILENCE_S = 30.0
"""How long nothing may arrive."""
MIN_BYTES_PER_S = 4096
"""Below this, over the whole upload, a sender holds a place and does not get anywhere."""
MAX_UPLOADS = 16
RETRY_AFTER_S = 5.0
SENDS_AGAIN = "Send the file that the ticket was asked for, whole and unchanged."


class Spool:
    """Takes uploads into `store`. `folder` is for the temporary files; None: the system's own for such files."""

    def __init__(
        self,
        store: Store,
        folder: Path | None,
        *,
        silence_s: float = SILENCE_S,
        min_bytes_per_s: float = MIN_BYTES_PER_S,
        max_uploads: int = MAX_UPLOADS,
    ) -> None:
        self._store = store
        self._folder = folder
        self._silence_s = silence_s
        self._min_bytes_per_s = min_bytes_per_s
        self._max_uploads = max_uploads
        self._arriving: set[str] = set()

    async def take(self, ticket: Ticket, body: AsyncIterator[bytes]) -> None:
        """Read `body` to its end and store it as the ticket's upload, or as its part of one.

        Raises:
            NotFoundError: the upload that it is a part of was ended.
            TooLargeError: more bytes than the ticket has; raised at the first one too many.
            InputError: fewer bytes, or another sha256.
            TimeoutError: nothing arrived for `silence_s`, or too little over all.
            BusyError: this lease has another upload under way, or this replica has too many.
            DiskFullError: no room for the temporary file.
        """
        with self._place(ticket.lease_id), self._file(ticket) as file:
            digest = await self._receive(ticket, body, file)
            if digest != ticket.sha256:
                raise InputError("The bytes that arrived do not have the ticket's sha256.", remedy=SENDS_AGAIN)
            await run_in_threadpool(self._keep, ticket, Path(file.name))

    def _keep(self, ticket: Ticket, path: Path) -> None:
        piece = ticket.piece
        if piece is None:
            self._store.put_file(upload_key(ticket.lease_id, ticket.sha256), path)
        else:
            key = upload_key(ticket.lease_id, piece.delta)
            self._store.put_part(key, piece.upload_id, piece.number, path, sha256=ticket.sha256)

    @contextlib.contextmanager
    def _place(self, lease_id: str) -> Iterator[None]:
        if lease_id in self._arriving or len(self._arriving) >= self._max_uploads:
            raise BusyError("an upload of this lease, or too many others, are under way", retry_after_s=RETRY_AFTER_S)
        self._arriving.add(lease_id)
        try:
            yield
        finally:
            self._arriving.discard(lease_id)

    @contextlib.contextmanager
    def _file(self, ticket: Ticket) -> Iterator[IO[bytes]]:
        folder = Path(self._folder or tempfile.gettempdir())
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(folder).free
            if free_bytes < ticket.size_bytes:
                raise DiskFullError(f"an upload needs {ticket.size_bytes} bytes in {folder}, {free_bytes} are free")
            # Unbuffered: what `write` returned from is in the file that the store reads.
            file = tempfile.NamedTemporaryFile(dir=folder, prefix="upload-", buffering=0)  # noqa: SIM115
        with contextlib.closing(file):
            yield file

    async def _receive(self, ticket: Ticket, body: AsyncIterator[bytes], file: IO[bytes]) -> str:
        """Write the body into `file`; returns its sha256."""
        digest = hashlib.sha256()

        def write(piece: bytes) -> None:
            digest.update(piece)
            with disk_errors(Path(file.name).parent):
                rest = memoryview(piece)
                while rest:
                    rest = rest[file.write(rest) :]

        clock = asyncio.get_running_loop().time
        began, size_bytes, piece = clock(), 0, bytearray()
        while True:
            slowest = began + self._silence_s + size_bytes / self._min_bytes_per_s
            async with asyncio.timeout_at(min(clock() + self._silence_s, slowest)):
                chunk = await anext(body, None)
            size_bytes += len(chunk or b"")
            if size_bytes > ticket.size_bytes:
                raise too_long(ticket)
            piece += chunk or b""
            if piece and (chunk is None or len(piece) >= PIECE_BYTES):
                await run_in_threadpool(write, bytes(piece))
                piece.clear()
            if chunk is None:
                break
        if size_bytes < ticket.size_bytes:
            raise too_short(ticket, size_bytes)
        return digest.hexdigest()


def too_long(ticket: Ticket) -> TooLargeError:
    return TooLargeError(f"The ticket is for {ticket.size_bytes} bytes; the body has more.", remedy=SENDS_AGAIN)


def too_short(ticket: Ticket, size_bytes: int) -> InputError:
    return InputError(
        f"The ticket is for {ticket.size_bytes} bytes; the body has only {size_bytes}.", remedy=SENDS_AGAIN
    )
