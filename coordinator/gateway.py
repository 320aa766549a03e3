"""The gateway: the HTTP application that is all a volunteer, an organiser's command or a reader can reach.

    layers.py          what sees every request first: size, request id, security headers, crashes
    exchange.py        one request as it is counted and logged
    ratelimit.py       how many calls of each kind
    access.py          tokens
    routes_people.py   join, leaderboard; invites, approvals, bans; people.py, people_*.py, actions.py, audited.py
    routes_worker.py   claim, heartbeat, return, restore, upload, submit; vouchers.py, adopting.py
    routes_upload.py   deltas that come through the gateway; tickets.py, spool.py
    routes_link.py     how fast bytes go between a volunteer and here; link.py
    routes_round.py    look at rounds; open, close and cancel them
    routes_model.py    models, versions, blobs, datasets, health; blobs.py
    routes_page.py     the status page
    routes_metrics.py  what Prometheus scrapes; metrics.py, gauges.py, reporter.py, ledger_counts.py
    problems.py        refusals

What always holds: the application keeps no state but caches, so any number of replicas serve together and each may be
killed at any time. It starts no server: Ray Serve runs it in production (serving.py), uvicorn or an in-process
transport in tests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import Scope

from coordinator import (
    openapi,
    routes_link,
    routes_metrics,
    routes_model,
    routes_page,
    routes_people,
    routes_round,
    routes_upload,
    routes_worker,
)
from coordinator.access import Desk, GatewayDeps
from coordinator.layers import BodyLimit, Envelope
from coordinator.problems import install_handlers
from coordinator.ratelimit import RateLimit

__all__ = ["GatewayDeps", "create_app"]


def create_app(deps: GatewayDeps) -> FastAPI:
    """The application over these parts. Nothing is connected before a request needs it.

    Raises SetupError where `transfer` is "proxied" and there is no organiser's token.
    """
    desk = Desk(deps)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await desk.close()

    app = FastAPI(
        lifespan=lifespan,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # Its page would load scripts from elsewhere.
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.desk = desk
    install_handlers(app)
    volunteers = (routes_worker, routes_people, routes_upload, routes_link)
    for module in (routes_model, *volunteers, routes_round, routes_page, routes_metrics):
        app.include_router(module.router)
    openapi.install(app)
    # The last one added is the outermost: even a refusal of BodyLimit carries the request id and the headers.
    app.add_middleware(BodyLimit, max_bytes=deps.settings.max_body_bytes, streams=_counts_for_itself)
    app.add_middleware(RateLimit, settings=deps.settings, tally=desk.tally)
    app.add_middleware(Envelope, tally=desk.tally)
    return app


def _counts_for_itself(scope: Scope) -> bool:
    return routes_upload.is_upload(scope) or routes_link.is_link(scope)
