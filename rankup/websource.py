"""Versions over HTTP: from a gateway, from any static web server, and from whichever of the two a URL turns out to be.

What always holds:
- answers that are read whole are cut off at their size limit; blobs are streamed, never held;
- at most `MAX_REDIRECTS` redirects are followed. A gateway answers a blob with one to a presigned URL on another host:
  the bearer token goes to the gateway's own address only, never along with a redirect, and every new attempt asks for
  a fresh link;
- trouble that may pass is a RetryableError, everything else is not;
- bytes are taken as they were stored: an answer that a server has compressed is refused.

A static server has the objects of the bucket under their keys below one URL (`rankup mirror` makes such a folder).
Retrying is the caller's: `rankup.sources.Patience`.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, TypeVar

import httpx2
from pydantic import ValidationError

from rankup.errors import (
    BusyError,
    DeniedError,
    InputError,
    NotFoundError,
    RankupError,
    TooLargeError,
    UnreachableError,
)
from rankup.problems import MAX_PROBLEM_BYTES, error_of
from rankup.protocol import Pointer, ServerInfo
from rankup.records import BlobRef, Retained
from rankup.retained import MAX_RETAINED_BYTES, parse_retained
from rankup.sourceport import BlobStream
from rankup.store import blob_key
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    MAX_POINTER_BYTES,
    manifest_key,
    parse_pointer,
    pointer_key,
    retained_key,
)

MAX_REDIRECTS: Final = 5
MAX_INFO_BYTES: Final = 4 * 1024 * 1024
"""Names of some tens of thousands of models."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE = re.compile(r"^bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)$")

W = TypeVar("W", bound="_Web")


