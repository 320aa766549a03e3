"""How a file is cut into parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.parts import MAX_PARTS, PART_BYTES, cut

MIB = 1024**2


@given(st.integers(1, 2**42))
def test_parts_cover_the_file_without_a_gap_and_are_as_s3_wants_them(size_bytes: int) -> None:
    parts = cut(size_bytes)
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    end = 0
    for part in parts:
        assert part.start == end
        end += part.size_bytes
    assert end == size_bytes
    assert len(parts) <= MAX_PARTS
    assert len({part.size_bytes for part in parts[:-1]} - {parts[0].size_bytes}) == 0
    assert all(part.size_bytes >= 5 * MIB for part in parts[:-1])
    assert 0 < parts[-1].size_bytes <= parts[0].size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "count", "first"),
    [
        (1, 1, 1),
        (PART_BYTES, 1, PART_BYTES),
        (PART_BYTES + 1, 2, PART_BYTES),
        (64 * MIB, 8, PART_BYTES),
        (MAX_PARTS * PART_BYTES, MAX_PARTS, PART_BYTES),
        # one byte more than 512 times 8 MiB: the next larger part of whole mebibytes is 9
        (MAX_PARTS * PART_BYTES + 1, 456, 9 * MIB),
    ],
)
def test_small_files_stay_whole_and_large_ones_get_larger_parts(size_bytes: int, count: int, first: int) -> None:
    assert (len(cut(size_bytes)), cut(size_bytes)[0].size_bytes) == (count, first)
