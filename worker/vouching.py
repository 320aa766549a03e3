"""A server that has forgotten a lease is shown the voucher that it gave with it, and the call is made again.

What always holds: without a voucher, and for a lease that the server knows, a call is what it would be without this
module; the voucher is shown once for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rankup.errors import NotFoundError
from rankup.protocol import RestoreRequest
from worker.client import GatewayClient
from worker.retry import RetryPolicy

T = TypeVar("T")


def with_voucher(
    client: GatewayClient, lease_id: str, voucher: str, call: Callable[[], T], *, policy: RetryPolicy | None = None
) -> T:
    """The result of `call`, which is about this lease.

    Raises what `call` raises, and what the server answers to the voucher: `DeniedError`, `StateError` (nobody takes a
    delta of the lease any more), `RetryableError` (its data is being restored).
    """
    try:
        return call()
    except NotFoundError:
        if not voucher:
            raise
        client.restore(lease_id, RestoreRequest(voucher=voucher), policy=policy)
        return call()
