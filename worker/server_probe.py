"""What the doctor finds at the server: whether it answers, knows this machine, and has its time; how fast bytes go.

What always holds: one try a question, and no longer than `ANSWER_TIMEOUT_S` for it; the token goes to its own server
only; nothing is enrolled, claimed or changed there. Links are measured where the owner's limits allow transfers now and
set no rate; else the rate counts, or what was measured before.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rankup.errors import DeniedError, IntegrityError, RankupError, RetryableError, UnauthenticatedError
from rankup.finding import Finding, fail, ok, warn
from rankup.protocol import ServerInfo, Standing, WorkerView
from rankup.settings import WorkerSettings
from worker import identity, links
from worker.client import GatewayClient
from worker.links import Links
from worker.machine_probe import Allowance
from worker.retry import RetryPolicy

ANSWER_TIMEOUT_S: Final = 10.0
GOOD_CLOCK_OFFSET_S: Final = 300.0
MAX_CLOCK_OFFSET_S: Final = 3600.0
"""Beyond it the server refuses to enrol."""


@dataclass(frozen=True)
class Guest:
    """This machine at one server."""

    home: Path
    server: str
    folder: identity.ServerFolder
    known: identity.Identity | None
    """None: it has not joined."""
    invite: str = ""
    joining: bool = False
    """It joins right after this."""

    @classmethod
    def of(cls, settings: WorkerSettings, server: str, *, invite: str, joining: bool) -> Guest:
        """Raises `IntegrityError` for an identity file that is damaged."""
        folder = identity.folder_of(settings.home, server)
        return cls(settings.home, server, folder, identity.load_identity(folder), invite, joining)


def open_client(settings: WorkerSettings, guest: Guest, allowed: Allowance) -> GatewayClient:
    """A client that asks once and counts its bytes."""
    return GatewayClient(
        guest.server,
        token=guest.known.token if guest.known is not None else "",
        timeout_s=min(settings.timeout_s, ANSWER_TIMEOUT_S),
        policy=RetryPolicy(0.0),
        meter=allowed.traffic,
    )


def ask_server(client: GatewayClient, guest: Guest, patience_s: float) -> tuple[Finding, ServerInfo | None]:
    """Whether it answers and speaks this protocol. `patience_s`: how long a worker that has joined waits for it."""
    try:
        info = client.info()
    except RetryableError as exc:
        if guest.joining and guest.known is not None:
            found = f"{exc.cause}; the worker waits for it, up to {patience_s / 3600:.0f} h"
            return warn("server", found, exc.remedy), None
        return fail("server", exc.cause, exc.remedy), None
    except RankupError as exc:
        return fail("protocol", exc.cause, exc.remedy), None
    models = ", ".join(info.models) or "no model yet"
    words = f"{guest.server}, protocol {info.protocol}, rankup {info.server_version}; models: {models}"
    return ok("server", words), info


def ask_standing(client: GatewayClient, guest: Guest, info: ServerInfo) -> Finding:
    """What the server says of this machine; who has not joined is told what that takes."""
    if guest.known is None:
        return stranger_finding(guest, invite_needed=info.invite_needed)
    try:
        seen = client.who_am_i()
    except UnauthenticatedError:
        return ok("member", f"joined as {guest.known.name}; the token is no longer known and will be replaced")
    except DeniedError as exc:
        return fail("member", exc.cause, exc.remedy)
    except RankupError as exc:
        return warn("member", f"joined as {guest.known.name}; {exc.cause}", exc.remedy)
    return standing_finding(seen)


def stranger_finding(guest: Guest, *, invite_needed: bool) -> Finding:
    """Whoever has not joined needs an invite where the server asks for one; a key that it knows does without."""
    if not invite_needed:
        return ok("member", "not joined yet; anybody may")
    if guest.invite or guest.folder.key_file.exists():
        return ok("member", "not joined yet" + (", with an invite" if guest.invite else ", with a key from before"))
    words = "not joined yet, and this server asks for an invite"
    return (fail if guest.joining else warn)("member", words, "Ask the organiser for one: join URL --invite CODE.")


def standing_finding(seen: WorkerView) -> Finding:
    """A member, or one that waits for the organiser."""
    team = f" of team {seen.team}" if seen.team else ""
    words = f"joined as {seen.name}{team} ({seen.worker_id})"
    if seen.standing is Standing.WAITING:
        return warn("member", f"{words}; it waits for approval", "The worker asks until the organiser has approved it.")
    return ok("member", words)


def check_publisher(guest: Guest, info: ServerInfo) -> Finding | None:
    """Another key than the pinned one is not always a fault: `join` follows a change that the old key has signed."""
    try:
        identity.check_publisher(guest.known, info.publisher_key)
    except IntegrityError as exc:
        return warn("publisher", exc.cause, "`join` goes on only if the old key has signed the new one.")
    return None


def clock_finding(offset_s: float | None) -> Finding:
    """Enrolment is refused when the clocks are an hour apart; a few minutes are a sign of trouble to come."""
    if offset_s is None:
        return ok("clock", "the server does not tell its time")
    off = abs(offset_s)
    detail = f"{off:.0f} s {'behind' if offset_s > 0 else 'ahead of'} the server" if off >= 2 else "as the server's"
    if off > MAX_CLOCK_OFFSET_S:
        return fail("clock", detail, "Set the clock: timedatectl set-ntp true.")
    if off > GOOD_CLOCK_OFFSET_S:
        return warn("clock", detail, "Set the clock: timedatectl set-ntp true.")
    return ok("clock", detail)


def find_links(client: GatewayClient, guest: Guest, allowed: Allowance, *, now: float) -> tuple[Finding, Links]:
    """How fast bytes go: measured now; by who joins, once a day."""
    before = links.remembered(guest.folder.root, now)
    if capped := capped_links(allowed):
        return ok("links", f"{links_words(capped)} (the limits that you set)"), capped
    if before is not None and (guest.joining or allowed.transfers is not None):
        return ok("links", f"{links_words(before)} (measured {_span(now - before.measured_at)} ago)"), before
    if allowed.transfers is not None:
        return ok("links", "not measured: no transfers now"), Links()
    measured = links.measure(client)
    with suppress(OSError):  # What is not remembered is measured again.
        if guest.joining:
            identity.open_folder(guest.home, guest.server)
        allowed.traffic.save()
        if not measured.trouble:
            links.remember(guest.folder.root, measured)
    if measured.trouble:
        return warn("links", f"{links_words(measured)}: {measured.trouble}", "The worker works without it."), measured
    return ok("links", links_words(measured)), measured


def capped_links(allowed: Allowance) -> Links | None:
    """The owner's rates where there are any: nothing is measured then, as that would go above them."""
    up, down = allowed.limits.max_bytes_sec_up, allowed.limits.max_bytes_sec_down
    return Links(up=up or None, down=down or None) if up or down else None


def links_words(found: Links) -> str:
    """Both directions, in bytes a second."""
    return f"up {_rate(found.up)}, down {_rate(found.down)}"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _rate(rate: float | None) -> str:
    if rate is None:
        return "unknown"
    return f"{rate / 1e6:.1f} MB/s" if rate >= 1e6 else f"{rate / 1e3:.0f} kB/s"
