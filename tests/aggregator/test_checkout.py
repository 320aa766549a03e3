"""Checkout: a folder of verified files, shared between versions, whatever happens to the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_world import World

from aggregator.checkout import checkout, prune
from rankup.errors import IntegrityError, UnreachableError
from rankup.store import blob_key


def fill(world: World, tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    checkout(world.store, world.parent, tmp_path / "blobs", folder)
    return folder


def test_a_folder_holds_every_export_file_and_no_master(world: World, tmp_path: Path) -> None:
    folder = fill(world, tmp_path, "one")
    assert sorted(path.name for path in folder.iterdir()) == sorted(f.path for f in world.parent.export_files())


def test_a_second_folder_downloads_nothing(world: World, tmp_path: Path) -> None:
    first = fill(world, tmp_path, "one")

    def fail(*_: object, **__: object) -> None:
        raise UnreachableError("nothing may be fetched")

    world.store.get_file = fail  # type: ignore[method-assign]
    second = fill(world, tmp_path, "two")
    assert (second / "config.json").read_bytes() == (first / "config.json").read_bytes()


def test_a_rotten_file_in_the_cache_is_fetched_again(world: World, tmp_path: Path) -> None:
    good = (fill(world, tmp_path, "one") / "config.json").read_bytes()
    [entry] = [file for file in world.parent.files if file.path == "config.json"]
    kept = tmp_path / "blobs" / entry.sha256
    kept.unlink()
    kept.write_bytes(b"rotten")
    assert (fill(world, tmp_path, "two") / "config.json").read_bytes() == good
    assert kept.read_bytes() == good


def test_pruning_keeps_what_is_named_and_breaks_no_folder(world: World, tmp_path: Path) -> None:
    folder = fill(world, tmp_path, "one")
    keep = {file.sha256 for file in world.parent.files}
    prune(tmp_path / "blobs", keep)
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == keep
    assert (folder / world.parent.groups[0].export.path).stat().st_size == world.parent.groups[0].export.size_bytes


def test_a_forged_blob_never_reaches_a_folder(world: World, tmp_path: Path) -> None:
    export = world.parent.groups[0].export
    world.store.put(blob_key(export.sha256), b"forged")
    with pytest.raises(IntegrityError):
        fill(world, tmp_path, "one")
    assert not (tmp_path / "one" / export.path).exists()
    assert not (tmp_path / "blobs" / export.sha256).exists()
