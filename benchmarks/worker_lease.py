"""What a volunteer waits for around two leases of a real server, from claim to verdict, by the worker's events."""

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


@dataclass
class Leg:
    """When each thing of one lease was told first and last, seconds after the start of the worker."""

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, at: float) -> None:
        self.first.setdefault(name, at)
        self.last[name] = at


def leases(scale: Scale, say: Say) -> Part:
    part = Part("Two leases of a real server")
    home = Path(tempfile.mkdtemp(dir=scale.scratch))
    with whole_server(home / "server", {}) as server:
        say("a model and a dataset")
        _rankup(server, "model", "import", scale.model, "--name", "bench")
        _rankup(server, "dataset", "build", "pydocs", "--pydocs", "--shard-rows", "64")
        wanted = {"model": "bench", "dataset": "pydocs", "shards": 2, "max_shards_per_lease": 1}
        file = home / "round.json"
        file.write_text(json.dumps(wanted | {"recipe": {"steps": STEPS}}))
        _rankup(server, "round", "create", str(file))
        say("two leases")
        first, second = _work(server, home / "volunteer")
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


def _span(leg: Leg, begin: str, end: str) -> float:
    start = leg.last["step"] if begin == "step-end" else leg.first[begin]
    return leg.first[end] - start


def _rankup(server: Server, *arguments: str) -> None:
    command = [sys.executable, "-m", "rankup", *arguments]
    subprocess.run(command, env=dict(server.environment), check=True, stdout=subprocess.DEVNULL)


def _work(server: Server, home: Path) -> tuple[Leg, Leg]:
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
        "2",
        "--json",
        "--no-doctor",
    ]
    began, legs, current = time.perf_counter(), dict[str, Leg](), ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        for text in worker.stdout:
            event: dict[str, Any] = json.loads(text)
            now = time.perf_counter() - began
            if event["event"] == "claimed":
                current = event["lease_id"]
            if lease_id := event.get("lease_id", current):
                legs.setdefault(lease_id, Leg()).note(event["event"], now)
    if worker.returncode or len(legs) != 2:
        raise SystemExit(f"the worker ended with {worker.returncode} after {len(legs)} leases; see {home}")
    first, second = legs.values()
    return first, second
