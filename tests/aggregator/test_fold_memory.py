"""The memory of a fold: a few tiles and the factors, however large the tensor is.

This file is also the script that folds: each measurement is the peak of a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folder_store import FolderStore

from aggregator.fold import fold_group
from aggregator.groups import Layout, open_group_writer
from rankup.delta import DeltaHeader, write_delta
from rankup.dtypes import export_of
from rankup.fixedpoint import quantise
from rankup.foldrows import Tile
from rankup.recipe import OuterStep
from rankup.records import Manifest, Term
from rankup.store import blob_key

D_IN = 2048
CONTRIBUTIONS = 4
RANK = 16
NESTEROV = OuterStep(learning_rate=0.75, momentum=0.875)
TILE_BYTES = 2 * 2**20


def peak_bytes() -> int:
    """Largest resident set of this process so far; where there is /proc, without what it inherited before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_inputs(folder: Path, d_out: int) -> None:
    """A store with one float32 tensor (d_out, D_IN), its momentum and some deltas, written row by row."""
    store = FolderStore(folder)
    rng = np.random.default_rng(0)
    layouts = {"w": Layout((d_out, D_IN), "BF16", "linear")}
    with open_group_writer(1, 1, layouts, {"w"}) as writer:
        rows = (rng.standard_normal((64, D_IN), dtype=np.float32) for _ in range(d_out // 64))
        writer.write("w", (Tile(each, export_of(each, "BF16"), each) for each in rows))
        group, entries = writer.finish(store)  # type: ignore[arg-type]
    terms = []
    for number in range(CONTRIBUTIONS):
        factors = quantise(0.01 * rng.standard_normal((d_out, RANK)), rng.standard_normal((RANK, D_IN)))
        header = DeltaHeader(round_id="r", lease_id=f"l{number}", base_manifest="0" * 64)
        ref = write_delta(folder / "delta", header, {"w": factors})
        store.put_file(blob_key(ref.sha256), folder / "delta")
        terms.append(
            Term(
                contribution=ref.sha256,
                size_bytes=ref.size_bytes,
                worker_id="w",
                worker_name="w",
                shard=number,
                tokens=1,
                coefficient=2**14,
            )
        )
    manifest = Manifest(
        model="m",
        version=0,
        parent=None,
        round_id=None,
        recipe=None,
        terms=tuple(terms),
        tensors=entries,
        groups=(group,),
        files=(),
        base_model="b",
        licence="l",
        created_at=0.0,
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def measure(folder: Path, d_out: int) -> dict[str, int]:
    make_inputs(folder, d_out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_tensor_of_96_mib_with_momentum_takes_less_memory_than_its_own_size(tmp_path: Path) -> None:
    rows = 96 * 2**20 // (4 * D_IN)
    large = measure(tmp_path / "large", rows)
    small = measure(tmp_path / "small", rows // 16)
    tensor_bytes = 4 * rows * D_IN
    factor_bytes = CONTRIBUTIONS * 2 * RANK * (rows + D_IN)
    # Read, and read as a part of what was read, and in the order of the sum.
    assert large["peak"] - small["peak"] < 12 * TILE_BYTES + 3 * factor_bytes
    assert large["peak"] - large["before"] < tensor_bytes
    assert large["folded"] == 1


if __name__ == "__main__":
    place = Path(sys.argv[1])
    parent = Manifest.model_validate_json((place / "manifest.json").read_text())
    before = peak_bytes()
    made = fold_group(
        FolderStore(place),  # type: ignore[arg-type]
        parent,
        1,
        parent.terms,
        16,
        outer=NESTEROV,
        tile_bytes=TILE_BYTES,
    )
    changed = int(made.tensors["w"].master != parent.tensors["w"].master)
    sys.stdout.write("\n" + json.dumps({"before": before, "peak": peak_bytes(), "folded": changed}))
