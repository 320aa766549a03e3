"""Workers in the ledger: who enrolled, by which token they are known, and what they have handed in.

What always holds: bearer tokens are stored as sha256 only, and a worker has at most one; every call may be repeated.

Scores are counted where verdicts are stored (`ledger_keys.lease_writes`); this module reads them. Every method
raises what `coordinator.valkey` raises.
"""

from __future__ import annotations

import re
from typing import Final

from pydantic import TypeAdapter

from coordinator import ledger_keys as keys
from coordinator.leases import Lease
from coordinator.ledger_types import Worker
from coordinator.valkey import ATTEMPTS, Valkey, lost_every_race
from rankup.errors import InputError, NotFoundError
from rankup.protocol import ContributorRow

_WORKER: Final = TypeAdapter(Worker)


class People:
    """The workers of one ledger."""

    def __init__(self, valkey: Valkey) -> None:
        self._valkey = valkey

    async def enrol(self, worker: Worker, token_hash: str) -> None:
        """Store a worker; enrolling again replaces its token, and the old one is worth nothing.

        Raises:
            InputError: `token_hash` is not a hex sha256 (a token itself must never get here).
        """
        if re.fullmatch(r"[0-9a-f]{64}", token_hash) is None:
            raise InputError("a worker's token is stored as the hex sha256 of it", remedy="Hash the token first.")
        key = keys.worker_key(worker.worker_id)
        for _ in range(ATTEMPTS):
            old = await self._valkey.call("HGET", key, "token")
            writes = [
                ["HSET", key, "doc", _WORKER.dump_json(worker).decode(), "token", token_hash],
                ["HSET", keys.TOKENS, token_hash, worker.worker_id],
            ]
            if old is not None and old != token_hash:
                writes.append(["HDEL", keys.TOKENS, old])
            if await self._valkey.commit([["HGET", key, "token", old]], writes):
                return
        raise lost_every_race(f"worker {worker.worker_id}")

    async def by_token(self, token_hash: str) -> Worker | None:
        """The worker that this token belongs to, if there is one."""
        worker_id = await self._valkey.call("HGET", keys.TOKENS, token_hash)
        return None if worker_id is None else await self.worker(worker_id)

    async def worker(self, worker_id: str) -> Worker:
        """Raises NotFoundError if it never enrolled."""
        doc = await self._valkey.call("HGET", keys.worker_key(worker_id), "doc")
        if doc is None:
            raise NotFoundError(f"no worker {worker_id}", remedy="Join first: `rankup worker join`.")
        return _WORKER.validate_json(doc)

    async def contributions(self, worker_id: str, limit: int = 1000) -> list[Lease]:
        """The leases with which this worker handed in a delta, newest first."""
        ids = await self._valkey.call("ZREVRANGE", keys.worker_key(worker_id, "contributions"), 0, limit - 1)
        rows = await self._valkey.read(*(["HGETALL", keys.lease_key(lease_id)] for lease_id in ids))
        return [keys.parse_lease(fields) for fields in rows if fields]

    async def valid_in_a_row(self, worker_id: str) -> int:
        """Accepted contributions of this worker since the last one that admission refused."""
        found = await self._valkey.call("HGET", keys.worker_key(worker_id, "score"), "valid_in_a_row")
        return int(found or 0)

    async def leaderboard(self, limit: int = 1000) -> list[ContributorRow]:
        """Workers with a verdict, by accepted tokens."""
        ids = await self._valkey.call("ZREVRANGE", keys.BOARD, 0, limit - 1)
        docs = await self._valkey.read(*(["HGET", keys.worker_key(worker_id), "doc"] for worker_id in ids))
        scores = await self._valkey.read(*(["HGETALL", keys.worker_key(worker_id, "score")] for worker_id in ids))
        return [
            ContributorRow(
                worker_id=worker_id,
                name=_WORKER.validate_json(doc).name if doc else worker_id,
                accepted=int(score.get("accepted", 0)),
                rejected=int(score.get("rejected", 0)),
                tokens=int(score.get("tokens", 0)),
            )
            for worker_id, doc, score in zip(ids, docs, scores, strict=True)
        ]
