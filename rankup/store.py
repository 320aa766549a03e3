"""Object storage: the port `Store`, with S3 behind it (`S3Store`) and a stand-in in memory (`MemoryStore`).

What always holds, for every store:
- a key names whole bytes: readers see the object as it was before a write or after it, never a part of it;
- `put(..., if_absent=True)` and `swap` have exactly one winner; everybody else gets `ConflictError`;
- an etag is an opaque string that changes with the bytes; it is only ever handed back to `swap`;
- nothing is read into memory that is larger than the caller allowed: `max_bytes` is compared with the size first;
- errors of the S3 library never leave this module: they come out as errors of `rankup.errors`, with a remedy.

A conditional write is repeated only when it is known not to have happened (409, 503, connection refused). When the
answer to one is lost, nobody knows: the caller gets `UnreachableError` and must read before it decides.

What it does not do: name objects (see `rankup.versions`), retry for longer than a few seconds, delete by age. Writing
in parts is in `rankup.multipart`. This is the only module that imports boto3, when the first S3 client is made.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from random import SystemRandom
from typing import Any, BinaryIO, Protocol

from rankup.errors import (
    BusyError,
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
from rankup.multipart import MemoryParts, PartStore, PresignedPut, S3Parts, base64_digest, checked_key
from rankup.records import BlobRef
from rankup.settings import StoreSettings

MULTIPART_BYTES = 16 * 1024**2
"""Files above this size are uploaded in parts of this size."""
CHUNK_BYTES = 1024**2
ATTEMPTS = 4
"""Tries of one request, the first one included."""
OCTETS = "application/octet-stream"

Progress = Callable[[int], None]
"""Called with the number of bytes that have just moved, possibly from several threads."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a listing."""

    key: str
    size_bytes: int
    modified_at: float
    """Unix seconds, by the store's clock: when these bytes were written."""
    etag: str = ""
    """Changes with the bytes."""


