"""Benchmark: what the exact fold costs beside ordinary floating-point merges of the same contributions.

Claim: the exact sum costs about twice the CPU time of the bare float64 product of the same shapes, and of an ordinary
float32 merge; its memory above the inputs is a few tiles; and it alone gives the same bits in any order.

    python benchmarks/fold.py                 # SmolLM2-135M: 210 weights, 64 contributions of rank 16
    python benchmarks/fold.py --quick         # a few seconds: 2 layers, 8 contributions
    python benchmarks/fold.py --json > fold.json

Four ways to make the same sum over every weight of SmolLM2-135M that takes a delta, with random factors:

    exact         rankup.fixedpoint.fold_tensor: int16 factors, exact in float64, two roundings
    sequential    W += s · B@A in float32, one contribution after the other, as peft's merge does
    concatenated  W += [s1·B1 …] @ [A1; …] in float32, one product a weight
    dgemm         the bare float64 product of the concatenated factors: no grid, no rounding, no master

How to read it: seconds are CPU time of one thread, the median of `--repeat` runs with their range; the ways take turns,
each in a process of its own, so a busy machine troubles all of them alike. Compare the ratios, not the seconds.
`exact costs` is the exact way's time over this one's. `of roofline` is the arithmetic (2 · d_out · d_in · total rank)
per second, as a share of what a square float64 product reaches in the same run; float32 products can pass 100 %.
`peak` is the process's largest resident set, `inputs` what it was before the work began. `order` says whether the
reversed order of contributions gave the same bits on one weight. Nothing is read or written here: a real fold also
waits for object storage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

SHAPES: Final[tuple[tuple[int, int, int], ...]] = (
    (576, 1536, 1),  # mlp.down_proj
    (1536, 576, 2),  # mlp.gate_proj, mlp.up_proj
    (576, 576, 2),  # self_attn.q_proj, o_proj
    (192, 576, 2),  # self_attn.k_proj, v_proj
)
"""(d_out, d_in, how many in one layer) of SmolLM2-135M."""
LAYERS: Final = 30
DENOMINATOR_LOG2: Final = 16
WAYS: Final = ("exact", "sequential", "concatenated", "dgemm")
ROOFLINE_SIZE: Final = 2048
THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def arithmetic(layers: int, total_rank: int) -> int:
    """Floating-point operations of the product alone, over all weights."""
    return sum(2 * d_out * d_in * total_rank * count * layers for d_out, d_in, count in SHAPES)


def peak_bytes() -> int:
    """Largest resident set of this process so far; exec resets VmHWM but not what getrusage says."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, layers: int, contributions: int, rank: int) -> dict[str, Any]:
    """CPU seconds of one way over all weights, in this process: factors are made outside the clock, once a shape."""
    import numpy as np

    from rankup.exactsum import fold_tensor
    from rankup.fixedpoint import dequantise, quantise

    rng = np.random.default_rng(7)
    scale = 1 / contributions
    weight = round(scale * 2**DENOMINATOR_LOG2)
    work = []
    for d_out, d_in, count in SHAPES:
        master = rng.normal(0, 0.02, (d_out, d_in)).astype(np.float32)
        factors = [
            quantise(rng.normal(0, 1e-3, (d_out, rank)), rng.normal(0, 0.02, (rank, d_in)))
            for _ in range(contributions)
        ]
        floats = [] if way == "exact" else [tuple(x.astype(np.float32) for x in dequantise(f)) for f in factors]
        wide = None
        if way == "dgemm":
            wide = tuple(np.concatenate([pair[side] for pair in floats], axis=1 - side) for side in (0, 1))
            wide = tuple(x.astype(np.float64) for x in wide)
        work.append((master, count, factors, floats, wide))
    s = np.float32(scale)

    def run(master: Any, factors: Any, floats: Any, wide: Any) -> Any:
        if way == "exact":
            return fold_tensor(master, [(weight, each) for each in factors], DENOMINATOR_LOG2)
        if way == "dgemm":
            return wide[0] @ wide[1]
        merged = master.copy()
        if way == "sequential":
            for b, a in floats:
                merged += s * (b @ a)
        else:
            merged += np.concatenate([s * b for b, _ in floats], axis=1) @ np.concatenate([a for _, a in floats])
        return merged

    run(work[-1][0], *work[-1][2:])  # the smallest weight, to load and to start what is started once
    before = peak_bytes()
    started = time.process_time()
    for master, count, factors, floats, wide in work:
        for _ in range(count * layers):
            run(master, factors, floats, wide)
    seconds = time.process_time() - started
    peak = peak_bytes()
    order_free = None  # the bare product has no contributions to put in another order
    if way != "dgemm":
        master, _, factors, floats, wide = work[0]
        one, other = run(master, factors, floats, wide), run(master, factors[::-1], floats[::-1], wide)
        order_free = one.tobytes() == other.tobytes()
    return {
        "cpu_s": seconds,
        "peak_bytes": peak,
        "input_bytes": before,
        "order_free": order_free,
    }


