"""How fast a lease trains: beside plain TRL and a bare loop, each in a process of its own, in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

from aggregate_run import FOLDER
from results import Part, Say
from worker_part import WARM_UP, Scale, environment, job_of

LEASE, TRL, BARE = "lease", "plain TRL", "bare loop"
GOAL = 0.98
SAME = 1e-4


@dataclass(frozen=True)
class Timing:
    """Of the steps after the warm-up of one process."""

    wall_s: float
    cpu_s: float
    slowest: float
    first_loss: float


def timed(scale: Scale, way: str, number: int) -> Timing:
    """Run one way in a new process."""
    job = job_of(scale, scale.scratch / f"{way.replace(' ', '-')}-{number}")
    spec = job.delta_file.with_name("spec.json")
    spec.write_text(json.dumps({"way": way, "job": job.model_dump(mode="json")}))
    command = [sys.executable, "-P", str(FOLDER / "worker_ways.py"), str(spec)]
    with job.delta_file.with_name("log").open("wb") as log:
        done = subprocess.run(command, env=environment(job), stdout=subprocess.PIPE, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"{way} ended with {done.returncode}; see {log.name}")
    found = json.loads(done.stdout)
    wall = found["wall"]
    gaps = [after - before for before, after in zip(wall[WARM_UP - 1 :], wall[WARM_UP:], strict=False)]
    return Timing(
        wall_s=statistics.median(gaps),
        cpu_s=(found["cpu"][-1] - found["cpu"][WARM_UP - 1]) / len(gaps),
        slowest=max(gaps),
        first_loss=found["losses"][0],
    )


def speed(scale: Scale, say: Say) -> Part:
    part = Part("A lease's training, beside the same training without Rankup")
    found: dict[str, list[Timing]] = {LEASE: [], TRL: [], BARE: []}
    for number in range(scale.repeat):
        for way, timings in found.items():
            say(f"{way}, {number + 1} of {scale.repeat}")
            timings.append(timed(scale, way, number))
    recipe = job_of(scale, scale.scratch / "described").recipe
    tokens = recipe.batch_size * recipe.max_tokens
    best = {way: min(timing.wall_s for timing in timings) for way, timings in found.items()}
    cpu = {way: min(timing.cpu_s for timing in timings) for way, timings in found.items()}
    table = part.table(
        f"{scale.model}, {recipe.batch_size} x {tokens // recipe.batch_size} tokens, rank {recipe.rank} on all linear "
        f"layers, {scale.device}, {scale.threads} threads",
        *("way", "s a step", "CPU s a step", "tokens/s", "lease's speed", "by CPU time", "medians of all runs, s"),
    )
    for way, timings in found.items():
        runs = ", ".join(f"{timing.wall_s:.2f}" for timing in timings)
        ratios = (f"{best[way] / best[LEASE]:.1%}", f"{cpu[way] / cpu[LEASE]:.1%}") if way != LEASE else ("", "")
        table.row(way, f"{best[way]:.2f}", f"{cpu[way]:.2f}", f"{tokens / best[way]:.0f}", *ratios, runs)
    fastest = min((TRL, BARE), key=lambda way: best[way])
    ratio = min(cpu[TRL], cpu[BARE]) / cpu[LEASE]
    part.goal(
        f"a lease trains at {GOAL:.0%} of the faster one or more",
        f"{best[fastest] / best[LEASE]:.1%} by the clock, {ratio:.1%} by CPU time, of {fastest}",
        met=best[fastest] / best[LEASE] >= GOAL,
        why="by CPU time it is met: others used the machine meanwhile" if ratio >= GOAL else "see the table",
    )
    losses = [timing.first_loss for timings in found.values() for timing in timings]
    part.goal(
        "all train on the same batches",
        f"losses of the first step differ by {max(losses) - min(losses):.1e}",
        met=max(losses) - min(losses) < SAME,
        why="they do not see the same tokens",
    )
    part.notes.append(
        f"The median of the steps after the first {WARM_UP} of {scale.steps}; of {scale.repeat} processes for each, in "
        "turn, the fastest counts. Tokens count padding, the same for all. The bare loop has its batches as tensors "
        "before the clock starts; the lease writes a checkpoint a minute, counts its tokens and reports each step, and "
        "on a processor it computes logits only at places where a row of the batch has a label."
    )
    part.versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    return part
