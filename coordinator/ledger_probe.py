"""What a Valkey server says of itself, and whether it keeps what it is told: a part of the ledger for `diagnosis`.

It changes nothing but the ledger's barrier key.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator import ledger_keys as keys
from coordinator.ledger import Ledger
from rankup.errors import SetupError


@dataclass(frozen=True)
class ServerFacts:
    """Empty strings and None: the server does not say (managed services hide their settings)."""

    name: str
    """valkey or redis."""
    version: str
    appendonly: bool | None
    appendfsync: str
    eviction: str
    """Its `maxmemory-policy`."""
    last_write_ok: bool
    """Of the append-only file."""
    used_bytes: int
    limit_bytes: int
    """0: none."""
    replica: bool


async def server_facts(ledger: Ledger) -> ServerFacts:
    """Raises what every call of the ledger raises."""
    # Each section by itself: of several at once some servers and some permissions refuse all.
    info: dict[str, str] = {}
    for section in ("server", "persistence", "memory", "replication"):
        info |= _as_words(await ledger.valkey.call("INFO", section))
    try:
        said = _as_words(await ledger.valkey.call("CONFIG", "GET", "appendfsync"))
    except SetupError:
        said = {}
    aof = info.get("aof_enabled")
    return ServerFacts(
        name="valkey" if "valkey_version" in info else "redis",
        version=info.get("valkey_version") or info.get("redis_version", ""),
        appendonly=None if aof is None else aof == "1",
        appendfsync=said.get("appendfsync", ""),
        eviction=info.get("maxmemory_policy", ""),
        last_write_ok=info.get("aof_last_write_status", "ok") == "ok",
        used_bytes=int(info.get("used_memory", 0)),
        limit_bytes=int(info.get("maxmemory", 0)),
        replica=info.get("role") in ("slave", "replica"),
    )


async def write_to_disk(ledger: Ledger) -> None:
    """Write something and wait until it is on the server's disk.

    Raises BusyError where that takes too long, SetupError where the server has no append-only file or no WAITAOF.
    """
    await ledger.valkey.commit([], [["SET", keys.BARRIER, "doctor"]], durable=True)


def _as_words(answer: object) -> dict[str, str]:
    """INFO and CONFIG GET, whichever shape the client library gives them."""
    if isinstance(answer, dict):
        return {str(name): str(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return {str(name): str(value) for name, value in zip(answer[::2], answer[1::2], strict=False)}
    lines = (line.partition(":") for line in str(answer).splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in lines}