def roofline() -> dict[str, Any]:
    """GFLOP/s of one square float64 product on one thread, the best of five."""
    import numpy as np

    rng = np.random.default_rng(7)
    left, right = rng.normal(size=(2, ROOFLINE_SIZE, ROOFLINE_SIZE))
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        left @ right
        best = min(best, time.process_time() - started)
    return {"gflops": 2 * ROOFLINE_SIZE**3 / best / 1e9}


def in_child(*arguments: object) -> dict[str, Any]:
    """Run one measurement of this file in a fresh process with one thread."""
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")}
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout)
    return answer


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def benchmark(layers: int, contributions: int, rank: int, repeat: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    rates: list[float] = []
    for _ in range(repeat):
        rates.append(in_child("roofline")["gflops"])
        for way in WAYS:
            runs[way].append(in_child(way, layers, contributions, rank))
    flops = arithmetic(layers, contributions * rank)
    rate = max(rates)
    median = {way: statistics.median(run["cpu_s"] for run in runs[way]) for way in WAYS}
    return {
        "layers": layers,
        "weights": layers * sum(count for _, _, count in SHAPES),
        "contributions": contributions,
        "rank": rank,
        "repeat": repeat,
        "gflop": flops / 1e9,
        "roofline_gflops": rate,
        "roofline_gflops_range": [min(rates), rate],
        "ways": {
            way: {
                "cpu_s": median[way],
                "cpu_s_range": [min(run["cpu_s"] for run in runs[way]), max(run["cpu_s"] for run in runs[way])],
                "exact_costs": median["exact"] / median[way],
                "of_roofline": flops / median[way] / 1e9 / rate,
                "peak_bytes": max(run["peak_bytes"] for run in runs[way]),
                "input_bytes": max(run["input_bytes"] for run in runs[way]),
                "order_free": runs[way][0]["order_free"],
            }
            for way in WAYS
        },
        "cpu": cpu_model() or platform.processor(),
        "load": list(os.getloadavg()),
        "versions": {"python": platform.python_version(), "numpy": version("numpy")},
    }


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{result['weights']} weights, {result['contributions']} contributions of rank {result['rank']}, one thread"
    table = Table(title=title)
    table.add_column("way")
    columns = ("CPU s", "range", "exact costs", "of roofline", "peak MB", "inputs MB", "order")
    for column in columns:
        table.add_column(column, justify="right")
    for way, row in result["ways"].items():
        low, high = row["cpu_s_range"]
        table.add_row(
            way,
            f"{row['cpu_s']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row['exact_costs']:.2f} x",
            f"{row['of_roofline']:.0%}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['input_bytes'] / 1e6:.0f}",
            {None: "", True: "same bits", False: "differs"}[row["order_free"]],
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    low, high = result["roofline_gflops_range"]
    console.print(
        f"roofline: {high:.1f} GFLOP/s float64 (range {low:.1f}-{high:.1f}); {result['gflop']:.1f} GFLOP to do"
    )
    console.print(f"{result['cpu']}; {result['versions']}; load {result['load'][0]:.1f}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact fold beside float32 merges and the float64 roofline.")
    parser.add_argument("--contributions", type=int, default=None, help="64, or 8 with --quick")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=None, help="3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="2 layers instead of 30")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, *numbers = options.child
        print(json.dumps(roofline() if way == "roofline" else measure(way, *map(int, numbers))))
        return
    contributions = options.contributions or (8 if options.quick else 64)
    repeat = options.repeat or (1 if options.quick else 3)
    if min(contributions, options.rank, repeat) < 1:
        parser.error("--contributions, --rank and --repeat are at least 1")
    result = benchmark(2 if options.quick else LAYERS, contributions, options.rank, repeat)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
