"""How rounds and leases lie in Valkey: the names of the keys, and pure steps written down as lists of writes.

Layout, version 2 (`rk1:` in front of everything; R round, L lease, W worker, shard numbers in decimal):

    rounds                  zset    R by creation time
    rounds:open             zset    R by creation time: those that grant leases; paused ones are not among them
    rounds:unfinished       zset    R by creation time: those that still owe the keeper a command
    round:R                 hash    facts (JSON RoundFacts, counts empty), state, rev, shards, lease_s, steps (of a
                                    shard), next (lowest shard never granted), rejected (deltas refused);
                                    told_tokens, told_seconds, told_shards (sums over what was handed in)
    round:R:record          string  JSON RoundRecord
    round:R:free            zset    shards that were granted and came back, score = shard
    round:R:fences          hash    shard -> fence of its newest grant
    round:R:holders         hash    shard -> number of its granted and submitted leases
    round:R:expiry          zset    granted L by the time they run out
    round:R:eta             zset    granted L by the time their training should be over
    round:R:pending         zset    submitted L by submission time
    round:R:submissions     hash    submitted L -> JSON Submission
    round:R:accepted        hash    shard -> accepted L
    round:R:late            hash    shard -> L whose delta a later round accepted
    round:R:receipts        hash    sha256 of an accepted delta -> JSON Receipt
    lease:L                 hash    the fields of leases.Lease
    live                    hash    W -> its granted L
    delivering              hash    W -> its granted L whose delta is on its way while it has another
    idle                    zset    W without work by the time they were told so
    digests                 hash    sha256 of a delta -> L that handed it in
    tokens                  hash    sha256 of a bearer token -> W
    worker:W                hash    doc (JSON Worker), token (its sha256)
    worker:W:contributions  zset    L with a delta by submission time
    worker:W:score          hash    accepted, rejected, tokens, valid_in_a_row, tokens_per_s:MODEL (mean of late ones)
    board                   zset    W by accepted tokens
    lock:NAME               string  who does something that only one may do at a time; expires
    barrier                 string  written to have something to wait for when a repeated call needs an fsync

What always holds: the shards that can be granted are those of `free` and those from `next` up; both are changed only by
`claim.lua` and `commit.lua`. Scripts build key names from the prefix, so this layout is for one server, not a cluster.

No I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.resources import files
from typing import Final

from pydantic import TypeAdapter

from coordinator import leases, rounds
from coordinator.leases import Lease
from coordinator.rounds import Counts, RoundFacts
from rankup.message import canonical_json
from rankup.protocol import RoundState
from rankup.records import Receipt, Submission

PREFIX: Final = "rk1:"
ROUNDS: Final = PREFIX + "rounds"
OPEN_ROUNDS: Final = PREFIX + "rounds:open"
UNFINISHED_ROUNDS: Final = PREFIX + "rounds:unfinished"
DIGESTS: Final = PREFIX + "digests"
TOKENS: Final = PREFIX + "tokens"
BOARD: Final = PREFIX + "board"
BARRIER: Final = PREFIX + "barrier"
LIVE: Final = PREFIX + "live"
DELIVERING: Final = PREFIX + "delivering"

SURVEY_LUA: Final = files("coordinator").joinpath("lua", "survey.lua").read_text("utf-8")
CLAIM_LUA: Final = files("coordinator").joinpath("lua", "claim.lua").read_text("utf-8")
BEAT_LUA: Final = files("coordinator").joinpath("lua", "beat.lua").read_text("utf-8")
COMMIT_LUA: Final = files("coordinator").joinpath("lua", "commit.lua").read_text("utf-8")

Row = list[str]
"""A write: a command and its arguments."""
Condition = list[str | list[str | None] | None]
"""A read command, its arguments, and the reply that it must give (None: nothing there)."""
SPEED: Final = "tokens_per_s:"
"""Fields of a worker's score: this and the name of a model -> tokens per second."""

_LEASE: Final = TypeAdapter(Lease)
_FACTS: Final = TypeAdapter(RoundFacts)


def round_key(round_id: str, part: str = "") -> str:
    return f"{PREFIX}round:{round_id}:{part}" if part else f"{PREFIX}round:{round_id}"


def lock_key(name: str) -> str:
    return f"{PREFIX}lock:{name}"


def lease_key(lease_id: str) -> str:
    return f"{PREFIX}lease:{lease_id}"


def worker_key(worker_id: str, part: str = "") -> str:
    return f"{PREFIX}worker:{worker_id}:{part}" if part else f"{PREFIX}worker:{worker_id}"


# -- rounds ------------------------------------------------------------------------------------------------------------


def parse_facts(
    fields: Mapping[str, str], *, freed: int, leased: int, submitted: int, accepted: int, contributions: int
) -> RoundFacts:
    """The facts of a round from its hash and the sizes of its sets."""
    untouched = int(fields["shards"]) - int(fields["next"])
    counts = Counts(freed + untouched, leased, submitted, accepted, int(fields["rejected"]), contributions)
    return replace(_FACTS.validate_json(fields["facts"]), counts=counts)


def facts_fields(facts: RoundFacts) -> Row:
    """Fields and values of the round's hash; counts are not among them, they have keys of their own."""
    stored = _FACTS.dump_json(replace(facts, counts=Counts())).decode()
    return ["facts", stored, "state", facts.state.value]


