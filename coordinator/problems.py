"""Every refusal of the gateway as `application/problem+json` (RFC 9457).

What always holds:
- an answer of 400 or above is a `protocol.Problem`: the last part of `type` is the `code` of `rankup.errors`, with a
  cause and a remedy in plain words, `Retry-After` where coming back helps, and never a stack trace, a key or a host
  name;
- what a client sent is echoed only as the location of a field, cut to a fixed length;
- what is wrong on the server's side goes into the log, and the answer says only that something is.

It knows no route, no ledger and no store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rankup.errors import (
    BusyError,
    ConflictError,
    DiskFullError,
    InputError,
    IntegrityError,
    NotFoundError,
    NotYetError,
    RankupError,
    RetryableError,
    UnauthenticatedError,
)
from rankup.problems import MEDIA_TYPE, TYPE_PREFIX
from rankup.protocol import Problem

RETRY_AFTER_S = 5.0
"""What a client is told to wait when a server behind the gateway does not answer."""
MAX_FIELD_ERRORS = 16
JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")

log = structlog.get_logger(__name__)


def problem_response(
    *,
    status: int,
    code: str,
    title: str,
    detail: str,
    remedy: str,
    retry_after_s: float | None = None,
    errors: tuple[dict[str, Any], ...] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One problem as a response; text that has no UTF-8 form is replaced, never an error of its own."""
    body = Problem(
        type=TYPE_PREFIX + code,
        title=printable(title),
        status=status,
        detail=printable(detail),
        remedy=printable(remedy),
        retry_after_s=retry_after_s,
        errors=errors,
    )
    response = Response(body.model_dump_json(exclude_none=True), status_code=status, media_type=MEDIA_TYPE)
    response.headers.update(dict(headers or {}))
    if retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if status == UnauthenticatedError.http_status:
        response.headers["WWW-Authenticate"] = 'Bearer realm="rankup"'
    return response


def from_error(error: RankupError) -> Response:
    """The problem for an error of ours.

    Faults of the server itself (a stored object fails its hash, a setting is missing) say only that, and are logged:
    what is wrong inside is no business of a stranger.
    """
    if isinstance(error, DiskFullError):
        log.error("request_failed", code=error.code, cause=error.cause)
        return problem_response(
            status=error.http_status,
            code=error.code,
            title="No room left on the server",
            detail="The disk of the server has no room for this at present.",
            remedy="Tell the organiser to free some space; then send the same call again.",
        )
    if isinstance(error, IntegrityError) or (error.http_status >= 500 and not isinstance(error, RetryableError)):
        log.error("request_failed", code=error.code, cause=error.cause)
        return problem_response(
            status=500,
            code=error.code,
            title="The coordinator found a fault of its own",
            detail="Something that the coordinator stores or needs fails its checks; nothing of it was served.",
            remedy="Tell the organiser, with the Rankup-Request-Id of this answer.",
        )
    detail, remedy = error.cause, error.remedy
    retry_after_s: float | None = None
    if isinstance(error, NotYetError):
        retry_after_s = error.retry_after_s
    elif isinstance(error, RetryableError) and not isinstance(error, ConflictError):
        # The cause and the remedy are for who runs the servers behind the gateway: into the log with them.
        log.warning("request_failed", code=error.code, cause=error.cause, remedy=error.remedy)
        busy = isinstance(error, BusyError)
        retry_after_s = error.retry_after_s if isinstance(error, BusyError) else RETRY_AFTER_S
        detail = f"A server that the coordinator needs {'has too much to do' if busy else 'does not answer'}."
        remedy = "Send the same call again later; nothing that was acknowledged is lost."
    return problem_response(
        status=error.http_status,
        code=error.code,
        title=_title(type(error)),
        detail=detail,
        remedy=remedy,
        retry_after_s=retry_after_s,
    )


def refused_body(error: RankupError) -> Response:
    """The document that `error` becomes, and the end of the connection: what nobody wants does not go on arriving."""
    refusal = from_error(error)
    refusal.headers["Connection"] = "close"
    return refusal


def body_too_slow(what: str, remedy: str) -> Response:
    """A body that stopped arriving, and the end of the connection."""
    return problem_response(
        status=408,
        code=InputError.code,
        title=f"The {what} did not arrive",
        detail=f"Nothing more of the {what} arrived for a while, or it came too slowly.",
        remedy=remedy,
        headers={"Connection": "close"},
    )


def install_handlers(app: FastAPI) -> None:
    """Make every refusal that FastAPI or a route raises a problem."""
    app.add_exception_handler(RankupError, _on_rankup_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_rankup_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, RankupError):
        raise error
    return from_error(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    found = error.errors()
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not JSON_TYPE.fullmatch(media) and any(item["loc"] == ("body",) and item["type"] != "missing" for item in found):
        return problem_response(
            status=415,
            code=InputError.code,
            title="The request cannot be read",
            detail="The body is not said to be JSON.",
            remedy="Send JSON, with `Content-Type: application/json`.",
        )
    fields = tuple(
        {"field": ".".join(printable(str(part)) for part in item["loc"]), "message": printable(str(item["msg"]))}
        for item in found[:MAX_FIELD_ERRORS]
    )
    unreadable = any(item["type"] == "json_invalid" for item in found)
    where = fields[0]["field"] if fields else "body"
    return problem_response(
        status=400 if unreadable else 422,
        code=InputError.code,
        title="The request cannot be read" if unreadable else "The request does not fit the protocol",
        detail="The body is not JSON." if unreadable else f"{len(found)} field(s) are not valid, the first is {where}.",
        remedy="Send what /v1/openapi.json describes; an older worker is cured by an update.",
        errors=fields,
    )


async def _on_http_exception(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == NotFoundError.http_status:
        detail, code = "There is nothing at this address.", NotFoundError.code
    elif error.status_code == 405:
        detail, code = "This address does not take that method.", InputError.code
    else:
        detail, code = "The body cannot be read.", InputError.code
    return problem_response(
        status=error.status_code,
        code=code,
        title=_title(NotFoundError if code == NotFoundError.code else InputError),
        detail=detail,
        remedy="See /v1/openapi.json for what exists.",
        headers=error.headers,
    )


_TITLES = {
    "unreachable": "A server does not answer",
    "busy": "Too much at once",
    "not-yet": "Not yet",
    "conflict": "Somebody else was first",
    "bad-input": "The request is wrong",
    "bad-delta": "The delta is wrong",
    "not-found": "No such thing",
    "wrong-state": "Not in this state",
    "too-large": "Too large",
    "denied": "Not allowed",
    "unauthenticated": "Who are you?",
}


def _title(kind: type[RankupError]) -> str:
    return _TITLES.get(kind.code, "The request failed")


def printable(text: str, limit: int = 1000) -> str:
    """UTF-8 that can always be written: lone surrogates replaced, control characters dropped, long echoes cut."""
    clean = "".join(char for char in text.encode("utf-8", "replace").decode() if char.isprintable())
    return clean if len(clean) <= limit else clean[:limit] + "…"
