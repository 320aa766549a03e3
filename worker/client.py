"""The worker's side of `/v1`: one method a call, errors of `rankup.errors`, retries inside.

What always holds:
- a call returns a parsed answer or raises a `RankupError`; nothing of the HTTP library comes out;
- what may be cured by waiting (no answer, 429, 5xx, an answer that is not the gateway's) is tried again under
  `RetryPolicy`; what may not (a problem document that names a fatal error) is raised at once. All calls may be
  repeated: enrolling, beating, restoring, returning and submitting are idempotent, and a claim whose answer was lost
  only leaves a lease that runs out;
- the token goes to the gateway's calls only, never along with the bytes: links and tickets carry their own permission,
  and where they are relative, they are relative to the gateway's address;
- downloads stop at the announced size and are kept only with the announced hash.

It keeps no files but the download's, knows nothing of training and never sleeps past `stop`.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from rankup import __version__, problems
from rankup.errors import (
    FatalError,
    InputError,
    IntegrityError,
    RankupError,
    RetryableError,
    SetupError,
    TooLargeError,
    UnreachableError,
)
from rankup.protocol import (
    PROTOCOL_VERSION,
    BlobLink,
    ClaimAnswer,
    ClaimRequest,
    Enrolled,
    EnrolRequest,
    Heartbeat,
    HeartbeatAnswer,
    LeaseView,
    RestoreRequest,
    ReturnRequest,
    ServerInfo,
    SubmitRequest,
    UploadRequest,
    UploadTicket,
)
from worker.disk import full_disk_means_disk_full
from worker.retry import RetryPolicy

MAX_ANSWER_BYTES = 16 * 1024**2
_CHUNK_BYTES = 256 * 1024
_MAX_REFUSALS = 4
"""4xx answers of the object store to one transfer before it counts as refused."""
_ONCE = RetryPolicy(patience_s=0.0)
_GATEWAY_DOWN = frozenset({404, 405, 502, 503, 504})
"""Without a problem document these come from a proxy in front of a gateway that is restarting."""

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Meter(Protocol):
    """Is told of every byte of a body, and may wait before it returns."""

    def sent(self, count: int) -> None: ...

    def received(self, count: int) -> None: ...


class _NoMeter:
    """The default: counts nothing, never waits."""

    def sent(self, count: int) -> None:
        """Nothing to do."""

    def received(self, count: int) -> None:
        """Nothing to do."""


class StopRequested(Exception):
    """Waiting or transferring was cut short because the user asked to stop. Not an error, so not in the error tree."""


def _ignore_waiting(error: RetryableError, pause_s: float) -> None:
    """The default of `on_waiting`: say nothing."""


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: httpx2.Headers
    content: bytes


class GatewayClient:
    """Calls to one gateway. Its methods may be used from several threads.

    `on_waiting` is told before each pause. `stop` ends every wait with `StopRequested`. `timeout_s` bounds the
    connection and each read or write, not a whole transfer. `meter` counts bytes and slows them down.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout_s: float = 30.0,
        policy: RetryPolicy,
        stop: threading.Event | None = None,
        meter: Meter | None = None,
        on_waiting: Callable[[RetryableError, float], None] = _ignore_waiting,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._policy = policy
        self._stop = stop or threading.Event()
        self._meter = meter or _NoMeter()
        self._on_waiting = on_waiting
        self._draw = draw
        self._clock = clock
        agent = {"User-Agent": f"rankup-worker/{__version__}"}
        self._gateway = httpx2.Client(base_url=self._url, timeout=timeout_s, headers=agent)
        self._storage = httpx2.Client(timeout=timeout_s, headers=agent, follow_redirects=True, max_redirects=5)

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._gateway.close()
        self._storage.close()

    def use_token(self, token: str) -> None:
        """Send this token from now on."""
        self._token = token

    # -- calls -----------------------------------------------------------------------------------------------------

    def info(self) -> ServerInfo:
        """What the server is. Raises `SetupError` when it speaks another protocol version."""
        info = self._call("GET", "/v1/info", None, ServerInfo)
        if info.protocol != PROTOCOL_VERSION:
            newer = info.protocol > PROTOCOL_VERSION
            raise SetupError(
                f"the server speaks protocol {info.protocol}, this worker {PROTOCOL_VERSION}",
                remedy="Update this worker: pip install -U rankup." if newer else "Ask the organiser to update.",
            )
        return info

    def enrol(self, request: EnrolRequest) -> Enrolled:
        return self._call("POST", "/v1/workers", request, Enrolled)

    def claim(self, request: ClaimRequest) -> ClaimAnswer:
        return self._call("POST", "/v1/leases", request, ClaimAnswer)

    def lease(self, lease_id: str, *, policy: RetryPolicy | None = None) -> LeaseView:
        return self._call("GET", f"/v1/leases/{lease_id}", None, LeaseView, policy)

    def heartbeat(self, lease_id: str, beat: Heartbeat, *, policy: RetryPolicy | None = None) -> HeartbeatAnswer:
        return self._call("POST", f"/v1/leases/{lease_id}/heartbeat", beat, HeartbeatAnswer, policy)

    def give_back(self, lease_id: str, request: ReturnRequest, *, policy: RetryPolicy | None = None) -> LeaseView:
        return self._call("POST", f"/v1/leases/{lease_id}/return", request, LeaseView, policy)

    def restore(self, lease_id: str, request: RestoreRequest, *, policy: RetryPolicy | None = None) -> LeaseView:
        return self._call("POST", f"/v1/leases/{lease_id}/restore", request, LeaseView, policy)

    def upload_ticket(
        self, lease_id: str, request: UploadRequest, *, policy: RetryPolicy | None = None
    ) -> UploadTicket:
        return self._call("POST", f"/v1/leases/{lease_id}/upload", request, UploadTicket, policy)

    def submit(self, lease_id: str, request: SubmitRequest) -> LeaseView:
        return self._call("POST", f"/v1/leases/{lease_id}/submit", request, LeaseView)

    def server_clock_offset_s(self) -> float | None:
        """Server's clock minus ours in seconds (to a second), from the `Date` header; None without one. One try."""
        from email.utils import parsedate_to_datetime

        answer = self._send("GET", "/v1/health", None)
        header = answer.headers.get("date")
        try:
            return parsedate_to_datetime(header).timestamp() - time.time() if header else None
        except ValueError:
            return None

    def patiently(self, attempt: Callable[[], Result]) -> Result:
        """Run `attempt` under this client's retry policy."""
        return self._retry(attempt, self._policy)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def download(self, link: BlobLink, to: Path, *, max_bytes: int, progress: Progress) -> None:
        """Fetch the blob into `to`.

        Raises `TooLargeError` above `max_bytes`, `IntegrityError` when the bytes do not have the announced size and
        hash, `DiskFullError`, and what `_retry` raises. Nothing is left at `to` on failure.
        """
        if link.size_bytes > max_bytes:
            raise TooLargeError(f"the server announces {link.size_bytes} bytes, the limit is {max_bytes}")
        url = self._absolute(link.url)
        partial = to.with_name(to.name + ".partial")
        refusals = 0

        def fetch() -> None:
            nonlocal refusals
            digest = hashlib.sha256()
            done = 0
            with self._storage.stream("GET", url) as answer, partial.open("wb") as file:
                if answer.status_code != 200:
                    refusals += _is_refusal(answer)
                    raise _storage_error(answer, "download", last=refusals >= _MAX_REFUSALS)
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    self._check_stop()
                    done += len(chunk)
                    if done > link.size_bytes:
                        raise IntegrityError(f"{to.name} is longer than the announced {link.size_bytes} bytes")
                    digest.update(chunk)
                    file.write(chunk)
                    self._meter.received(len(chunk))
                    progress(done, link.size_bytes)
                file.flush()
                os.fsync(file.fileno())
            if done < link.size_bytes:
                raise UnreachableError(f"the download of {to.name} ended after {done} of {link.size_bytes} bytes")
            if digest.hexdigest() != link.sha256:
                raise IntegrityError(f"{to.name} does not have the announced hash")
            partial.replace(to)

        try:
            with full_disk_means_disk_full(to.parent):
                self._retry(fetch, self._policy)
        finally:
            partial.unlink(missing_ok=True)

    def upload(self, lease_id: str, request: UploadRequest, path: Path, *, progress: Progress) -> None:
        """Ask for a ticket and PUT the file where it says, in pieces; a new ticket for every try, as URLs run out.

        A ticket with `already_there` sends nothing. Raises `InputError` when the object store goes on refusing.
        """
        size = path.stat().st_size
        refusals = 0

        def pieces() -> Iterator[bytes]:
            done = 0
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    self._check_stop()
                    yield chunk
                    self._meter.sent(len(chunk))
                    done += len(chunk)
                    progress(done, size)

        def send() -> None:
            nonlocal refusals
            granted = self.upload_ticket(lease_id, request, policy=_ONCE)
            if granted.already_there:
                progress(size, size)
                return
            headers = _with_length(granted.headers, size)
            answer = self._storage.put(self._absolute(granted.url), content=pieces(), headers=headers)
            if not answer.is_success:
                refusals += _is_refusal(answer)
                raise _storage_error(answer, "upload", last=refusals >= _MAX_REFUSALS)

        self._retry(send, self._policy)

    def _absolute(self, url: str) -> str:
        """`url`, joined to the gateway's address where it is relative; a presigned one stays as it was signed."""
        return url if httpx2.URL(url).is_absolute_url else str(httpx2.URL(self._url + "/").join(url))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _call(
        self, method: str, path: str, body: BaseModel | None, answer: type[Model], policy: RetryPolicy | None = None
    ) -> Model:
        def once() -> Model:
            response = self._send(method, path, body)
            if not 200 <= response.status < 300:
                raise _gateway_error(response, self._url)
            try:
                return answer.model_validate_json(response.content)
            except ValidationError as exc:
                raise UnreachableError(f"what answers at {self._url}{path} is not a Rankup gateway") from exc

        return self._retry(once, policy or self._policy)

    def _send(self, method: str, path: str, body: BaseModel | None) -> _Reply:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        content = body.model_dump_json().encode() if body is not None else (b"{}" if method == "POST" else None)
        if content is not None:
            headers["Content-Type"] = "application/json"
            self._meter.sent(len(content))
        try:
            with self._gateway.stream(method, path, content=content, headers=headers) as response:
                content_in = bytearray()
                for chunk in response.iter_bytes():
                    content_in += chunk
                    if len(content_in) > MAX_ANSWER_BYTES:
                        raise FatalError(f"an answer above {MAX_ANSWER_BYTES} bytes", remedy="Check the address.")
                self._meter.received(len(content_in))
                return _Reply(response.status_code, response.headers, bytes(content_in))
        except httpx2.HTTPError as exc:
            raise _unreachable(exc, self._url) from exc

    def _retry(self, attempt: Callable[[], Result], policy: RetryPolicy) -> Result:
        """Run `attempt` until it succeeds, fails for good, patience is over (last error raised) or stop is set."""
        failures = 0
        first_failure: float | None = None
        while True:
            self._check_stop()
            try:
                return attempt()
            except RetryableError as exc:
                error: RetryableError = exc
            except httpx2.HTTPError as exc:
                error = _unreachable(exc, self._url)
                error.__cause__ = exc
            failures += 1
            now = self._clock()
            first_failure = now if first_failure is None else first_failure
            pause_s = policy.pause_s(error, failures, now - first_failure, self._draw)
            if pause_s is None:
                raise error
            self._on_waiting(error, pause_s)
            self._stop.wait(pause_s)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StopRequested


