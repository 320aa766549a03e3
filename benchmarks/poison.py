"""Benchmark: how much of what honest volunteers teach survives when some of them attack.

Claim to test: with 30 % of attackers the default chain keeps at least 95 % of the clean gain in held-out loss, with
40 % at least 85 %, it refuses at most 2 % of honest contributions, and a NaN is never accepted.

    python benchmarks/poison.py --out results/poison                       # everything: hours of CPU, resumes
    python benchmarks/poison.py --quick                                    # a minute: 2 rounds, 2 attacks, 1 seed
    python benchmarks/poison.py --out results/poison --only backdoor       # one attack
    python benchmarks/poison.py --out results/poison --report docs/results # only write poison.md and poison.svg

20 volunteers teach a byte-level transformer (`poison_model`) English docstrings over 8 rounds; the last of them are
attackers (`poison_attacks`). Every run is one line of JSON in `runs.jsonl` of the folder; a run that is there already,
with the same settings, is not repeated. The same seed gives the same numbers on the same machine.

How to read it: 100 % is the gain of the plain mean of 20 honest volunteers with the same seed; 0 % is the base, less is
a model that became worse. Columns without "chain" have no screening; all but the first clip at 1.5 median norms.
"chain" is the default of `rankup.recipe.Aggregation`; "chain, loss only" leaves slopes out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from poison_attacks import ATTACKS
from poison_model import Recipe, Text, Weights, load
from poison_report import show, write
from poison_rounds import Case, Defence, run

from rankup.recipe import Aggregation

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SHARES: Final = (0.3, 0.4, 0.2, 0.1)
"""Of the volunteers; the shares with a goal come first, in case somebody interrupts."""
BASE_STEPS: Final = 1500
DEFAULT: Final = Aggregation()
CHAIN: Final = Defence(
    rule=DEFAULT.rule,
    clip_norm_ratio=DEFAULT.clip_norm_ratio,
    byzantine_share=DEFAULT.byzantine_share,
    screened=True,
    max_cosine=DEFAULT.max_cosine or 1.0,
    max_loss_mads=DEFAULT.max_loss_mads or 1e6,
    min_descent=DEFAULT.min_descent,
)
DEFENCES: Final = {
    "mean": Defence(clip_norm_ratio=float("inf")),
    "mean, clip": Defence(),
    "multi_krum": Defence("multi_krum"),
    "geometric_median": Defence("geometric_median"),
    "centred_clipping": Defence("centred_clipping"),
    "chain, loss only": replace(CHAIN, max_loss_mads=3.0, min_descent=None),
    "chain": CHAIN,
}
OUTER: Final = {"outer sgd": (0.0, 1.0), "outer nesterov": (0.875, 0.75)}
"""Momentum and learning rate of the outer step, on the plain mean."""


def cases(seeds: int, quick: bool, only: str | None) -> Iterator[tuple[str, Case]]:
    """Label and settings of every run, the important ones first: an interrupted benchmark still says something."""
    rounds = 2 if quick else 8
    shares = (SHARES[:1],) if quick else (SHARES[:2], SHARES[2:])
    attacks = ("sign_flip", "malformed") if quick else ATTACKS
    for part, seed in itertools.product(shares, range(seeds)):
        if part == shares[0]:
            for label, defence in DEFENCES.items():
                yield label, Case("none", 0.0, seed, defence, rounds)
            for label, (momentum, rate) in OUTER.items():
                yield label, Case("none", 0.0, seed, DEFENCES["mean"], 2 * rounds, momentum, rate)
        for share, attack in itertools.product(part, attacks):
            if only is not None and attack != only:
                continue
            for label, defence in DEFENCES.items():
                if attack == "malformed" and (label != "chain, loss only" or seed != 0):
                    continue  # the format refuses it before any chain
                yield label, Case(attack, share, seed, defence, rounds)


def key_of(case: Case, base_steps: int) -> str:
    settings = json.dumps([asdict(case), base_steps], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


_shared: dict[int, tuple[Weights, Text]] = {}


def work(case: Case, base_steps: int) -> dict[str, Any]:
    """One run, in a process of its own with one thread."""
    torch.set_num_threads(1)
    if base_steps not in _shared:
        _shared[base_steps] = load(base_steps)
    return run(case, *_shared[base_steps])


def stored(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of a file by their keys; a line that was cut off by a crash is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["key"]] = record
    return found


def main() -> None:
    if any(os.environ.get(name) != "1" for name in THREAD_VARIABLES):
        # One thread a process; BLAS reads this when it is loaded, so the program starts again.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")})  # noqa: S606
    torch.set_num_threads(1)  # many processes, one thread each
    parser = argparse.ArgumentParser(description="What attackers leave of the gain of honest volunteers.")
    parser.add_argument("--out", type=Path, default=None, help="folder of runs.jsonl; without it, a temporary one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=None, help="3, or 1 with --quick")
    parser.add_argument("--only", choices=ATTACKS, default=None, help="this attack and the clean runs")
    parser.add_argument("--quick", action="store_true", help="2 rounds, sign_flip and malformed, one share")
    parser.add_argument("--report", type=Path, default=None, help="write poison.md and poison.svg here; run nothing")
    options = parser.parse_args()
    seeds = options.seeds or (1 if options.quick else 3)
    if min(seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs are at least 1")
    folder = options.out or Path(tempfile.mkdtemp(prefix="rankup-poison-"))
    folder.mkdir(parents=True, exist_ok=True)
    path, base_steps = folder / "runs.jsonl", 100 if options.quick else BASE_STEPS
    wanted = [(label, case, key_of(case, base_steps)) for label, case in cases(seeds, options.quick, options.only)]
    done = stored(path)
    if options.report is None:
        compute({key: case for _, case, key in wanted if key not in done}, path, base_steps, options.jobs, done)
    records = [
        {**done[key], "defence": label, "attack": case.attack, "share": case.share, "seed": case.seed}
        for label, case, key in wanted
        if key in done
    ]
    if not records:
        parser.error(f"{path} holds no run of this benchmark's settings")
    facts = {
        "recipe": asdict(Recipe()),
        "defences": {label: asdict(defence) for label, defence in DEFENCES.items()},
        "base_steps": base_steps,
        "missing": len(wanted) - len(records),
        "all": len(wanted),
    }
    show(records, facts)
    if options.report is not None:
        write(records, facts, options.report)
    print(f"runs: {path}")


def compute(todo: dict[str, Case], path: Path, base_steps: int, jobs: int, done: dict[str, dict[str, Any]]) -> None:
    """Carry out what is left, `jobs` at a time, and append each result to the file as it comes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    if not todo:
        return
    load(base_steps)  # made once, before there are many who would make it
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        path.open("a") as file,
        ProcessPoolExecutor(jobs) as pool,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task("runs", total=len(todo))
        futures: dict[Future[dict[str, Any]], str] = {
            pool.submit(work, case, base_steps): key for key, case in todo.items()
        }
        for future in as_completed(futures):
            key = futures[future]
            record = {"key": key, **future.result()}
            file.write(json.dumps(record) + "\n")
            file.flush()
            done[key] = record
            progress.advance(bar)


if __name__ == "__main__":
    main()
