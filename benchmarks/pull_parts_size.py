"""Part 1 of benchmarks/pull.py: how large the difference between two versions is, and how fast it is coded.

What always holds: all ways code the same files, those that the round changed, and every answer is compared with the
child's bytes; ways take turns, each in a process of its own with one thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aggregate_run import MissingError, Ran, child
from pull_part import Scale, hashes, megabytes, tensor_files
from results import Part, Say

PATCH: Final = "patch"
PLANES: Final = "planes"
GOAL_RATIO: Final = 9.0
GOAL_DECODE: Final = 200.0
"""MB of weights a second and core."""
GOAL_CASE: Final = "lr2e-4"


@dataclass(frozen=True)
class Way:
    label: str
    script: str
    encode: str
    decode: str
    more: Mapping[str, Any]
    from_parent: bool = True
    """Whether the parent is needed. Then only changed files are coded, otherwise all."""


WAYS: Final[Mapping[str, Way]] = {
    PATCH: Way("rankup patch", "pull_codecs.py", "patch_encode", "patch_decode", {}),
    PLANES: Way(
        "zstd-3 of the byte planes of the int16 difference", "pull_peers.py", "planes_encode", "planes_decode", {}
    ),
    "zipnn-xor": Way("ZipNN of child xor parent", "pull_peers.py", "zipnn_encode", "zipnn_decode", {"delta": True}),
    "zipnn": Way(
        "ZipNN of the child", "pull_peers.py", "zipnn_encode", "zipnn_decode", {"delta": False}, from_parent=False
    ),
    "zstd": Way("zstd-3 of the child", "pull_peers.py", "zstd_encode", "zstd_decode", {}, from_parent=False),
}


@dataclass(frozen=True)
class Pair:
    """Two versions: the files of weights that the round changed, and those that it did not."""

    parent: Path
    child: Path
    changed: list[str]
    same: list[str]

    def names(self, way: Way) -> list[str]:
        return self.changed if way.from_parent else [*self.changed, *self.same]

    def coded_bytes(self, way: Way) -> int:
        """Bytes of weights that a way codes."""
        return self.changed_bytes if way.from_parent else self.all_bytes

    @property
    def changed_bytes(self) -> int:
        return sum((self.child / name).stat().st_size for name in self.changed)

    @property
    def all_bytes(self) -> int:
        return self.changed_bytes + sum((self.child / name).stat().st_size for name in self.same)


@dataclass(frozen=True)
class Coded:
    """The fastest of several processes; pairs are of encoding and of decoding."""

    size_bytes: int
    wall_s: tuple[float, float]
    cpu_s: tuple[float, float]
    peak_bytes: tuple[int, int]
    copy_cpu_s: float
    """Of copying what was decoded with a hash of it; 0 where that was not measured."""


def pair_of(scale: Scale, case: str) -> Pair:
    parent, after = scale.rounds / case / "0", scale.rounds / case / "1"
    names = tensor_files(after)
    old, new = hashes(parent, names), hashes(after, names)
    return Pair(parent, after, [n for n in names if old[n] != new[n]], [n for n in names if old[n] == new[n]])


def sizes(scale: Scale, peers: Path, say: Say) -> Part:
    columns = ("way", "MB", "below full", "of changed files", "encode MB/s", "decode MB/s", "peak MB", "remarks")
    part = Part("What a round changes, written down")
    part.table("", *columns)
    made = json.loads((scale.rounds / "rounds.json").read_text())
    for case in scale.cases:
        pair = pair_of(scale, case)
        coded = _coded(part, scale, case, pair, peers, say)
        limit = child("pull_codecs.py", {"way": "entropy", **_files(pair, pair.changed)}).answer
        part.raw[case] = {
            "round": made[case],
            "all_bytes": pair.all_bytes,
            "changed_bytes": pair.changed_bytes,
            "entropy": limit,
            "ways": {way: vars(one) for way, one in coded.items()},
        }
        _rows(part, case, pair, coded, made[case], limit)
        if case == GOAL_CASE and PATCH in coded:
            _size_goal(part, pair, coded, made[case], limit)
        if PATCH in coded:
            _speed_goal(part, case, pair, coded)
    part.notes += [
        "MB are 10^6 bytes. Below full: bytes of all weights in bfloat16 by what has to be fetched. Ways that need the "
        "parent code the files that the round changed, since the others are there already; of changed files: bytes of "
        "these by their coded bytes. Ways that do not need it code all files.",
        f"MB/s: weights that were coded by CPU seconds, one thread, the fastest of {scale.repeat} processes, "
        "files read from and written to the page cache. Making a patch hashes both files and the patch, applying it "
        "hashes the result and waits until that is on disk; the other ways do neither. The peak is that of encoding / "
        "decoding; zstd-3 of planes holds one tensor, ZipNN takes a whole file and codes within the buffer that it is "
        "given.",
        "The base is dequantised from a file of 4 bits a weight, so the parent's weights lie on a grid and the child's "
        "where the round left them; trained in bfloat16, a model leaves a coder without a parent less to find.",
        "order-0 limit: entropy of single differences, with one table for all files; given the old exponent: with one "
        "table for each exponent of the parent's weight. The patch has tables for each block of a tensor and may be "
        "below.",
    ]
    return part


def _files(pair: Pair, names: list[str]) -> dict[str, list[str]]:
    return {
        "child": [str(pair.child / name) for name in names],
        "base": [str(pair.parent / name) for name in names],
    }


def _coded(part: Part, scale: Scale, case: str, pair: Pair, peers: Path, say: Say) -> dict[str, Coded]:
    runs: dict[str, list[tuple[int, Ran, Ran]]] = {}
    wanted = hashes(pair.child, [*pair.changed, *pair.same])
    for number in range(scale.repeat):
        for name, way in WAYS.items():
            say(f"{case}: {way.label}, run {number + 1} of {scale.repeat}")
            folder = scale.scratch / "codec"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            names = pair.names(way)
            packed = [str(folder / f"{file}.packed") for file in names]
            again = [str(folder / file) for file in names]
            files, python = _files(pair, names), ({"python": peers} if way.script == "pull_peers.py" else {})
            try:
                encoded = child(way.script, {"way": way.encode, **files, "out": packed, **way.more}, **python)
                arguments = {"way": way.decode, "packed": packed, "base": files["base"], "out": again}
                arguments |= {"expected": files["child"]} if name == PATCH else {}
                decoded = child(way.script, arguments | way.more, **python)
            except MissingError as exc:
                if not number:
                    part.row(f"{case}: {way.label}", "", "", "", "", "", "", f"missing: {exc} is not installed")
                continue
            assert hashes(folder, names) == {name: wanted[name] for name in names}, f"{way.label} gives other bytes"
            size_bytes = sum(Path(path).stat().st_size for path in packed)
            runs.setdefault(name, []).append((size_bytes, encoded, decoded))
            part.versions |= encoded.answer["versions"]
    shutil.rmtree(scale.scratch / "codec", ignore_errors=True)
    return {name: _best(found) for name, found in runs.items()}


def _best(runs: list[tuple[int, Ran, Ran]]) -> Coded:
    encoded, decoded = [run[1] for run in runs], [run[2] for run in runs]
    return Coded(
        runs[0][0],
        (min(run.answer["wall_s"] for run in encoded), min(run.answer["wall_s"] for run in decoded)),
        (min(run.answer["cpu_s"] for run in encoded), min(run.answer["cpu_s"] for run in decoded)),
        (max(run.peak_bytes for run in encoded), max(run.peak_bytes for run in decoded)),
        min(run.answer.get("copy_cpu_s", 0.0) for run in decoded),
    )


def _rows(
    part: Part, case: str, pair: Pair, coded: Mapping[str, Coded], made: Mapping[str, Any], limit: Mapping[str, float]
) -> None:
    part.row(
        f"{case}: full bfloat16",
        megabytes(pair.all_bytes),
        "1.0 ×",
        "1.0 ×",
        "",
        "",
        "",
        f"{made['steps']} steps at learning rate {made['learning_rate']:g}: relative change "
        f"{made['relative_change']:.2g}, {made['changed_linear']:.0%} of the weights of linear layers changed",
    )
    for name, one in coded.items():
        way = WAYS[name]
        coded_bytes = pair.coded_bytes(way)
        remarks = f"{16 * one.size_bytes / coded_bytes:.2f} bits a weight"
        if way.from_parent and name != PATCH and PATCH in coded:
            remarks += f"; the patch is {one.size_bytes / coded[PATCH].size_bytes:.2f} × smaller"
        part.row(
            f"{case}: {way.label}",
            megabytes(one.size_bytes),
            f"{pair.all_bytes / one.size_bytes:.1f} ×",
            f"{coded_bytes / one.size_bytes:.1f} ×" if way.from_parent else "",
            f"{coded_bytes / one.cpu_s[0] / 1e6:.0f}",
            f"{coded_bytes / one.cpu_s[1] / 1e6:.0f}",
            " / ".join(f"{peak / 1e6:.0f}" for peak in one.peak_bytes),
            remarks,
        )
    for key, label in (
        ("plain_bits", "order-0 limit"),
        ("given_exponent_bits", "order-0 limit given the old exponent"),
    ):
        size_bytes = limit[key] * limit["weights"] / 8
        part.row(
            f"{case}: {label}",
            megabytes(size_bytes),
            f"{pair.all_bytes / size_bytes:.1f} ×",
            f"{pair.changed_bytes / size_bytes:.1f} ×",
            "",
            "",
            "",
            f"{limit[key]:.2f} bits a weight",
        )


def _size_goal(
    part: Part, pair: Pair, coded: Mapping[str, Coded], made: Mapping[str, Any], limit: Mapping[str, float]
) -> None:
    one = coded[PATCH]
    least = limit["given_exponent_bits"] * limit["weights"] / 8
    part.goal(
        f"patch at least {GOAL_RATIO:.0f} × below full bfloat16 at relative change {made['relative_change']:.1e}",
        f"{pair.all_bytes / one.size_bytes:.1f} × of all weights, {pair.changed_bytes / one.size_bytes:.1f} × of the "
        "changed files alone",
        met=pair.all_bytes / one.size_bytes >= GOAL_RATIO,
        why=f"the order-0 entropy given the old exponent allows {pair.all_bytes / least:.1f} ×; the patch is "
        f"{one.size_bytes / least - 1:.0%} above it",
    )
    if PLANES in coded:
        part.goal(
            "smaller than zstd-3 of byte planes",
            f"{coded[PLANES].size_bytes / one.size_bytes:.2f} ×",
            met=one.size_bytes < coded[PLANES].size_bytes,
            why="zstd codes these planes better",
        )


def _speed_goal(part: Part, case: str, pair: Pair, coded: Mapping[str, Coded]) -> None:
    cpu_s, wall_s = coded[PATCH].cpu_s[1], coded[PATCH].wall_s[1]
    rate = pair.changed_bytes / cpu_s / 1e6
    copy_s = coded[PATCH].copy_cpu_s
    beside = ""
    if PLANES in coded:
        beside = f"; zstd-3 of planes comes to {pair.changed_bytes / coded[PLANES].cpu_s[1] / 1e6:.0f} MB/s beside it"
    part.goal(
        f"{case}: a patch is applied at {GOAL_DECODE:.0f} MB/s of weights a core or more",
        f"{rate:.0f} MB/s of CPU time, {pair.changed_bytes / wall_s / 1e6:.0f} MB/s by the clock; without hashing and "
        f"writing the result {pair.changed_bytes / (cpu_s - copy_s) / 1e6:.0f} MB/s",
        met=rate >= GOAL_DECODE,
        why=f"hashing and writing the result takes {copy_s / cpu_s:.0%} of the CPU time{beside}",
    )
