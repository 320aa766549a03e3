"""What the agent tells whoever watches: small frozen values, drawn by `display`, counted into a `Summary`.

What always holds: events are plain data, they carry no secret, and the agent never waits for an answer to one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankup.errors import RankupError
from rankup.protocol import NoWorkCode


@dataclass(frozen=True)
class Enrolled:
    """The server knows this machine; `new` is False when an earlier identity was used again, `waiting` says that the
    organiser has not approved it yet."""

    worker_id: str
    name: str
    server: str
    new: bool
    waiting: bool = False


@dataclass(frozen=True)
class PageOpened:
    """The page for the owner is served at `address`."""

    address: str


@dataclass(frozen=True)
class Claimed:
    """Shards to train: `shard` is the first of `shards`."""

    lease_id: str
    round_id: str
    model: str
    base_version: int
    shard: int
    steps: int
    """Of the whole lease."""
    shards: int = 1
    step: int = 0
    """Where an earlier run left it."""


@dataclass(frozen=True)
class NoWork:
    """The server has nothing to train just now; `why` is its code for programs."""

    reason: str
    retry_after_s: float
    why: NoWorkCode | None = None


@dataclass(frozen=True)
class Downloading:
    """Bytes of the base version, of a teacher or of the lease's shards; `what` is "base", "teacher" or "shard"."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Starting:
    """The trainer process has been started; loading the base comes first."""

    lease_id: str


@dataclass(frozen=True)
class Answering:
    """Distillation: the teacher has answered `done` of the prompts that the pupil will learn from."""

    done: int
    total: int


@dataclass(frozen=True)
class Step:
    """One optimiser step is done; `loss` in nats per token."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    grad_norm: float | None = None
    energy_j: float | None = None
    """Joules of the whole training so far; None: the card does not tell."""


@dataclass(frozen=True)
class Paused:
    """Nothing is trained for now; `lease_id` is that of a training that waits, empty where there is none."""

    reason: str
    lease_id: str = ""


@dataclass(frozen=True)
class Resumed:
    """What held the work up is gone."""

    lease_id: str = ""


@dataclass(frozen=True)
class Retrying:
    """The trainer failed and is started again, from its checkpoint, with `micro_batch` examples at a time."""

    lease_id: str
    reason: str
    step: int
    micro_batch: int


@dataclass(frozen=True)
class Kept:
    """The worker ends in the middle of a training: its checkpoint and its lease are kept for the next start."""

    lease_id: str
    step: int
    steps: int


@dataclass(frozen=True)
class Uploading:
    """Bytes of a delta on their way to object storage."""

    lease_id: str
    done: int
    total: int


@dataclass(frozen=True)
class Submitted:
    """The server has the delta and has acknowledged it; the verdict follows."""

    lease_id: str
    contribution: str
    tokens: int


@dataclass(frozen=True)
class Verdict:
    """What admission said about a delta."""

    lease_id: str
    accepted: bool
    reason: str


@dataclass(frozen=True)
class Dropped:
    """The server will not take a finished delta any more: its round is over, or the lease is somebody else's."""

    lease_id: str
    reason: str


@dataclass(frozen=True)
class Abandoned:
    """A lease ended without a delta: told to by the server, stopped by the user, or failed. `returned`: handed back."""

    lease_id: str
    reason: str
    returned: bool


@dataclass(frozen=True)
class Waiting:
    """The server does not answer or is busy; the agent tries again by itself."""

    reason: str
    next_try_s: float


@dataclass(frozen=True)
class Problem:
    """Something went wrong; the agent goes on unless `run` raises."""

    error: RankupError


def shards_in_words(shard: int, shards: int) -> str:
    """Which shards, such as "shard 4", or "shards 4-7" for four of them."""
    return f"shard {shard}" if shards == 1 else f"shards {shard}-{shard + shards - 1}"


WorkerEvent = (
    Enrolled
    | PageOpened
    | Claimed
    | NoWork
    | Downloading
    | Starting
    | Answering
    | Step
    | Paused
    | Resumed
    | Retrying
    | Kept
    | Uploading
    | Submitted
    | Verdict
    | Dropped
    | Abandoned
    | Waiting
    | Problem
)


@dataclass(frozen=True)
class Summary:
    """What one run of the agent did."""

    leases: int = 0
    """Leases that were claimed."""
    submitted: int = 0
    accepted: int = 0
    rejected: int = 0
    dropped: int = 0
    """Finished deltas that the server would not take any more."""
    tokens: int = 0
    """Tokens of the submitted deltas."""
    waiting: int = 0
    """Deltas in the outbox whose upload or verdict is still to come."""
    seconds: float = 0.0
