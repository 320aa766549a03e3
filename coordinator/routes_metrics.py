"""`GET /metrics`: what Prometheus scrapes, for the organiser's token or a token that opens nothing else.

What always holds: a stranger learns nothing, not even whether there are metrics; every replica shows the same totals
(see `metrics`). Without the ledger there is no page: a scrape that fails is a sign of its own.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.responses import Response

from coordinator import ledger_counts, metrics
from coordinator.access import DeskOf, require_scraper
from coordinator.openapi import refusals

router = APIRouter(tags=["operator"])


@router.get(
    "/metrics",
    dependencies=[Depends(require_scraper)],
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text format 0.0.4.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **refusals(401, 403),
    },
)
async def show_metrics(desk: DeskOf) -> Response:
    """Counters of all processes, and gauges of rounds, leases, queues and versions."""
    ledger = await desk.ledger()
    await desk.reporter.report()
    totals, seen = await ledger_counts.totals(ledger)
    readings = [metrics.Reading(metrics.REPORTED, (role,), at) for role, at in seen.items()]
    readings += await desk.gauges.read()
    return Response(metrics.page(totals, readings), media_type=metrics.CONTENT_TYPE)
