"""When to try again, as a pure policy: full jitter, capped, until patience is over.

The n-th pause is uniform in [0, min(cap_s, base_s * 2**n)] ("full jitter": Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015), so that a thousand volunteers do not come back to a restarted server in the same second.
A server that names a time (`retry_after_s`) is asked no sooner: the jitter then comes on top. After a long outage the
pauses are up to a tenth of it, at most `slow_cap_s`. No clock, no sleep here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankup.errors import BusyError, RetryableError


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on asking a server that does not answer."""

    patience_s: float
    """From the first failure; 0 means: try once."""
    base_s: float = 0.5
    cap_s: float = 20.0
    slow_cap_s: float = 120.0

    def pause_s(self, error: RetryableError, failures: int, waited_s: float, draw: Callable[[], float]) -> float | None:
        """Seconds to wait before the next try, or None to give up.

        `failures`: tries that failed so far, at least 1; `waited_s`: since the first; `draw`: uniform in [0, 1).
        """
        if waited_s >= self.patience_s:
            return None
        cap_s = max(self.cap_s, min(self.slow_cap_s, waited_s / 10))
        bound = min(cap_s, self.base_s * 2.0 ** min(failures - 1, 30))
        pause = bound * draw()
        if isinstance(error, BusyError):
            pause += error.retry_after_s
        return min(pause, self.patience_s - waited_s)
