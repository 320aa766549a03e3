"""The store port: one set of rules, held by the in-memory store and by S3 on a real server."""

import hashlib
import pickle
import resource
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from rankup.errors import (
    ConflictError,
    DiskFullError,
    InputError,
    IntegrityError,
    NotFoundError,
    RankupError,
    SetupError,
    TooLargeError,
    UnreachableError,
)
from rankup.local import LocalServices
from rankup.settings import StoreSettings
from rankup.store import (
    MULTIPART_BYTES,
    MemoryStore,
    PresignedPut,
    S3Store,
    Store,
    blob_key,
    get_blob,
    open_store,
    put_blob,
    put_blob_file,
)


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue("memory_store" if request.param == "memory" else "s3_store")
    return found


@pytest.fixture
def key() -> str:
    return f"test/{uuid4().hex}/object"


# -- what every store does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "one byte", "1.2 MB"])
def test_what_was_put_is_got_back_with_size_and_etag(store: Store, key: str, data: bytes) -> None:
    etag = store.put(key, data)
    info = store.head(key)
    assert info is not None
    assert (info.size_bytes, info.etag) == (len(data), etag)
    assert store.get_with_etag(key, max_bytes=len(data)) == (data, etag)


def test_a_missing_key_is_not_found_and_has_no_head(store: Store, key: str, tmp_path: Path) -> None:
    assert store.head(key) is None
    store.delete(key)
    for read in (
        lambda: store.get(key, max_bytes=1),
        lambda: store.get_range(key, 0, 1),
        lambda: store.get_range(key, 0, 0),
        lambda: store.get_file(key, tmp_path / "file"),
    ):
        with pytest.raises(NotFoundError, match=key):
            read()
    assert list(tmp_path.iterdir()) == []


def test_an_object_above_the_limit_is_refused_and_one_at_the_limit_is_read(store: Store, key: str) -> None:
    store.put(key, b"12345")
    assert store.get(key, max_bytes=5) == b"12345"
    with pytest.raises(TooLargeError, match="5 bytes"):
        store.get(key, max_bytes=4)


@pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 1), (9, 1), (3, 4), (5, 0)])
def test_a_range_gives_exactly_its_bytes(store: Store, key: str, start: int, length: int) -> None:
    store.put(key, b"0123456789")
    assert store.get_range(key, start, length) == b"0123456789"[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (100, 5), (-1, 2), (2, -1)])
def test_a_range_outside_the_object_is_an_error_and_no_short_read(
    store: Store, key: str, start: int, length: int
) -> None:
    store.put(key, b"0123456789")
    with pytest.raises(InputError):
        store.get_range(key, start, length)


def test_put_replaces_and_delete_removes(store: Store, key: str) -> None:
    first = store.put(key, b"one")
    assert store.put(key, b"two") != first
    assert store.get(key, max_bytes=9) == b"two"
    store.delete(key)
    assert store.head(key) is None


def test_listing_gives_the_keys_under_a_prefix_sorted(store: Store) -> None:
    prefix = f"test/{uuid4().hex}/"
    for name in ("b", "a/2", "a/1", "c"):
        store.put(prefix + name, b"x")
    store.put(f"test/{uuid4().hex}/other", b"x")
    assert list(store.list(prefix)) == [prefix + name for name in ("a/1", "a/2", "b", "c")]
    assert list(store.list(prefix + "a/")) == [prefix + "a/1", prefix + "a/2"]
    assert list(store.list(prefix + "nothing")) == []


def test_a_scan_tells_size_and_time_of_what_a_listing_names(store: Store) -> None:
    prefix = f"test/{uuid4().hex}/"
    for name in ("b", "a"):
        store.put(prefix + name, name.encode() * 3)
    started = time.time()
    store.put(prefix + "c", b"new")
    found = {each.key: each for each in store.scan(prefix)}
    assert list(found) == list(store.list(prefix)) == [prefix + name for name in ("a", "b", "c")]
    assert {each.size_bytes for each in found.values()} == {3}
    # S3 tells whole seconds, by its own clock.
    assert abs(found[prefix + "c"].modified_at - started) < 5