def _gateway_error(response: _Reply, url: str) -> RankupError:
    media_type = response.headers.get("content-type", "").partition(";")[0].strip()
    if media_type != problems.MEDIA_TYPE and response.status in _GATEWAY_DOWN:
        return UnreachableError(
            f"{url} answers {response.status} without being a gateway",
            remedy="The server may be restarting; otherwise check its address.",
        )
    return problems.error_of(response.status, response.content, where=url)


def _is_refusal(answer: httpx2.Response) -> bool:
    """Whether the answer says that the request is wrong, and not only that it came too slowly or too early."""
    return answer.is_client_error and answer.status_code not in (408, 425, 429)


def _storage_error(answer: httpx2.Response, what: str, *, last: bool) -> RankupError:
    """What an object store's refusal means. A 4xx is tried again a few times: an expired URL or damage on the way."""
    detail = answer.read()[:300].decode(errors="replace").strip()
    cause = f"the object store answered {answer.status_code} to the {what}" + (f": {detail}" if detail else "")
    if last:
        return InputError(cause, remedy="Tell the organiser: the object store refuses what the gateway allowed.")
    return RetryableError(cause)


def _unreachable(exc: httpx2.HTTPError, url: str) -> UnreachableError:
    reason = str(exc) or type(exc).__name__
    return UnreachableError(
        f"{url} does not answer ({reason})",
        remedy="Check the address and this machine's network; the server may be restarting.",
    )


def _with_length(headers: Mapping[str, str], size: int) -> dict[str, str]:
    """The ticket's headers as they are, plus the length, without which a body in pieces would be sent chunked."""
    named = {name.lower() for name in headers}
    return dict(headers) if "content-length" in named else {**headers, "Content-Length": str(size)}
