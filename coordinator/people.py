"""Workers in the ledger: who enrolled, by which token they are known, what the organiser says of them.

What always holds:
- bearer tokens are stored as sha256 only, a worker has at most one, and it ends at its time;
- every call may be repeated;
- enrolling again changes what a worker says of itself, never its standing or when it joined;
- a change of standing is on the server's disk when it is answered.

Invites are `people_invites`, what workers have earned is `people_scores`. Every method raises what `coordinator.valkey`
raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from coordinator import ledger_keys as keys
from coordinator import people_keys
from coordinator.leases import Lease
from coordinator.ledger_types import Worker
from coordinator.people_invites import Invites
from coordinator.people_keys import parse_worker, worker_text
from coordinator.people_scores import Scores
from coordinator.valkey import ATTEMPTS, Valkey, back_off, lost_every_race
from rankup.errors import DeniedError, InputError, NotFoundError
from rankup.protocol import Standing

FOR_EVER: Final = 1e11
SEEN_EVERY_S: Final = 300.0
"""How old the note of a worker's last call may be: a write for each call would be too many."""
_INDEX: Final = {Standing.WAITING: people_keys.WAITING, Standing.BANNED: people_keys.BANNED}
_HASH: Final = re.compile(r"[0-9a-f]{64}")


class People:
    """The workers of one ledger."""

    def __init__(self, valkey: Valkey) -> None:
        self._valkey = valkey
        self.invites = Invites(valkey)
        self.scores = Scores(valkey)

    # -- joining -------------------------------------------------------------------------------------------------------

    async def enrol(self, worker: Worker, token_hash: str, until: float = FOR_EVER) -> Worker:
        """Store a worker with its token, good until then (Unix seconds); the one before is worth nothing from now on.

        Returns the worker as it is now: a known one keeps its standing, its note and the time of joining.

        Raises:
            InputError: `token_hash` is not a hex sha256 (a token itself must never get here).
            DeniedError: the worker is banned.
        """
        _require_hash(token_hash)
        key = keys.worker_key(worker.worker_id)
        for attempt in range(ATTEMPTS):
            doc, old_hash = await self._valkey.call("HMGET", key, "doc", "token")
            known = _parse(doc)
            kept = worker if known is None else _as_known(worker, known)
            require_welcome(kept)
            writes = [*_worker_writes(kept, known), *_token_writes(kept.worker_id, token_hash, old_hash, until)]
            if await self._valkey.commit([["HGET", key, "doc", doc], ["HGET", key, "token", old_hash]], writes):
                return kept
            await back_off(attempt)
        raise lost_every_race(f"worker {worker.worker_id}")

    async def restore(self, worker: Worker) -> None:
        """Store a worker as it is, without a token; of one that is there only the standing is changed."""
        key = keys.worker_key(worker.worker_id)
        if not await self._valkey.commit([["HEXISTS", key, "doc", "0"]], _worker_writes(worker, None)):
            await self.set_standing(worker.worker_id, worker.standing, worker.enrolled_at, worker.note)

    async def give_token(self, worker_id: str, token_hash: str, until: float) -> None:
        """Another token for a known worker. Raises InputError, NotFoundError."""
        _require_hash(token_hash)
        key = keys.worker_key(worker_id)
        for attempt in range(ATTEMPTS):
            await self.worker(worker_id)
            old_hash = await self._valkey.call("HGET", key, "token")
            writes = _token_writes(worker_id, token_hash, old_hash, until)
            if await self._valkey.commit([["HGET", key, "token", old_hash]], writes):
                return
            await back_off(attempt)
        raise lost_every_race(f"worker {worker_id}")

    async def revoke_token(self, worker_id: str) -> Worker:
        """The worker's token is worth nothing from now on; its key may enrol again. Raises NotFoundError."""
        worker, key = await self.worker(worker_id), keys.worker_key(worker_id)
        for attempt in range(ATTEMPTS):
            token_hash = await self._valkey.call("HGET", key, "token")
            writes = [["HDEL", key, "token", "token_until"]]
            if token_hash is not None:
                writes.append(["HDEL", keys.TOKENS, token_hash])
            if await self._valkey.commit([["HGET", key, "token", token_hash]], writes, durable=True):
                return worker
            await back_off(attempt)
        raise lost_every_race(f"worker {worker_id}")

    async def recorded(self, worker_id: str) -> str | None:
        """sha256 of the enrolment that object storage has of this worker."""
        found: str | None = await self._valkey.call("HGET", keys.worker_key(worker_id), "recorded")
        return found

    async def note_recorded(self, worker_id: str, sha256: str) -> None:
        await self._valkey.call("HSET", keys.worker_key(worker_id), "recorded", sha256)

    # -- who it is -----------------------------------------------------------------------------------------------------

    async def by_token(self, token_hash: str, now: float) -> Worker | None:
        """The worker that this token belongs to, banned ones included; None where it is unknown or has run out."""
        command = ("EVAL", people_keys.WHOSE_LUA, 0, keys.PREFIX, token_hash, f"{now:.3f}", str(SEEN_EVERY_S))
        return _parse(await self._valkey.call(*command))

    async def find(self, worker_id: str) -> Worker | None:
        """The worker, or None if it never enrolled."""
        return _parse(await self._valkey.call("HGET", keys.worker_key(worker_id), "doc"))

    async def worker(self, worker_id: str) -> Worker:
        """Raises NotFoundError if it never enrolled."""
        found = await self.find(worker_id)
        if found is None:
            raise NotFoundError(f"no worker {worker_id}", remedy="Join first: `rankup worker join`.")
        return found

    async def names(self, worker_ids: Sequence[str]) -> dict[str, str]:
        """Worker id -> name, of those who are known."""
        docs = await self._valkey.read(*(["HGET", keys.worker_key(worker_id), "doc"] for worker_id in worker_ids))
        return {wid: parse_worker(doc).name for wid, doc in zip(worker_ids, docs, strict=True) if doc}

    async def listed(self, standing: Standing | None, limit: int, offset: int = 0) -> list[tuple[Worker, float | None]]:
        """Workers, those who joined last first, with the time of their last call; of one standing, or all (None).

        Members are found among all, so fewer than `limit` of them may come.
        """
        index = people_keys.WORKERS if standing is None else _INDEX.get(standing, people_keys.WORKERS)
        ids = await self._valkey.call("ZREVRANGE", index, offset, offset + limit - 1)
        rows = await self._valkey.read(*(["HMGET", keys.worker_key(worker_id), "doc", "seen"] for worker_id in ids))
        found = [(parse_worker(doc), float(seen) if seen else None) for doc, seen in rows if doc]
        return [(worker, seen) for worker, seen in found if standing in (None, worker.standing)]

    async def seen_at(self, worker_id: str) -> float | None:
        """The time of a worker's last call, give or take `SEEN_EVERY_S`."""
        found = await self._valkey.call("HGET", keys.worker_key(worker_id), "seen")
        return None if found is None else float(found)

    # -- standing ------------------------------------------------------------------------------------------------------

    async def set_standing(
        self, worker_id: str, standing: Standing, now: float, note: str = "", *, durable: bool = True
    ) -> tuple[Worker, bool]:
        """Change what the organiser says of a worker; returns it as it is now, and whether anything changed.

        A durable change is on the server's disk when this returns, and with it all changes before.

        Raises NotFoundError.
        """
        key = keys.worker_key(worker_id)
        for attempt in range(ATTEMPTS):
            doc = await self._valkey.call("HGET", key, "doc")
            known = _parse(doc)
            if known is None:
                raise NotFoundError(f"There is no worker {worker_id}.", remedy="See `rankup people list`.")
            changed = replace(known, standing=standing, note=note)
            if changed == known:
                return known, False
            writes = _worker_writes(changed, known, now)
            if await self._valkey.commit([["HGET", key, "doc", doc]], writes, durable=durable):
                return changed, True
            await back_off(attempt)
        raise lost_every_race(f"worker {worker_id}")

    # -- what they handed in -------------------------------------------------------------------------------------------

    async def contributions(self, worker_id: str, limit: int = 1000) -> list[Lease]:
        """The leases with which this worker handed in a delta, newest first."""
        ids = await self._valkey.call("ZREVRANGE", keys.worker_key(worker_id, "contributions"), 0, limit - 1)
        rows = await self._valkey.read(*(["HGETALL", keys.lease_key(lease_id)] for lease_id in ids))
        return [keys.parse_lease(fields) for fields in rows if fields]


