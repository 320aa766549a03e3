"""Routes of rounds: everybody may look; the organiser opens, pauses, resumes, closes and cancels.

What always holds: a round that was opened here stands in object storage before it is answered; of two calls that open a
campaign of one model at a time, at most one does. What is shown of leases are names and progress, never ids or tokens.
"""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Path

from coordinator.access import Desk, DeskOf, require_organiser
from coordinator.audited import AuditedRoute
from coordinator.openapi import refusals
from coordinator.opening import open_round, require_no_campaign
from coordinator.rounds import Cancel, Close, EndCampaign, Event, Pause, Resume
from rankup.message import Identifier
from rankup.protocol import CloseRequest, LeasesAtWork, RoundRequest, Rounds, RoundState, RoundView

RoundId = Annotated[Identifier, Path(description="From the list of rounds.")]
ROUNDS_SHOWN = 100
OPENING_S = 120.0
"""Longest time that opening a round can take; who dies meanwhile keeps others out no longer."""

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["rounds"], route_class=AuditedRoute)
organiser = Depends(require_organiser)


@router.get("/rounds", responses=refusals())
async def list_rounds(desk: DeskOf) -> Rounds:
    """The newest rounds, newest first."""
    found = await (await desk.ledger()).rounds(ROUNDS_SHOWN)
    return Rounds(rounds=tuple(status.view() for status in found))


@router.get("/rounds/{round_id}", responses=refusals(404))
async def show_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """One round."""
    return (await (await desk.ledger()).round(round_id)).view()


@router.get("/rounds/{round_id}/leases", responses=refusals(404))
async def leases_at_work(round_id: RoundId, desk: DeskOf) -> LeasesAtWork:
    """Who is training a round at the moment and how far they are; as it was at most a second ago."""
    return await desk.watched.leases(round_id)


@router.post("/rounds", status_code=201, dependencies=[organiser], responses=refusals(400, 401, 403, 404, 409))
async def create_round(request: RoundRequest, desk: DeskOf) -> RoundView:
    """Open the first round of a campaign on the model's latest version; the keeper opens the others."""
    ledger = await desk.ledger()
    async with ledger.alone(f"opening a round of {request.model}", OPENING_S):
        await require_no_campaign(ledger, request.model)
        record = await open_round(
            ledger,
            desk.store,
            request,
            index=0,
            previous=None,
            now=desk.clock(),
            max_delta_bytes=desk.settings.max_delta_bytes,
            publisher_key=desk.publisher_key,
        )
    log.info("round_opened", round_id=record.round_id, model=request.model, base_version=record.base_version)
    return (await ledger.round(record.round_id)).view()


async def _tell(desk: Desk, round_id: str, event: Event) -> RoundView:
    status, _ = await (await desk.ledger()).apply(round_id, event, desk.clock())
    log.info("round_changed", round_id=round_id, change=type(event).__name__, state=status.facts.state.value)
    return status.view()


@router.post("/rounds/{round_id}/pause", dependencies=[organiser], responses=refusals(401, 403, 404, 409))
async def pause_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """Grant no leases until it is resumed; who is training goes on. The rounds after this one open paused too."""
    return await _tell(desk, round_id, Pause())


@router.post("/rounds/{round_id}/resume", dependencies=[organiser], responses=refusals(401, 403, 404, 409))
async def resume_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """Grant leases again; the deadline has moved by the length of the pause."""
    return await _tell(desk, round_id, Resume())


@router.post("/rounds/{round_id}/close", dependencies=[organiser], responses=refusals(401, 403, 404, 409))
async def close_round(round_id: RoundId, how: CloseRequest, desk: DeskOf) -> RoundView:
    """Grant no more leases, wait a little for those who are training, and make a version of what there is."""
    if how.last:
        view = await _tell(desk, round_id, EndCampaign())
        if view.state in (RoundState.AGGREGATING, RoundState.EVALUATING):
            return view  # It is closed already.
    return await _tell(desk, round_id, Close(grace=how.grace))


@router.post("/rounds/{round_id}/last", dependencies=[organiser], responses=refusals(401, 403, 404, 409))
async def last_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """Let the round go on to its own end, and open none after it."""
    return await _tell(desk, round_id, EndCampaign())


@router.post("/rounds/{round_id}/cancel", dependencies=[organiser], responses=refusals(401, 403, 404, 409))
async def cancel_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """Give the round and its campaign up: no version comes of it."""
    return await _tell(desk, round_id, Cancel("cancelled by the organiser"))
