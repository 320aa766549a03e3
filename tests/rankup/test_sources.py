"""Where versions come from: folders that cannot be left, web servers of all habits, and how a URL is told apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_server import Served, serve
from history import MODEL, History, make_history
from static_world import Site, lay_out, serve_folder

from rankup.cli.source import open_model, open_source, parse_rate
from rankup.errors import (
    BusyError,
    DeniedError,
    InputError,
    IntegrityError,
    NotFoundError,
    RetryableError,
    TooLargeError,
    UnreachableError,
)
from rankup.message import canonical_json
from rankup.protocol import ServerInfo
from rankup.pull import pull
from rankup.records import BlobRef, Retained
from rankup.retained import MAX_RETAINED_BYTES, lacking, parse_retained, parts_of
from rankup.sources import FolderSource, GatewaySource, Patience, Source, StaticSource, StoreSource, WebSource
from rankup.store import blob_key
from rankup.versions import manifest_digest, manifest_key, pointer_key, retained_key

QUICK = Patience(attempts=4, first_pause_s=0.01, longest_pause_s=0.02)
GONE = Retained(model=MODEL, gone={0: ("master", "export"), 1: ("contributions",)})


@pytest.fixture(scope="module")
def history() -> History:
    return make_history()


@pytest.fixture
def folder(history: History, tmp_path: Path) -> Path:
    return lay_out(history.store, tmp_path / "bucket")


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    with serve_folder(folder) as running:
        yield running


@pytest.fixture
def served(history: History) -> Iterator[Served]:
    with serve(history) as running:
        yield running


def read(source: Source, ref: BlobRef, start: int = 0) -> bytes:
    """The blob from `start` on, whatever the source begins with."""
    with source.stream(ref, start) as stream:
        return b"".join(stream.chunks)[start - stream.start :]


# -- what every source does --------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[History, Path, str], Source]] = {
    "bucket": lambda history, folder, url: StoreSource(history.store),
    "folder": lambda history, folder, url: FolderSource(folder),
    "static server": lambda history, folder, url: StaticSource(url),
    "unnamed server": lambda history, folder, url: WebSource(url),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_what_was_published_and_a_pull_works(
    kind: str, history: History, folder: Path, site: Site, tmp_path: Path
) -> None:
    source = KINDS[kind](history, folder, site.url)
    manifest = history.manifests[2]
    assert source.latest(MODEL).manifest == manifest_digest(manifest)
    assert source.envelope(MODEL, 1) == history.store.get(manifest_key(MODEL, 1), max_bytes=2**20)
    assert source.retained(MODEL) == Retained(model=MODEL)
    ref = manifest.groups[0].export
    for start in (0, 1, ref.size_bytes - 1):
        assert read(source, ref, start) == history.blob(ref)[start:]
    for call in (
        lambda: source.latest("nobody"),
        lambda: source.envelope(MODEL, 7),
        lambda: read(source, BlobRef(sha256="0" * 64, size_bytes=5)),
    ):
        with pytest.raises(NotFoundError):
            call()
    pulled = pull(source, MODEL, None, tmp_path / "model", patience=QUICK)
    assert pulled.manifest == manifest


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_tells_what_is_no_longer_kept(kind: str, tmp_path: Path) -> None:
    history = make_history(versions=1)
    history.store.put(retained_key(MODEL), canonical_json(GONE))
    folder = lay_out(history.store, tmp_path)
    with serve_folder(folder) as site:
        assert KINDS[kind](history, folder, site.url).retained(MODEL) == GONE


BAD_RECORDS = {
    "no JSON": (b"<html>", IntegrityError),
    "another model": (canonical_json(Retained(model="other")), IntegrityError),
    "an unknown part": (b'{"model":"toy","gone":{"1":["everything"]}}', IntegrityError),
    "too large": (b" " * (MAX_RETAINED_BYTES + 1), TooLargeError),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_of_what_is_gone_is_bounded_and_strict(name: str, history: History, folder: Path, site: Site) -> None:
    data, error = BAD_RECORDS[name]
    with pytest.raises(error):
        parse_retained(data, model=MODEL)
    (folder / retained_key(MODEL)).write_bytes(data)
    for source in (FolderSource(folder), StaticSource(site.url)):
        with pytest.raises(error):
            source.retained(MODEL)


def test_the_parts_of_a_version_are_lacking_where_one_of_their_blobs_is(history: History) -> None:
    manifest = history.manifests[1]
    assert lacking(manifest, lambda ref: True) == ()
    for part, refs in parts_of(manifest).items():
        for ref in refs:
            assert lacking(manifest, lambda each, lost=ref: each != lost) == (part,)


# -- a folder ----------------------------------------------------------------------------------------------------------


def _outside(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    path.replace(secret)
    path.symlink_to(secret)


def _outer_folder(path: Path, tmp_path: Path) -> None:
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")


def _pipe(path: Path, tmp_path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, tmp_path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path, tmp_path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


TRICKS = {
    "a link out": _outside,
    "a linked folder": _outer_folder,
    "a pipe": _pipe,
    "a folder": _folder,
    "a loop": _loop,
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("what", ["pointer", "manifest", "blob"])
def test_a_folder_is_never_left_and_only_files_are_read(
    trick: str, what: str, history: History, folder: Path, tmp_path: Path
) -> None:
    ref = history.manifests[0].groups[0].export
    key = {"pointer": pointer_key(MODEL), "manifest": manifest_key(MODEL, 0), "blob": blob_key(ref.sha256)}[what]
    TRICKS[trick](folder / key, tmp_path)
    source = FolderSource(folder)
    reads = {
        "pointer": lambda: source.latest(MODEL),
        "manifest": lambda: source.envelope(MODEL, 0),
        "blob": lambda: read(source, ref),
    }
    with pytest.raises(InputError) as caught:
        reads[what]()
    assert not isinstance(caught.value, NotFoundError)


def test_a_link_within_the_folder_is_followed_and_the_folder_may_be_one_itself(
    history: History, folder: Path, tmp_path: Path
) -> None:
    ref = history.manifests[0].groups[0].export
    path = folder / blob_key(ref.sha256)
    path.rename(folder / "moved")
    path.symlink_to(folder / "moved")
    (tmp_path / "link").symlink_to(folder)
    assert read(FolderSource(tmp_path / "link"), ref) == history.blob(ref)


def test_a_folder_lists_its_models_and_nothing_else(folder: Path) -> None:
    (folder / "models" / "Not A Name").mkdir()
    (folder / "models" / "Not A Name" / "latest").touch()
    (folder / "models" / "empty").mkdir()
    assert FolderSource(folder).models() == (MODEL,)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder"):
        FolderSource(tmp_path / name)


def test_a_manifest_above_its_limit_is_not_read(folder: Path) -> None:
    with (folder / manifest_key(MODEL, 0)).open("wb") as file:
        file.truncate(64 * 1024 * 1024 + 1)
    with pytest.raises(TooLargeError):
        FolderSource(folder).envelope(MODEL, 0)


# -- a static server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "without ranges"])
@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_a_broken_download_goes_on_with_or_without_ranges(
    ranges: bool, moved: bool, history: History, site: Site, tmp_path: Path
) -> None:
    site.ranges, site.moved = ranges, moved
    largest = max(history.manifests[2].export_files(), key=lambda file: file.size_bytes)
    with StaticSource(site.url) as source:
        source.latest(MODEL)
        pull(source, MODEL, 0, tmp_path / "old", patience=QUICK)
        site.cut_after = largest.size_bytes // 2 if not moved else 0
        pulled = pull(source, MODEL, None, tmp_path / "model", patience=QUICK)
    assert pulled.manifest == history.manifests[2]
    assert (tmp_path / "model" / largest.path).read_bytes() == history.blob(largest)


STATUSES = {401: DeniedError, 403: DeniedError, 404: NotFoundError, 410: NotFoundError, 429: BusyError, 500: BusyError}


@pytest.mark.parametrize("status", STATUSES)
def test_the_answers_of_a_static_server_become_errors(status: int, site: Site) -> None:
    site.missing = status
    with StaticSource(site.url) as source, pytest.raises(STATUSES[status]):
        source.latest("nobody")


@pytest.mark.parametrize("status", [403, 404, 200])
def test_a_server_without_a_record_of_what_is_gone_says_so_in_its_own_way(status: int, site: Site) -> None:
    site.missing = status
    with StaticSource(site.url) as source:
        assert source.retained(MODEL) == Retained(model=MODEL)


def test_a_page_in_the_place_of_a_file_is_not_found(site: Site) -> None:
    site.missing = 200
    with StaticSource(site.url) as source, pytest.raises(NotFoundError, match="page"):
        source.latest("nobody")


def test_compressed_bytes_are_refused_with_a_remedy(history: History, site: Site) -> None:
    site.encoding = "gzip"
    with StaticSource(site.url) as source, pytest.raises(InputError, match="compresses"):
        read(source, history.manifests[0].groups[0].export)


# -- what a URL is -----------------------------------------------------------------------------------------------------


def test_a_server_is_asked_once_what_it_is(history: History, folder: Path, site: Site) -> None:
    for info in (b"", b'{"models": []}', None):
        (folder / "v1").mkdir(exist_ok=True)
        if info is not None:
            (folder / "v1/info").write_bytes(info)
        else:
            (folder / "v1/info").unlink()
        site.requests.clear()
        source = WebSource(site.url)
        assert source.models() is None
        assert source.latest(MODEL).version == 2
        source.envelope(MODEL, 0)
        source.close()
        asked = ["/v1/info", f"/{pointer_key(MODEL)}", f"/{manifest_key(MODEL, 0)}"]
        assert [path for path, _ in site.requests] == asked


def test_a_gateway_is_known_by_what_it_says_of_itself(history: History, folder: Path, site: Site) -> None:
    info = ServerInfo(
        protocol=1,
        server_version="1",
        publisher_key=history.publisher_key,
        models=(MODEL,),
        invite_needed=False,
        max_delta_bytes=1,
    )
    (folder / "v1" / "models" / MODEL).mkdir(parents=True)
    (folder / "v1" / "info").write_bytes(canonical_json(info))
    (folder / pointer_key(MODEL)).rename(folder / "v1" / pointer_key(MODEL))
    source = WebSource(site.url)
    assert source.models() == (MODEL,)
    assert source.latest(MODEL).version == 2
    assert open_model(site.url, None)[1:] == (MODEL, None)


def test_a_server_that_is_down_at_first_is_asked_again(history: History, site: Site) -> None:
    site.down = True
    source = WebSource(site.url)
    for _ in range(2):
        with pytest.raises(RetryableError):
            source.latest(MODEL)
    site.down = False
    assert source.latest(MODEL).version == 2
    assert source.retained(MODEL) == Retained(model=MODEL)


def test_nobody_there_is_unreachable_until_patience_ends(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError):
        pull(WebSource("http://127.0.0.1:1"), MODEL, None, tmp_path, patience=QUICK)


def test_a_gateway_without_the_route_keeps_everything(served: Served) -> None:
    with GatewaySource(served.url) as source:
        assert source.retained(MODEL) == Retained(model=MODEL)


def test_addresses_name_their_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_source(str(folder)), FolderSource)
    assert isinstance(open_source(folder.as_uri()), FolderSource)
    spaced = folder.rename(folder.with_name("a folder"))
    assert isinstance(open_source(spaced.as_uri()), FolderSource)
    assert isinstance(open_source("s3://bucket/"), StoreSource)
    assert isinstance(open_source("https://rankup.example.org"), WebSource)
    for wrong in ("ftp://host/x", "file://host/x", "rankup.example.org:8420", "https://"):
        with pytest.raises(InputError):
            open_source(wrong)


def test_a_model_left_out_is_found_where_there_is_one(folder: Path, site: Site) -> None:
    for name, version in ((None, None), ("@1", 1)):
        source, model, found = open_model(str(folder), name)
        assert (source.latest(model).model, found) == (MODEL, version)
    with pytest.raises(InputError, match="cannot tell"):
        open_model(site.url, None)
    assert open_model(site.url, f"{MODEL}@2")[1:] == (MODEL, 2)
    (folder / "models" / "second").mkdir()
    (folder / "models" / "second" / "latest").touch()
    with pytest.raises(InputError, match="2 models: second, toy"):
        open_model(str(folder), None)


@pytest.mark.parametrize("name", ["toy@x", "toy@-1", "toy@1234567", "toy@²"])
def test_what_is_no_version_number_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(InputError, match="version number"):
        open_model(str(folder), name)


RATES = {"5M": 5e6, "800K": 8e5, "2MiB/s": 2 * 2**20, "1.5 MB/s": 1.5e6, "100": 100.0, "1g": 1e9, "64kib": 65536.0}


@pytest.mark.parametrize("text", RATES)
def test_rates_are_read_as_they_are_written(text: str) -> None:
    limit = parse_rate(text)
    assert limit is not None
    assert limit.take(int(60 * RATES[text])) == pytest.approx(60, abs=1)


@pytest.mark.parametrize("text", ["", "fast", "-5M", "5Mbit", "0", "1e9", "5 M B", "inf"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_rate(text)