@pytest.mark.parametrize("bad", ["", "/a", "a/", "a//b", "a/../b", "..", ".", "a\nb", "a\0b", "k" * 1025])
def test_keys_that_could_leave_the_bucket_are_refused(store: Store, bad: str) -> None:
    for call in (lambda: store.put(bad, b""), lambda: store.get(bad, max_bytes=1), lambda: store.presign_get(bad)):
        with pytest.raises(InputError):
            call()


def test_put_if_absent_refuses_an_existing_key_and_leaves_it_alone(store: Store, key: str) -> None:
    store.put(key, b"first", if_absent=True)
    with pytest.raises(ConflictError):
        store.put(key, b"second", if_absent=True)
    assert store.get(key, max_bytes=9) == b"first"


def test_swap_writes_only_over_the_etag_that_was_read(store: Store, key: str) -> None:
    one = store.swap(key, b"one", etag=None)
    with pytest.raises(ConflictError):
        store.swap(key, b"again", etag=None)
    two = store.swap(key, b"two", etag=one)
    with pytest.raises(ConflictError):
        store.swap(key, b"late", etag=one)
    assert store.get_with_etag(key, max_bytes=9) == (b"two", two)


def test_swap_of_an_object_that_is_gone_is_a_conflict(store: Store, key: str) -> None:
    etag = store.put(key, b"one")
    store.delete(key)
    with pytest.raises(ConflictError):
        store.swap(key, b"two", etag=etag)
    assert store.head(key) is None


def _race(attempt: Callable[[int], object]) -> list[int]:
    """Numbers of the threads, out of eight, whose attempt was no conflict."""
    barrier, winners = threading.Barrier(8), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            attempt(number)
        except ConflictError:
            return
        winners.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


@pytest.mark.parametrize("repeat", range(3))
def test_of_eight_writers_that_want_an_absent_key_one_wins(store: Store, key: str, repeat: int) -> None:
    winners = _race(lambda number: store.put(key, b"writer %d" % number, if_absent=True))
    assert len(winners) == 1
    assert store.get(key, max_bytes=99) == b"writer %d" % winners[0]


@pytest.mark.parametrize("repeat", range(3))
def test_of_eight_swaps_from_the_same_etag_one_wins(store: Store, key: str, repeat: int) -> None:
    etag = store.put(key, b"before")
    winners = _race(lambda number: store.swap(key, b"writer %d" % number, etag=etag))
    assert len(winners) == 1
    assert store.get(key, max_bytes=99) == b"writer %d" % winners[0]


