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
from collections.abc import Callable, Iterator
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
    LeasesAtWork,
    LeaseView,
    LinkMeasured,
    RestoreRequest,
    ReturnRequest,
    Rounds,
    ServerInfo,
    SubmitRequest,
    UploadRequest,
    UploadTicket,
    WorkerView,
)
from worker.disk import full_disk_means_disk_full
from worker.retry import RetryPolicy
from worker.uploading import StorageRefusedError, Upload

MAX_ANSWER_BYTES = 16 * 1024**2
_CHUNK_BYTES = 64 * 1024
_SLICE_S = 0.25
"""How long a transfer waits for its rate at most before it looks whether it should go on, and at which rate."""
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
    """Is told of every byte of a body; returns how many seconds to wait before the next ones. Asked with 0: how many
    are left of them."""

    def sent(self, count: int) -> float: ...

    def received(self, count: int) -> float: ...


class _NoMeter:
    """The default: counts nothing, asks for no waiting."""

    def sent(self, count: int) -> float:
        return 0.0

    def received(self, count: int) -> float:
        return 0.0


class StopRequested(Exception):
    """Waiting or transferring was cut short because the user asked to stop. Not an error, so not in the error tree."""


def _ignore_waiting(error: RetryableError, pause_s: float) -> None:
    """The default of `on_waiting`: say nothing."""


def _go_on() -> None:
    """The default of `check`: nothing speaks against it."""


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: httpx2.Headers
    content: bytes


class GatewayClient:
    """Calls to one gateway. Its methods may be used from several threads.

    `on_waiting` is told before each pause. `stop` ends every wait with `StopRequested`. `timeout_s` bounds the
    connection and each read or write, not a whole transfer. `meter` counts bytes and says how fast they go.
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

    def info(self, *, policy: RetryPolicy | None = None) -> ServerInfo:
        """What the server is. Raises `SetupError` when it speaks another protocol version."""
        info = self._call("GET", "/v1/info", None, ServerInfo, policy)
        if info.protocol != PROTOCOL_VERSION:
            newer = info.protocol > PROTOCOL_VERSION
            raise SetupError(
                f"the server speaks protocol {info.protocol}, this worker {PROTOCOL_VERSION}",
                remedy="Update this worker: pip install -U rankup." if newer else "Ask the organiser to update.",
            )
        return info

    def who_am_i(self) -> WorkerView:
        return self._call("GET", "/v1/workers/me", None, WorkerView)

    def rounds(self) -> Rounds:
        return self._call("GET", "/v1/rounds", None, Rounds)

    def leases_at_work(self, round_id: str) -> LeasesAtWork:
        return self._call("GET", f"/v1/rounds/{round_id}/leases", None, LeasesAtWork)

    def link_up(self, data: bytes) -> LinkMeasured:
        """Send bytes that mean nothing, to see how fast they go."""
        return self._call("PUT", "/v1/link", data, LinkMeasured)

    def link_down(self, size_bytes: int) -> int:
        """Fetch bytes that mean nothing, to see how fast they come; returns how many came."""
        answer = self._send("GET", f"/v1/link?size={size_bytes}", None)
        if answer.status != 200:
            raise _gateway_error(answer, self._url)
        return len(answer.content)

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

    def download(
        self, link: BlobLink, to: Path, *, max_bytes: int, progress: Progress, check: Callable[[], None] = _go_on
    ) -> None:
        """Fetch the blob into `to`. `check` is called between any two pieces, and while the rate is waited for: what it
        raises ends the download.

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
                    done += len(chunk)
                    if done > link.size_bytes:
                        raise IntegrityError(f"{to.name} is longer than the announced {link.size_bytes} bytes")
                    digest.update(chunk)
                    file.write(chunk)
                    self._pace(self._meter.received, len(chunk), check)
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

    def upload(
        self,
        lease_id: str,
        request: UploadRequest,
        path: Path,
        *,
        progress: Progress,
        check: Callable[[], None] = _go_on,
    ) -> None:
        """Have the file in object storage: what is missing of it is sent where a ticket says, and a new ticket is asked
        for after every failure (`worker.uploading`). Patience begins anew with every part that has arrived.

        `check` as in `download`. Raises `InputError` when the object store goes on refusing, `IntegrityError` when the
        file does not have the hash of the request.
        """
        upload = Upload(
            path,
            request,
            ask=lambda asked: self.upload_ticket(lease_id, asked, policy=_ONCE),
            put=self._put,
            pace=lambda count: self._pace(self._meter.sent, count, check),
            progress=progress,
        )
        self._retry(upload.attempt, self._policy, mark=lambda: upload.accepted)

    def _put(self, url: str, headers: dict[str, str], content: Iterator[bytes]) -> None:
        answer = self._storage.put(self._absolute(url), content=content, headers=headers)
        if not answer.is_success:
            kind = StorageRefusedError if _is_refusal(answer) else RetryableError
            raise kind(_storage_cause(answer, "upload"))

    def _pace(self, take: Callable[[int], float], count: int, check: Callable[[], None]) -> None:
        """Wait as the meter asks after `count` bytes; a rate that changes meanwhile holds at once."""
        wait_s = take(count)
        while True:
            self._check_stop()
            check()
            if wait_s <= 0:
                return
            self._stop.wait(min(wait_s, _SLICE_S))
            wait_s = take(0)

    def _absolute(self, url: str) -> str:
        """`url`, joined to the gateway's address where it is relative; a presigned one stays as it was signed."""
        return url if httpx2.URL(url).is_absolute_url else str(httpx2.URL(self._url + "/").join(url))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        body: BaseModel | bytes | None,
        answer: type[Model],
        policy: RetryPolicy | None = None,
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

    def _send(self, method: str, path: str, body: BaseModel | bytes | None) -> _Reply:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        content = body.model_dump_json().encode() if isinstance(body, BaseModel) else body
        content = b"{}" if content is None and method == "POST" else content
        if content is not None:
            headers["Content-Type"] = "application/octet-stream" if isinstance(body, bytes) else "application/json"
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

    def _retry(
        self, attempt: Callable[[], Result], policy: RetryPolicy, *, mark: Callable[[], int] = lambda: 0
    ) -> Result:
        """Run `attempt` until it succeeds, fails for good, patience is over (last error raised) or stop is set.

        A `mark` that has grown since the last failure is progress: failures are counted anew.
        """
        failures = reached = 0
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
            if mark() > reached:
                reached, failures, first_failure = mark(), 0, None
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
    cause = _storage_cause(answer, what)
    if last:
        return InputError(cause, remedy="Tell the organiser: the object store refuses what the gateway allowed.")
    return RetryableError(cause)


def _storage_cause(answer: httpx2.Response, what: str) -> str:
    detail = answer.read()[:300].decode(errors="replace").strip()
    return f"the object store answered {answer.status_code} to the {what}" + (f": {detail}" if detail else "")


def _unreachable(exc: httpx2.HTTPError, url: str) -> UnreachableError:
    reason = str(exc) or type(exc).__name__
    return UnreachableError(
        f"{url} does not answer ({reason})",
        remedy="Check the address and this machine's network; the server may be restarting.",
    )
