"""The version of the ledger's layout (`coordinator.ledger_keys`), and how data of an older one is brought up to date.

    schema                  string  version of the layout; absent: version 1, or an empty ledger

What always holds:
- a server starts on data of its own layout only: older data is migrated first, newer data is refused untouched;
- a migration may be killed anywhere and repeated, also while another process carries it out: each change is one
  compare-and-set or says what already holds. The version moves when all of a step is done.

Records in object storage carry their format themselves and are not touched here.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import structlog

from coordinator import ledger_keys as keys
from coordinator.ledger import Ledger
from coordinator.valkey import Valkey
from rankup.errors import BusyError, SetupError

SCHEMA: Final = keys.PREFIX + "schema"
CURRENT: Final = 2
SCAN_COUNT: Final = 1000
LOCK_S: Final = 60.0
"""Longer than a migration between two changes of the version; two at once would do no harm."""
PATIENCE_S: Final = 300.0
"""How long a migration by another process is waited for."""

Migration = Callable[[Valkey], Awaitable[None]]

log = structlog.get_logger(__name__)


async def bring_up_to_date(ledger: Ledger) -> int:
    """Migrate what is older; the version that was found (0: the ledger was empty).

    Raises:
        SetupError: the data is newer than this release.
        BusyError: another process has been migrating for longer than `PATIENCE_S`.
    """
    found: int | None = None
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        version = await stored_version(ledger.valkey)
        found = version if found is None else found
        if version == CURRENT:
            return found
        if version > CURRENT:
            raise SetupError(
                f"the ledger has layout {version}; this release of Rankup knows {CURRENT}",
                remedy="Update Rankup, or give it an empty Valkey: `rankup up` fills that from object storage.",
            )
        if version == 0:
            await ledger.valkey.call("SET", SCHEMA, str(CURRENT), "NX")
            continue
        try:
            async with ledger.alone("migrating the ledger", LOCK_S):
                await _migrate(ledger.valkey)
        except BusyError:
            if time.monotonic() > give_up_at:
                raise
            await asyncio.sleep(1.0)


async def stored_version(valkey: Valkey) -> int:
    """The version of the layout that the data has; 0 where there is none. Raises SetupError where it is no number."""
    found, known = await valkey.read(["GET", SCHEMA], ["EXISTS", keys.ROUNDS, keys.TOKENS, keys.BOARD])
    if found is None:
        return 1 if known else 0
    if not (found.isascii() and found.isdecimal()):
        raise SetupError(
            f"the ledger's layout is {found[:32]!r}, which is no version",
            remedy="Point RANKUP_LEDGER_URL to the Valkey of this server, which nobody else writes to.",
        )
    return int(found)


async def _migrate(valkey: Valkey) -> None:
    version = await stored_version(valkey)
    for start, migration in MIGRATIONS:
        if version == start:
            await migration(valkey)
            await valkey.commit([], [["SET", SCHEMA, str(start + 1)]], durable=True)
            log.info("ledger_migrated", layout=start + 1)
            version = start + 1


async def _scan(valkey: Valkey, pattern: str) -> AsyncIterator[list[str]]:
    """Keys like `pattern`, in pages; one may come twice."""
    cursor = "0"
    while True:
        cursor, page = await valkey.call("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)
        if page:
            yield page
        if str(cursor) == "0":
            return


# -- version 1 to 2: leases of several shards --------------------------------------------------------------------------


async def _leases_of_several_shards(valkey: Valkey) -> None:
    """Leases say how many shards they have, receipts stand under their contribution, and ended rounds owe their
    keeper the record of their ending."""
    async for page in _scan(valkey, keys.lease_key("*")):
        new = (("shards", "1"), ("expected_s", "0.0"))
        await valkey.commit([], [["HSETNX", key, name, value] for key in page for name, value in new])
    created = await valkey.call("ZRANGE", keys.ROUNDS, 0, -1, "WITHSCORES")
    for round_id, created_at in created:
        await _rekey_receipts(valkey, keys.round_key(round_id, "receipts"))
        await _live_leases_together(valkey, round_id)
        # Of those that have ended the keeper writes down how; of the others this changes nothing.
        await valkey.commit([], [["ZADD", keys.UNFINISHED_ROUNDS, repr(float(created_at)), round_id]])


async def _rekey_receipts(valkey: Valkey, key: str) -> None:
    for shard in await valkey.call("HKEYS", key):
        if not shard.isdecimal() or len(shard) == 64:
            continue
        doc = await valkey.call("HGET", key, shard)
        if doc is None:
            continue
        # The statement is read, not the whole receipt: what else a receipt must have is the reader's business.
        contribution = json.loads(doc)["submission"]["statement"]["sha256"]
        await valkey.commit([["HGET", key, shard, doc]], [["HSET", key, contribution, doc], ["HDEL", key, shard]])


async def _live_leases_together(valkey: Valkey, round_id: str) -> None:
    """A worker has one live lease, whatever the round; and when a training should be over is kept beside its expiry."""
    live, expiry = keys.round_key(round_id, "live"), keys.round_key(round_id, "expiry")
    held, ends = await valkey.read(["HGETALL", live], ["ZRANGE", expiry, "0", "-1", "WITHSCORES"])
    writes = [["HSETNX", keys.LIVE, worker_id, lease_id] for worker_id, lease_id in held.items()]
    eta = keys.round_key(round_id, "eta")
    for lease_id, at in ends:
        writes.append(["ZADD", eta, "NX", repr(float(at)), lease_id])
    await valkey.commit([], [*writes, ["DEL", live]])


MIGRATIONS: Final[tuple[tuple[int, Migration], ...]] = ((1, _leases_of_several_shards),)
"""From which version, and what makes the next one of it; in order."""
