"""Simulated volunteers over real HTTP, in one process: real keys, tokens, leases, uploads, signatures; no training.

Standard input is JSON (`Orders`), standard output a JSON report. Volunteers are kept in a file between the runs: one
enrols them, the next one gives each a lease, and the next one has all of them alive.

What always holds:
- a request is sent when it is due, whatever became of those before it, and its latency counts from that moment: a
  server that stands still is measured, not waited for (no coordinated omission);
- a volunteer behaves as `worker/` does: it beats at the pace that the last answer asked for, uploads by the ticket,
  submits with its signature, asks for the verdict at its next beats, and claims the next lease at once;
- training is pretended: a lease takes `lease_s`, and the delta is small, random and new.

`late` in the report is how far behind its own schedule this process was when it sent: where that is not small, the
generator was the bottleneck and not the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from load_crowd import Crowd, Refused, Volunteer

TIMEOUT_S: Final = 30.0
CONNECTIONS: Final = 512
"""Kept alive, for all volunteers; a request that finds none free waits, and the waiting counts."""
AT_ONCE: Final = 32
"""Requests under way while volunteers enrol and claim for the first time."""


@dataclass(frozen=True)
class Orders:
    """What this process shall do."""

    act: str
    """enrol, arrive, live or rate."""
    url: str
    people: str
    """File that keeps the volunteers."""
    count: int = 0
    seconds: float = 0.0
    """How long `live` and `rate` last."""
    lease_s: float = 1200.0
    rate: float = 0.0
    """Requests a second of `rate`."""
    claims: float = 0.1
    """Part of the requests of `rate` that are claims; the others are heartbeats."""
    seed: int = 1


async def all_at(act: Callable[[Any], Awaitable[Any]], things: list[Any]) -> float:
    """`act` on all of them, `AT_ONCE` at a time; how long it took."""
    left = iter(things)

    async def work() -> None:
        for thing in left:
            try:
                await act(thing)
            except Refused:
                continue

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return time.perf_counter() - start


async def live(crowd: Crowd, orders: Orders) -> float:
    """Everybody trains, beats, hands in and claims again, for `seconds`."""
    dice = random.Random(orders.seed)
    start = time.perf_counter()
    end, turn = start + orders.seconds, 0
    # A worker's heart stops before it hands in, so that no beat comes after the submission.
    hearts = {volunteer.worker_id: asyncio.Lock() for volunteer in crowd.people}
    agenda: list[tuple[float, int, str, Volunteer, str]] = []

    def note(at: float, what: str, volunteer: Volunteer, lease_id: str = "") -> None:
        nonlocal turn
        turn += 1
        if at < end:
            heapq.heappush(agenda, (at, turn, what, volunteer, lease_id))

    for volunteer in crowd.people:
        if not volunteer.lease:
            note(start + dice.uniform(0, crowd.pace_s), "claim", volunteer)
            continue
        lease_id = volunteer.lease["lease_id"]
        # They did not come all at once: each is somewhere between two beats, and somewhere in its lease.
        note(start + dice.uniform(0, volunteer.lease["heartbeat_s"]), "beat", volunteer, lease_id)
        note(start + dice.uniform(0, orders.lease_s), "finish", volunteer, lease_id)

    async def beat(volunteer: Volunteer, lease_id: str, due: float) -> None:
        async with hearts[volunteer.worker_id]:
            if volunteer.lease.get("lease_id") != lease_id:
                return  # Handed in meanwhile.
            try:
                pause = await crowd.beat(volunteer, due)
                await crowd.ask_verdicts(volunteer)
            except Refused:
                pause = crowd.pace_s or 15.0
        note(time.perf_counter() + pause, "beat", volunteer, lease_id)

    async def claim(volunteer: Volunteer, due: float) -> None:
        try:
            wait_s = await crowd.claim(volunteer, due)
        except Refused:
            wait_s = 5.0
        now = time.perf_counter()
        if wait_s:
            note(now + wait_s, "claim", volunteer)
            return
        note(now + volunteer.lease["heartbeat_s"], "beat", volunteer, volunteer.lease["lease_id"])
        note(now + orders.lease_s, "finish", volunteer, volunteer.lease["lease_id"])

    async def finish(volunteer: Volunteer) -> None:
        async with hearts[volunteer.worker_id]:
            try:
                await crowd.hand_in(volunteer)
            except Refused:
                note(time.perf_counter() + 5.0, "finish", volunteer, volunteer.lease["lease_id"])
                return
            volunteer.lease = {}
        await claim(volunteer, time.perf_counter())

    tasks: set[asyncio.Task[None]] = set()
    while agenda or tasks:
        if not agenda:
            await asyncio.wait(tasks, timeout=0.05)
            continue
        at, _, what, volunteer, lease_id = agenda[0]
        wait_s = at - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(min(wait_s, 0.05))
            continue
        heapq.heappop(agenda)
        crowd.late.append(-wait_s)
        match what:
            case "beat":
                act = beat(volunteer, lease_id, at)
            case "claim":
                act = claim(volunteer, at)
            case _:
                act = finish(volunteer)
        task = asyncio.create_task(act)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return time.perf_counter() - start


async def at_rate(crowd: Crowd, orders: Orders) -> float:
    """`rate` requests a second for `seconds`, at random moments, whatever becomes of them."""
    dice = random.Random(orders.seed)
    start = due = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()

    async def one(volunteer: Volunteer, claims: bool, due: float) -> None:
        with contextlib.suppress(Refused):
            await (crowd.claim(volunteer, due) if claims else crowd.beat(volunteer, due))

    while (due := due + dice.expovariate(orders.rate)) < start + orders.seconds:
        while (wait_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        crowd.late.append(-wait_s)
        task = asyncio.create_task(one(dice.choice(crowd.people), dice.random() < orders.claims, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    crowd.waiting = len(tasks)
    if tasks:
        await asyncio.wait(tasks)
    return time.perf_counter() - start


async def carry_out(orders: Orders) -> dict[str, Any]:
    kept = Path(orders.people)
    people = [Volunteer(**found) for found in json.loads(kept.read_text())] if kept.exists() else []
    connector = aiohttp.TCPConnector(limit=CONNECTIONS, limit_per_host=CONNECTIONS, keepalive_timeout=30)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        crowd = Crowd(orders.url, http, people, seed=orders.seed)
        crowd.lease_s = orders.lease_s
        report: dict[str, Any] = {}
        if orders.act == "enrol":
            report["wall_s"] = await all_at(crowd.enrol, list(range(len(people), orders.count)))
        elif orders.act == "arrive":
            report["wall_s"] = await all_at(crowd.claim, [one for one in people if not one.lease])
        elif orders.act == "live":
            report["wall_s"] = await live(crowd, orders)
        elif orders.act == "rate":
            report["wall_s"] = await at_rate(crowd, orders)
        report |= {
            "times": crowd.times,
            "late": crowd.late,
            "errors": dict(crowd.errors),
            "lost": crowd.lost,
            "verdicts": dict(crowd.verdicts),
            "handed_in": crowd.handed_in,
            "pace_s": crowd.pace_s,
            "waiting": crowd.waiting,
            "cpu_s": time.process_time(),
        }
    kept.write_text(json.dumps([asdict(one) for one in crowd.people]))
    return report


def main() -> None:
    given = json.loads(sys.stdin.read())
    print(json.dumps(asyncio.run(carry_out(Orders(**given)))))


if __name__ == "__main__":
    main()
