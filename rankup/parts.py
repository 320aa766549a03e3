"""How a delta is cut into the parts that it is uploaded in: a law that worker and server share, and no I/O.

What always holds: the cut follows from the size alone, so parts that arrived under an earlier ticket fit a later one;
the parts follow each other without a gap, every one but the last has the same size, there are at most `MAX_PARTS`, and
every one but the last is above the 5 MiB that S3 asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PART_BYTES: Final = 8 * 1024**2
"""What a broken line costs at most, on files of up to 4 GiB."""
MAX_PARTS: Final = 512
"""S3 takes 10,000; a request names every part by its hash and has to stay small."""
_STEP_BYTES: Final = 1024**2


@dataclass(frozen=True, slots=True)
class Part:
    """One part: its number from 1, and where its bytes lie in the file."""

    number: int
    start: int
    size_bytes: int


def cut(size_bytes: int) -> tuple[Part, ...]:
    """The parts of a file of this size, in order: one where it is not worth cutting. `size_bytes` is above 0."""
    each = PART_BYTES
    if size_bytes > MAX_PARTS * PART_BYTES:
        fair = -(-size_bytes // MAX_PARTS)
        each = -(-fair // _STEP_BYTES) * _STEP_BYTES
    starts = range(0, size_bytes, each)
    return tuple(Part(number, start, min(each, size_bytes - start)) for number, start in enumerate(starts, 1))
