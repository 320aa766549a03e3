"""Upload tickets of a gateway that takes deltas itself: addresses that carry their own permission, and no I/O.

What always holds:
- an address is valid for one lease, one sha256, one size and until one moment, and for one part of one upload where the
  delta goes in parts; its HMAC-SHA256 covers all of them;
- the key follows from the organiser's token, which every replica has (`coordinator.derived_keys`): any of them checks
  what another one wrote, and no state is kept;
- addresses are relative to the gateway's own: it does not know under which name it is reached.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from urllib.parse import quote

from coordinator.derived_keys import derive_key
from rankup.errors import DeniedError, SetupError

TICKET_TTL_S = 3600
UPLOADS_PATH = "v1/uploads/"
_PURPOSE = b"rankup.upload-ticket/1"
_ASK_AGAIN = "Ask for a new ticket and send the bytes that it was asked for."


@dataclass(frozen=True, slots=True)
class Piece:
    """Which part of which upload the bytes are: `delta` is the sha256 of the whole, `number` counts from 1."""

    delta: str
    upload_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to upload exactly these bytes. `expires_at` is in Unix seconds."""

    lease_id: str
    sha256: str
    size_bytes: int
    expires_at: int
    piece: Piece | None = None
    """None: they are the whole delta."""


class TicketSigner:
    """Writes and checks the addresses of tickets.

    Raises:
        SetupError: there is no organiser's token to derive the key from.
    """

    def __init__(self, organiser_token: str) -> None:
        if not organiser_token:
            raise SetupError(
                "proxied transfer needs an organiser's token: it signs the upload tickets",
                remedy="Set RANKUP_COORDINATOR_ORGANISER_TOKEN, or RANKUP_COORDINATOR_TRANSFER=presigned.",
            )
        self._key = derive_key(organiser_token, _PURPOSE)

    def address(self, ticket: Ticket) -> str:
        """Relative reference that `ticket` may be PUT to."""
        path, query = f"{UPLOADS_PATH}{ticket.lease_id}/{ticket.sha256}", ""
        if ticket.piece is not None:
            path = f"{UPLOADS_PATH}{ticket.lease_id}/{ticket.piece.delta}/parts/{ticket.piece.number}"
            query = f"upload={quote(ticket.piece.upload_id, safe='')}&sha256={ticket.sha256}&"
        query += f"size={ticket.size_bytes}&expires={ticket.expires_at}&signature={self._signature(ticket)}"
        return f"{path}?{query}"

    def check(self, ticket: Ticket, signature: str, *, now: float) -> None:
        """Return if this ticket was written here and has not run out. Raises DeniedError."""
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._signature(ticket).encode()):
            raise DeniedError("The address is no upload ticket of this server.", remedy=_ASK_AGAIN)
        if now > ticket.expires_at:
            raise DeniedError("The upload ticket has run out.", remedy=_ASK_AGAIN)

    def _signature(self, ticket: Ticket) -> str:
        # No line of it but the last can have a line break in it, so different tickets are different texts.
        text = f"{ticket.lease_id}\n{ticket.sha256}\n{ticket.size_bytes}\n{ticket.expires_at}"
        if ticket.piece is not None:
            text += f"\n{ticket.piece.delta}\n{ticket.piece.number}\n{ticket.piece.upload_id}"
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
