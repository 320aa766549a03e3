"""The record of organiser calls, for every route of a router at once.

    router = APIRouter(route_class=AuditedRoute)

What always holds: a call that `access.require_organiser` let in, that is no mere look (GET) and that went well is
answered only after its record lies in object storage. Where it cannot be written the caller gets an error, although the
call had its effect: it is repeated, and recorded then. Calls that were refused are in the log, not among the records.

A route adds what only the ledger will hold with `note_outcome`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import JsonValue
from starlette.responses import Response

from coordinator import actions
from coordinator.access import desk_of
from coordinator.ratelimit import client_address, parse_networks
from rankup.membership import Action

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def note_outcome(request: Request, outcome: dict[str, JsonValue]) -> None:
    """Put this into the record of the call, beside what the caller sent. No secrets."""
    request.state.outcome = outcome


class AuditedRoute(APIRoute):
    """A route whose organiser calls are recorded."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def audited(request: Request) -> Response:
            response = await handle(request)
            who = getattr(request.state, "organiser", "")
            if who and request.method not in SAFE_METHODS and response.status_code < 400:
                await _record(request, self.name, who)
            return response

        return audited


async def _record(request: Request, what: str, who: str) -> None:
    desk = desk_of(request)
    body = await request.body()
    said = actions.without_secrets(json.loads(body)) if body else {}
    action = Action(
        what=what,
        by=who,
        address=client_address(request.scope, parse_networks(desk.settings.trusted_proxies))[:64],
        request_id=str(structlog.contextvars.get_contextvars().get("request_id", "")),
        subject={name: str(value) for name, value in request.path_params.items()},
        arguments=said if isinstance(said, dict) else {},
        outcome=getattr(request.state, "outcome", {}),
        at=desk.clock(),
    )
    await desk.in_thread(actions.write, desk.store, action)
    structlog.get_logger(__name__).info("organiser_action", what=what, by=who, **action.subject)
