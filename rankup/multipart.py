"""Objects that are written in parts, over hours if need be: the part of `rankup.store`'s port for it, `PartStore`.

    begin_upload ─> presign_part | put_part, each part, in any order, again if need be ─> finish_upload
                                                                                       └> abort_upload

What always holds, for every store:
- nothing is at the key before `finish_upload`, and then the whole; parts that are never put together are no object, and
  no listing of objects shows them;
- a presigned part takes bytes of exactly the signed length and sha256; `finish_upload` names every part's sha256 again,
  and where the server keeps them it compares;
- a part may be sent again; some servers then list it twice, in any order, and `finish_upload` says which one is meant;
- an upload that was finished or aborted is not found any more.

`S3Parts` and `MemoryParts` are what `S3Store` and `MemoryStore` have of it. How a file is cut is `rankup.parts`'.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rankup.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from rankup.settings import StoreSettings


@dataclass(frozen=True, slots=True)
class PresignedPut:
    """Permission to write one object, or one part, once it has the signed length and sha256."""

    url: str
    headers: dict[str, str]
    """To be sent as they are."""
    expires_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An upload in parts that was begun and not ended."""

    key: str
    upload_id: str
    begun_at: float
    """Unix seconds, by the store's clock."""


@dataclass(frozen=True, slots=True)
class ArrivedPart:
    """A part that is there."""

    number: int
    size_bytes: int
    etag: str
    sha256: str | None = None
    """Hex; None: the store does not tell."""


class PartStore(Protocol):
    """Writing in parts. Any method may also raise what every method of a store may."""

    def begin_upload(self, key: str) -> str:
        """Begin to write `key` in parts; returns the upload's id."""

    def open_uploads(self, prefix: str) -> Iterator[OpenUpload]:
        """Uploads to keys that start with `prefix`. Some servers list those of one whole key only."""

    def arrived_parts(self, key: str, upload_id: str) -> tuple[ArrivedPart, ...]:
        """The parts that are there, in the order of their numbers; one that was sent again may be there more than once.
        Raises NotFoundError where there is no such upload."""

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size_bytes: int, sha256: str, ttl_s: int | None = None
    ) -> PresignedPut:
        """URL that takes one part of exactly this length and hex sha256, until it expires."""

    def put_part(self, key: str, upload_id: str, number: int, path: Path, *, sha256: str) -> None:
        """Send a file as one part. Raises NotFoundError where there is no such upload; InputError where the bytes do
        not have this sha256."""

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[ArrivedPart]) -> None:
        """Put these parts together, each with its sha256; others are thrown away. Raises NotFoundError where there is
        no such upload, InputError where they do not fit."""

    def abort_upload(self, key: str, upload_id: str) -> None:
        """End the upload and throw its parts away; fine where there is none."""


def base64_digest(sha256: str) -> str:
    """As S3 writes a hash. Raises InputError for what is no hex sha256."""
    try:
        raw = bytes.fromhex(sha256)
    except ValueError as exc:
        raise InputError(f"{sha256!r} is no hex sha256") from exc
    if len(raw) != 32:
        raise InputError(f"{sha256!r} is no hex sha256")
    return base64.b64encode(raw).decode()


class S3Parts:
    """Writing in parts on S3. The class that inherits it has the connection."""

    _settings: StoreSettings
    _clock: Callable[[], float]

    @abstractmethod
    def _client(self) -> Any:
        """The boto3 client."""

    @abstractmethod
    def _wrapped(self, key: str = "") -> AbstractContextManager[None]:
        """Turns the client's errors into ours."""

    @abstractmethod
    def _presign(self, operation: str, key: str, ttl_s: int, params: dict[str, Any]) -> str:
        """A signed URL."""

    def begin_upload(self, key: str) -> str:
        with self._wrapped(key):
            answer = self._client().create_multipart_upload(
                Bucket=self._settings.bucket, Key=checked_key(key), ChecksumAlgorithm="SHA256"
            )
        return str(answer["UploadId"])

    def open_uploads(self, prefix: str) -> Iterator[OpenUpload]:
        with self._wrapped(prefix):
            listing = self._client().get_paginator("list_multipart_uploads")
            for page in listing.paginate(Bucket=self._settings.bucket, Prefix=prefix):
                for entry in page.get("Uploads", ()):
                    yield OpenUpload(str(entry["Key"]), str(entry["UploadId"]), entry["Initiated"].timestamp())

    def arrived_parts(self, key: str, upload_id: str) -> tuple[ArrivedPart, ...]:
        found: list[ArrivedPart] = []
        with self._wrapped(key):
            listing = self._client().get_paginator("list_parts")
            for page in listing.paginate(Bucket=self._settings.bucket, Key=checked_key(key), UploadId=upload_id):
                for entry in page.get("Parts", ()):
                    told = entry.get("ChecksumSHA256")
                    digest = base64.b64decode(told).hex() if told else None
                    part = ArrivedPart(int(entry["PartNumber"]), int(entry["Size"]), str(entry["ETag"]), digest)
                    found.append(part)
        return tuple(sorted(found, key=lambda part: part.number))

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size_bytes: int, sha256: str, ttl_s: int | None = None
    ) -> PresignedPut:
        ttl = ttl_s or self._settings.presign_ttl_s
        checksum = base64_digest(sha256)
        expires_at = self._clock() + ttl
        signed = {"UploadId": upload_id, "PartNumber": number, "ContentLength": size_bytes, "ChecksumSHA256": checksum}
        headers = {"Content-Length": str(size_bytes), "x-amz-checksum-sha256": checksum}
        return PresignedPut(self._presign("upload_part", key, ttl, signed), headers, expires_at)

    def put_part(self, key: str, upload_id: str, number: int, path: Path, *, sha256: str) -> None:
        with path.open("rb") as body, self._wrapped(key):
            self._client().upload_part(
                Bucket=self._settings.bucket,
                Key=checked_key(key),
                UploadId=upload_id,
                PartNumber=number,
                Body=body,
                ChecksumSHA256=base64_digest(sha256),
            )

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[ArrivedPart]) -> None:
        listed = [
            {"PartNumber": part.number, "ETag": part.etag}
            | ({"ChecksumSHA256": base64_digest(part.sha256)} if part.sha256 else {})
            for part in parts
        ]
        with self._wrapped(key):
            self._client().complete_multipart_upload(
                Bucket=self._settings.bucket,
                Key=checked_key(key),
                UploadId=upload_id,
                MultipartUpload={"Parts": listed},
            )

    def abort_upload(self, key: str, upload_id: str) -> None:
        try:
            with self._wrapped(key):
                self._client().abort_multipart_upload(
                    Bucket=self._settings.bucket, Key=checked_key(key), UploadId=upload_id
                )
        except NotFoundError:
            return


