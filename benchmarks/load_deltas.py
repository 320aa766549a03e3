"""Deltas that pass admission, made in a moment: random factors for the weights of a lease, no two the same."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankup.delta import DeltaHeader, write_delta
from rankup.fixedpoint import quantise


@dataclass(frozen=True)
class Delta:
    """The bytes of a delta file."""

    data: bytes
    sha256: str


def make_delta(lease: Mapping[str, Any], *, seed: int) -> Delta:
    """A delta for this grant (as it came in JSON)."""
    dice = np.random.default_rng(seed)
    header = DeltaHeader(round_id=lease["round_id"], lease_id=lease["lease_id"], base_manifest=lease["base_manifest"])
    factors = {
        name: quantise(
            1e-3 * dice.normal(size=(one["d_out"], one["rank"])), dice.normal(size=(one["rank"], one["d_in"]))
        )
        for name, one in lease["targets"].items()
    }
    # In memory, where there is such a folder: a delta is written durably, and a disk would be measured.
    shared = Path("/dev/shm")  # noqa: S108 - a temporary folder is made in it
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        path = Path(folder) / "delta"
        write_delta(path, header, factors)
        data = path.read_bytes()
    return Delta(data, hashlib.sha256(data).hexdigest())