@pytest.mark.parametrize(
    "size", [0, 1, 3_000_000, MULTIPART_BYTES + 12_345], ids=["empty", "byte", "3 MB", "multipart"]
)
def test_a_file_goes_there_and_back_with_its_bytes_counted(store: Store, key: str, tmp_path: Path, size: int) -> None:
    source, target, sent, got = tmp_path / "source", tmp_path / "new" / "target", [0], [0]
    source.write_bytes(hashlib.shake_128(b"rankup").digest(size))
    store.put_file(key, source, progress=lambda count: sent.append(count))
    store.get_file(key, target, progress=lambda count: got.append(count))
    assert target.read_bytes() == source.read_bytes()
    assert sum(sent) == sum(got) == size
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_file_that_cannot_be_read_is_the_callers_error(store: Store, key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        store.put_file(key, tmp_path / "missing")
    with pytest.raises(InputError, match="missing"):
        put_blob_file(store, tmp_path / "missing")


def test_a_failed_download_keeps_the_old_file_and_leaves_no_part(store: Store, key: str, tmp_path: Path) -> None:
    class StopHereError(Exception):
        pass

    def stop(count: int) -> None:
        raise StopHereError

    store.put(key, b"new")
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(StopHereError):
        store.get_file(key, target, progress=stop)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_full_disk_is_a_disk_full_error_and_leaves_no_part(store: Store, key: str, tmp_path: Path) -> None:
    store.put(key, bytes(3_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskFullError):
            store.get_file(key, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_setup_error(store: Store, key: str, tmp_path: Path) -> None:
    store.put(key, b"x")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SetupError):
        store.get_file(key, tmp_path / "file" / "below")


# -- blobs -------------------------------------------------------------------------------------------------------------


def test_a_blob_lies_under_its_hash_and_may_be_put_again(store: Store, tmp_path: Path) -> None:
    data = uuid4().bytes * 1000
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "file").write_bytes(data)
    for ref in (put_blob(store, data), put_blob(store, data), put_blob_file(store, tmp_path / "file")):
        assert (ref.sha256, ref.size_bytes) == (digest, len(data))
    assert get_blob(store, digest, max_bytes=len(data)) == data
    assert store.head(f"blobs/sha256/{digest[:2]}/{digest}") is not None


def test_a_blob_file_that_is_there_already_is_not_sent_again(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(uuid4().bytes)
    sent: list[int] = []
    put_blob_file(store, tmp_path / "file", progress=sent.append)
    put_blob_file(store, tmp_path / "file", progress=sent.append)
    assert sum(sent) == 16


def test_a_blob_with_other_bytes_than_its_name_says_is_refused(store: Store) -> None:
    digest = hashlib.sha256(uuid4().bytes).hexdigest()
    store.put(blob_key(digest), b"forged")
    with pytest.raises(IntegrityError):
        get_blob(store, digest, max_bytes=100)


# -- presigned URLs ----------------------------------------------------------------------------------------------------


def _send(method: str, url: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=body, headers=headers or {}, method=method)  # noqa: S310 - our own URL
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read()


@pytest.mark.parametrize("bad", ["", "abc", "zz" * 32, "ab" * 31])
def test_a_presigned_put_wants_a_sha256(store: Store, bad: str) -> None:
    with pytest.raises(InputError):
        store.presign_put("a", size_bytes=1, sha256=bad)


def test_a_presigned_get_reads_wholes_and_ranges_without_credentials(s3_store: S3Store, key: str) -> None:
    s3_store.put(key, b"0123456789")
    url = s3_store.presign_get(key)
    assert _send("GET", url) == (200, b"0123456789")
    assert _send("GET", url, {"Range": "bytes=2-4"}) == (206, b"234")
    assert _send("GET", url.partition("?")[0])[0] == 403
    assert _send("GET", url.replace("object?", "other?"))[0] == 403


def test_a_presigned_url_ends(s3_store: S3Store, key: str) -> None:
    s3_store.put(key, b"x")
    url = s3_store.presign_get(key, ttl_s=1)
    deadline = time.monotonic() + 20
    while _send("GET", url)[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_presigned_put_writes_the_signed_bytes(s3_store: S3Store, key: str) -> None:
    body = b"delta" * 1000
    ticket = s3_store.presign_put(key, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest(), ttl_s=60)
    assert time.time() + 30 < ticket.expires_at <= time.time() + 60
    assert _send("PUT", ticket.url, ticket.headers, body)[0] == 200
    assert s3_store.get(key, max_bytes=len(body)) == body


FORGERIES: dict[str, Callable[[PresignedPut, bytes], tuple[dict[str, str], bytes]]] = {
    "other bytes of the same length": lambda ticket, body: (ticket.headers, b"X" + body[1:]),
    "shorter": lambda ticket, body: ({**ticket.headers, "Content-Length": str(len(body) - 1)}, body[:-1]),
    "longer": lambda ticket, body: ({**ticket.headers, "Content-Length": str(len(body) + 1)}, body + b"X"),
    "another checksum": lambda ticket, body: ({**ticket.headers, "x-amz-checksum-sha256": "A" * 43 + "="}, body),
    "no checksum": lambda ticket, body: ({"Content-Length": ticket.headers["Content-Length"]}, body),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_presigned_put_refuses(s3_store: S3Store, key: str, forgery: str) -> None:
    body = b"delta" * 1000
    ticket = s3_store.presign_put(key, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
    status, _ = _send("PUT", ticket.url, *FORGERIES[forgery](ticket, body))
    assert status in (400, 403)
    assert s3_store.head(key) is None


def test_presigned_urls_carry_the_public_address(local_services: LocalServices, key: str) -> None:
    public = local_services.store_settings.model_copy(update={"public_endpoint_url": "https://s3.example.org:9443"})
    store = S3Store(public)
    store.put(key, b"x")
    assert store.presign_get(key).startswith(f"https://s3.example.org:9443/{public.bucket}/{key}?")
    assert store.presign_put(key, size_bytes=1, sha256="00" * 32).url.startswith("https://s3.example.org:9443/")


# -- what can be wrong with a server -----------------------------------------------------------------------------------


def _calls(store: Store, tmp_path: Path) -> dict[str, Callable[[], object]]:
    (tmp_path / "file").write_bytes(b"x")
    return {
        "get": lambda: store.get("a", max_bytes=1),
        "head": lambda: store.head("a"),
        "list": lambda: list(store.list("a")),
        "put": lambda: store.put("a", b""),
        "put if absent": lambda: store.put("a", b"", if_absent=True),
        "swap": lambda: store.swap("a", b"", etag='"x"'),
        "put_file": lambda: store.put_file("a", tmp_path / "file"),
        "get_file": lambda: store.get_file("a", tmp_path / "new"),
        "delete": lambda: store.delete("a"),
        "ensure_bucket": store.ensure_bucket,
    }


WRONG: dict[str, tuple[dict[str, str], type[RankupError], str]] = {
    "nobody listens": ({"endpoint_url": "http://127.0.0.1:9"}, UnreachableError, "127.0.0.1:9"),
    "wrong secret": ({"secret_key": "wrong"}, SetupError, "access denied"),
    "unknown key": ({"access_key": "unknown"}, SetupError, "access denied"),
    "no address": ({"endpoint_url": "nonsense"}, SetupError, "nonsense"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_server_is_named_with_a_remedy(local_services: LocalServices, tmp_path: Path, wrong: str) -> None:
    change, error, words = WRONG[wrong]
    good = StoreSettings.from_wire(local_services.store_settings.to_wire())
    store = S3Store(StoreSettings(**{**good.model_dump(), **change}))
    calls = _calls(store, tmp_path)
    for name in calls if wrong != "nobody listens" else ("get", "swap", "put_file"):
        with pytest.raises(error, match=words) as caught:
            calls[name]()
        assert caught.value.remedy
        assert caught.value.__cause__ is not None


def test_a_missing_bucket_is_a_setup_error_and_can_be_made(local_services: LocalServices) -> None:
    missing = local_services.store_settings.model_copy(update={"bucket": f"new-{uuid4().hex[:8]}"})
    store = S3Store(missing)
    with pytest.raises(SetupError, match=missing.bucket):
        store.put("a", b"x")
    assert _race(lambda number: store.ensure_bucket()) != []
    store.ensure_bucket()
    store.put("a", b"x")
    assert list(store.list("")) == ["a"]


def test_a_store_travels_to_another_process_as_its_settings(s3_store: S3Store, key: str) -> None:
    s3_store.put(key, b"x")
    assert pickle.loads(pickle.dumps(s3_store)).get(key, max_bytes=1) == b"x"  # noqa: S301 - our own bytes


def test_the_memory_store_and_the_s3_store_fit_the_port(s3_store: S3Store) -> None:
    stores: list[Store] = [MemoryStore(), s3_store, open_store(StoreSettings())]
    assert all(each.head for each in stores)
