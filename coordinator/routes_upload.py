"""The routes that take deltas, whole or in parts, where object storage is out of reach (`transfer` is "proxied").

What always holds:
- the address itself is the permission (see tickets.py): no token is asked for, and none should be sent. It ends with
  its time or with the verdict on its lease, whatever comes first;
- nothing of a body is read before the ticket and the announced length fit;
- every refusal closes the connection, so a body that nobody wants does not go on arriving.
"""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Path, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from coordinator.access import Desk, DeskOf
from coordinator.openapi import refusals
from coordinator.problems import body_too_slow, refused_body
from coordinator.spool import too_long, too_short
from coordinator.tickets import UPLOADS_PATH, Piece, Ticket
from rankup.errors import DeniedError, NotFoundError, RankupError
from rankup.message import Digest, Identifier
from rankup.parts import MAX_PARTS
from rankup.protocol import LeaseState

MAX_UPLOAD_ID_CHARS = 1024
Size = Annotated[int, Query(ge=0, lt=10**15)]
Expiry = Annotated[int, Query(ge=0, lt=10**15)]
Mac = Annotated[str, Query(max_length=64)]

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["worker"])


def is_upload(scope: Scope) -> bool:
    """Whether this request's body is a delta, to be streamed and not to be held."""
    return bool(scope["method"] == "PUT" and scope["path"].startswith("/" + UPLOADS_PATH))


@router.put(
    "/uploads/{lease_id}/{sha256}",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "The delta is stored."}, **refusals(400, 403, 404, 408, 413, 507)},
)
async def upload(
    lease_id: Annotated[Identifier, Path()],
    sha256: Annotated[Digest, Path()],
    size: Size,
    expires: Expiry,
    signature: Mac,
    request: Request,
    desk: DeskOf,
) -> Response:
    """The delta itself, to the address that an upload ticket names."""
    return await _answer(Ticket(lease_id, sha256, size, expires), signature, request, desk)


@router.put(
    "/uploads/{lease_id}/{delta}/parts/{number}",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "The part is stored."}, **refusals(400, 403, 404, 408, 413, 507)},
)
async def upload_part(
    lease_id: Annotated[Identifier, Path()],
    delta: Annotated[Digest, Path()],
    number: Annotated[int, Path(ge=1, le=MAX_PARTS)],
    upload: Annotated[str, Query(max_length=MAX_UPLOAD_ID_CHARS)],
    sha256: Annotated[Digest, Query()],
    size: Size,
    expires: Expiry,
    signature: Mac,
    request: Request,
    desk: DeskOf,
) -> Response:
    """One part of a delta, to the address that an upload ticket names; `sha256` and `size` are the part's own."""
    ticket = Ticket(lease_id, sha256, size, expires, Piece(delta, upload, number))
    return await _answer(ticket, signature, request, desk)


async def _answer(ticket: Ticket, signature: str, request: Request, desk: Desk) -> Response:
    lease_id = ticket.lease_id
    try:
        await _take(ticket, signature, request, desk)
    except ClientDisconnect:
        log.info("upload_broke_off", lease_id=lease_id)
        return Response(status_code=400)  # Nobody is there to read it.
    except TimeoutError:
        return body_too_slow("delta", "Send it again over a better connection.")
    except RankupError as error:
        return refused_body(error)
    part = ticket.piece.number if ticket.piece is not None else 0
    log.info("delta_uploaded", lease_id=lease_id, size_bytes=ticket.size_bytes, part=part)
    return Response(status_code=204)


async def _take(ticket: Ticket, signature: str, request: Request, desk: Desk) -> None:
    if desk.tickets is None:
        raise NotFoundError("This server takes no uploads.", remedy="PUT the delta where its ticket says.")
    desk.tickets.check(ticket, signature, now=desk.clock())
    await _require_unjudged(desk, ticket.lease_id)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20:
        if int(announced) > ticket.size_bytes:
            raise too_long(ticket)
        if int(announced) < ticket.size_bytes:
            raise too_short(ticket, int(announced))
    await desk.spool.take(ticket, aiter(request.stream()))


async def _require_unjudged(desk: Desk, lease_id: str) -> None:
    """Raises DeniedError where the ticket's lease has its verdict: what came now would lie in the store for nobody."""
    try:
        lease = await (await desk.ledger()).lease(lease_id)
    except NotFoundError:
        return  # A ledger that was lost: the ticket is good all the same.
    if lease.state in (LeaseState.ACCEPTED, LeaseState.REJECTED):
        raise DeniedError("The upload ticket is used up: its lease has its verdict.", remedy="Claim another lease.")