class _Web(ABC):
    """One HTTP client for one base URL; safe to use from several threads. Close it after use."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 30.0) -> None:
        """Raises InputError where `url` is not an http or https URL."""
        if not re.match(r"^https?://[^/]", url):
            raise InputError(f"{url!r} is not a URL of a server", remedy="Give one such as https://rankup.example.org.")
        self._base = url.rstrip("/")
        self._authorization = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        self._client.close()

    def __enter__(self: W) -> W:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _refusal(self, response: httpx2.Response, path: str, *, redirected: bool) -> RankupError:
        """What an answer that is neither 200, 206 nor 416 stands for; `path` was asked for."""

    @contextmanager
    def _blob(self, path: str, start: int) -> Iterator[BlobStream]:
        wanted = {"Range": f"bytes={start}-"} if start else {}
        with self._get(path, wanted) as response:
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
            if response.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/html":
                # Some servers answer 200 with a page for whatever they do not have.
                raise NotFoundError(f"{response.url} is a page, not a file of a model")
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
                        if response.status_code not in (200, 206, 416):
                            raise self._refusal(response, path, redirected=hop > 0)
                        if response.headers.get("Content-Encoding", "identity") != "identity":
                            raise InputError(
                                f"{response.url.host} compresses what it was asked to send as it is",
                                remedy="Switch compression off for these files on that server.",
                            )
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


# -- the gateway -------------------------------------------------------------------------------------------------------


class GatewaySource(_Web):
    """Versions as a gateway serves them under `/v1`; safe to use from several threads. Close it after use."""

    def info(self) -> ServerInfo:
        """What the server says about itself. Raises NotFoundError where it is no gateway."""
        try:
            return ServerInfo.model_validate_json(self._whole("/v1/info", MAX_INFO_BYTES))
        except ValidationError as exc:
            raise NotFoundError(f"{self._base} does not answer as a gateway does") from exc

    def latest(self, model: str) -> Pointer:
        pointer_key(model)  # the name goes into a URL
        return parse_pointer(self._whole(f"/v1/models/{model}/latest", MAX_POINTER_BYTES), model=model)

    def envelope(self, model: str, version: int) -> bytes:
        manifest_key(model, version)
        return self._whole(f"/v1/models/{model}/versions/{version}", MAX_ENVELOPE_BYTES)

    def retained(self, model: str) -> Retained:
        retained_key(model)
        try:
            return parse_retained(self._whole(f"/v1/models/{model}/retained", MAX_RETAINED_BYTES), model=model)
        except NotFoundError:
            return Retained(model=model)  # a server of an earlier release

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        with self._blob(f"/v1/blobs/{ref.sha256}", start) as stream:
            yield stream

    def _refusal(self, response: httpx2.Response, path: str, *, redirected: bool) -> RankupError:
        status, host = response.status_code, response.url.host
        missing = status in (404, 410)
        if redirected and path.startswith("/v1/blobs/"):
            if missing:
                return NotFoundError(f"{host} does not have the blob that the gateway links to")
            # A presigned link that ran out is a 403 (or 400): the next attempt gets a fresh one.
            return UnreachableError(f"{host} answered {status} to a link of the gateway")
        error = error_of(status, _read(response, MAX_PROBLEM_BYTES), where=host)
        if missing and type(error) is InputError:
            return NotFoundError(error.cause, remedy=error.remedy)
        return error


# -- any other web server ----------------------------------------------------------------------------------------------


class StaticSource(_Web):
    """Versions in a folder with the layout of the bucket, behind any web server, with or without Range.

    Safe to use from several threads. Close it after use.
    """

    def latest(self, model: str) -> Pointer:
        return parse_pointer(self._whole(f"/{pointer_key(model)}", MAX_POINTER_BYTES), model=model)

    def envelope(self, model: str, version: int) -> bytes:
        return self._whole(f"/{manifest_key(model, version)}", MAX_ENVELOPE_BYTES)

    def retained(self, model: str) -> Retained:
        try:
            return parse_retained(self._whole(f"/{retained_key(model)}", MAX_RETAINED_BYTES), model=model)
        except (NotFoundError, DeniedError):
            # A bucket that nobody may list answers 403 for what is not there.
            return Retained(model=model)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        with self._blob(f"/{blob_key(ref.sha256)}", start) as stream:
            yield stream

    def _refusal(self, response: httpx2.Response, path: str, *, redirected: bool) -> RankupError:
        status, host = response.status_code, response.url.host
        if status in (404, 410):
            return NotFoundError(
                f"{host} does not have {path}",
                remedy="Check the URL and the model's name; `rankup mirror` makes what such a server must serve.",
            )
        if status in (401, 403):
            return DeniedError(
                f"{host} answered {status} for {path}",
                remedy="Check the URL, and that everybody may read the files of that server.",
            )
        if status == 429 or status >= 500:
            asked = response.headers.get("Retry-After", "")
            wait_s = float(asked) if re.fullmatch(r"\d{1,6}", asked) else 0.0
            return BusyError(f"{host} answered {status}", retry_after_s=wait_s)
        return InputError(f"{host} answered {status} for {path}", remedy="Check the URL.")


# -- one of the two ----------------------------------------------------------------------------------------------------


class WebSource:
    """A URL of which nobody has said what it is: the first call asks for `/v1/info`, once.

    While that has no answer, every call raises UnreachableError or another RetryableError, and the next one asks again.
    """

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        self._gateway = GatewaySource(url, timeout_s=timeout_s)
        self._static = StaticSource(url, timeout_s=timeout_s)
        self._found: GatewaySource | StaticSource | None = None
        self._models: tuple[str, ...] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        self._gateway.close()
        self._static.close()

    def models(self) -> tuple[str, ...] | None:
        """Names of the models, as the gateway tells them; None where the server is a static one and cannot tell."""
        self._source()
        return self._models

    def latest(self, model: str) -> Pointer:
        return self._source().latest(model)

    def envelope(self, model: str, version: int) -> bytes:
        return self._source().envelope(model, version)

    def retained(self, model: str) -> Retained:
        return self._source().retained(model)

    @contextmanager
    def stream(self, ref: BlobRef, start: int) -> Iterator[BlobStream]:
        with self._source().stream(ref, start) as stream:
            yield stream

    def _source(self) -> GatewaySource | StaticSource:
        with self._lock:
            if self._found is None:
                try:
                    self._models = self._gateway.info().models
                    self._found = self._gateway
                except (InputError, DeniedError):
                    self._found = self._static
            return self._found
