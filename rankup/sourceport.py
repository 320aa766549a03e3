"""The port by which versions are read: what any source hands out.

What always holds: a source hands out bytes and trusts nothing. Whoever reads checks signatures and hashes, and asks
again where trouble may pass. Nothing here does I/O; `rankup.sources` and `rankup.websource` do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from rankup.protocol import Pointer
from rankup.records import BlobRef, Retained


@dataclass(frozen=True)
class BlobStream:
    """Bytes of a blob from `start` on. `total_bytes` is the whole blob's size as the server tells it, if it does."""

    start: int
    total_bytes: int | None
    chunks: Iterator[bytes]


class Source(Protocol):
    """Read access to published versions.

    Raises (all methods): UnreachableError, BusyError or another RetryableError where a later try may work;
    NotFoundError where there is no such thing.
    """

    def latest(self, model: str) -> Pointer:
        """The pointer of a model; IntegrityError where it is malformed."""

    def envelope(self, model: str, version: int) -> bytes:
        """The sealed manifest of a version, unchecked but no larger than `rankup.versions.MAX_ENVELOPE_BYTES`."""

    def retained(self, model: str) -> Retained:
        """What is no longer kept of the model's versions; an empty record where the source says nothing about it.

        A hint for planning, signed by nobody. IntegrityError where it is malformed."""

    def stream(self, ref: BlobRef, start: int) -> AbstractContextManager[BlobStream]:
        """The blob from byte `start` on (0 <= start < size); a source may begin earlier, and then says so."""
