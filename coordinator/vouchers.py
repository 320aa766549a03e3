"""Vouchers of leases: what a worker shows to a server that has forgotten its lease. No I/O.

    voucher = base64url(JSON of what the lease is) "." hex HMAC-SHA256 of that text

What always holds:
- a voucher says which lease it is, of which worker, of which shards, under which fence; its signature covers all of it,
  and nothing of it is parsed before the signature fits;
- the key follows from the organiser's token (`coordinator.derived_keys`), so a server whose ledger lost everything
  knows its own vouchers again. Where there is no such token, there are no vouchers;
- it has no end: what a lease that is taken up again is still good for is for `coordinator.leases` to say.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from pydantic import ValidationError

from coordinator.derived_keys import derive_key
from coordinator.leases import Lease
from rankup.errors import DeniedError
from rankup.message import Finite, Identifier, Message, canonical_json
from rankup.protocol import LeaseState

_PURPOSE = b"rankup.lease-voucher/1"


class _Said(Message):
    """What a voucher says of its lease."""

    lease_id: Identifier
    round_id: Identifier
    shard: int
    shards: int
    rank: int | None
    worker_id: Identifier
    fence: int
    granted_at: Finite
    expected_s: Finite


class VoucherSigner:
    """Writes and reads vouchers with the key of one organiser's token."""

    def __init__(self, organiser_token: str) -> None:
        self._key = derive_key(organiser_token, _PURPOSE)

    def write(self, lease: Lease) -> str:
        """The voucher of a lease that was just granted."""
        said = _Said(
            lease_id=lease.lease_id,
            round_id=lease.home,
            shard=lease.shard,
            shards=lease.shards,
            rank=lease.rank,
            worker_id=lease.worker_id,
            fence=lease.fence,
            granted_at=lease.granted_at,
            expected_s=lease.expected_s,
        )
        text = base64.urlsafe_b64encode(canonical_json(said)).rstrip(b"=")
        return f"{text.decode()}.{self._signature(text)}"

    def read(self, voucher: str) -> Lease:
        """The lease that a voucher tells of, as one that has run out. Raises DeniedError."""
        text, _, signature = voucher.partition(".")
        data = text.encode("utf-8", "replace")
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._signature(data).encode()):
            raise wrong_voucher()
        try:
            said = _Said.model_validate_json(base64.urlsafe_b64decode(data + b"=" * (-len(data) % 4)))
        except (ValueError, ValidationError) as exc:
            raise wrong_voucher() from exc
        return Lease(
            lease_id=said.lease_id,
            fence=said.fence,
            round_id=said.round_id,
            shard=said.shard,
            worker_id=said.worker_id,
            state=LeaseState.EXPIRED,
            granted_at=said.granted_at,
            expires_at=said.granted_at,
            shards=said.shards,
            rank=said.rank,
            expected_s=said.expected_s,
        )

    def _signature(self, text: bytes) -> str:
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()


def wrong_voucher() -> DeniedError:
    """The refusal of a voucher that was not written here, or not for this lease."""
    return DeniedError("This is no voucher of this server for this lease.", remedy="Claim another lease.")
