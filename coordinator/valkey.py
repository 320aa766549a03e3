"""The connection to Valkey (or Redis): reads at one moment, compare-and-set, waiting for the disk. The only importer of
redis.

What always holds:
- a commit makes all of its writes or none (`lua/commit.lua`); a durable one is on the server's disk when it returns,
  where `require_fsync` is set;
- what the client library raises becomes an error of the tree: UnreachableError when the server does not answer,
  BusyError when it cannot write now, SetupError when it is set up so that this cannot work.

It knows no key and no rule: those are `coordinator.ledger_keys` and the modules that use this one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, Final, Self

from redis import asyncio as redis
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.driver_info import DriverInfo

from coordinator import ledger_keys as keys
from rankup.errors import BusyError, ConflictError, SetupError, UnreachableError
from rankup.settings import LedgerSettings

_DRIVER: Final = DriverInfo()
ATTEMPTS: Final = 30
"""How often a compare-and-set is tried; losing this often in a row means that something is badly wrong."""
CONNECTIONS: Final = 256
"""Made when needed; a call that waits for an fsync keeps one for up to a second."""


@asynccontextmanager
async def _errors_of_server() -> AsyncIterator[None]:
    """Turn what the client library raises into errors of the tree."""
    try:
        yield
    except redis_errors.MaxConnectionsError as exc:
        raise BusyError("too many calls to Valkey at once", remedy="Try again.", retry_after_s=1.0) from exc
    except (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError) as exc:
        # A refused handshake comes as a ConnectionError whose cause is the server's answer.
        refusals = (redis_errors.AuthenticationError, redis_errors.ResponseError)
        if isinstance(exc, refusals) or isinstance(exc.__cause__, refusals):
            raise SetupError(
                f"Valkey refuses the login: {exc}", remedy="Correct the password in RANKUP_LEDGER_URL."
            ) from exc
        raise UnreachableError(
            f"Valkey does not answer: {exc}",
            remedy="Check that it runs where RANKUP_LEDGER_URL points; nothing is lost, the same call may be repeated.",
        ) from exc
    except redis_errors.ResponseError as exc:
        no_writes = isinstance(exc, redis_errors.OutOfMemoryError | redis_errors.ReadOnlyError)
        if no_writes or str(exc).startswith(("OOM", "MISCONF", "NOREPLICAS", "BUSY")):
            raise BusyError(
                f"Valkey takes no writes now: {exc}", remedy="Look at its log, its memory and its disk; then try again."
            ) from exc
        raise SetupError(
            f"Valkey refuses a command: {exc}",
            remedy="Use Valkey 8 or Redis 7.2 or newer with an append-only file (`--appendonly yes`).",
        ) from exc


class Valkey:
    """One server. Make it with `Valkey.connect` inside the event loop that uses it."""

    def __init__(self, client: redis.Redis, settings: LedgerSettings) -> None:
        self._redis: Any = client
        self._settings = settings

    @classmethod
    async def connect(cls, settings: LedgerSettings) -> Self:
        """Connect and check that the server answers.

        Raises:
            SetupError: there is no address, or it makes no sense.
            UnreachableError: nobody answers there.
        """
        url = settings.url.get_secret_value()
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=settings.timeout_s,
                socket_timeout=settings.timeout_s,
                socket_connect_timeout=settings.timeout_s,
                decode_responses=True,
                protocol=3,  # What callers get must not depend on a default: scores come as pairs, hashes as dicts.
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
                # Left to itself every new connection looks up the version of the client library on disk.
                driver_info=_DRIVER,
            )
        except ValueError as exc:
            raise SetupError(
                "RANKUP_LEDGER_URL is not an address of a Valkey server",
                remedy="Set it to redis://host:port or unix:///path/to/valkey.sock.",
            ) from exc
        valkey = cls(redis.Redis.from_pool(pool), settings)
        try:
            await valkey.ping()
        except BaseException:
            await valkey.close()
            raise
        return valkey

    async def close(self) -> None:
        """Close every connection; it is of no use afterwards."""
        await self._redis.aclose()

    async def ping(self) -> None:
        """Return if the server answers, else raise UnreachableError."""
        await self.call("PING")

    async def call(self, *command: Any) -> Any:
        """One command and its reply."""
        async with _errors_of_server():
            return await self._redis.execute_command(*command)

    async def run(self, script: str, *arguments: str) -> Any:
        """A script by its hash, or whole where the server does not know it yet. It names its keys itself."""
        async with _errors_of_server():
            try:
                return await self._redis.execute_command("EVALSHA", _hash_of(script), 0, *arguments)
            except redis_errors.NoScriptError:
                return await self._redis.execute_command("EVAL", script, 0, *arguments)

    async def read(self, *commands: Iterable[str]) -> list[Any]:
        """Many reads at one moment."""
        reads = [list(command) for command in commands]
        return await self._send(reads, transaction=True)

    async def _send(self, commands: Sequence[Sequence[Any]], *, transaction: bool) -> list[Any]:
        """Send commands down one connection; their replies, or the first error among them."""
        if not commands:
            return []
        async with _errors_of_server(), self._redis.pipeline(transaction=transaction) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            # Left to itself the client would put the whole command into the error's text.
            replies: list[Any] = await pipe.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

    async def commit(
        self, conditions: Sequence[keys.Condition], writes: Sequence[keys.Row], *, durable: bool = False
    ) -> bool:
        """Make all writes if all conditions hold, and say whether they did; `durable` waits until they are on disk."""
        arguments = (json.dumps(conditions), json.dumps(writes))
        if not (durable and self._settings.require_fsync):
            return bool(await self.run(keys.COMMIT_LUA, *arguments))
        # The server must give up before the socket does, or a slow disk would look like a dead server.
        wait_ms = int(self._settings.timeout_s * 800)
        # One connection for both: WAITAOF waits for the writes of its own connection.
        command = ("EVAL", keys.COMMIT_LUA, 0, *arguments)
        made, waited = await self._send([command, ("WAITAOF", 1, 0, wait_ms)], transaction=False)
        if made and waited[0] < 1:
            raise BusyError(
                f"Valkey has not written to its disk within {wait_ms} ms", remedy="Repeat the call.", retry_after_s=2.0
            )
        return bool(made)


@lru_cache(maxsize=64)
def _hash_of(script: str) -> str:
    """What the server knows a script by."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def lost_every_race(what: str) -> ConflictError:
    """The error of a compare-and-set that somebody else won `ATTEMPTS` times."""
    return ConflictError(f"{what} changed {ATTEMPTS} times while it was being changed", remedy="Try again.")


def back_off(attempt: int) -> Awaitable[None]:
    """Wait a little before trying again."""
    # Full jitter (Brooker, "Exponential backoff and jitter", 2015); it only spreads load, so any generator will do.
    return asyncio.sleep(random.uniform(0, min(0.1, 0.001 * 2**attempt)))  # noqa: S311
