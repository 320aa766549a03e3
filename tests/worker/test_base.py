"""Base versions on a volunteer's disk: what a new one fetches when an older one is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankup.folder import STATE_NAME
from worker import cache
from worker.base import pull_base

sys.path.insert(0, str(Path(__file__).parents[1] / "rankup"))
from faulty_server import Served, serve
from history import MODEL, make_history


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
    assert cache.make_room(tmp_path, 130, keep=keep) == []
    assert cache.make_room(tmp_path, 129, keep=keep) == [tmp_path / "a"]
    assert cache.make_room(tmp_path, 100, keep=keep) == [tmp_path / "b"]
    assert (keep / "shared").read_bytes() == bytes(100)
