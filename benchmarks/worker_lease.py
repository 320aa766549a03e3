"""What a volunteer waits for around the leases of a real server, from claim to verdict, by the worker's events: on a
fast line, and on a slow one, where a delta goes up while the next lease is trained."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aggregate_run import FOLDER, QUIET
from load_server import Server, whole_server
from results import Part, Say
from worker_part import LEASE_S, Scale

STEPS = 4
UPLINK_STEPS, UPLINK_LEASES, UPLINK_S = 24, 4, 40.0
"""A line on which a delta takes about so long as its training."""


@dataclass
class Leg:
    """When each thing of one lease was told first and last, seconds after the start of the worker."""

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    """Of its delta."""

    def note(self, name: str, at: float) -> None:
        self.first.setdefault(name, at)
        self.last[name] = at


def leases(scale: Scale, say: Say) -> Part:
    part = Part("Two leases of a real server")
    home = Path(tempfile.mkdtemp(dir=scale.scratch))
    with whole_server(home / "server", {}) as server:
        _open_round(server, home, scale, say, shards=2, steps=STEPS)
        say("two leases")
        first, second = _work(server, home / "volunteer", 2)
    table = part.table(
        f"{scale.model}, {STEPS} steps a lease, server and volunteer on the same machine; seconds",
        *("what", "first lease", "second lease", "share of a lease of 20 minutes"),
    )
    spans = {
        "claim to trainer: base version and shard": ("claimed", "starting"),
        "trainer's start to its first step done": ("starting", "step"),
        "last step to the delta in the outbox, checked": ("step-end", "uploading"),
        "upload and submission": ("uploading", "submitted"),
        "submission to verdict (the next lease does not wait)": ("submitted", "verdict"),
    }
    waits = 0.0
    for what, (begin, end) in spans.items():
        took = [_span(leg, begin, end) for leg in (first, second)]
        table.row(what, *(f"{seconds:.2f}" for seconds in took), f"{took[1] / LEASE_S:.2%}")
        waits += 0.0 if end == "verdict" else took[1]
    part.goal(
        "a worker waits for less than 5% of a lease, once it has the base",
        f"{waits / LEASE_S:.2%} ({waits:.1f} s)",
        met=waits / LEASE_S < 0.05,
        why="see the table",
    )
    part.notes.append(
        "The first lease fetches the whole base over loopback and checks every hash; the second finds it in the cache. "
        "The first step is part of the second row. On a line of 10 Mbit/s a delta of 4.9 MB takes 4 s more."
    )
    part.versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "ray")}
    return part


def uplink(scale: Scale, say: Say) -> Part:
    part = Part("Leases on a slow line")
    home = Path(tempfile.mkdtemp(dir=scale.scratch))
    with whole_server(home / "server", {}) as server:
        _open_round(server, home, scale, say, shards=UPLINK_LEASES, steps=UPLINK_STEPS)
        say("one lease, to know how large a delta is")
        (probe,) = _work(server, home / "volunteer", 1)
        rate = int(probe.size_bytes / UPLINK_S)
        say(f"{UPLINK_LEASES - 1} leases with {rate / 1000:.0f} kB/s upwards")
        legs = _work(server, home / "volunteer", UPLINK_LEASES - 1, f"max_bytes_sec_up={rate}")
    table = part.table(
        f"{scale.model}, {UPLINK_STEPS} steps a lease, {rate / 1000:.0f} kB/s upwards; seconds",
        *("lease", "claim to last step", "upload and submission", "last step to the next claim"),
    )
    trains = [leg.last["step"] - leg.first["claimed"] for leg in legs]
    before, uploads = 0.0, list[float]()
    for leg in legs:
        # It begins when that of the lease before is there.
        uploads.append(leg.first["submitted"] - max(leg.last["step"], before))
        before = leg.first["submitted"]
    for number, leg in enumerate(legs):
        following = f"{legs[number + 1].first['claimed'] - leg.last['step']:.1f}" if number + 1 < len(legs) else ""
        table.row(str(number + 1), f"{trains[number]:.1f}", f"{uploads[number]:.1f}", following)
    wall, serial = before - legs[0].first["claimed"], sum(trains) + sum(uploads)
    floor = max(sum(trains) + uploads[-1], trains[0] + sum(uploads))
    part.goal(
        "all leases within 5% of what training or line alone would allow",
        f"{wall:.0f} s, {wall / floor:.1%} of {floor:.0f} s; one after the other they would take {serial:.0f} s",
        met=wall <= 1.05 * floor,
        why="see the table",
    )
    part.notes.append("The next lease is claimed when an upload has taken 3 s: shorter ones are waited for.")
    part.versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "ray")}
    return part


def _open_round(server: Server, home: Path, scale: Scale, say: Say, *, shards: int, steps: int) -> None:
    say("a model and a dataset")
    _rankup(server, "model", "import", scale.model, "--name", "bench")
    _rankup(server, "dataset", "build", "pydocs", "--pydocs", "--shard-rows", "64")
    wanted = {"model": "bench", "dataset": "pydocs", "shards": shards, "max_shards_per_lease": 1}
    file = home / "round.json"
    file.write_text(json.dumps(wanted | {"recipe": {"steps": steps}}))
    _rankup(server, "round", "create", str(file))


def _span(leg: Leg, begin: str, end: str) -> float:
    start = leg.last["step"] if begin == "step-end" else leg.first[begin]
    return leg.first[end] - start


def _rankup(server: Server, *arguments: str) -> None:
    command = [sys.executable, "-m", "rankup", *arguments]
    subprocess.run(command, env=dict(server.environment), check=True, stdout=subprocess.DEVNULL)


def _work(server: Server, home: Path, leases: int, *limits: str) -> list[Leg]:
    environment = {**server.environment, **QUIET, "RANKUP_WORKER_HOME": str(home), "PYTHONPATH": str(FOLDER.parent)}
    environment |= {"RANKUP_WORKER_DEDICATED": "true", "RANKUP_WORKER_PAGE_PORT": "off"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [
        sys.executable,
        "-m",
        "rankup",
        "worker",
        "join",
        server.url,
        "--max-leases",
        str(leases),
        "--json",
        "--no-doctor",
    ]
    for limit in limits:
        subprocess.run([*command[:4], "limits", "set", limit], env=environment, check=True, stdout=subprocess.DEVNULL)
    began, legs, current = time.perf_counter(), dict[str, Leg](), ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        for text in worker.stdout:
            event: dict[str, Any] = json.loads(text)
            now = time.perf_counter() - began
            if event["event"] == "claimed":
                current = event["lease_id"]
            if lease_id := event.get("lease_id", current):
                leg = legs.setdefault(lease_id, Leg())
                leg.note(event["event"], now)
                leg.size_bytes = max(leg.size_bytes, event["total"] if event["event"] == "uploading" else 0)
    if worker.returncode or len(legs) != leases:
        raise SystemExit(f"the worker ended with {worker.returncode} after {len(legs)} leases; see {home}")
    return list(legs.values())