def require_welcome(worker: Worker) -> None:
    """Raise DeniedError for a worker that is banned."""
    if worker.standing is Standing.BANNED:
        raise DeniedError(
            f"This worker was banned by the organiser: {worker.note}",
            remedy="Write to the organiser; what was accepted of your work stays as it is.",
        )


def _require_hash(token_hash: str) -> None:
    if _HASH.fullmatch(token_hash) is None:
        raise InputError("a worker's token is stored as the hex sha256 of it", remedy="Hash the token first.")


def _parse(doc: Any) -> Worker | None:
    return None if doc is None else parse_worker(doc)


def _as_known(said: Worker, known: Worker) -> Worker:
    return replace(said, standing=known.standing, note=known.note, enrolled_at=known.enrolled_at)


def _token_writes(worker_id: str, token_hash: str, old_hash: str | None, until: float) -> list[keys.Row]:
    writes = [
        ["HSET", keys.worker_key(worker_id), "token", token_hash, "token_until", f"{until:.3f}"],
        ["HSET", keys.TOKENS, token_hash, worker_id],
    ]
    if old_hash is not None and old_hash != token_hash:
        writes.append(["HDEL", keys.TOKENS, old_hash])
    return writes


def _worker_writes(worker: Worker, before: Worker | None, now: float | None = None) -> list[keys.Row]:
    """Store a worker and keep the lists right; `now` is when its standing changed, by default when it joined."""
    worker_id, joined = worker.worker_id, repr(worker.enrolled_at)
    writes = [
        ["HSET", keys.worker_key(worker_id), "doc", worker_text(worker)],
        ["ZADD", people_keys.WORKERS, joined, worker_id],
    ]
    for standing, index in _INDEX.items():
        if worker.standing is standing:
            writes.append(["ZADD", index, joined if now is None else repr(now), worker_id])
        elif before is not None and before.standing is standing:
            writes.append(["ZREM", index, worker_id])
    team = before.team if before is not None else ""
    if worker.team != team:
        moves = ((team, "-1"), (worker.team, "1"))
        writes += [["HINCRBY", people_keys.TEAM_MEMBERS, name, by] for name, by in moves if name]
    return writes
