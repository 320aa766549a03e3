"""The totals of all processes in the ledger: a part of it that has its own module, because nothing else depends on it.

    metrics                 hash    cell (JSON) -> total
    metrics:seen            hash    role -> Unix seconds of the last report of a process of that role
    metrics:process:P       string  number of the last report of process P; forgotten after a day

What always holds: each report is added exactly once, however often it is sent: its number is compared and set in the
same step (`lua/commit.lua`). A ledger that was emptied takes the next report and starts from zero.

It decides nothing by these numbers, and nobody may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coordinator.ledger import Ledger
from coordinator.ledger_keys import PREFIX
from coordinator.metrics import Cell, cell_name, parse_cell

TOTALS: Final = PREFIX + "metrics"
SEEN: Final = PREFIX + "metrics:seen"
PROCESS_TTL_S: Final = 86_400
ROLES: Final = ("gateway", "keeper")


async def report(
    ledger: Ledger, process: str, number: int, increments: Mapping[Cell, float], *, role: str, now: float
) -> None:
    """Add what `process` counted; its reports are numbered 1, 2, 3, …, and one that is sent again changes nothing.

    Raises what every call of the ledger raises; send the same report again then.
    """
    key = f"{TOTALS}:process:{process}"
    writes = [["HINCRBYFLOAT", TOTALS, cell_name(cell), repr(amount)] for cell, amount in increments.items()]
    writes.append(["HSET", SEEN, role, repr(now)])
    writes.append(["SET", key, str(number), "EX", str(PROCESS_TTL_S)])
    before = str(number - 1) if number > 1 else None
    if await ledger.valkey.commit([["GET", key, before]], writes):
        return
    found = await ledger.valkey.call("GET", key)
    if found != str(number):
        # The ledger lost its data, or had not heard of this process for a day.
        await ledger.valkey.commit([["GET", key, found]], writes)


async def totals(ledger: Ledger) -> tuple[dict[Cell, float], dict[str, float]]:
    """The totals of all processes, and when each role was last heard of (Unix seconds)."""
    cells, seen = await ledger.valkey.read(["HGETALL", TOTALS], ["HGETALL", SEEN])
    found = {cell: float(value) for name, value in cells.items() if (cell := parse_cell(name)) is not None}
    return found, {role: float(seen[role]) for role in ROLES if role in seen}
