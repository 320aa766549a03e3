"""Benchmark: what the coordinator's door takes, with simulated volunteers over real HTTP on loopback.

Claims: ten thousand volunteers who live at the pace that the server asks for, and hand in at the rate of leases of
twenty minutes, get 99 of 100 claims and heartbeats answered within 250 ms, and no lease is lost. Each goal is reported
as met or missed, with the reason.

    python benchmarks/load.py                      # all of it (about 50 minutes)
    python benchmarks/load.py --only volunteers    # one part: volunteers, haproxy, rates, ledger or transfer
    python benchmarks/load.py --quick              # everything small; writes no page
    python benchmarks/load.py --json numbers.json  # the tables as JSON

Every server is a `rankup up` of its own, with embedded Valkey and SeaweedFS, in a folder that is removed afterwards. A
run that is not quick writes docs/results/load.json, and from it the page docs/results/load.md; `--only` replaces its
part and leaves the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from aggregate_run import FOLDER, machine
from load_ledger import ledger
from load_live import volunteers
from load_part import Part, Say, Scale
from load_rates import HA_PROXY, rates
from load_report import markdown, show
from load_transfer import transfer
from rich.console import Console

RESULTS: Final = FOLDER.parent / "docs" / "results"
PARTS: Final[Mapping[str, Callable[[Scale, Say], Part]]] = {
    "volunteers": volunteers,
    "haproxy": partial(volunteers, title="alive, through HAProxy", changes={HA_PROXY: "1"}),
    "rates": rates,
    "ledger": ledger,
    "transfer": transfer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What the coordinator's door takes.")
    parser.add_argument("--quick", action="store_true", help="everything small; writes no page")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to a file")
    parser.add_argument("--folder", type=Path, help="where servers keep their state (4 GB)")
    options = parser.parse_args()
    command = " ".join(["python benchmarks/load.py", *(f"--only {options.only}" for _ in [0] if options.only)])
    results: dict[str, Any] = {}
    # Short: the paths of unix sockets begin with it.
    with tempfile.TemporaryDirectory(prefix="rk-load-", dir=options.folder) as scratch:
        scale = Scale(Path(scratch))
        if options.quick:
            scale = dataclasses.replace(
                scale,
                volunteers=200,
                live_s=20.0,
                crowd=100,
                step_s=4.0,
                rates=(50, 200),
                shards=2_000,
                transfer_bytes=2**24,
            )
        for name in [options.only] if options.only else PARTS:
            results[name] = measure(name, command, partial(PARTS[name], scale))
            if not options.quick:
                keep(name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def measure(name: str, command: str, part_of: Callable[[Say], Part]) -> dict[str, Any]:
    """A part's result, with what it depends on."""
    before = os.getloadavg()[0]
    console = Console(stderr=True)
    with console.status(name) as status:

        def say(text: str) -> None:
            status.update(f"{name}: {text}")
            if not console.is_terminal:
                console.print(f"{name}: {text}", highlight=False)

        part = part_of(say)
    return dataclasses.asdict(part) | {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": [before, os.getloadavg()[0]],
        "machine": machine(),
    }


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Put one part's result beside what was measured of the others, and write the page."""
    numbers = RESULTS / "load.json"
    known = json.loads(numbers.read_text()) if numbers.exists() else {}
    known[name] = result
    ordered = {part: known[part] for part in PARTS if part in known}
    numbers.write_text(json.dumps(ordered, indent=1) + "\n")
    (RESULTS / "load.md").write_text(markdown(ordered))


if __name__ == "__main__":
    main()
