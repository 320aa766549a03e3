"""Base versions on a volunteer's disk: what a new one fetches when an older one is there."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankup.folder import STATE_NAME
from worker import cache
from worker.base import pull_base
from worker.traffic import Traffic

sys.path.insert(0, str(Path(__file__).parents[1] / "rankup"))
from faulty_server import Served, serve
from history import MODEL, make_history


@pytest.fixture(scope="module")
def large() -> Iterator[Served]:
    with serve(make_history(versions=1, filler_bytes=2_000_000)) as running:
        yield running


class Held(Exception):
    """Stands for whatever ends a download."""


class Switch:
    """A rate that a test changes, and a switch that ends what asks for it."""

    def __init__(self, home: Path, bytes_per_s: float) -> None:
        self.traffic = Traffic(home)
        self.traffic.set_rates(up=0.0, down=bytes_per_s)
        self.held = threading.Event()
        self.asked_at: list[float] = []

    def take(self, count: int) -> float:
        self.asked_at.append(time.monotonic())
        wait_s = self.traffic.received(count)
        if self.held.is_set():
            raise Held
        return wait_s


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(make_history(contributions=1, filler_bytes=100_000, patches=True)) as running:
        yield running


def have(served: Served, store: Path, version: int) -> tuple[Path, int]:
    """The folder of a version, pulled as the agent does, and the bytes of blobs that it took."""
    before = served.blob_bytes
    folder = cache.version_folder(store, f"digest-of-{version}")
    folder.mkdir(parents=True, exist_ok=True)
    cache.mark_used(folder)
    key = served.history.publisher_key
    fetched: list[int] = []
    pull_base(
        served.url,
        MODEL,
        version,
        folder,
        publisher_key=key,
        progress=lambda done, total: fetched.append(done),
        working=lambda: None,
        limit=None,
    )
    assert max(fetched, default=0) <= served.blob_bytes - before, "only what was fetched is told as fetched"
    return folder, served.blob_bytes - before


def require_whole(served: Served, folder: Path, version: int) -> None:
    for file in served.history.manifests[version].export_files():
        assert (folder / file.path).read_bytes() == served.history.blob(file), file.path


def test_a_new_version_is_patched_from_the_one_before_and_both_stay_whole(served: Served, tmp_path: Path) -> None:
    _, whole = have(served, tmp_path, 0)
    old, _ = have(served, tmp_path, 1)
    new, patched = have(served, tmp_path, 2)
    assert patched < whole / 5
    for version in (0, 1, 2):
        require_whole(served, cache.version_folder(tmp_path, f"digest-of-{version}"), version)
    assert (new / "config.json").samefile(old / "config.json")


@pytest.mark.parametrize(
    ("there", "wanted", "starts_from"), [([0, 1], 2, [1]), ([2], 1, []), ([], 0, []), ([0, 2], 1, [0]), ([1], 1, [])]
)
def test_a_pull_starts_from_the_newest_version_that_is_not_newer(
    served: Served, tmp_path: Path, there: list[int], wanted: int, starts_from: list[int]
) -> None:
    folders = {version: have(served, tmp_path, version)[0] for version in there}
    folder = cache.version_folder(tmp_path, f"digest-of-{wanted}")
    found = cache.nearest_version(tmp_path, MODEL, wanted, without=folder)
    assert found == [folders[version] for version in starts_from]
    assert cache.nearest_version(tmp_path, "another", wanted, without=folder) == []


def pull_at(served: Served, folder: Path, limit: Switch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    key = served.history.publisher_key
    nothing = {"progress": lambda done, total: None, "working": lambda: None}
    pull_base(served.url, MODEL, 0, folder, publisher_key=key, limit=limit, **nothing)  # type: ignore[arg-type]


def test_a_base_comes_as_fast_as_the_limit_says_also_when_that_changes(large: Served, tmp_path: Path) -> None:
    _, size = have(large, tmp_path / "free", 0)
    limit = Switch(tmp_path, size / 3)
    changed_at: list[float] = []

    def change() -> None:
        limit.traffic.set_rates(up=0.0, down=size * 2 / 3)
        changed_at.append(time.monotonic())

    threading.Timer(1.0, change).start()
    pull_at(large, tmp_path / "slow" / "v0", limit)
    began, ended = limit.asked_at[0], limit.asked_at[-1]
    # a third of it a second until the change, the rest at twice that: about 2 s together
    slow_s = changed_at[0] - began
    assert ended - began == pytest.approx(slow_s + (1 - slow_s / 3) * 1.5, rel=0.1)
    assert limit.traffic.day().down == size


def test_a_download_that_is_held_up_ends_within_a_second_and_goes_on_where_it_was(
    large: Served, tmp_path: Path
) -> None:
    _, size = have(large, tmp_path / "free", 0)
    limit = Switch(tmp_path, size / 60)
    held_at: list[float] = []

    def hold() -> None:
        held_at.append(time.monotonic())
        limit.held.set()

    threading.Timer(0.4, hold).start()
    with pytest.raises(Held):
        pull_at(large, tmp_path / "slow" / "v0", limit)
    assert time.monotonic() - held_at[0] < 1.0
    assert 0 < limit.traffic.day().down < size
    again = Switch(tmp_path / "second", 0.0)
    large.object_requests.clear()
    pull_at(large, tmp_path / "slow" / "v0", again)
    assert limit.traffic.day().down + again.traffic.day().down == size
    assert any(wanted for _, _, wanted in large.object_requests), "the rest was asked for by Range"
    require_whole(large, tmp_path / "slow" / "v0", 0)


def test_a_folder_that_is_not_complete_or_not_readable_lends_nothing(served: Served, tmp_path: Path) -> None:
    folder, _ = have(served, tmp_path, 0)
    state = (folder / STATE_NAME).read_text()
    for broken in (state.replace('"complete":true', '"complete":false'), "{"):
        (folder / STATE_NAME).write_text(broken)
        assert cache.nearest_version(tmp_path, MODEL, 1, without=tmp_path / "new") == []


def test_files_that_versions_share_count_once_and_go_with_the_last_of_them(tmp_path: Path) -> None:
    for age, name in enumerate(["c", "b", "a"]):
        folder = cache.version_folder(tmp_path, name)
        folder.mkdir()
        if age:
            os.link(tmp_path / "c" / "shared", folder / "shared")
        else:
            (folder / "shared").write_bytes(bytes(100))
        (folder / "own").write_bytes(bytes(10))
        os.utime(folder, (1000.0 - age, 1000.0 - age))
    keep = tmp_path / "c"
    assert cache.make_room(tmp_path, 130, keep=[keep]) == []
    assert cache.make_room(tmp_path, 129, keep=[keep]) == [tmp_path / "a"]
    assert cache.make_room(tmp_path, 100, keep=[keep]) == [tmp_path / "b"]
    assert (keep / "shared").read_bytes() == bytes(100)
