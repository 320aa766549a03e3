"""Benchmark: what aggregation costs, beside what others do with the same contributions.

Claims: one answer on every machine costs at most 2.5 times the order-dependent float32 product, near the bare float64
product; `rankup merge` merges adapters in the memory of a few tiles; a fold of a model of 7 billion weights fits 2 GiB;
and a robust rule on low-rank contributions costs a small part of one on dense arrays. Each goal is reported as met or
missed, with the reason.

    python benchmarks/aggregate.py                        # all of it, about half an hour
    python benchmarks/aggregate.py --quick                # one layer, under a minute; writes no page
    python benchmarks/aggregate.py --only krum            # one part: arithmetic, memory, large or krum
    python benchmarks/aggregate.py --json numbers.json    # every number of every run

peft, mergekit and Flower are taken from .venv-bench, which `make bench-aggregate` makes from
benchmarks/requirements.txt; without it, from this Python. What is missing is reported as missing. A run that is not
quick writes docs/results/aggregate.json, and from it the page docs/results/aggregate.md; `--only` replaces its part and
leaves the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from aggregate_part import QUICK, Part, Say, Scale
from aggregate_parts_cpu import arithmetic, krum
from aggregate_parts_disk import large, memory
from aggregate_report import markdown, show
from aggregate_run import FOLDER, machine
from rich.console import Console

RESULTS: Final = FOLDER.parent / "docs" / "results"
PARTS: Final[Mapping[str, Callable[[Scale, Path, Say], Part]]] = {
    "arithmetic": arithmetic,
    "memory": memory,
    "large": large,
    "krum": krum,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What aggregation costs, beside what others do.")
    parser.add_argument("--quick", action="store_true", help="one layer and few contributions; writes no page")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file")
    parser.add_argument("--peers", type=Path, metavar="VENV", default=FOLDER.parent / ".venv-bench")
    parser.add_argument("--folder", type=Path, help="where files are made (20 GB); the temporary folder by default")
    parser.add_argument("--repeat", type=int, help="processes for each way; the fastest counts")
    options = parser.parse_args()
    scale = dataclasses.replace(QUICK if options.quick else Scale(), folder=options.folder)
    if options.repeat is not None:
        if options.repeat < 1:
            parser.error("--repeat is at least 1")
        scale = dataclasses.replace(scale, repeat=options.repeat)
    peers = options.peers / "bin" / "python"
    if not peers.exists():
        peers = Path(sys.executable)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = " ".join(["python benchmarks/aggregate.py", *(f"--only {options.only}" for _ in [0] if options.only)])
    results: dict[str, Any] = {}
    console = Console(stderr=True)
    for name in [options.only] if options.only else PARTS:
        before = os.getloadavg()[0]
        with console.status(name) as status:

            def say(text: str, name: str = name, status: Any = status) -> None:
                status.update(f"{name}: {text}")
                if not console.is_terminal:
                    console.print(f"{name}: {text}", highlight=False)

            part = PARTS[name](scale, peers, say)
        if options.quick:
            part.goals.clear()  # they are for the whole
        results[name] = dataclasses.asdict(part) | {
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "load": [before, os.getloadavg()[0]],
            "machine": machine(),
        }
        if not options.quick:
            keep(name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    show(results, machine())


def keep(name: str, result: dict[str, Any]) -> None:
    """Put one part's result beside what was measured of the others, and write the page."""
    numbers = RESULTS / "aggregate.json"
    known = json.loads(numbers.read_text()) if numbers.exists() else {}
    known[name] = result
    ordered = {part: known[part] for part in PARTS if part in known}
    numbers.write_text(json.dumps(ordered, indent=1) + "\n")
    (RESULTS / "aggregate.md").write_text(markdown(ordered))


if __name__ == "__main__":
    main()
