"""Crafted HTTP requests, byte by byte over a socket: bodies, lengths, encodings, headers and paths that no honest
client sends; and what a server may answer to each."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

CLOSED: Final = 0
"""Instead of a status: the connection ended without an answer."""
TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Target:
    """A gateway, somebody who has joined, and a lease of theirs with a ticket for `delta`."""

    host: str
    port: int
    worker: str
    organiser: str
    lease_id: str
    fence: int
    ticket: str
    """Path and query of the address to PUT to."""
    delta: bytes

    def send(self, pieces: Iterable[bytes]) -> tuple[int, str, bytes]:
        """Status (or CLOSED), media type and body of the answer."""
        with socket.create_connection((self.host, self.port), timeout=TIMEOUT_S) as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
            except OSError:
                pass  # Refused in the middle: the answer may be there already.
            answer = http.client.HTTPResponse(connection)
            try:
                answer.begin()
                return answer.status, answer.headers.get("content-type", ""), answer.read()
            except (OSError, http.client.HTTPException, ValueError):
                return CLOSED, "", b""

    def request(self, line: str, *headers: str, body: bytes = b"", length: bool = True) -> bytes:
        """One request; `line` is method and path. `headers` come after Host, and before Content-Length."""
        sized = [f"Content-Length: {len(body)}"] if length else []
        head = "\r\n".join([f"{line} HTTP/1.1", f"Host: {self.host}:{self.port}", *headers, *sized, "", ""])
        return head.encode("latin-1", "surrogateescape") + body

    def post(self, body: bytes, *headers: str, path: str = "/v1/workers", media: str = "application/json") -> bytes:
        return self.request(f"POST {path}", f"Content-Type: {media}", *headers, body=body)

    def as_worker(self, path: str, body: Any) -> bytes:
        return self.post(json.dumps(body).encode(), f"Authorization: Bearer {self.worker}", path=path)

    def put(self, body: bytes, *headers: str, length: int | None = None, ticket: str | None = None) -> bytes:
        sized = f"Content-Length: {len(body) if length is None else length}"
        return self.request(f"PUT {ticket or self.ticket}", *headers, sized, body=body, length=False)

    def chunked(self, line: str, *headers: str) -> bytes:
        return self.request(
            line, "Content-Type: application/json", "Transfer-Encoding: chunked", *headers, length=False
        )

    @property
    def beat(self) -> str:
        return f"/v1/leases/{self.lease_id}/heartbeat"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def endless(head: bytes, piece: bytes, count: int, pause_s: float = 0.0) -> Iterator[bytes]:
    yield head
    for _ in range(count):
        yield piece
        time.sleep(pause_s)


Make = Callable[[Target], bytes | Iterable[bytes]]
UNREADABLE: Final = (400, 422)
BAD_HTTP: Final = (400, CLOSED)

REQUESTS: Final[Mapping[str, tuple[tuple[int, ...], Make]]] = {
    # name: (what may be answered, the bytes)
    # -- bodies
    "a body in gzip": (UNREADABLE, lambda t: t.post(gzip.compress(b"{}"), "Content-Encoding: gzip")),
    "a gzip bomb": (UNREADABLE, lambda t: t.post(gzip.compress(bytes(10**7)), "Content-Encoding: gzip")),
    "an encoding that is a lie": (UNREADABLE, lambda t: t.post(b"{}", "Content-Encoding: br")),
    "ten encodings": (UNREADABLE, lambda t: t.post(b"{}", "Content-Encoding: " + ", ".join(["gzip"] * 10))),
    "deep objects": (UNREADABLE, lambda t: t.post(b'{"a":' * 2000 + b"1" + b"}" * 2000)),
    "deep arrays inside a field": (UNREADABLE, lambda t: t.post(b'{"statement":' + b"[" * 900 + b"]" * 900 + b"}")),
    "a fence twice": (
        (403,),
        lambda t: t.post(b'{"fence":%d,"fence":999}' % t.fence, f"Authorization: Bearer {t.worker}", path=t.beat),
    ),
    "a fence beyond all numbers": ((422,), lambda t: t.as_worker(t.beat, {"fence": 10**300})),
    "a fence of infinity": (UNREADABLE, lambda t: t.as_worker(t.beat, {"fence": float("inf")})),
    "a fence of minus nothing": ((422,), lambda t: t.as_worker(t.beat, {"fence": -1})),
    "a fence that is a text": ((403, 422), lambda t: t.as_worker(t.beat, {"fence": "999"})),
    "a loss beyond all numbers": (
        UNREADABLE,
        lambda t: t.post(b'{"fence":1,"loss":1e999}', f"Authorization: Bearer {t.worker}", path=t.beat),
    ),
    "a byte order mark": (UNREADABLE, lambda t: t.post(b"\xef\xbb\xbf{}")),
    "UTF-16": (UNREADABLE, lambda t: t.post("{}".encode("utf-16"))),
    "UTF-32": (UNREADABLE, lambda t: t.post("{}".encode("utf-32"))),
    "zeros": (UNREADABLE, lambda t: t.post(bytes(1000))),
    "a name with a zero": ((422,), lambda t: t.post(b'{"statement":{"name":"a\\u0000b"}}')),
    "five thousand numbers": (UNREADABLE, lambda t: t.post(json.dumps([0] * 5000).encode())),
    "a thousand fields": (UNREADABLE, lambda t: t.post(json.dumps({str(n): n for n in range(1000)}).encode())),
    "XML with an entity": (
        (415,),
        lambda t: t.post(b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', media="application/xml"),
    ),
    "a form with a file": (
        (415,),
        lambda t: t.post(
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="../b"\r\n\r\n\r\n--x--',
            media="multipart/form-data; boundary=x",
        ),
    ),
    "a body with no media type": ((415,), lambda t: t.request("POST /v1/workers", body=b"{}")),
    "a media type of 8,000 letters": ((415,), lambda t: t.post(b"{}", media="a/" + "b" * 8000)),
    "an alphabet that nobody uses": (
        UNREADABLE,
        lambda t: t.post(b"+AHs-+AH0-", media="application/json; charset=utf-7"),
    ),
    # -- lengths
    "a body above the limit": ((413,), lambda t: t.post(b" " * 100_000)),
    "a length above the limit and no body": (
        (413,),
        lambda t: t.request("POST /v1/workers", f"Content-Length: {10**15}", length=False),
    ),
    "a length of 400 digits": (
        BAD_HTTP,
        lambda t: t.request("POST /v1/workers", "Content-Length: " + "9" * 400, length=False),
    ),
    "a negative length": (BAD_HTTP, lambda t: t.request("POST /v1/workers", "Content-Length: -1", length=False)),
    "a length that is no number": (
        BAD_HTTP,
        lambda t: t.request("POST /v1/workers", "Content-Length: 1e3", length=False),
    ),
    "two lengths": (
        BAD_HTTP,
        lambda t: t.request("POST /v1/workers", "Content-Length: 2", "Content-Length: 3", body=b"{}1", length=False),
    ),
    "a length and chunks": (
        (*BAD_HTTP, 422),
        lambda t: t.request(
            "POST /v1/workers", "Transfer-Encoding: chunked", body=b"0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n"
        ),
    ),
    "chunks by another name": (
        (*BAD_HTTP, 422, 501),
        lambda t: t.request("POST /v1/workers", "Transfer-Encoding: xchunked", body=b"{}"),
    ),
    "a chunk of 2^64 bytes": (BAD_HTTP, lambda t: t.chunked("POST /v1/workers") + b"FFFFFFFFFFFFFFFFF\r\n{}\r\n"),
    "a chunk of minus one byte": (BAD_HTTP, lambda t: t.chunked("POST /v1/workers") + b"-1\r\n{}\r\n0\r\n\r\n"),
    "chunks without end": ((413,), lambda t: endless(t.chunked("POST /v1/workers"), chunk(b" " * 4096), 64)),
    "tiny chunks without end": ((413,), lambda t: endless(t.chunked("POST /v1/workers"), chunk(b" ") * 512, 64)),
    "expecting to be told to go on": (
        (413,),
        lambda t: t.request("POST /v1/workers", "Expect: 100-continue", f"Content-Length: {10**9}", length=False),
    ),
    # -- time
    "a body that never comes": ((408,), lambda t: t.request("POST /v1/workers", "Content-Length: 10", length=False)),
    "a chunk that never ends": ((408,), lambda t: t.chunked("POST /v1/workers") + b"ff\r\n{"),
    "a byte now and then": (
        (408,),
        lambda t: endless(t.request("POST /v1/workers", "Content-Length: 1000", length=False), b" ", 20, 0.1),
    ),
    # -- headers and paths
    "a header of a megabyte": ((*BAD_HTTP, 404, 431), lambda t: t.request("GET /v1/nothing", "X-Long: " + "x" * 2**20)),
    "5,000 headers": (
        (*BAD_HTTP, 404, 431),
        lambda t: t.request("GET /v1/nothing", *(f"X-{n}: {n}" for n in range(5000))),
    ),
    "a path of a megabyte": ((*BAD_HTTP, 404, 414), lambda t: t.request("GET /v1/" + "a" * 2**20)),
    "a query of a megabyte": ((*BAD_HTTP, 404, 414), lambda t: t.request("GET /v1/nothing?" + "a=1&" * 2**18)),
    "a zero in a header": (BAD_HTTP, lambda t: t.request("GET /v1/nothing", "X-Zero: a\0b")),
    "a header without a name": (BAD_HTTP, lambda t: t.request("GET /v1/nothing", ": a")),
    "a header without a colon": (BAD_HTTP, lambda t: t.request("GET /v1/nothing", "nothing")),
    "another version of HTTP": (BAD_HTTP, lambda t: b"GET /v1/nothing HTTP/9.9\r\nHost: a\r\n\r\n"),
    "no HTTP at all": (BAD_HTTP, lambda t: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n"),
    "a method of its own": ((*BAD_HTTP, 405), lambda t: t.request("FETCH /v1/rounds")),
    "TRACE": ((405,), lambda t: t.request("TRACE /v1/rounds")),
    "a path out of the root": ((404,), lambda t: t.request("GET /v1/../../../etc/passwd")),
    "a path out of the root, in code": ((404,), lambda t: t.request("GET /v1/rounds/%2e%2e%2f%2e%2e%2fetc")),
    "a path of broken code": ((*BAD_HTTP, 404, 422), lambda t: t.request("GET /v1/rounds/%zz%c0%af%00")),
    "a path of no UTF-8": ((*BAD_HTTP, 404, 422), lambda t: t.request("GET /v1/rounds/\udcff\udcfe")),
    "somebody else's address": ((*BAD_HTTP, 404), lambda t: t.request("GET http://example.org/v1/rounds/none")),
    "an upgrade": (
        (*BAD_HTTP, 404),
        lambda t: t.request("GET /v1/nothing", "Connection: Upgrade", "Upgrade: websocket"),
    ),
    "a token of 100 kB": (
        (*BAD_HTTP, 401, 431),
        lambda t: t.request("POST /v1/leases", "Authorization: Bearer " + "x" * 10**5),
    ),
    "a token of no text": ((401,), lambda t: t.request("POST /v1/leases", "Authorization: Bearer \udcff\udc80")),
    "two tokens": (
        (401, 403),
        lambda t: t.request(
            f"POST /v1/rounds/{t.lease_id}/cancel",
            f"Authorization: Bearer {t.worker}",
            f"Authorization: Bearer {t.organiser}",
        ),
    ),
    "a token in the query": ((401,), lambda t: t.request(f"POST /v1/leases?token={t.worker}")),
    "a method in disguise": (
        (405,),
        lambda t: t.request("GET /v1/leases", "X-HTTP-Method-Override: POST", f"Authorization: Bearer {t.worker}"),
    ),
    "a lease id with a wildcard": ((422,), lambda t: t.as_worker("/v1/leases/l-*/heartbeat", {"fence": 1})),
    "a lease id with a line break": (
        (422,),
        lambda t: t.as_worker("/v1/leases/l-1%0d%0aFLUSHALL/heartbeat", {"fence": 1}),
    ),
    # -- uploads
    "an upload without end": ((413,), lambda t: endless(t.chunked(f"PUT {t.ticket}"), chunk(bytes(4096)), 1000)),
    "an upload of a byte too many": ((413,), lambda t: t.put(t.delta + b"\0")),
    "an upload of a byte too few": ((400,), lambda t: t.put(t.delta[:-1])),
    "an upload of other bytes": ((400,), lambda t: t.put(bytes(len(t.delta)))),
    "an upload in gzip": (
        (400,),
        lambda t: t.put(gzip.compress(t.delta), "Content-Encoding: gzip", "Content-Type: application/octet-stream"),
    ),
    "an upload in gzip of the right length": (
        (400,),
        lambda t: t.put(gzip.compress(bytes(2**20)).ljust(len(t.delta), b"\0"), "Content-Encoding: gzip"),
    ),
    "an upload as a form": (
        (400, 413),
        lambda t: t.put(b"--x\r\n\r\n" + t.delta + b"\r\n--x--", "Content-Type: multipart/form-data; boundary=x"),
    ),
    "an upload that never comes": ((408,), lambda t: t.put(b"", length=len(t.delta))),
    "an upload that stops half-way": ((408,), lambda t: t.put(t.delta[:100], length=len(t.delta))),
    "an upload of a byte now and then": ((408,), lambda t: endless(t.put(b"", length=len(t.delta)), b"\0", 20, 0.1)),
    "an upload with a smaller size in its address": (
        (403,),
        lambda t: t.put(t.delta, ticket=t.ticket.replace(f"size={len(t.delta)}", f"size={len(t.delta) - 1}")),
    ),
    "an upload with a second size in its address": ((403,), lambda t: t.put(t.delta, ticket=f"{t.ticket}&size=1")),
    "an upload of a negative size": ((422,), lambda t: t.put(b"", ticket=t.ticket.replace("size=", "size=-"))),
    "an upload of a size without end": (
        (422,),
        lambda t: t.put(b"", ticket=t.ticket.replace("size=", "size=" + "9" * 30)),
    ),
    "an upload that lasts for ever": (
        (403, 422),
        lambda t: t.put(t.delta, ticket=t.ticket.replace("expires=", "expires=9")),
    ),
    "an upload with no signature": ((422,), lambda t: t.put(t.delta, ticket=t.ticket.partition("&signature")[0])),
    "an upload with a signature of no text": ((403, 422), lambda t: t.put(t.delta, ticket=t.ticket[:-4] + "%ff%fe")),
    "an upload to another digest": (
        (403,),
        lambda t: t.put(t.delta, ticket=t.ticket.replace(t.ticket[-40:], "0" * 40, 1)),
    ),
    "an upload out of its folder": (
        (404, 422),
        lambda t: t.put(t.delta, ticket="/v1/uploads/..%2f..%2fmodels/tiny/latest" + t.ticket[t.ticket.index("?") :]),
    ),
    "an upload by POST": ((405,), lambda t: t.request(f"POST {t.ticket}", body=b"{}")),
}