class Store(PartStore, Protocol):
    """What Rankup needs of object storage. Any method may also raise UnreachableError, BusyError and SetupError."""

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """The whole object. Raises NotFoundError; TooLargeError above `max_bytes`, before anything is read."""

    def get_with_etag(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        """As `get`, with the etag that `swap` wants."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from offset `start`. Raises NotFoundError; InputError where the object is shorter."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and etag, or None where there is no such object."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that start with `prefix`, sorted."""

    def scan(self, prefix: str) -> Iterator[StoredObject]:
        """As `list`, with what is known of each object without reading it."""

    def delete(self, key: str) -> None:
        """Remove the object; fine where there is none."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False, content_type: str = OCTETS) -> str:
        """Write, and return the etag. Raises ConflictError when `if_absent` and the key exists."""

    def put_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        """Write a file's bytes, in parts above 16 MiB. Raises InputError where the file cannot be read."""

    def get_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        """Stream the object into a file that appears whole or not at all. Raises NotFoundError, DiskFullError."""

    def swap(self, key: str, data: bytes, *, etag: str | None) -> str:
        """Compare-and-swap: write only where the present etag is `etag` (None: where there is nothing). Returns the new
        etag. Raises ConflictError."""

    def presign_get(self, key: str, *, ttl_s: int | None = None) -> str:
        """URL that reads one object, with Range, until it expires."""

    def presign_put(self, key: str, *, size_bytes: int, sha256: str, ttl_s: int | None = None) -> PresignedPut:
        """URL that writes one object of exactly this length and hex sha256, until it expires."""

    def ensure_bucket(self) -> None:
        """Create the bucket where it is missing; it is private, as buckets are by default."""


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns errors of the local disk into ours; never put network calls under it."""
    try:
        yield
    except OSError as exc:
        # EFBIG: the file system (FAT32) or a limit of this process has no room for so large a file.
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"no room to write {path}: {exc.strerror}", remedy="Free some space and run the same command again."
            ) from exc
        raise SetupError(f"cannot write {path}: {exc}", remedy="Check the folder and its permissions.") from exc


def _write_atomically(path: Path, chunks: Iterator[bytes], progress: Progress | None) -> None:
    """Write beside `path`, sync, rename over it; on any failure the partial file is removed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle: BinaryIO = partial.open("xb")
    try:
        try:
            for chunk in chunks:
                with _disk(path):
                    handle.write(chunk)
                if progress is not None:
                    progress(len(chunk))
            with _disk(path):
                handle.flush()
                os.fsync(handle.fileno())
        finally:
            with _disk(path):
                handle.close()
        with _disk(path):
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _open_source(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror}") from exc


# -- S3 ----------------------------------------------------------------------------------------------------------------

_MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
_NOT_HAPPENED = frozenset({"ConditionalRequestConflict", "OperationAborted", "SlowDown", "ServiceUnavailable"})
_DENIED = frozenset({"AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "403", "Forbidden", "ExpiredToken"})


class S3Store(S3Parts):
    """S3 or anything compatible, through boto3: signature v4, path-style addresses, checksums only when asked for.

    Safe to share between threads, and may be pickled (only its settings travel). `clock` gives Unix seconds.
    """

    def __init__(self, settings: StoreSettings, *, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, int], Any] = {}

    def __reduce__(self) -> tuple[type[S3Store], tuple[StoreSettings]]:
        return type(self), (self._settings,)

    def _client(self, *, attempts: int = ATTEMPTS, public: bool = False) -> Any:
        """The boto3 client for this purpose; making one is not thread-safe, using one is."""
        settings = self._settings
        endpoint = (settings.public_endpoint_url if public else "") or settings.endpoint_url
        with self._lock:
            client = self._clients.get((endpoint, attempts))
            if client is None:
                client = self._clients[endpoint, attempts] = self._connect(endpoint, attempts)
            return client

    def _connect(self, endpoint: str, attempts: int) -> Any:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as exc:
            raise SetupError("boto3 is missing", remedy="Install it: pip install boto3") from exc
        settings = self._settings
        try:
            return boto3.session.Session().client(
                "s3",
                endpoint_url=endpoint or None,
                region_name=settings.region,
                # Without keys in the settings boto3 looks where every AWS tool does: environment, profile, role.
                aws_access_key_id=settings.access_key or None,
                aws_secret_access_key=settings.secret_key.get_secret_value() or None,
                config=Config(
                    signature_version="s3v4",
                    s3={"addressing_style": "path"},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    connect_timeout=settings.connect_timeout_s,
                    read_timeout=settings.read_timeout_s,
                    max_pool_connections=32,
                ),
            )
        except ValueError as exc:
            raise SetupError(
                f"{endpoint!r} is no S3 address: {exc}", remedy="Set RANKUP_STORE_ENDPOINT_URL to http(s)://host:port."
            ) from exc

    def _where(self, key: str = "") -> str:
        place = self._settings.endpoint_url or f"AWS {self._settings.region}"
        return f"s3://{self._settings.bucket}/{key} at {place}"

    def _translate(self, exc: Exception, key: str) -> RankupError | None:
        """Our error for one of boto3's, or None where the exception is none of boto3's business."""
        from botocore import exceptions as boto

        where = self._where(key)
        if isinstance(exc, boto.ClientError):
            return self._translate_answer(exc.response, where)
        if isinstance(exc, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            return SetupError(
                f"no credentials for {where}", remedy="Set RANKUP_STORE_ACCESS_KEY and RANKUP_STORE_SECRET_KEY."
            )
        if isinstance(exc, boto.SSLError):
            return SetupError(f"no trusted TLS connection to {where}: {exc}", remedy="Check the server's certificate.")
        if isinstance(exc, (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)):
            return UnreachableError(
                f"{where} does not answer: {exc}",
                remedy="Check that the object storage runs and that RANKUP_STORE_ENDPOINT_URL is right.",
            )
        if isinstance(exc, boto.BotoCoreError):
            return SetupError(f"{where}: {exc}", remedy="Check the RANKUP_STORE_ settings.")
        return None

    @staticmethod
    def _translate_answer(response: Any, where: str) -> RankupError:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        said = f"{where}: {response.get('Error', {}).get('Message') or code}"
        if code == "NoSuchBucket":
            return SetupError(said, remedy="Create the bucket, or correct RANKUP_STORE_BUCKET.")
        if code in _MISSING or status == 404:
            return NotFoundError(f"there is no {where}")
        if code == "PreconditionFailed" or status in (409, 412):
            return ConflictError(f"somebody else wrote {where} first", remedy="Read it again, then decide again.")
        if code in _DENIED or status in (401, 403):
            return SetupError(
                f"access denied: {said}", remedy="Check RANKUP_STORE_ACCESS_KEY, its secret and its rights."
            )
        if status == 503 or status == 429:
            return BusyError(said)
        if status >= 500:
            return UnreachableError(said)
        return InputError(said)

    @contextlib.contextmanager
    def _wrapped(self, key: str = "") -> Iterator[None]:
        try:
            yield
        except RankupError:
            raise
        except Exception as exc:
            ours = self._translate(exc, key)
            if ours is None:
                raise
            raise ours from exc

    # reading

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.get_with_etag(key, max_bytes=max_bytes)[0]

    def get_with_etag(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        with self._wrapped(key):
            answer = self._client().get_object(Bucket=self._settings.bucket, Key=checked_key(key))
            with contextlib.closing(answer["Body"]) as body:
                _check_size(key, int(answer["ContentLength"]), max_bytes)
                return bytes(body.read()), str(answer["ETag"])

    def get_range(self, key: str, start: int, length: int) -> bytes:
        _check_range(start, length)
        if length == 0:
            if self.head(key) is None:
                raise NotFoundError(f"there is no {self._where(key)}")
            return b""
        from botocore.exceptions import ClientError

        wanted = f"bytes={start}-{start + length - 1}"
        with self._wrapped(key):
            try:
                answer = self._client().get_object(Bucket=self._settings.bucket, Key=checked_key(key), Range=wanted)
            except ClientError as exc:
                if exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                    raise InputError(f"{key} has no bytes at offset {start}") from exc
                raise
            with contextlib.closing(answer["Body"]) as body:
                # A server that ignores Range answers with the whole object: do not read that.
                if int(answer["ContentLength"]) != length:
                    raise InputError(f"{key} has no {length} bytes at offset {start}")
                return bytes(body.read())

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._wrapped(key):
                answer = self._client().head_object(Bucket=self._settings.bucket, Key=checked_key(key))
        except NotFoundError:
            return None
        return ObjectInfo(size_bytes=int(answer["ContentLength"]), etag=str(answer["ETag"]))

    def list(self, prefix: str) -> Iterator[str]:
        for found in self.scan(prefix):
            yield found.key

    def scan(self, prefix: str) -> Iterator[StoredObject]:
        with self._wrapped(prefix):
            pages = (
                self._client().get_paginator("list_objects_v2").paginate(Bucket=self._settings.bucket, Prefix=prefix)
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    written_at = entry["LastModified"].timestamp()
                    yield StoredObject(str(entry["Key"]), int(entry["Size"]), written_at, str(entry["ETag"]))

    def get_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        _write_atomically(path, self._chunks(checked_key(key)), progress)

    def _chunks(self, key: str) -> Iterator[bytes]:
        """The object in pieces; a broken connection is taken up where it broke, if the object is still the same."""
        from botocore import exceptions as boto

        done, failures = 0, 0
        condition: dict[str, str] = {}
        while True:
            with self._wrapped(key):
                extra = {**condition, **({"Range": f"bytes={done}-"} if done else {})}
                answer = self._client().get_object(Bucket=self._settings.bucket, Key=key, **extra)
                condition = {"IfMatch": answer["ETag"]}
                with contextlib.closing(answer["Body"]) as body:
                    try:
                        while chunk := body.read(CHUNK_BYTES):
                            done += len(chunk)
                            yield bytes(chunk)
                    except (boto.HTTPClientError, boto.IncompleteReadError):
                        failures += 1
                        if failures >= ATTEMPTS:
                            raise
                        continue
            return

    # writing

    def put(self, key: str, data: bytes, *, if_absent: bool = False, content_type: str = OCTETS) -> str:
        if if_absent:
            return self._put_when(key, data, content_type, IfNoneMatch="*")
        with self._wrapped(key):
            answer = self._client().put_object(
                Bucket=self._settings.bucket, Key=checked_key(key), Body=data, ContentType=content_type
            )
        return str(answer["ETag"])

    def swap(self, key: str, data: bytes, *, etag: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        return self._put_when(key, data, "application/json", **condition)

    def _put_when(self, key: str, data: bytes, content_type: str, **condition: str) -> str:
        """Conditional write. Retries by hand: boto3 would also repeat a write whose answer was lost, and then take its
        own first try for somebody else's."""
        from botocore import exceptions as boto

        attempt = 0
        while True:
            attempt += 1
            try:
                with self._wrapped(key):
                    answer = self._client(attempts=1).put_object(
                        Bucket=self._settings.bucket,
                        Key=checked_key(key),
                        Body=data,
                        ContentType=content_type,
                        **condition,
                    )
                    return str(answer["ETag"])
            except RankupError as exc:
                cause = exc.__cause__
                if isinstance(cause, boto.ClientError):
                    code = cause.response.get("Error", {}).get("Code", "")
                    if "IfMatch" in condition and isinstance(exc, NotFoundError):
                        raise ConflictError(f"{self._where(key)} is gone") from cause
                    again = code in _NOT_HAPPENED
                else:
                    again = isinstance(cause, (boto.EndpointConnectionError, boto.ConnectTimeoutError))
                if not again or attempt >= ATTEMPTS:
                    raise
            time.sleep(SystemRandom().uniform(0.05, 0.1) * 2**attempt)

    def put_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        from boto3.exceptions import S3UploadFailedError
        from boto3.s3.transfer import TransferConfig

        transfer = TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, max_concurrency=4
        )
        _open_source(path).close()
        with self._wrapped(key):
            try:
                # By name: of an open file boto3 would hold up to ten parts in memory.
                self._client().upload_file(
                    str(path), self._settings.bucket, checked_key(key), Callback=progress, Config=transfer
                )
            except S3UploadFailedError as exc:
                refused = exc.__context__
                ours = self._translate(refused, key) if isinstance(refused, Exception) else None
                raise ours or UnreachableError(f"cannot upload {path} to {self._where(key)}: {exc}") from exc

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFoundError), self._wrapped(key):
            self._client().delete_object(Bucket=self._settings.bucket, Key=checked_key(key))

    def ensure_bucket(self) -> None:
        from botocore.exceptions import ClientError

        client, bucket, region = self._client(), self._settings.bucket, self._settings.region
        with self._wrapped():
            try:
                client.head_bucket(Bucket=bucket)
                return
            except ClientError as exc:
                if exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:
                    raise
            place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            try:
                client.create_bucket(Bucket=bucket, **place)
            except ClientError as exc:
                code = exc.response.get("Error", {}).get("Code", "")
                if code == "BucketAlreadyExists":
                    raise SetupError(
                        f"the bucket name {bucket} is taken by somebody else",
                        remedy="Choose another RANKUP_STORE_BUCKET.",
                    ) from exc
                if code != "BucketAlreadyOwnedByYou":
                    raise

    # presigned URLs

    def presign_get(self, key: str, *, ttl_s: int | None = None) -> str:
        return self._presign("get_object", key, ttl_s or self._settings.presign_ttl_s, {})

    def presign_put(self, key: str, *, size_bytes: int, sha256: str, ttl_s: int | None = None) -> PresignedPut:
        """As `Store.presign_put`. The signature covers `content-length` and `x-amz-checksum-sha256`: a request with
        other headers is refused by every S3. AWS and SeaweedFS also refuse a body that does not have the signed
        checksum; not every compatible server does, so who takes an upload hashes it again before it counts."""
        ttl = ttl_s or self._settings.presign_ttl_s
        checksum = base64_digest(sha256)
        expires_at = self._clock() + ttl
        url = self._presign("put_object", key, ttl, {"ContentLength": size_bytes, "ChecksumSHA256": checksum})
        headers = {"Content-Length": str(size_bytes), "x-amz-checksum-sha256": checksum}
        return PresignedPut(url=url, headers=headers, expires_at=expires_at)

    def _presign(self, operation: str, key: str, ttl_s: int, params: dict[str, Any]) -> str:
        target = {"Bucket": self._settings.bucket, "Key": checked_key(key), **params}
        with self._wrapped(key):
            return str(self._client(public=True).generate_presigned_url(operation, Params=target, ExpiresIn=ttl_s))


# -- memory ------------------------------------------------------------------------------------------------------------


class MemoryStore(MemoryParts):
    """A store in this process with the rules of `S3Store`, for tests. Its presigned URLs only name things."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._written_at: dict[str, float] = {}
        self._lock = threading.Lock()
        self._clock = clock

    def _find(self, key: str) -> tuple[bytes, str]:
        with self._lock:
            found = self._objects.get(checked_key(key))
        if found is None:
            raise NotFoundError(f"there is no memory://{key}")
        return found

    def _write(self, key: str, data: bytes, allowed: Callable[[str | None], bool]) -> str:
        etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        with self._lock:
            present = self._objects.get(checked_key(key))
            if not allowed(present[1] if present else None):
                raise ConflictError(f"somebody else wrote memory://{key} first")
            self._objects[key] = (bytes(data), etag)
            self._written_at[key] = self._clock()
        return etag

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.get_with_etag(key, max_bytes=max_bytes)[0]

    def get_with_etag(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        data, etag = self._find(key)
        _check_size(key, len(data), max_bytes)
        return data, etag

    def get_range(self, key: str, start: int, length: int) -> bytes:
        _check_range(start, length)
        data, _ = self._find(key)
        if start + length > len(data):
            raise InputError(f"{key} has no {length} bytes at offset {start}")
        return data[start : start + length]

    def head(self, key: str) -> ObjectInfo | None:
        try:
            data, etag = self._find(key)
        except NotFoundError:
            return None
        return ObjectInfo(size_bytes=len(data), etag=etag)

    def list(self, prefix: str) -> Iterator[str]:
        for found in self.scan(prefix):
            yield found.key

    def scan(self, prefix: str) -> Iterator[StoredObject]:
        with self._lock:
            found = [
                StoredObject(key, len(data), self._written_at[key], etag)
                for key, (data, etag) in sorted(self._objects.items())
                if key.startswith(prefix)
            ]
        yield from found

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(checked_key(key), None)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, content_type: str = OCTETS) -> str:
        return self._write(key, data, lambda present: not if_absent or present is None)

    def swap(self, key: str, data: bytes, *, etag: str | None) -> str:
        return self._write(key, data, lambda present: present == etag)

    def put_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        with _open_source(path) as source:
            data = source.read()
        self.put(key, data)
        if progress is not None:
            progress(len(data))

    def get_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        data, _ = self._find(key)
        chunks = (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
        _write_atomically(path, chunks, progress)

    def presign_get(self, key: str, *, ttl_s: int | None = None) -> str:
        return f"memory:///{checked_key(key)}?expires={self._clock() + (ttl_s or 3600):.0f}"

    def presign_put(self, key: str, *, size_bytes: int, sha256: str, ttl_s: int | None = None) -> PresignedPut:
        headers = {"Content-Length": str(size_bytes), "x-amz-checksum-sha256": base64_digest(sha256)}
        return PresignedPut(
            url=self.presign_get(key, ttl_s=ttl_s), headers=headers, expires_at=self._clock() + (ttl_s or 3600)
        )

    def ensure_bucket(self) -> None:
        """Nothing to create."""


def _check_size(key: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise TooLargeError(f"{key} has {size_bytes} bytes; at most {max_bytes} are read")


def _check_range(start: int, length: int) -> None:
    if start < 0 or length < 0:
        raise InputError(f"a range of {length} bytes from offset {start} makes no sense")


# -- blobs -------------------------------------------------------------------------------------------------------------


def open_store(settings: StoreSettings) -> Store:
    """The store that the settings name. No connection is made before the first call."""
    return S3Store(settings)


def blob_key(digest: str) -> str:
    """Where content-addressed bytes lie: `blobs/sha256/<first two>/<digest>`."""
    return f"blobs/sha256/{digest[:2]}/{digest}"


def put_blob(store: Store, data: bytes) -> BlobRef:
    """Store bytes under their hash; fine where they are there already."""
    digest = hashlib.sha256(data).hexdigest()
    with contextlib.suppress(ConflictError):
        store.put(blob_key(digest), data, if_absent=True)
    return BlobRef(sha256=digest, size_bytes=len(data))


def put_blob_file(store: Store, path: Path, *, ref: BlobRef | None = None, progress: Progress | None = None) -> BlobRef:
    """Store a file under its hash, reading it in pieces; nothing is sent where the same bytes are there already.

    `ref` spares a pass over the file: hash and size as the writer of the file has just computed them from its bytes.
    Raises InputError where the file cannot be read.
    """
    if ref is None:
        with _open_source(path) as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
            ref = BlobRef(sha256=digest, size_bytes=source.tell())
    if not has_blob(store, ref):
        store.put_file(blob_key(ref.sha256), path, progress=progress)
    return ref


def has_blob(store: Store, ref: BlobRef) -> bool:
    """The blob is there in its size."""
    present = store.head(blob_key(ref.sha256))
    return present is not None and present.size_bytes == ref.size_bytes


def get_blob_file(store: Store, digest: str, path: Path) -> None:
    """Put the bytes with this hash into the file `path`. Raises NotFoundError, IntegrityError (they do not have it),
    and DiskFullError."""
    store.get_file(blob_key(digest), path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise IntegrityError(f"the bytes stored under blob {digest} have another hash")


def get_blob(store: Store, digest: str, *, max_bytes: int) -> bytes:
    """The bytes with this hash. Raises NotFoundError, TooLargeError, and IntegrityError where they do not have it."""
    data = store.get(blob_key(digest), max_bytes=max_bytes)
    if hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(f"the bytes stored under blob {digest} have another hash")
    return data
