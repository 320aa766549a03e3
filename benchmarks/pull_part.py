"""What the parts of benchmarks/pull.py have in common: how much is measured, and what comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MEGABYTE: Final = 1e6


@dataclass(frozen=True)
class Scale:
    """How much is measured, and of what."""

    rounds: Path
    """Where benchmarks/rounds.py keeps its models."""
    scratch: Path
    """Where files are made."""
    cases: tuple[str, ...] = ("lr2e-4", "lr1e-3")
    repeat: int = 3
    """Processes for each way; the fastest counts."""
    line_bytes_per_s: float = 12.5e6
    """Of a download over a line: 100 Mbit/s."""
    kills: int = 10
    kill_bytes_per_s: float = 40e6
    """Of a download that is killed: slow enough that it can be killed where it should be."""


def megabytes(count: float) -> str:
    return f"{count / MEGABYTE:.1f}" if count < 100 * MEGABYTE else f"{count / MEGABYTE:.0f}"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """File name -> sha256; an empty one where there is no such file."""
    found = {}
    for name in names:
        path = folder / name
        found[name] = ""
        if path.is_file():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def tensor_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))
