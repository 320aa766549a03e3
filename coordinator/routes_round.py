"""Routes of rounds: everybody may look, the organiser opens, closes and cancels.

What always holds: a round that was opened here stands in object storage before it is answered; one model has one round
at a time, because each round builds on the version before it.
"""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Path

from coordinator.access import DeskOf, require_organiser
from coordinator.openapi import refusals
from coordinator.opening import open_round
from coordinator.rounds import Cancel, Close
from rankup.errors import StateError
from rankup.message import Answer, Identifier
from rankup.protocol import RoundRequest, RoundView

RoundId = Annotated[Identifier, Path(description="From the list of rounds.")]
ROUNDS_SHOWN = 100

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["rounds"])
organiser = Depends(require_organiser)


class Rounds(Answer):
    rounds: tuple[RoundView, ...]


@router.get("/rounds", responses=refusals())
async def list_rounds(desk: DeskOf) -> Rounds:
    """The newest rounds, newest first."""
    found = await (await desk.ledger()).rounds(ROUNDS_SHOWN)
    return Rounds(rounds=tuple(status.view() for status in found))


@router.get("/rounds/{round_id}", responses=refusals(404))
async def show_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """One round."""
    return (await (await desk.ledger()).round(round_id)).view()


@router.post("/rounds", status_code=201, dependencies=[organiser], responses=refusals(400, 401, 403, 404, 409))
async def create_round(request: RoundRequest, desk: DeskOf) -> RoundView:
    """Open the first round of a campaign on the model's latest version; the keeper opens the others."""
    ledger = await desk.ledger()
    for status in await ledger.rounds(ROUNDS_SHOWN):
        if status.record.request.model == request.model and not status.facts.state.ended:
            raise StateError(
                f"Round {status.record.round_id} of model {request.model} is {status.facts.state.value}.",
                remedy=f"Wait until it has ended, or cancel it: rankup round cancel {status.record.round_id}",
            )
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


@router.post("/rounds/{round_id}/close", dependencies=[organiser], responses=refusals(401, 403, 404, 409))
async def close_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """Take no more contributions and make a version of those that are there."""
    status, _ = await (await desk.ledger()).apply(round_id, Close(), desk.clock())
    log.info("round_closed", round_id=round_id)
    return status.view()


@router.post("/rounds/{round_id}/cancel", dependencies=[organiser], responses=refusals(401, 403, 404, 409))
async def cancel_round(round_id: RoundId, desk: DeskOf) -> RoundView:
    """Give the round up: no version comes of it."""
    status, _ = await (await desk.ledger()).apply(round_id, Cancel("cancelled by the organiser"), desk.clock())
    log.info("round_cancelled", round_id=round_id)
    return status.view()
