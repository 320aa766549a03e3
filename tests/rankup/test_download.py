"""The bandwidth cap of a fetch: its law on a clock of the test's own, and real fetches under it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.download import PullProgress, RateLimit, fetch
from rankup.errors import InputError, NotFoundError
from rankup.records import BlobRef
from rankup.sources import BlobStream, StoreSource
from rankup.store import MemoryStore, put_blob

BURST_S = 0.25


class Clock:
    """Seconds that only pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_limit_lets_something_through(rate: float) -> None:
    with pytest.raises(InputError):
        RateLimit(rate)


def test_a_steady_stream_comes_at_the_rate() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock=clock)
    for _ in range(100):
        clock.now += limit.take(50)
    # 5,000 bytes at 1,000 a second
    assert clock.now - 100.0 == pytest.approx(5.0)


def test_who_is_late_makes_up_for_it_and_a_long_pause_saves_up_nothing() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock=clock)
    for _ in range(100):
        # Woken up 0.1 s too late each time: then two pieces of 0.05 s go at once, until it is even.
        wait_s = limit.take(50)
        clock.now += wait_s + (0.1 if wait_s else 0.0)
    assert clock.now - 100.0 == pytest.approx(5.0, abs=0.11)
    clock.now += 3600
    assert limit.take(250) == pytest.approx(0.25)
    assert limit.take(1000) == pytest.approx(1.25)


def test_another_rate_holds_at_once_for_what_came_too_early() -> None:
    limit = RateLimit(10, clock=Clock())
    assert limit.take(1000) == pytest.approx(100.0)
    limit.change(1000)
    assert limit.take(0) == pytest.approx(1.0)
    assert limit.take(1000) == pytest.approx(2.0)


@given(
    rate=st.floats(10, 1e9),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 10**7), st.floats(0, 5)), min_size=1, max_size=60),
)
def test_no_stretch_of_time_sees_more_than_the_rate_and_a_burst(
    rate: float, steps: list[tuple[int, int, float]]
) -> None:
    """Three threads, each of which waits as it is told and then dawdles, arrive in the order of time."""
    clock = Clock()
    limit = RateLimit(rate, burst_s=BURST_S, clock=clock)
    free_at = [clock.now] * 3
    taken: list[tuple[float, int]] = []
    for thread, count, dawdle_s in steps:
        clock.now = max(clock.now, free_at[thread])
        taken.append((clock.now, count))
        free_at[thread] = clock.now + limit.take(count) + dawdle_s
    largest = max(count for _, count in taken)
    for begin, (first, _) in enumerate(taken):
        total = 0
        for at, count in taken[begin:]:
            total += count
            assert total <= rate * (at - first + BURST_S) * (1 + 1e-9) + 3 * largest + 1e-3


class Trickle:
    """A source that hands out its store's blobs in chunks of 10,000 bytes."""

    def __init__(self, store: MemoryStore) -> None:
        self._source = StoreSource(store)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        with self._source.stream(ref, start) as stream:
            data = b"".join(stream.chunks)
            pieces = (data[at : at + 10_000] for at in range(0, len(data), 10_000))
            yield BlobStream(stream.start, stream.total_bytes, pieces)


@pytest.fixture
def world() -> tuple[Trickle, list[BlobRef]]:
    store = MemoryStore()
    refs = [put_blob(store, bytes([number]) * 100_000) for number in range(4)]
    return Trickle(store), refs


def test_all_threads_of_a_fetch_share_one_limit(world: tuple[Trickle, list[BlobRef]], tmp_path: Path) -> None:
    source, refs = world
    seen: list[PullProgress] = []
    started = time.monotonic()
    fetch(source, refs, tmp_path, parallel=4, limit=RateLimit(800_000), progress=seen.append)  # type: ignore[arg-type]
    took_s = time.monotonic() - started
    for ref in refs:
        assert hashlib.sha256((tmp_path / ref.sha256).read_bytes()).hexdigest() == ref.sha256
    # 400,000 bytes take 0.5 s; each thread alone under a limit of its own would take nothing at all.
    assert took_s >= 0.49
    assert seen[-1] == PullProgress("downloading", 400_000, 400_000)


def test_a_failure_ends_the_waiting_of_the_others(world: tuple[Trickle, list[BlobRef]], tmp_path: Path) -> None:
    source, refs = world
    missing = BlobRef(sha256="0" * 64, size_bytes=200_000)
    started = time.monotonic()
    with pytest.raises(NotFoundError):
        fetch(source, [*refs, missing], tmp_path, parallel=5, limit=RateLimit(1000))  # type: ignore[arg-type]
    assert time.monotonic() - started < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rankup-fetch")]
