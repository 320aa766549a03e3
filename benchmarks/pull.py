"""Benchmark: what it costs to have the next version of a model, beside what others do with the same bytes.

Claims: a patch is at least 9 times smaller than the full weights at the change that a gentle round makes, and is
applied at 200 MB/s of weights a core or more; a pull takes no longer than huggingface_hub's download of the same files;
a pull that was killed asks for at most one part again. Each goal is reported as met or missed, with the reason.

    python benchmarks/pull.py                      # all of it, after benchmarks/rounds.py --to .rounds
    python benchmarks/pull.py --only size          # one part: size, downloads or kills
    python benchmarks/pull.py --quick              # one case, one process a way; writes no page
    python benchmarks/pull.py --json numbers.json  # every number of every run

ZipNN and huggingface_hub are taken from .venv-bench, which `make bench-pull` makes from benchmarks/requirements.txt;
without it, from this Python. What is missing is reported as missing. A run that is not quick writes
docs/results/pull.json, and from it the page docs/results/pull.md; `--only` replaces its part and leaves the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from aggregate_run import FOLDER
from pull_part import Scale
from pull_parts_downloads import downloads
from pull_parts_kills import kills
from pull_parts_size import sizes
from results import Part, Say, keep, measure, show

HEAD: Final = (
    "# What an update costs",
    "",
    "Written by `benchmarks/pull.py` (`make bench-pull`) from real rounds of SmolLM2-135M-Instruct",
    "(`benchmarks/rounds.py`): patches, pulls and what an interruption costs, beside what others do; and by",
    "`benchmarks/corruption.py`: damage, and whether it is found. Nothing here is typed in by hand.",
)
PARTS: Final[Mapping[str, Callable[[Scale, Path, Say], Part]]] = {"size": sizes, "downloads": downloads, "kills": kills}
ORDER: Final = (*PARTS, "corruption")


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to have the next version.")
    parser.add_argument("--quick", action="store_true", help="one case, one process a way; writes no page")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file")
    parser.add_argument("--rounds", type=Path, metavar="DIR", default=FOLDER.parent / ".rounds")
    parser.add_argument("--peers", type=Path, metavar="VENV", default=FOLDER.parent / ".venv-bench")
    parser.add_argument("--folder", type=Path, help="where files are made (2 GB); the temporary folder by default")
    options = parser.parse_args()
    if not (options.rounds / "rounds.json").exists():
        parser.error(f"{options.rounds} has no rounds; make them: python benchmarks/rounds.py --to {options.rounds}")
    peers = options.peers / "bin" / "python"
    if not peers.exists():
        peers = Path(sys.executable)
    command = " ".join(["python benchmarks/pull.py", *(f"--only {options.only}" for _ in [0] if options.only)])
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rankup-pull-", dir=options.folder) as scratch:
        scale = Scale(options.rounds.resolve(), Path(scratch))
        if options.quick:
            scale = dataclasses.replace(scale, cases=scale.cases[:1], repeat=1, kills=2)
        for name in [options.only] if options.only else PARTS:
            results[name] = measure(name, command, partial(PARTS[name], scale, peers))
            if not options.quick:
                keep("pull", HEAD, ORDER, name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
