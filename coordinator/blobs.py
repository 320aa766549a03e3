"""Bytes of a stored object as an HTTP answer: whole, or the one range that was asked for (RFC 9110, section 14).

What always holds:
- the object is read in pieces of `PIECE_BYTES`, each when the one before it was handed on: the whole is never held;
- several ranges at once, or a range that cannot be read, are answered with the whole object, as the RFC allows;
- the answers that readers have not taken yet have at most `MAX_OUTSTANDING_BYTES` together, or are one: Ray Serve
  takes an answer at once and keeps what a slow reader leaves, so pausing between pieces does not bound it;
- a store that fails in the middle breaks the answer off, so that it is shorter than it announced; readers resume.

Hashes are not checked here: who reads a blob knows its hash and checks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from coordinator.problems import problem_response
from rankup.errors import BusyError, InputError, RankupError
from rankup.store import OCTETS, Store

PIECE_BYTES = 4 * 1024**2
MAX_OUTSTANDING_BYTES = 4 * 1024**3
MIN_BYTES_PER_S = 16 * 1024
"""A reader slower than this no longer counts as outstanding."""
RETRY_AFTER_S = 5.0
FOR_GOOD = "public, max-age=31536000, immutable"
_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.ASCII | re.IGNORECASE)

log = structlog.get_logger(__name__)


class UnsatisfiableError(ValueError):
    """The range lies outside the object."""


def wanted_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """First byte and number of bytes that a Range header asks for; None: the whole object.

    Raises:
        UnsatisfiableError: no byte of the object is in the range.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or (not found[1] and not found[2]):
        return None
    if not found[1]:
        length = min(int(found[2]), size_bytes)
        start = size_bytes - length
    else:
        start = int(found[1])
        if found[2] and int(found[2]) < start:
            return None
        length = min(int(found[2]) + 1 if found[2] else size_bytes, size_bytes) - start
    if length <= 0:
        raise UnsatisfiableError
    return start, length


class Outgoing:
    """Counts the bytes of one replica's answers from their beginning until their readers have taken or left them."""

    def __init__(self, max_bytes: int = MAX_OUTSTANDING_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0

    def check(self, length: int) -> None:
        """Raises BusyError where an answer of this length has to wait for others."""
        if self._bytes and self._bytes + length > self._max_bytes:
            raise BusyError("readers have not taken the answers under way yet", retry_after_s=RETRY_AFTER_S)

    @contextlib.contextmanager
    def hold(self, length: int) -> Iterator[None]:
        self._bytes += length
        try:
            yield
        finally:
            self._bytes -= length


class _CountedResponse(StreamingResponse):
    """A streamed answer that counts as outgoing until its last byte is with the reader, or the reader is gone."""

    def __init__(
        self, pieces: AsyncIterator[bytes], status: int, headers: dict[str, str], length: int, outgoing: Outgoing
    ) -> None:
        super().__init__(pieces, status, headers=headers, media_type=OCTETS)
        self._length = length
        self._outgoing = outgoing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._outgoing.hold(self._length):
            await super().__call__(scope, receive, send)
            # Servers report the end of an exchange as a disconnect, also when all went well.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_AFTER_S + self._length / MIN_BYTES_PER_S):
                    while (await receive())["type"] != "http.disconnect":
                        pass


def blob_answer(
    store: Store, key: str, outgoing: Outgoing, *, size_bytes: int, sha256: str, method: str, asked: Headers
) -> Response:
    """The answer to a GET or HEAD of the object `key`, which has this size and hash.

    Raises:
        BusyError: too much that was answered before is still on its way.
    """
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": FOR_GOOD}
    known = {tag.strip().removeprefix("W/") for tag in asked.get("if-none-match", "").split(",")}
    if etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    # Range means something for GET only, and If-Range drops it where the reader's part is of another object.
    ranged = method == "GET" and asked.get("if-range", etag) == etag
    try:
        part = wanted_range(asked.get("range") if ranged else None, size_bytes)
    except UnsatisfiableError:
        return problem_response(
            status=416,
            code=InputError.code,
            title="No such range",
            detail=f"The blob has {size_bytes} bytes; none of them is in the range.",
            remedy="Ask for bytes inside the blob.",
            headers={"Content-Range": f"bytes */{size_bytes}", "Accept-Ranges": "bytes"},
        )
    start, length = part or (0, size_bytes)
    headers["Content-Length"] = str(length)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size_bytes}"
    if method == "HEAD":
        return Response(status_code=200, headers=headers, media_type=OCTETS)
    status = 200 if part is None else 206
    outgoing.check(length)
    return _CountedResponse(_pieces(store, key, start, length), status, headers, length, outgoing)


async def _pieces(store: Store, key: str, start: int, length: int) -> AsyncIterator[bytes]:
    for position in range(start, start + length, PIECE_BYTES):
        try:
            yield await run_in_threadpool(store.get_range, key, position, min(PIECE_BYTES, start + length - position))
        except RankupError as exc:
            log.warning("blob_broke_off", key=key, position=position, code=exc.code, cause=exc.cause)
            raise
