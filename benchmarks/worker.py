"""Benchmark: what a lease costs a volunteer beside its training, and whether it trains as fast as without Rankup.

Claims: a lease trains at 98 % or more of the speed of plain TRL and of a bare PyTorch loop with peft, whichever is
faster; what is around the training takes less than a twentieth of a lease; a pause frees the memory within 5 seconds.
Each goal is reported as met or missed, with the reason.

    python benchmarks/worker.py                      # all of it, on SmolLM2-135M (about 20 minutes)
    python benchmarks/worker.py --only speed         # one part: speed, around, leases, uplink or pauses
    python benchmarks/worker.py --quick              # a tiny model, everything once; writes no page
    python benchmarks/worker.py --json numbers.json  # the tables as JSON

A run that is not quick writes docs/results/worker.json, and from it the page docs/results/worker.md; `--only` replaces
its part and leaves the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from results import Part, Say, keep, measure, show
from worker_around import around, pauses
from worker_lease import leases, uplink
from worker_part import Scale
from worker_speed import speed

HEAD: Final = (
    "# What a lease costs a volunteer",
    "",
    "Written by `benchmarks/worker.py` (`make bench-worker`): the volunteer's trainer beside the same training written",
    "with TRL, and as a bare PyTorch loop; and what is around it. Nothing here is typed in by hand.",
)
PARTS: Final[Mapping[str, Callable[[Scale, Say], Part]]] = {
    "speed": speed,
    "around": around,
    "leases": leases,
    "uplink": uplink,
    "pauses": pauses,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a lease costs a volunteer.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, everything once; writes no page")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--threads", type=int, help="of the trainings; default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to a file")
    options = parser.parse_args()
    command = " ".join(["python benchmarks/worker.py", *(f"--only {options.only}" for _ in [0] if options.only)])
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rankup-worker-") as scratch:
        scale = Scale(Path(scratch))
        if options.quick:
            scale = dataclasses.replace(scale, model="tiny", steps=6, repeat=1, pauses=1, rows=64)
        if options.threads:
            scale = dataclasses.replace(scale, threads=options.threads)
        for name in [options.only] if options.only else PARTS:
            results[name] = measure(name, command, partial(PARTS[name], scale))
            if not options.quick:
                keep("worker", HEAD, tuple(PARTS), name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
