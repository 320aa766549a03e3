"""Where versions are read from: a narrow port, the gateway's HTTP behind it, and a bucket behind it.

What always holds:
- a source hands out bytes and trusts nothing: whoever reads checks signatures and hashes;
- answers that are read whole are cut off at their size limit; blobs are streamed, never held;
- the gateway answers a blob with a redirect to a presigned URL on another host. The bearer token goes to the gateway's
  own address only, never along with a redirect, and every new attempt asks for a fresh link;
- trouble that may pass is a RetryableError, everything else is not.

Retrying is the caller's: `Patience` is the policy, `patiently` applies it to calls that are read whole.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from random import SystemRandom
from types import TracebackType
from typing import Protocol, TypeVar

import httpx2

from rankup.errors import BusyError, InputError, NotFoundError, RetryableError, TooLargeError, UnreachableError
from rankup.problems import MAX_PROBLEM_BYTES, error_of
from rankup.protocol import Pointer
from rankup.records import BlobRef
from rankup.store import Store, blob_key
from rankup.versions import MAX_ENVELOPE_BYTES, MAX_POINTER_BYTES, manifest_key, parse_pointer, pointer_key

MAX_REDIRECTS = 5
STORE_CHUNK_BYTES = 8 * 1024 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE = re.compile(r"^bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)$")
_system_random = SystemRandom()

T = TypeVar("T")


@dataclass(frozen=True)
class BlobStream:
    """Bytes of a blob from `start` on. `total_bytes` is the whole blob's size as the server tells it, if it does."""

    start: int
    total_bytes: int | None
    chunks: Iterator[bytes]


class Source(Protocol):
    """Read access to published versions.

    Raises (all methods): UnreachableError, BusyError or another RetryableError where a later try may work;
    NotFoundError where there is no such thing.
    """

    def latest(self, model: str) -> Pointer:
        """The pointer of a model; IntegrityError where it is malformed."""

    def envelope(self, model: str, version: int) -> bytes:
        """The sealed manifest of a version, unchecked but no larger than `MAX_ENVELOPE_BYTES`."""

    def stream(self, ref: BlobRef, start: int) -> AbstractContextManager[BlobStream]:
        """The blob from byte `start` on (0 <= start < size); a source may begin earlier, and then says so."""


@dataclass(frozen=True)
class Patience:
    """How long trouble is ridden out: pauses double up to `longest_pause_s`, and each is shortened by up to half.

    The default waits 90 to 181 seconds in 11 pauses: a killed Ray Serve proxy needs up to half a minute to come back.
    """

    attempts: int = 12
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    uniform: Callable[[], float] = field(default=_system_random.random, compare=False)

    def pause_s(self, failures: int, error: RetryableError) -> float:
        """Seconds to wait after the `failures`-th failure in a row (from 1); at least what a busy server asked for."""
        pause = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 60))
        asked = min(error.retry_after_s, self.longest_pause_s) if isinstance(error, BusyError) else 0.0
        return max(asked, pause * (1.0 - 0.5 * self.uniform()))


def patiently(call: Callable[[], T], patience: Patience, *, sleep: Callable[[float], None] = time.sleep) -> T:
    """The call's result; a RetryableError comes through only after the last attempt."""
    failures = 0
    while True:
        try:
            return call()
        except RetryableError as exc:
            failures += 1
            if failures >= patience.attempts:
                raise
            sleep(patience.pause_s(failures, exc))


# -- the gateway -------------------------------------------------------------------------------------------------------


