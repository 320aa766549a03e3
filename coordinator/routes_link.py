"""Routes that measure the way between a volunteer's machine and this server, before it joins.

What always holds:
- no token is asked for, as who has not joined yet has none: address by address, `links_per_min` bounds how often;
- nothing that arrives is kept, and nothing that is sent means anything (link.py);
- every refusal of a body closes the connection, so one that nobody wants does not go on arriving.
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from coordinator.access import DeskOf
from coordinator.link import filler, require_short
from coordinator.openapi import refusals
from coordinator.problems import body_too_slow, refused_body
from rankup.errors import RankupError
from rankup.protocol import MAX_LINK_BYTES, LinkMeasured

LINK_PATH: Final = "/v1/link"
_OCTETS: Final = "application/octet-stream"

router = APIRouter(prefix="/v1", tags=["worker"])


def is_link(scope: Scope) -> bool:
    """Whether this request's body only measures, and counts for itself."""
    return bool(scope["method"] == "PUT" and scope["path"] == LINK_PATH)


@router.put("/link", response_model=LinkMeasured, responses=refusals(400, 408))
async def measure_up(request: Request, desk: DeskOf) -> LinkMeasured | Response:
    """Count the bytes of the body, at most 1 MiB of whatever they are, and throw them away."""
    try:
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and len(announced) < 20:
            require_short(int(announced))
        return await desk.sink.swallow(aiter(request.stream()))
    except ClientDisconnect:
        return Response(status_code=400)  # Nobody is there to read it.
    except TimeoutError:
        return body_too_slow("body", "Send less, or again over a better connection.")
    except RankupError as error:
        return refused_body(error)


@router.get(
    "/link",
    response_class=Response,
    responses={200: {"description": "So many bytes that mean nothing.", "content": {_OCTETS: {}}}, **refusals()},
)
async def measure_down(size: Annotated[int, Query(ge=1, le=MAX_LINK_BYTES)]) -> Response:
    """Bytes that mean nothing, to see how fast they come."""
    return Response(filler()[:size], media_type=_OCTETS)
