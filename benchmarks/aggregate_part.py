"""What the parts of benchmarks/aggregate.py have in common: how much is measured, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aggregate_run import LLAMA_7B, ONE_LAYER, SMOLLM2, TINYLLAMA

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rank: int = 16
    contributions: int = 64
    repeat: int = 3
    arithmetic: Mapping[str, int] = field(default_factory=lambda: {SMOLLM2.name: 10, TINYLLAMA.name: 2})
    """Model -> passes over one layer in each process."""
    merged: str = TINYLLAMA.name
    adapters: int = 4
    large: str = LLAMA_7B.name
    large_contributions: int = 16
    krum: str = TINYLLAMA.name
    flower_contributions: int = 8
    folder: Path | None = None
    """Where files are made; the system's temporary folder by default."""


QUICK: Final = Scale(
    contributions=8,
    repeat=1,
    arithmetic={ONE_LAYER.name: 2},
    merged=ONE_LAYER.name,
    adapters=2,
    large=ONE_LAYER.name,
    large_contributions=2,
    krum=ONE_LAYER.name,
    flower_contributions=4,
)


@dataclass
class Part:
    """Rows of a table, and the goals that they meet or miss."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """way, cpu_s, wall_s, peak_bytes (each may be None), against, remarks"""
    goals: list[dict[str, Any]] = field(default_factory=list)
    """goal, found, met, why"""
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def row(
        self,
        way: str,
        *,
        cpu_s: float | None = None,
        wall_s: float | None = None,
        peak_bytes: int | None = None,
        against: str = "",
        remarks: str = "",
    ) -> None:
        self.rows.append(
            {
                "way": way,
                "cpu_s": cpu_s,
                "wall_s": wall_s,
                "peak_bytes": peak_bytes,
                "against": against,
                "remarks": remarks,
            }
        )

    def goal(self, goal: str, found: str, *, met: bool, why: str = "") -> None:
        self.goals.append({"goal": goal, "found": found, "met": met, "why": "" if met else why})
