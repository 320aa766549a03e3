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
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from load_ledger import ledger
from load_live import volunteers
from load_part import Scale
from load_rates import HA_PROXY, rates
from load_transfer import transfer
from results import Part, Say, keep, measure, show

HEAD: Final = (
    "# What the door takes",
    "",
    "Written by `benchmarks/load.py` (`make bench-load`): simulated volunteers over real HTTP on loopback, against",
    "`rankup up` with real Valkey, real object storage and real Ray Serve. Nothing here is typed in by hand.",
)
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
                keep("load", HEAD, tuple(PARTS), name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