def round_conditions(round_id: str, rev: int, before: RoundFacts, after: RoundFacts) -> list[Condition]:
    """What must still hold when `after` is stored: nobody else stored a step, and no delta came or went meanwhile that
    a change of state would have to look at."""
    conditions: list[Condition] = [["HGET", round_key(round_id), "rev", str(rev)]]
    if before.state is not after.state:
        conditions.append(["ZCARD", round_key(round_id, "pending"), str(after.counts.submitted)])
        conditions.append(["HLEN", round_key(round_id, "accepted"), str(after.counts.accepted)])
    return conditions


def round_writes(round_id: str, rev: int, facts: RoundFacts, created_at: float) -> list[Row]:
    """The writes that store `facts` and keep the lists of rounds right."""
    writes = [["HSET", round_key(round_id), *facts_fields(facts), "rev", str(rev + 1)]]
    if facts.state is RoundState.OPEN and not facts.paused:
        writes.append(["ZADD", OPEN_ROUNDS, repr(created_at), round_id])
    else:
        writes.append(["ZREM", OPEN_ROUNDS, round_id])
    if facts.state.ended and not rounds.owed(facts):
        writes.append(["ZREM", UNFINISHED_ROUNDS, round_id])
    return writes


# -- leases ------------------------------------------------------------------------------------------------------------


def parse_lease(fields: Mapping[str, str]) -> Lease:
    return _LEASE.validate_python(dict(fields))


def lease_fields(lease: Lease) -> Row:
    row: Row = []
    for name, value in asdict(lease).items():
        if value is not None:
            row += [name, repr(value) if isinstance(value, float) else str(value)]
    return row


def lease_writes(
    lease: Lease,
    commands: Iterable[leases.Command],
    *,
    submission: Submission | None = None,
    speed: tuple[str, float] | None = None,
    receipt: Receipt | None = None,
) -> list[Row]:
    """The writes that store `lease` and carry out `commands`.

    `submission` is what QueueForAdmission queues, with the worker's `speed` after it (model, tokens per second);
    `receipt` is what RecordAccepted keeps.
    """
    lease_id, worker_id, span = lease.lease_id, lease.worker_id, [str(lease.shard), str(lease.shards)]
    key, home, score = round_key(lease.round_id), round_key(lease.home), worker_key(worker_id, "score")
    writes = [["HSET", lease_key(lease_id), *lease_fields(replace(lease, rev=lease.rev + 1))]]
    # The accepted delta must be on record before the shard is freed: FREE looks at it.
    for command in commands:
        match command:
            case leases.HoldShards():
                writes.append(["HOLD", home, *span])
            case leases.FreeShards():
                writes.append(["FREE", home, *span])
            case leases.ExtendExpiry(expires_at=expires_at, ends_at=ends_at):
                writes.append(["ZADD", f"{home}:expiry", repr(expires_at), lease_id])
                writes.append(["ZADD", f"{home}:eta", repr(ends_at), lease_id])
            case leases.ForgetExpiry():
                writes.append(["ZREM", f"{home}:expiry", lease_id])
                writes.append(["ZREM", f"{home}:eta", lease_id])
                writes += [["HDELEQ", held, worker_id, lease_id] for held in (LIVE, DELIVERING)]
            case leases.QueueForAdmission(contribution=contribution) if submission is not None:
                at = repr(submission.submitted_at)
                writes.append(["ZADD", f"{key}:pending", at, lease_id])
                writes.append(["HSET", f"{key}:submissions", lease_id, canonical_json(submission).decode()])
                writes.append(["HSET", DIGESTS, contribution, lease_id])
                writes.append(["ZADD", worker_key(worker_id, "contributions"), at, lease_id])
                writes.append(["HINCRBY", home, "told_tokens", str(submission.statement.tokens)])
                writes.append(["HINCRBYFLOAT", home, "told_seconds", repr(submission.statement.seconds)])
                writes.append(["HINCRBY", home, "told_shards", str(lease.shards)])
                if speed is not None:
                    writes.append(["HSET", score, SPEED + speed[0], repr(speed[1])])
            case leases.LeaveQueue():
                writes.append(["ZREM", f"{key}:pending", lease_id])
                writes.append(["HDEL", f"{key}:submissions", lease_id])
            case leases.RecordAccepted() if receipt is not None:
                statement = receipt.submission.statement
                tokens, shards = str(statement.tokens), [str(shard) for shard in lease.numbers]
                by_shard = [word for shard in shards for word in (shard, lease_id)]
                if lease.trained_for is None:
                    writes.append(["HSET", f"{home}:accepted", *by_shard])
                    writes.append(["ZREM", f"{home}:free", *shards])
                else:
                    writes.append(["HSET", f"{home}:late", *by_shard])
                writes.append(["HSET", f"{key}:receipts", statement.sha256, canonical_json(receipt).decode()])
                writes.append(["HINCRBY", score, "accepted", "1"])
                writes.append(["HINCRBY", score, "valid_in_a_row", "1"])
                writes.append(["HINCRBY", score, "tokens", tokens])
                writes.append(["ZINCRBY", BOARD, tokens, worker_id])
            case leases.RecordRejected():
                writes.append(["HINCRBY", key, "rejected", "1"])
                writes.append(["HINCRBY", score, "rejected", "1"])
                if receipt is not None and not receipt.accepted:
                    # A delta that came too late for its shard says nothing bad about its worker.
                    writes.append(["HSET", score, "valid_in_a_row", "0"])
                writes.append(["ZINCRBY", BOARD, "0", worker_id])
            case _:
                raise ValueError(f"{command} needs its submission or receipt")
    return writes
