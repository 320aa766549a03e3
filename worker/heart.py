"""The heartbeat of one lease, in a thread: tells the server how far training is, hears whether to go on.

What always holds: a beat that fails because the server is away changes nothing (training goes on, the lease may even
expire: a late delta is still welcome), and so does a server that forgot token or lease: the machine enrols again and
shows the voucher. Only an answer from the server ends the lease; the pause between beats is what the server asked for
last, or up to a fifth less, so that those who began together do not stay together. The thread is gone when the `with`
block is left.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType

from rankup.errors import FatalError, RankupError, RetryableError, UnauthenticatedError
from rankup.protocol import Heartbeat, HeartbeatAnswer, LeaseGrant
from worker.client import GatewayClient
from worker.events import Problem, Waiting, WorkerEvent
from worker.retry import RetryPolicy
from worker.vouching import with_voucher

_ONCE = RetryPolicy(patience_s=0.0)
_SHORTEST_PAUSE_S = 0.05
_SPREAD = 0.2


class Heart:
    """Beats for `grant` from entering the `with` block to leaving it. `after_beat` runs in the same thread.

    `with_token` makes a call, and once more with a new token where the server did not know the old one.
    """

    def __init__(
        self,
        client: GatewayClient,
        grant: LeaseGrant,
        report: Callable[[WorkerEvent], None],
        after_beat: Callable[[], None],
        *,
        with_token: Callable[[Callable[[], HeartbeatAnswer]], HeartbeatAnswer],
    ) -> None:
        self._client = client
        self._grant = grant
        self._report = report
        self._after_beat = after_beat
        self._with_token = with_token
        self._beat = Heartbeat(fence=grant.fence)
        self._pause_s = grant.heartbeat_s
        self._over = threading.Event()
        self._abandon: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"heart-{grant.lease_id}", daemon=True)

    @property
    def abandon(self) -> str | None:
        """Why the server wants no delta of this lease any more; None while it does."""
        return self._abandon

    def note(
        self,
        step: int,
        loss: float,
        tokens_per_s: float,
        *,
        grad_norm: float | None = None,
        energy_j: float | None = None,
    ) -> None:
        """What the next beat will say."""
        self._beat = Heartbeat(
            fence=self._grant.fence,
            step=step,
            loss=loss,
            tokens_per_s=tokens_per_s,
            grad_norm=grad_norm,
            energy_j=energy_j,
        )

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _say(self) -> HeartbeatAnswer:
        lease_id, voucher = self._grant.lease_id, self._grant.voucher
        beat = partial(self._client.heartbeat, lease_id, self._beat, policy=_ONCE)
        return with_voucher(self._client, lease_id, voucher, beat, policy=_ONCE)

    def _next_pause_s(self) -> float:
        return max(self._pause_s * random.uniform(1 - _SPREAD, 1), _SHORTEST_PAUSE_S)  # noqa: S311 - it spreads load

    def _run(self) -> None:
        while not self._over.wait(self._next_pause_s()) and self._abandon is None:
            try:
                answer = self._with_token(self._say)
            except RetryableError as exc:
                self._report(Waiting(f"{exc.cause}; training goes on", self._pause_s))
                continue
            except UnauthenticatedError:
                continue  # the server knows neither token nor machine just now; the delivery will see
            except FatalError as exc:
                self._abandon = exc.cause
                return
            self._pause_s = answer.heartbeat_s
            if not answer.go_on:
                self._abandon = answer.reason or "the server asked to abandon the lease"
                return
            try:
                self._after_beat()
            except RankupError as exc:
                self._report(Problem(exc))
