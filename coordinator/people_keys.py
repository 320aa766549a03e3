"""How people lie in Valkey, beside the keys of `coordinator.ledger_keys` (`rk1:` in front; W worker, I invite, T team,
M model, R round).

    tokens                  hash    sha256 of a bearer token -> W
    worker:W                hash    doc (JSON Worker), token (its sha256), token_until, seen (both Unix seconds),
                                    recorded (sha256 of the Enrolment that object storage has)
    worker:W:score          hash    accepted, rejected, tokens, valid_in_a_row (written with verdicts);
                                    settled, unpublished, credit (tokens), rating:M ("mu sigma")
    workers                 zset    W by the time of joining
    workers:waiting         zset    W that wait for approval, by the time of joining
    workers:banned          zset    W by the time of the ban
    board                   zset    W by accepted tokens (written with verdicts)
    board:credit            zset    W by credit
    teams:members           hash    T -> workers in it
    teams:credit            zset    T by the credit of those who were in it
    teams:closed            set     T that an invite was made for
    invites                 hash    I -> JSON Invite
    invites:left            hash    I -> uses left
    invite:I:users          set     W that joined with it
    settled                 hash    M -> "version:part": what credit was given for (`coordinator.people_settling`)
    settled:rounds          set     R that ended without a version and were settled

No I/O here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Final

from pydantic import TypeAdapter

from coordinator.ledger_keys import PREFIX
from coordinator.ledger_types import Worker
from coordinator.reputation import Rating

WORKERS: Final = PREFIX + "workers"
WAITING: Final = PREFIX + "workers:waiting"
BANNED: Final = PREFIX + "workers:banned"
CREDIT_BOARD: Final = PREFIX + "board:credit"
TEAM_MEMBERS: Final = PREFIX + "teams:members"
TEAM_CREDIT: Final = PREFIX + "teams:credit"
CLOSED_TEAMS: Final = PREFIX + "teams:closed"
INVITES: Final = PREFIX + "invites"
INVITES_LEFT: Final = PREFIX + "invites:left"
SETTLED: Final = PREFIX + "settled"
SETTLED_ROUNDS: Final = PREFIX + "settled:rounds"

WHOSE_LUA: Final = files("coordinator").joinpath("lua", "whose.lua").read_text("utf-8")
USE_INVITE_LUA: Final = files("coordinator").joinpath("lua", "use_invite.lua").read_text("utf-8")

_WORKER: Final = TypeAdapter(Worker)


def parse_worker(doc: str) -> Worker:
    return _WORKER.validate_json(doc)


def worker_text(worker: Worker) -> str:
    """Equal workers, equal texts."""
    return _WORKER.dump_json(worker).decode()


def invite_users_key(invite_id: str) -> str:
    return f"{PREFIX}invite:{invite_id}:users"


def rating_field(model: str) -> str:
    return f"rating:{model}"


@dataclass(frozen=True)
class Score:
    """What a worker has done; all counts but the first four are in tokens."""

    accepted: int = 0
    rejected: int = 0
    valid_in_a_row: int = 0
    tokens: int = 0
    settled: int = 0
    """Of accepted contributions whose version was published."""
    unpublished: int = 0
    """Of accepted contributions whose round ended without one."""
    credit: int = 0
    ratings: Mapping[str, Rating] = field(default_factory=dict)
    """By model."""

    @property
    def escrow(self) -> int:
        """Accepted tokens whose round has not ended yet."""
        return max(0, self.tokens - self.settled - self.unpublished)


def parse_score(fields: Mapping[str, str]) -> Score:
    """The score from the fields of its hash; those that this version does not know are passed over."""
    counts = ("accepted", "rejected", "valid_in_a_row", "tokens", "settled", "unpublished", "credit")
    ratings = {
        name.removeprefix("rating:"): parse_rating(value)
        for name, value in sorted(fields.items())
        if name.startswith("rating:")
    }
    return Score(**{name: int(fields.get(name, 0)) for name in counts}, ratings=ratings)


def parse_rating(text: str) -> Rating:
    mu, sigma = text.split(" ")
    return Rating(float(mu), float(sigma))


def rating_text(rating: Rating) -> str:
    """Reads back as the same floats."""
    return f"{rating.mu!r} {rating.sigma!r}"
