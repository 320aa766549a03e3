"""Rate limits: how many calls of each kind one volunteer, or one address, may make in a minute.

    kind of call           counted by     setting
    enrol                  address        enrols_per_min
    claim, restore         token          claims_per_min
    heartbeat              token          heartbeats_per_min
    the rest of a lease    token          deliveries_per_min
    measuring the way      address        links_per_min
    anything else          address        requests_per_min
    answers of 401         address        refusals_per_min

What always holds:
- a call above its limit is refused (429, with Retry-After) before its body is read and before Valkey is asked;
- tokens are counted by a keyed hash, unchecked: whoever makes tokens up gets 401 for each, and those count by address;
- an address is that of the socket, or what a trusted proxy says of its caller; IPv6 counts by /64, as one home has;
- what is remembered is bounded: counts are forgotten within `SWEEP_S` of their end, and at `MAX_KEYS` all begin anew;
- 0 is no limit. Health and metrics have none.

Counts are those of one process: with n replicas a caller may get up to n times as much. The only module that imports
limits. It knows no ledger.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Sequence
from typing import Final, Literal, cast

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.metrics import RATE_LIMITED, Tally
from coordinator.problems import problem_response
from rankup.errors import BusyError
from rankup.settings import CoordinatorSettings

Kind = Literal["enrol", "claim", "heartbeat", "delivery", "link", "request", "refusal"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_KEYS: Final = 200_000
"""About 100 MB. Two keys for each caller and kind of call."""
SWEEP_S: Final = 60.0
UNCOUNTED: Final = frozenset({"/v1/health", "/v1/ready", "/metrics"})
UNKNOWN: Final = "unknown"
MAX_HOPS: Final = 16
_WORDS: Final[dict[Kind, str]] = {
    "enrol": "enrolments from your address",
    "claim": "claims",
    "heartbeat": "heartbeats",
    "delivery": "calls about leases",
    "link": "measurements from your address",
    "request": "requests from your address",
    "refusal": "calls with an unknown token from your address",
}


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Networks such as "10.0.0.0/8". Raises ValueError."""
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def client_address(scope: Scope, trusted: Sequence[Network]) -> str:
    """The address that a request came from; "unknown" where there is none, as over a unix socket.

    `X-Forwarded-For` is read from the right, and only as far as trusted proxies wrote it.
    """
    client = scope.get("client")
    address = str(client[0]) if client else UNKNOWN
    if not trusted or not _within(address, trusted):
        return address
    said = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    hops = b",".join(said).decode("latin-1").split(",")
    for hop in [part.strip() for part in hops[-MAX_HOPS:]][::-1]:
        try:
            address = str(ipaddress.ip_address(hop))
        except ValueError:
            break
        if not _within(address, trusted):
            break
    return address


def _within(address: str, networks: Sequence[Network]) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in networks)


def counted_as(address: str) -> str:
    """The address, or the /64 of one of IPv6: whoever has one has 2^64."""
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(found.ipv4_mapped) if found.ipv4_mapped else str(ipaddress.ip_network((found.packed, 64), strict=False))


def kind_of(method: str, path: str) -> Kind | None:
    """What a call counts as; None: it is not counted."""
    if path in UNCOUNTED:
        return None
    if path == "/v1/link":
        return "link"
    if path.startswith("/v1/leases/") and path.endswith("/restore"):
        return "claim"
    if path.startswith("/v1/leases/"):
        return "heartbeat" if path.endswith("/heartbeat") else "delivery"
    if method == "POST" and path == "/v1/leases":
        return "claim"
    return "enrol" if method == "POST" and path == "/v1/workers" else "request"


class _NoTimer(threading.Timer):
    """Stands in for the timer with which `MemoryStorage` looks through all of its keys a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(SWEEP_S, lambda: None)

    def is_alive(self) -> bool:
        return True


class Limiter:
    """Counts calls in windows that slide over a minute. For one event loop."""

    def __init__(self, per_min: dict[Kind, int]) -> None:
        self._items = {kind: RateLimitItemPerMinute(count) for kind, count in per_min.items() if count > 0}
        self._storage = MemoryStorage()
        self._storage.timer.cancel()
        self._storage.timer = _NoTimer()
        self._windows = SlidingWindowCounterRateLimiter(self._storage)
        self._swept_at = time.monotonic()

    def hit(self, kind: Kind, who: str) -> float | None:
        """Count a call; None where it is within the limit, else seconds until the window is over."""
        item = self._items.get(kind)
        if item is None:
            return None
        self._forget()
        return None if self._windows.hit(item, kind, who) else self._wait_s(kind, who)

    def spent(self, kind: Kind, who: str) -> float | None:
        """As `hit`, without counting."""
        item = self._items.get(kind)
        return None if item is None or self._windows.test(item, kind, who) else self._wait_s(kind, who)

    def _forget(self) -> None:
        if len(self._storage.storage) > MAX_KEYS:
            self._storage.reset()
        if time.monotonic() - self._swept_at > SWEEP_S:
            self._swept_at = time.monotonic()
            for key in list(self._storage.storage):
                self._storage.get(key)  # Drops it where its time is over.

    def _wait_s(self, kind: Kind, who: str) -> float:
        stats = self._windows.get_window_stats(self._items[kind], kind, who)
        return max(1.0, stats.reset_time - time.time())


class RateLimit:
    """The ASGI layer: refuses what is above a limit, before anything of a request is read."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: CoordinatorSettings,
        tally: Tally,
    ) -> None:
        self._app = app
        self._tally = tally
        self._trusted = parse_networks(settings.trusted_proxies)
        self._limiter = Limiter(
            {
                "enrol": settings.enrols_per_min,
                "claim": settings.claims_per_min,
                "heartbeat": settings.heartbeats_per_min,
                "delivery": settings.deliveries_per_min,
                "link": settings.links_per_min,
                "request": settings.requests_per_min,
                "refusal": settings.refusals_per_min,
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = kind_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if kind is None:
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        # However many spaces there are, and whatever the case of the scheme, it is the same token.
        # Who enrols may still send the one that is no longer known.
        token = given.split(None, 1)[-1].rstrip() if given.strip() and kind != "enrol" else b""
        address = counted_as(client_address(scope, self._trusted))
        wait_s = self._limiter.spent("refusal", address) if token else None
        if wait_s is not None:
            kind = "refusal"
        else:
            # The hash of bytes is keyed afresh in every process.
            by_token = token and kind not in ("link", "request")
            wait_s = self._limiter.hit(kind, f"#{hash(token):x}" if by_token else address)
        if wait_s is not None:
            self._tally.add(RATE_LIMITED, kind)
            await _refusal(kind, wait_s)(scope, receive, send)
            return

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 401:
                self._limiter.hit("refusal", address)
            await send(message)

        await self._app(scope, receive, watching if token else send)


def _refusal(kind: Kind, wait_s: float) -> ASGIApp:
    response = problem_response(
        status=BusyError.http_status,
        code=BusyError.code,
        title="Too many calls",
        detail=f"Too many {_WORDS[kind]} within a minute.",
        remedy="Wait as long as Retry-After says, then send the same call again.",
        retry_after_s=wait_s,
    )
    return cast(ASGIApp, response)