class GatewaySource:
    """Versions as a gateway serves them under `/v1`; safe to use from several threads. Close it after use.

    Raises:
        InputError: `url` is not an http or https URL.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 30.0) -> None:
        if not re.match(r"^https?://[^/]", url):
            raise InputError(
                f"{url!r} is not a URL of a gateway", remedy="Give one such as https://rankup.example.org."
            )
        self._base = url.rstrip("/")
        self._authorization = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> GatewaySource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def latest(self, model: str) -> Pointer:
        pointer_key(model)  # the name goes into a URL
        return parse_pointer(self._whole(f"/v1/models/{model}/latest", MAX_POINTER_BYTES), model=model)

    def envelope(self, model: str, version: int) -> bytes:
        manifest_key(model, version)
        return self._whole(f"/v1/models/{model}/versions/{version}", MAX_ENVELOPE_BYTES)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        wanted = {"Range": f"bytes={start}-"} if start else {}
        with self._get(f"/v1/blobs/{ref.sha256}", wanted) as response:
            declared = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if response.status_code == 416:
                # Only bytes inside the blob are asked for, so the object behind the link is shorter than it must be.
                yield BlobStream(start, int(declared[2]) if declared and declared[2] else 0, iter(()))
            elif response.status_code == 206 and start:
                if declared is None or declared[1] is None:
                    raise UnreachableError(f"{response.url.host} sent a part of a blob without saying which")
                total = int(declared[2]) if declared[2] else None
                yield BlobStream(int(declared[1]), total, response.iter_raw())
            else:
                length = response.headers.get("Content-Length", "")
                total = int(length) if re.fullmatch(r"\d{1,18}", length) else None
                yield BlobStream(0, total, response.iter_raw())

    def _whole(self, path: str, max_bytes: int) -> bytes:
        with self._get(path, {}) as response:
            body = _read(response, max_bytes + 1)
        if len(body) > max_bytes:
            raise TooLargeError(f"{self._base}{path} answers with more than {max_bytes} bytes")
        return body

    @contextmanager
    def _get(self, path: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        """An open answer with status 200, 206 or 416, after redirects."""
        url = httpx2.URL(self._base + path)
        credentials = self._authorization
        try:
            for hop in range(MAX_REDIRECTS + 1):
                request = self._client.build_request("GET", url, headers={**headers, **credentials})
                response = self._client.send(request, stream=True)
                try:
                    if response.status_code not in _REDIRECTS:
                        _raise_for(response, redirected=hop > 0)
                        yield response
                        return
                    url = url.join(response.headers.get("Location", ""))
                    credentials = {}
                finally:
                    response.close()
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as exc:
            raise InputError(f"cannot fetch {url.scheme}://{url.host}: {exc}") from exc
        except (httpx2.TransportError, httpx2.StreamError) as exc:
            raise UnreachableError(f"{url.scheme}://{url.host} does not answer: {exc or type(exc).__name__}") from exc
        raise UnreachableError(f"{self._base}{path} is redirected more than {MAX_REDIRECTS} times")


def _read(response: httpx2.Response, limit: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= limit:
            break
    return bytes(body[:limit])


def _raise_for(response: httpx2.Response, *, redirected: bool) -> None:
    status = response.status_code
    if status in (200, 206, 416):
        return
    if not redirected:
        raise error_of(status, _read(response, MAX_PROBLEM_BYTES), where=response.url.host)
    if status in (404, 410):
        raise NotFoundError(f"{response.url.host} does not have the blob that the gateway links to")
    # A presigned link that ran out is a 403 (or 400): the next attempt gets a fresh one.
    raise UnreachableError(f"{response.url.host} answered {status} to a link of the gateway")


# -- the bucket --------------------------------------------------------------------------------------------------------


class StoreSource:
    """Versions read straight from object storage: for the organiser's own machines."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def latest(self, model: str) -> Pointer:
        return parse_pointer(self._store.get(pointer_key(model), max_bytes=MAX_POINTER_BYTES), model=model)

    def envelope(self, model: str, version: int) -> bytes:
        return self._store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        key = blob_key(ref.sha256)
        info = self._store.head(key)
        if info is None:
            raise NotFoundError(f"there is no blob {ref.sha256}")
        yield BlobStream(start, info.size_bytes, self._chunks(key, start, info.size_bytes))

    def _chunks(self, key: str, start: int, size_bytes: int) -> Iterator[bytes]:
        for position in range(start, size_bytes, STORE_CHUNK_BYTES):
            yield self._store.get_range(key, position, min(STORE_CHUNK_BYTES, size_bytes - position))
