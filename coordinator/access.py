"""Who calls, and what a request may use: the gateway's parts (`GatewayDeps`, `Desk`) and the bearer tokens.

What always holds:
- tokens are compared by their sha256 and in constant time; no token is ever logged, stored or echoed;
- the token for metrics opens `/metrics` and nothing else;
- no token, or one that nobody knows, is 401 (`UnauthenticatedError`); a known one in the wrong place is 403
  (`DeniedError`): a worker's token does not open an organiser's route, nor the other way round;
- the ledger's client is made on the event loop that serves requests, at the first request that needs it, so the gateway
  starts, answers `/v1/health` and recovers by itself while Valkey is away.

Calls of the store block; they run in a thread pool through `Desk.in_thread`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, ParamSpec, TypeVar

import structlog
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from coordinator.blobs import Outgoing
from coordinator.catalogue import Catalogue
from coordinator.gauges import Gauges
from coordinator.ledger import Ledger, Worker
from coordinator.link import Sink
from coordinator.metrics import Tally
from coordinator.people import require_welcome
from coordinator.reporter import Reporter
from coordinator.spool import Spool
from coordinator.tickets import TicketSigner
from coordinator.vouchers import VoucherSigner
from coordinator.watched import Watched
from rankup.errors import DeniedError, UnauthenticatedError
from rankup.settings import CoordinatorSettings
from rankup.store import Store

MAX_TOKEN_CHARS = 512
SHORT_HASH = 16
"""Hex digits of a token's sha256 that tell it from others and are of no other use."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class GatewayDeps:
    """All that the gateway is made of. `clock` gives Unix seconds, `publisher_key` is the public key in hex."""

    connect_ledger: Callable[[], Awaitable[Ledger]]
    store: Store
    settings: CoordinatorSettings
    publisher_key: str
    clock: Callable[[], float]


class Desk:
    """What the routes of one application share: its parts, the ledger once it is connected, the catalogue's caches."""

    def __init__(self, deps: GatewayDeps) -> None:
        self.store = deps.store
        self.settings = deps.settings
        self.publisher_key = deps.publisher_key
        self.clock = deps.clock
        self.catalogue = Catalogue(deps.store, deps.publisher_key, clock=deps.clock)
        self.outgoing = Outgoing()
        self.spool = Spool(deps.store, deps.settings.spool_dir)
        self.sink = Sink()
        self.tickets: TicketSigner | None = None
        """Only where the gateway takes the uploads itself."""
        if deps.settings.transfer == "proxied":
            self.tickets = TicketSigner(deps.settings.organiser_token.get_secret_value())
        organiser_token = deps.settings.organiser_token.get_secret_value()
        self.vouchers = VoucherSigner(organiser_token) if organiser_token else None
        """Only where there is an organiser's token to sign with."""
        self.tally = Tally()
        self.reporter = Reporter(self.tally, self.ledger, role="gateway", clock=deps.clock)
        self.gauges = Gauges(self.ledger, self.catalogue, clock=deps.clock)
        self.watched = Watched(self.ledger, clock=deps.clock)
        self._connect_ledger = deps.connect_ledger
        self._ledger: Ledger | None = None
        self._attempt: asyncio.Task[Ledger] | None = None

    async def ledger(self) -> Ledger:
        """The ledger, connected at the first call. Raises UnreachableError."""
        if self._ledger is not None:
            return self._ledger
        if self._attempt is None:
            # All who wait share one attempt, or each would wait for the time limits of those before it.
            self._attempt = asyncio.create_task(self._connect())
        return await asyncio.shield(self._attempt)

    async def _connect(self) -> Ledger:
        try:
            self._ledger = await self._connect_ledger()
            self.reporter.start()
            return self._ledger
        finally:
            self._attempt = None

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call beside the event loop."""
        return await run_in_threadpool(function, *args, **kwargs)

    async def close(self) -> None:
        """Report what was counted, and let go of the ledger's connections."""
        await self.reporter.stop()
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            await ledger.close()


def desk_of(request: Request) -> Desk:
    desk = request.app.state.desk
    if not isinstance(desk, Desk):
        raise TypeError("the application was not made by create_app")
    return desk


async def _the_desk(request: Request) -> Desk:
    """`desk_of` as a coroutine: FastAPI would send a plain function to a thread, with every request."""
    return desk_of(request)


bearer = HTTPBearer(auto_error=False, description="A worker's token (from enrolling) or the organiser's token.")
DeskOf = Annotated[Desk, Depends(_the_desk)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def token_hash(token: str) -> str:
    """What is kept of a token: hex sha256. Tokens are 256 random bits, so no salt and no slow hash is needed."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def same_secret(given: str, kept: str) -> bool:
    """Constant-time comparison of two secrets of any length and alphabet."""
    return hmac.compare_digest(token_hash(given), token_hash(kept))


def token_of(credentials: HTTPAuthorizationCredentials | None) -> str:
    """The bearer token. Raises UnauthenticatedError where there is none."""
    token = credentials.credentials.strip() if credentials is not None else ""
    if not token or len(token) > MAX_TOKEN_CHARS:
        raise UnauthenticatedError(
            "The call needs a bearer token and carries none.",
            remedy="Send `Authorization: Bearer <token>`; a worker gets its token by joining.",
        )
    return token


def _is_organiser(desk: Desk, token: str) -> bool:
    kept = desk.settings.organiser_token.get_secret_value()
    return bool(kept) and same_secret(token, kept)


_UNKNOWN = "The server does not know this token."


async def require_worker(desk: DeskOf, credentials: Credentials) -> Worker:
    """The enrolled worker that calls.

    Raises:
        UnauthenticatedError: no token, one that is unknown or has run out.
        DeniedError: the organiser's token, or the worker is banned.
    """
    token = token_of(credentials)
    if _is_organiser(desk, token):
        raise DeniedError("This is the organiser's token; leases belong to workers.", remedy="Use a worker's token.")
    worker = await (await desk.ledger()).people.by_token(token_hash(token), desk.clock())
    if worker is None:
        raise UnauthenticatedError(_UNKNOWN)
    require_welcome(worker)
    structlog.contextvars.bind_contextvars(worker_id=worker.worker_id)
    return worker


async def require_organiser(request: Request, desk: DeskOf, credentials: Credentials) -> None:
    """Return if the organiser calls; `request.state.organiser` tells which token it was, for the record of the call.

    Raises:
        UnauthenticatedError: no token, or an unknown one.
        DeniedError: a worker's token.
    """
    token = token_of(credentials)
    if _is_organiser(desk, token):
        request.state.organiser = token_hash(token)[:SHORT_HASH]
        return
    remedy = "Use the organiser's token of this server."
    if await (await desk.ledger()).people.by_token(token_hash(token), desk.clock()) is not None:
        raise DeniedError("This is a worker's token; only the organiser may do this.", remedy=remedy)
    raise UnauthenticatedError(_UNKNOWN, remedy=remedy)


async def require_scraper(request: Request, desk: DeskOf, credentials: Credentials) -> None:
    """Return if the organiser calls, or somebody with the token for metrics.

    Raises:
        UnauthenticatedError: no token, or an unknown one.
        DeniedError: a worker's token.
    """
    kept = desk.settings.metrics_token.get_secret_value()
    if kept and same_secret(token_of(credentials), kept):
        return
    await require_organiser(request, desk, credentials)


CallingWorker = Annotated[Worker, Depends(require_worker)]