class MemoryParts:
    """Writing in parts in this process, by the rules of `S3Parts`."""

    _lock: threading.Lock
    _clock: Callable[[], float]

    def __init__(self) -> None:
        self._uploads: dict[str, tuple[OpenUpload, dict[int, tuple[bytes, ArrivedPart]]]] = {}

    @abstractmethod
    def put(self, key: str, data: bytes) -> str:
        """As `Store.put`."""

    def begin_upload(self, key: str) -> str:
        begun = OpenUpload(checked_key(key), secrets.token_hex(8), self._clock())
        with self._lock:
            self._uploads[begun.upload_id] = (begun, {})
        return begun.upload_id

    def open_uploads(self, prefix: str) -> Iterator[OpenUpload]:
        with self._lock:
            found = [begun for begun, _ in self._uploads.values() if begun.key.startswith(prefix)]
        yield from sorted(found, key=lambda begun: (begun.key, begun.begun_at))

    def arrived_parts(self, key: str, upload_id: str) -> tuple[ArrivedPart, ...]:
        parts = self._parts(key, upload_id)
        with self._lock:
            return tuple(parts[number][1] for number in sorted(parts))

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size_bytes: int, sha256: str, ttl_s: int | None = None
    ) -> PresignedPut:
        expires_at = self._clock() + (ttl_s or 3600)
        url = f"memory:///{checked_key(key)}?upload={upload_id}&part={number}&expires={expires_at:.0f}"
        headers = {"Content-Length": str(size_bytes), "x-amz-checksum-sha256": base64_digest(sha256)}
        return PresignedPut(url, headers, expires_at)

    def put_part(self, key: str, upload_id: str, number: int, path: Path, *, sha256: str) -> None:
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise InputError(f"part {number} of memory://{key} has the sha256 {found}")
        parts = self._parts(key, upload_id)
        with self._lock:
            parts[number] = (data, ArrivedPart(number, len(data), f'"{found[:32]}"', found))

    def finish_upload(self, key: str, upload_id: str, parts: Sequence[ArrivedPart]) -> None:
        there = self._parts(key, upload_id)
        with self._lock:
            whole = bytearray()
            for part in parts:
                data, arrived = there.get(part.number, (b"", None))
                if arrived is None or arrived.etag != part.etag or part.sha256 not in (None, arrived.sha256):
                    raise InputError(f"part {part.number} of memory://{key} is not the one that is there")
                whole += data
            del self._uploads[upload_id]
        self.put(key, bytes(whole))

    def abort_upload(self, key: str, upload_id: str) -> None:
        with self._lock:
            self._uploads.pop(upload_id, None)

    def _parts(self, key: str, upload_id: str) -> dict[int, tuple[bytes, ArrivedPart]]:
        with self._lock:
            found = self._uploads.get(upload_id)
        if found is None or found[0].key != key:
            raise NotFoundError(f"there is no upload {upload_id} to memory://{key}")
        return found[1]


def checked_key(key: str) -> str:
    """The key. Raises InputError for one that a file-backed store could take for a path outside the bucket."""
    parts = key.split("/")
    if not key or len(key.encode()) > 1024 or not key.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{key!r} is no valid object key", remedy="Use names without empty, '.' or '..' parts.")
    return key
