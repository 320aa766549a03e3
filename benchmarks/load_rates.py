"""Part "rates" of benchmarks/load.py: how many heartbeats and claims a second break the door, and what breaks first.

The same calls at rising rates, sent at random moments whatever becomes of them, on one way of serving after the other:
Ray Serve as it can be set up, the same application on plain uvicorn, and as little as a heartbeat can cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from load_part import GOAL_MS, Ride, Scale, in_words, milliseconds, ride
from load_server import Server, bare_server, whole_server
from load_world import furnish, open_round
from results import Part, Say, Table

HA_PROXY: Final = "RAY_SERVE_ENABLE_HA_PROXY"


@dataclass(frozen=True)
class Way:
    """One way of serving the gateway."""

    name: str
    changes: Mapping[str, str]
    """Of the environment of `rankup up`."""
    bare: str = ""
    """What `load_bare.py` serves beside it; empty: the server itself is measured."""
    claims: float = 0.1


WAYS: Final = (
    Way("Serve as `rankup up` starts it: Python proxy", {}),
    Way("Serve, HAProxy", {HA_PROXY: "1"}),
    Way("uvicorn, one process", {}, "gateway"),
    Way("uvicorn, the ledger's heartbeat and nothing else", {}, "beat", 0.0),
)


def rates(scale: Scale, say: Say) -> Part:
    part = Part("The rate that breaks the door")
    summary = part.table(
        "What each way takes",
        *(
            "way",
            "keeps up to, calls/s",
            "p99 ms there",
            "server's CPU ms a call",
            "breaks at",
            "how",
            "busiest process",
        ),
    )
    steps = part.table(
        "Every step", "way", "calls/s", "heartbeat p50 ms", "p99 ms", "claim p50 ms", "p99 ms", "unanswered", "errors"
    )
    for number, way in enumerate(WAYS):
        say(way.name)
        people = scale.scratch / f"crowd-{number}.json"
        with _serving(scale.scratch / f"way-{number}", way, scale, people) as server:
            _ramp(summary, steps, way, scale, server, people, say)
    part.notes += [
        f"One call in ten is a claim (of a volunteer that holds a lease: it gets the same one again), the others are "
        f"heartbeats of {scale.crowd:,} volunteers; each step lasts {scale.step_s:.0f} s. A rate breaks a server when "
        f"the 99th percentile of all calls passes {GOAL_MS:.0f} ms, counted from when each was due, or a call fails.",
        "The volunteers share the machine with the server. CPU of the server: proxies, replicas, Valkey; not the "
        "volunteers, and not what Ray does when nobody calls.",
    ]
    return part


@contextmanager
def _serving(home: Path, way: Way, scale: Scale, people: Path) -> Iterator[Server]:
    """A server with a crowd that holds leases."""
    with whole_server(home, way.changes) as server:
        furnish(server, scale.crowd)
        # The crowd stands still between two steps: its leases must not run out.
        open_round(server, shards=scale.crowd, lease_s=86_400)
        ride(server, people, "enrol", count=scale.crowd)
        ride(server, people, "arrive")
        if not way.bare:
            yield server
            return
        with bare_server(server, way.bare) as bare:
            yield bare


def _ramp(summary: Table, steps: Table, way: Way, scale: Scale, server: Server, people: Path, say: Say) -> None:
    kept: Ride | None = None
    kept_rate = 0.0
    for rate in scale.rates:
        say(f"{way.name}: {rate:.0f} calls a second")
        found = ride(server, people, "rate", rate=rate, seconds=scale.step_s, claims=way.claims, seed=int(rate))
        beats, claims = found.times.get("heartbeat", ()), found.times.get("claim", ())
        steps.row(
            way.name,
            f"{rate:.0f}",
            *(f"{milliseconds(times, quantile):.0f}" for times in (beats, claims) for quantile in (0.5, 0.99) if times),
            *([""] * (0 if claims else 2)),
            str(found.report["waiting"]),
            in_words(found.report["errors"]),
        )
        p99 = found.p99_ms("heartbeat", "claim")
        if found.report["errors"] or p99 > GOAL_MS:
            how = in_words(found.report["errors"]) if found.report["errors"] else f"p99 {p99:.0f} ms"
            summary.row(way.name, *_kept(kept, kept_rate), f"{rate:.0f} calls/s", how, found.busiest)
            return
        kept, kept_rate = found, rate
    summary.row(way.name, *_kept(kept, kept_rate), "not reached")


def _kept(kept: Ride | None, rate: float) -> tuple[str, str, str]:
    if kept is None:
        return "none of the rates", "", ""
    door = ("gateway replica", "Serve proxy", "HAProxy", "Valkey", "uvicorn")
    used = sum(use.cpu_s for role, use in kept.uses.items() if role in door)
    calls = sum(len(times) for times in kept.times.values())
    return f"{rate:.0f}", f"{kept.p99_ms('heartbeat', 'claim'):.0f}", f"{1000 * used / calls:.1f}"
