"""Writing in parts: one set of rules, held by the store in memory and by S3 on a real server."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from uuid import uuid4

import pytest

from rankup.errors import InputError, NotFoundError
from rankup.multipart import ArrivedPart, PresignedPut
from rankup.store import MemoryStore, S3Store, Store

MIB = 1024**2
FIRST, LAST = bytes(range(256)) * 4 * 1024 * 5, b"the end"
"""5 MiB, the least that S3 takes for a part that is not the last."""


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue("memory_store" if request.param == "memory" else "s3_store")
    return found


@pytest.fixture
def key() -> str:
    return f"test/{uuid4().hex}/object"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put_part(store: Store, key: str, upload_id: str, number: int, data: bytes, folder: Path) -> None:
    path = folder / f"part-{number}"
    path.write_bytes(data)
    store.put_part(key, upload_id, number, path, sha256=sha256(data))


def named(store: Store, key: str, upload_id: str, *datas: bytes) -> list[ArrivedPart]:
    """The parts of these sizes that are there, with the hashes that they must have."""
    return [
        ArrivedPart(part.number, part.size_bytes, part.etag, sha256(datas[part.number - 1]))
        for part in store.arrived_parts(key, upload_id)
        if part.size_bytes == len(datas[part.number - 1])
    ]


def test_parts_in_any_order_and_sent_again_become_one_object(store: Store, key: str, tmp_path: Path) -> None:
    upload_id = store.begin_upload(key)
    for number, data in ((2, LAST), (1, LAST), (1, FIRST)):
        put_part(store, key, upload_id, number, data, tmp_path)
    arrived = store.arrived_parts(key, upload_id)
    assert [part.number for part in arrived] == sorted(part.number for part in arrived)
    assert {(part.number, part.size_bytes) for part in arrived} >= {(1, len(FIRST)), (2, len(LAST))}
    assert {part.sha256 for part in arrived} <= {None, sha256(FIRST), sha256(LAST)}
    assert store.head(key) is None
    assert list(store.list(key)) == []
    store.finish_upload(key, upload_id, named(store, key, upload_id, FIRST, LAST))
    assert store.get(key, max_bytes=6 * MIB) == FIRST + LAST
    assert list(store.open_uploads(key)) == []
    with pytest.raises(NotFoundError):
        store.arrived_parts(key, upload_id)
    with pytest.raises(NotFoundError):
        put_part(store, key, upload_id, 1, LAST, tmp_path)


def test_open_uploads_are_found_by_key_and_gone_once_aborted(store: Store, key: str, tmp_path: Path) -> None:
    first, second = store.begin_upload(key), store.begin_upload(f"{key}-2")
    put_part(store, key, first, 1, LAST, tmp_path)
    found = {upload.key: upload.upload_id for upload in store.open_uploads(key)}
    assert found == {key: first, f"{key}-2": second}
    store.abort_upload(key, first)
    store.abort_upload(key, first)
    assert [upload.upload_id for upload in store.open_uploads(key)] == [second]
    assert store.head(key) is None
    store.abort_upload(f"{key}-2", second)


def test_parts_with_other_hashes_than_stated_are_not_put_together(store: Store, key: str, tmp_path: Path) -> None:
    upload_id = store.begin_upload(key)
    put_part(store, key, upload_id, 1, FIRST, tmp_path)
    put_part(store, key, upload_id, 2, LAST, tmp_path)
    with pytest.raises(InputError):
        store.finish_upload(key, upload_id, named(store, key, upload_id, FIRST, b"not end"))
    assert store.head(key) is None
    store.abort_upload(key, upload_id)


def test_a_part_with_another_hash_than_stated_is_refused(store: Store, key: str, tmp_path: Path) -> None:
    upload_id = store.begin_upload(key)
    path = tmp_path / "part"
    path.write_bytes(LAST)
    with pytest.raises(InputError):
        store.put_part(key, upload_id, 1, path, sha256=sha256(FIRST))
    assert store.arrived_parts(key, upload_id) == ()
    store.abort_upload(key, upload_id)


def test_unknown_uploads_and_bad_keys_are_errors(store: Store, key: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        store.arrived_parts(key, "0" * 32)
    with pytest.raises(NotFoundError):
        store.finish_upload(key, "0" * 32, [])
    with pytest.raises(InputError):
        store.begin_upload("../away")
    with pytest.raises(InputError):
        store.presign_part(key, "0" * 32, 1, size_bytes=1, sha256="no hash")


# -- presigned ---------------------------------------------------------------------------------------------------------


def send(put: PresignedPut, data: bytes, **changes: str) -> int:
    headers = put.headers | changes | {"Content-Length": str(len(data))}
    request = urllib.request.Request(put.url, data=data, method="PUT", headers=headers)  # noqa: S310 - loopback
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code


def test_a_presigned_part_takes_the_signed_bytes_and_no_others(s3_store: S3Store, key: str) -> None:
    upload_id = s3_store.begin_upload(key)

    def permit(number: int = 1) -> PresignedPut:
        return s3_store.presign_part(key, upload_id, number, size_bytes=len(LAST), sha256=sha256(LAST))

    assert send(permit(), b"a" * len(LAST)) == 400
    assert send(permit(), LAST + b"!") == 403
    other = s3_store.presign_part(key, upload_id, 1, size_bytes=7, sha256=sha256(b"another"))
    assert send(permit(), b"another", **other.headers) == 403
    moved = permit()
    assert send(PresignedPut(moved.url.replace("partNumber=1", "partNumber=2"), moved.headers, 0.0), LAST) == 403
    assert s3_store.arrived_parts(key, upload_id) == ()
    assert send(permit(), LAST) == 200
    assert [part.size_bytes for part in s3_store.arrived_parts(key, upload_id)] == [len(LAST)]
    s3_store.abort_upload(key, upload_id)
    assert send(permit(2), LAST) == 404


def test_a_presigned_part_in_memory_names_what_it_is_for(memory_store: MemoryStore, key: str) -> None:
    put = memory_store.presign_part(key, "upload-1", 3, size_bytes=7, sha256=sha256(LAST))
    assert key in put.url
    assert "part=3" in put.url
    assert put.headers["Content-Length"] == "7"
