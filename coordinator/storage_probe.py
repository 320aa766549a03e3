"""Whether an object storage does what Rankup stands on: tried out with scratch objects, which are removed afterwards.

    conditional writes      If-None-Match and If-Match have exactly one winner
    signed uploads          another length or other bytes than the signed ones are refused
    uploads in parts        what was begun is found again by its key, with its parts, and is put together
    privacy                 without a signature nothing can be read, listed or written
    clock                   this machine's against the Date header

What always holds: nothing outside `doctor/` is written; a check that cannot be made is a finding and not an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rankup.errors import ConflictError, RankupError
from rankup.finding import Finding, fail, guarded, ok, warn
from rankup.store import Store

if TYPE_CHECKING:
    import httpx2

CLOCK_WARN_S, CLOCK_FAIL_S = 30.0, 300.0
"""S3 refuses signatures that are 15 minutes off."""
RACERS = 4
TIMEOUT_S = 15.0


def storage(store: Store, *, clock: Callable[[], float] = time.time) -> list[Finding]:
    """All checks of object storage, with scratch objects that are removed afterwards."""
    scratch = f"doctor/{secrets.token_hex(8)}"
    keys = [f"{scratch}/{name}" for name in ("once", "swap", "upload", "private", "parts")]
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("s3 write once", lambda: _write_once(store, keys[0])),
        ("s3 compare and swap", lambda: _compare_and_swap(store, keys[1])),
        ("s3 signed uploads", lambda: _signed_uploads(store, keys[2])),
        ("s3 uploads in parts", lambda: _in_parts(store, keys[4])),
        ("s3 privacy", lambda: _private(store, keys[3])),
        ("clock", lambda: _clock(store, keys[3], clock)),
    )
    unreachable = guarded("s3", lambda: _answers(store, keys[0]))
    if unreachable:
        return unreachable
    try:
        return [finding for name, make in checks for finding in guarded(name, make)]
    finally:
        for key in keys:
            with contextlib.suppress(RankupError):
                store.delete(key)


def _answers(store: Store, key: str) -> Iterator[Finding]:
    """No finding: it answers, and our keys open the bucket."""
    if store.head(key) is not None:
        yield fail("s3", f"there is an object where nobody wrote one: {key}", "Check what answers at this address.")


def _race(write: Callable[[int], object]) -> int:
    """How many of several writers at once were told that they won."""

    def attempt(number: int) -> bool:
        try:
            write(number)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        return sum(pool.map(attempt, range(RACERS)))


_OTHER_STORE = "Use an object storage that honours If-None-Match and If-Match (AWS S3, SeaweedFS 4, MinIO)."


def _write_once(store: Store, key: str) -> Iterator[Finding]:
    won = _race(lambda number: store.put(key, b"%d" % number, if_absent=True))
    if won == 1:
        yield ok("s3 write once", f"If-None-Match: one of {RACERS} writers won")
    else:
        yield fail("s3 write once", f"If-None-Match: {won} of {RACERS} writers were told that they won", _OTHER_STORE)


def _compare_and_swap(store: Store, key: str) -> Iterator[Finding]:
    first = store.swap(key, b"first", etag=None)
    won = _race(lambda number: store.swap(key, b"second %d" % number, etag=first))
    if won == 1:
        yield ok("s3 compare and swap", f"If-Match: one of {RACERS} writers won")
    else:
        yield fail("s3 compare and swap", f"If-Match: {won} of {RACERS} writers were told that they won", _OTHER_STORE)


def _signed_uploads(store: Store, key: str) -> Iterator[Finding]:
    import httpx2

    good, other = b"exactly these bytes", b"exactly other bytes"
    signed = store.presign_put(key, size_bytes=len(good), sha256=hashlib.sha256(good).hexdigest())
    longer = {**signed.headers, "Content-Length": str(len(good) + 1)}
    with _http() as http:
        try:
            too_long = http.put(signed.url, content=good + b"!", headers=longer).status_code
            swapped = http.put(signed.url, content=other, headers=signed.headers).status_code
            taken = http.put(signed.url, content=good, headers=signed.headers).status_code
        except httpx2.HTTPError as exc:
            yield fail(
                "s3 signed uploads",
                f"{_host(signed.url)} does not answer: {type(exc).__name__}",
                "Set RANKUP_STORE_PUBLIC_ENDPOINT_URL to an address that volunteers reach.",
            )
            return
    if taken >= 400:
        yield fail(
            "s3 signed uploads",
            f"an upload as signed is refused with {taken}",
            "Check the clock, and that a proxy in front passes the Host header on unchanged.",
        )
    elif too_long < 400:
        yield fail("s3 signed uploads", "a body of another length than the signed one is taken", _OTHER_STORE)
    elif swapped < 400:
        yield warn(
            "s3 signed uploads",
            "length is enforced, the checksum is not: a volunteer can replace the bytes of its own upload",
            "Nothing is lost, because admission hashes again; a storage that checks x-amz-checksum-sha256 is better.",
        )
    else:
        yield ok("s3 signed uploads", "another length and other bytes than the signed ones are refused")


def _in_parts(store: Store, key: str) -> Iterator[Finding]:
    import httpx2

    check, remedy = "s3 uploads in parts", "Use an object storage with multipart uploads: deltas above 8 MiB need them."
    data = b"all of it in one part"
    digest = hashlib.sha256(data).hexdigest()
    upload_id = store.begin_upload(key)
    try:
        signed = store.presign_part(key, upload_id, 1, size_bytes=len(data), sha256=digest)
        with _http() as http:
            try:
                taken = http.put(signed.url, content=data, headers=signed.headers).status_code
            except httpx2.HTTPError as exc:
                yield fail(check, f"{_host(signed.url)} does not answer: {type(exc).__name__}", remedy)
                return
        found = [upload.upload_id for upload in store.open_uploads(key)]
        parts = store.arrived_parts(key, upload_id)
        if taken >= 400 or found != [upload_id] or [part.size_bytes for part in parts] != [len(data)]:
            yield fail(
                check, f"a part is answered with {taken}; {len(found)} uploads and {len(parts)} parts are found", remedy
            )
            return
        store.finish_upload(key, upload_id, [replace(parts[0], sha256=digest)])
        if store.get(key, max_bytes=len(data)) == data:
            yield ok(check, "an upload is found again with its parts, and put together")
        else:
            yield fail(check, "what was put together is not what was sent", remedy)
    finally:
        store.abort_upload(key, upload_id)


def _private(store: Store, key: str) -> Iterator[Finding]:
    import httpx2

    store.put(key, b"not for strangers")
    url = store.presign_get(key)
    bare = url.partition("?")[0]
    listing = bare.removesuffix(key)
    with _http() as http:
        try:
            read = http.get(bare).status_code
            listed = http.get(listing, params={"list-type": "2"}).status_code
            written = http.put(bare, content=b"by a stranger").status_code
        except httpx2.HTTPError as exc:
            yield fail("s3 privacy", f"{_host(url)} does not answer: {type(exc).__name__}", "Check the address.")
            return
    allowed = {"read objects": read, "list the bucket": listed, "write objects": written}
    open_to_all = [what for what, status in allowed.items() if status < 400]
    if open_to_all:
        yield fail(
            "s3 privacy",
            f"anybody may {', '.join(open_to_all)} without a signature",
            "Make the bucket private: uploads, held-out rows and receipts lie in it.",
        )
    else:
        yield ok("s3 privacy", "without a signature nothing can be read, listed or written")


def _clock(store: Store, key: str, clock: Callable[[], float]) -> Iterator[Finding]:
    import httpx2

    url = store.presign_get(key)
    with _http() as http:
        try:
            asked = clock()
            answer = http.get(url)
            middle = (asked + clock()) / 2
        except httpx2.HTTPError as exc:
            yield fail("clock", f"{_host(url)} does not answer: {type(exc).__name__}", "Check the address.")
            return
    yield clock_finding(answer.headers.get("date"), middle)


def clock_finding(date: str | None, now: float) -> Finding:
    """Compare this machine's clock with a Date header (RFC 9110, 6.6.1)."""
    try:
        # The header has whole seconds, cut off.
        off = now - (parsedate_to_datetime(date or "").timestamp() + 0.5)
    except ValueError:
        return warn("clock", "object storage does not tell its time", "Check the clock by hand: timedatectl.")
    found = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} object storage"
    remedy = "Set the clock: timedatectl set-ntp true."
    if abs(off) > CLOCK_FAIL_S:
        return fail("clock", f"{found}; signatures are refused from 15 minutes on", remedy)
    return warn("clock", found, remedy) if abs(off) > CLOCK_WARN_S else ok("clock", found)


@contextlib.contextmanager
def _http() -> Iterator[httpx2.Client]:
    import httpx2

    with httpx2.Client(timeout=TIMEOUT_S, follow_redirects=False) as client:
        yield client


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port}" if parts.port else f"{parts.scheme}://{parts.hostname}"
