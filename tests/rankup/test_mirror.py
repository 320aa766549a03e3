"""Mirrors: folders that can be served by anything, always whole, and never taken over by somebody else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from history import MODEL, History, make_history
from static_world import lay_out, serve_folder

import rankup.mirror
from rankup.cli.mirror import register
from rankup.errors import IntegrityError, NotFoundError, UnreachableError
from rankup.message import canonical_json
from rankup.mirror import Mirrored, Wish, mirror
from rankup.pull import pull
from rankup.records import BlobRef, Retained
from rankup.replay import verify_version
from rankup.signing import generate_private_key, parse_private_key
from rankup.sources import BlobStream, FolderSource, Patience, StoreSource, WebSource
from rankup.store import MemoryStore, blob_key
from rankup.versions import manifest_digest, manifest_key, retained_key

ONCE = Patience(attempts=1)
ALL = Wish(masters=True, contributions=True)


@pytest.fixture(scope="module")
def template() -> History:
    return make_history(versions=5, contributions=2, patches=True, filler_bytes=20_000)


@pytest.fixture
def history(template: History) -> History:
    """One that a test may change."""
    store = MemoryStore()
    for key in template.store.list(""):
        store.put(key, template.store.get(key, max_bytes=2**20))
    return History(store, template.key, list(template.manifests), dict(template.deltas), patches=True)


def run(bucket: History, to: Path, version: int | None = None, **options: Any) -> Mirrored:
    return mirror(StoreSource(bucket.store), MODEL, version, to, patience=ONCE, **options)


def forget(history: History, refs: list[BlobRef], gone: Retained) -> None:
    for ref in refs:
        history.store.delete(blob_key(ref.sha256))
    history.store.put(retained_key(MODEL), canonical_json(gone))


def blobs_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("blobs/sha256/??/*")}


class Dying:
    """The bucket, until so many bytes of blobs have been sent."""

    def __init__(self, history: History, after_bytes: int) -> None:
        self._source = StoreSource(history.store)
        self.left = after_bytes
        self.latest, self.envelope, self.retained = self._source.latest, self._source.envelope, self._source.retained

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        with self._source.stream(ref, start) as stream:
            yield BlobStream(stream.start, stream.total_bytes, self._counted(stream.chunks))

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if len(chunk) > self.left:
                yield chunk[: self.left]
                self.left = 0
                raise UnreachableError("the line is cut")
            self.left -= len(chunk)
            yield chunk


def test_a_mirror_behind_any_web_server_is_pulled_from(history: History, tmp_path: Path) -> None:
    made = run(history, tmp_path / "www")
    assert (made.version, made.versions, made.publisher_key) == (4, (4,), history.publisher_key)
    with serve_folder(tmp_path / "www") as site:
        pulled = pull(WebSource(site.url), MODEL, None, tmp_path / "model", patience=ONCE)
    assert pulled.manifest == history.manifests[4]
    assert sorted(path.name for path in (tmp_path / "www").iterdir()) == [".rankup.lock", "blobs", "models"]


def test_a_mirror_holds_what_was_asked_for_and_says_what_it_lacks(history: History, tmp_path: Path) -> None:
    newest = history.manifests[4]
    exports = {file.sha256 for file in newest.export_files()}
    patches = {group.patch.sha256 for group in newest.groups if group.patch is not None}
    masters = {group.master.sha256 for group in newest.groups}
    deltas = {term.contribution for term in newest.terms}
    run(history, tmp_path)
    assert patches
    assert blobs_in(tmp_path) == exports | patches
    assert FolderSource(tmp_path).retained(MODEL).gone == {4: ("master", "contributions")}
    made = run(history, tmp_path, wish=ALL)
    assert blobs_in(tmp_path) == exports | patches | masters | deltas
    assert FolderSource(tmp_path).retained(MODEL).gone == {}
    assert made.fetched_bytes == sum(len(history.blob(BlobRef(sha256=d, size_bytes=0))) for d in masters | deltas)


def test_an_update_fetches_only_what_is_new_and_keeps_the_old(history: History, tmp_path: Path) -> None:
    run(history, tmp_path, 3)
    before = blobs_in(tmp_path)
    again = run(history, tmp_path, 3)
    assert again.fetched_bytes == 0
    made = run(history, tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("blobs/sha256/??/*")}
    assert made.fetched_bytes == sum(sizes[digest] for digest in sizes.keys() - before)
    source = FolderSource(tmp_path)
    for version in (3, 4):
        assert pull(source, MODEL, version, tmp_path / f"v{version}").manifest == history.manifests[version]


def test_a_pointer_never_goes_back_though_older_versions_may_be_added(history: History, tmp_path: Path) -> None:
    run(history, tmp_path)
    run(history, tmp_path, 1)
    assert FolderSource(tmp_path).latest(MODEL).version == 4
    assert pull(FolderSource(tmp_path), MODEL, 1, tmp_path / "old").manifest == history.manifests[1]
    history.point(2)
    with pytest.raises(IntegrityError, match="latest version of toy was 4"):
        run(history, tmp_path)


def test_a_mirror_with_masters_and_contributions_can_be_replayed(history: History, tmp_path: Path) -> None:
    run(history, tmp_path / "www", history=5, wish=ALL)
    report = verify_version(FolderSource(tmp_path / "www"), MODEL, None, cache=tmp_path / "cache", patience=ONCE)
    assert report.ok


def test_versions_without_full_files_bring_along_the_one_that_has_them(history: History, tmp_path: Path) -> None:
    kept = {file.sha256 for file in history.manifests[1].export_files()}
    lost = [group.export for number in (2, 3) for group in history.manifests[number].groups]
    lost = [ref for ref in lost if ref.sha256 not in kept]
    gone = Retained(model=MODEL, gone={2: ("export",), 3: ("export",)})
    forget(history, lost, gone)
    made = run(history, tmp_path / "www", 3)
    assert made.versions == (1, 2, 3)
    source = FolderSource(tmp_path / "www")
    assert {number: parts for number, parts in source.retained(MODEL).gone.items() if "export" in parts}.keys() == {
        2,
        3,
    }
    for version in made.versions:
        pulled = pull(source, MODEL, version, tmp_path / f"v{version}", patience=ONCE)
        assert pulled.manifest == history.manifests[version]


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_bytes", [0, 1, 40_000, 100_000])
def test_a_run_that_was_cut_leaves_the_old_version_whole_and_is_taken_up(
    history: History, tmp_path: Path, after_bytes: int
) -> None:
    to = tmp_path / "www"
    run(history, to, 2)
    dying = Dying(history, after_bytes)
    with pytest.raises(UnreachableError):
        mirror(dying, MODEL, None, to, wish=ALL, patience=ONCE, parallel=1)  # type: ignore[arg-type]
    assert pull(FolderSource(to), MODEL, None, tmp_path / "model").manifest == history.manifests[2]
    dying.left = 10**9
    made = mirror(dying, MODEL, None, to, wish=ALL, patience=ONCE, parallel=1)  # type: ignore[arg-type]
    assert 10**9 - dying.left == made.fetched_bytes - after_bytes
    assert pull(FolderSource(to), MODEL, None, tmp_path / "model").manifest == history.manifests[4]


def test_whenever_writing_stops_the_folder_can_be_pulled_from(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "www"
    run(history, to, 1)
    real = rankup.mirror._write
    for stop in range(6):
        done: list[Path] = []

        def failing(path: Path, data: bytes, done: list[Path] = done, stop: int = stop) -> None:
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(path)
            real(path, data)

        monkeypatch.setattr(rankup.mirror, "_write", failing)
        try:
            run(history, to, history=3)
        except KeyboardInterrupt:
            latest = FolderSource(to).latest(MODEL).version
            assert latest == 1
        else:
            assert stop == 5
        for version in {path.stem for path in (to / "models" / MODEL / "versions").iterdir()}:
            pulled = pull(FolderSource(to), MODEL, int(version), tmp_path / f"{stop}-{version}")
            assert pulled.manifest == history.manifests[int(version)]
        # Those already written are not written again.
        for path in done:
            if "versions" in path.parts:
                path.unlink()
    assert FolderSource(to).latest(MODEL).version == 4


def test_a_blob_that_rotted_is_found_and_mended_by_a_check(history: History, tmp_path: Path) -> None:
    run(history, tmp_path)
    path = tmp_path / blob_key(history.manifests[4].groups[0].export.sha256)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert run(history, tmp_path).fetched_bytes == 0
    assert run(history, tmp_path, check=True).fetched_bytes == len(data)
    assert path.read_bytes() == data


# -- trust -------------------------------------------------------------------------------------------------------------


def test_wrong_bytes_never_become_part_of_a_mirror(history: History, tmp_path: Path) -> None:
    ref = history.manifests[4].groups[0].export
    history.replace_blob(ref, b"x" * ref.size_bytes)
    with pytest.raises(IntegrityError, match=ref.sha256):
        run(history, tmp_path)
    assert ref.sha256 not in blobs_in(tmp_path)
    with pytest.raises(NotFoundError):
        FolderSource(tmp_path).latest(MODEL)


def test_another_publisher_cannot_take_a_mirror_over(history: History, tmp_path: Path) -> None:
    run(history, tmp_path, 1)
    mallory = make_history(versions=5, seed=7)
    for options in ({}, {"publisher_key": mallory.publisher_key}):
        with pytest.raises(IntegrityError, match="signed by"):
            run(mallory, tmp_path, **options)
    with pytest.raises(IntegrityError):
        run(history, tmp_path, publisher_key=mallory.publisher_key)
    assert FolderSource(tmp_path).latest(MODEL).manifest == manifest_digest(history.manifests[1])


def test_a_rewritten_version_is_refused(history: History, tmp_path: Path) -> None:
    run(history, tmp_path, history=3)
    changed = history.manifests[3].model_copy(update={"licence": "another"})
    history.publish(changed)
    with pytest.raises(IntegrityError):
        run(history, tmp_path, 3)


def test_a_new_key_that_the_old_one_named_is_followed(history: History, tmp_path: Path) -> None:
    run(history, tmp_path)
    old = history.publisher_key
    history.rotate(parse_private_key(generate_private_key()))
    made = run(history, tmp_path, history=2)
    assert (made.version, made.publisher_key != old) == (5, True)
    # Versions of the old key's time still come in.
    assert run(history, tmp_path, 2).versions == (2,)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_mirror_of_a_mirror(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lay_out(history.store, tmp_path / "bucket")
    app = typer.Typer()
    register(app)
    code = app(
        [str(folder), "--to", str(tmp_path / "www"), "--history", "2", "--limit-rate", "500M", "--json"],
        standalone_mode=False,
    )
    assert not code
    said = json.loads(capsys.readouterr().out)
    assert (said["versions"], said["publisher_key"]) == ([3, 4], history.publisher_key)
    assert said["fetched_bytes"] == said["total_bytes"] > 0
    assert (tmp_path / "www" / manifest_key(MODEL, 3)).is_file()
