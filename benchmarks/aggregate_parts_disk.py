"""Parts 2 and 3 of benchmarks/aggregate.py: memory and time of a merge, and of a fold larger than memory, from disk.

A part is a function (scale, peers, say) -> `Part`, as in aggregate_parts_cpu.py. All files lie in a temporary folder
that is removed in the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from aggregate_part import Part, Say, Scale
from aggregate_run import MODELS, MissingError, Ran, Stream, child, run

PIECE_BYTES: Final = 8 * 1024**2


def memory(scale: Scale, peers: Path, say: Say) -> Part:
    part = Part(f"Merging {scale.adapters} adapters of rank {scale.rank} into {scale.merged} (bfloat16) on disk")
    with _folder(scale, 11 * 2 * MODELS[scale.merged].entries + 2**30) as folder:
        say(f"making {scale.merged} and {scale.adapters} adapters")
        make = {"way": "make", "folder": str(folder), "model": scale.merged}
        made = child("aggregate_memory.py", make | {"adapters": scale.adapters, "rank": scale.rank}).answer
        base, adapters = folder / "base", [folder / f"adapter-{i}" for i in range(scale.adapters)]
        place = {"base": str(base), "adapters": [str(path) for path in adapters]}
        ways: dict[str, tuple[str, Callable[[Path], Ran]]] = {
            "rankup": ("rankup merge", lambda out: run(["rankup", "merge", base, *adapters, "--out", out, "--json"])),
            "peft": (
                "peft: from_pretrained, merge_and_unload, save_pretrained",
                lambda out: child("aggregate_peers.py", {"way": "peft_merge", **place, "out": str(out)}, python=peers),
            ),
            "mergekit": (
                "mergekit: task_arithmetic of base+adapter",
                lambda out: child(
                    "aggregate_peers.py",
                    {"way": "mergekit_merge", **place, "out": str(out), "cache": str(folder / "cache")},
                    python=peers,
                ),
            ),
        }
        ran: dict[str, Ran] = {}
        for way, (what, merge) in ways.items():
            say(f"{what}")
            try:
                ran[way] = merge(folder / way)
            except MissingError as exc:
                part.row(what, remarks=f"missing: {exc} is not installed")
            shutil.rmtree(folder / "cache", ignore_errors=True)
        say("comparing the merged models")
        merged = {way: str(folder / way) for way in ran}
        right = child("aggregate_memory.py", {"way": "compare", "folder": str(folder), "merged": merged}).answer
    for way, result in ran.items():
        part.versions |= result.answer.get("versions", {})
        ratio = result.peak_bytes / ran["rankup"].peak_bytes
        part.row(
            ways[way][0],
            cpu_s=result.cpu_s,
            wall_s=result.wall_s,
            peak_bytes=result.peak_bytes,
            against="" if way == "rankup" else f"{ratio:.0f} × the memory of rankup merge",
            remarks=f"{right[way]:.4%} of entries correctly rounded; {result.anonymous_bytes / 1e6:.0f} MB of the peak "
            "are no file's pages",
        )
        part.raw[way] = {
            "cpu_s": result.cpu_s,
            "wall_s": result.wall_s,
            "peak_bytes": result.peak_bytes,
            "anonymous_bytes": result.anonymous_bytes,
            "correct": right[way],
        }
    part.raw["base_bytes"] = made["base_bytes"]
    part.notes += [
        f"Whole processes, one thread: start, load, merge, write. The model has {made['base_bytes'] / 1e9:.2f} GB; "
        "its files were just written, so they are read from the page cache. Pages of files that a process has mapped "
        "count for its peak.",
        "mergekit has no sum of adapters: it merges each into a copy of the model on disk, then adds up the "
        "differences.",
        "correctly rounded: equal to base + sum of B·A, in float64, rounded once to bfloat16, for rows of every weight "
        "of one layer.",
    ]
    return part


@contextmanager
def _folder(scale: Scale, needed_bytes: int) -> Iterator[Path]:
    """A folder that is removed in the end. Raises RuntimeError where the disk is too small."""
    folder = Path(tempfile.mkdtemp(prefix="rankup-benchmark-", dir=scale.folder))
    try:
        free = shutil.disk_usage(folder).free
        if free < needed_bytes:
            raise RuntimeError(
                f"{needed_bytes / 1e9:.0f} GB are needed in {folder.parent}, {free / 1e9:.0f} GB are free"
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- a large model -----------------------------------------------------------------------------------------------------

LARGE_LIMIT_BYTES: Final = 2 * 2**30


def large(scale: Scale, peers: Path, say: Say) -> Part:
    count = scale.large_contributions
    part = Part(f"A fold of {scale.large}: float32 masters, {count} contributions of rank {scale.rank}, from disk")
    plan = child("aggregate_large.py", {"way": "plan", "model": scale.large}).answer
    with _folder(scale, 2**32 + count * 2**27) as folder:
        deltas = []
        for number in range(count):
            say(f"making delta {number + 1} of {count}")
            make = {"way": "make_delta", "folder": str(folder), "model": scale.large, "rank": scale.rank}
            deltas.append(child("aggregate_large.py", make | {"number": number}).answer)
        with (
            Stream(
                "aggregate_large.py", {"way": "make_groups", "folder": str(folder), "model": scale.large}, {}
            ) as maker,
            Stream(
                "aggregate_large.py",
                {"way": "fold", "folder": str(folder), "deltas": deltas},
                {"TMPDIR": str(folder)},
            ) as folder_process,
        ):
            total = _fold_groups(plan["groups"], maker, folder_process, folder, say)
    peak = folder_process.peak_bytes
    moved = total["read"] + total["written"] + sum(delta["size_bytes"] for delta in deltas)
    copied = total["read"] + total["written"]
    part.row(
        f"fold of {plan['bytes'] / 1e9:.1f} GB of masters in {len(plan['groups'])} groups",
        cpu_s=total["fold_cpu_s"],
        wall_s=total["fold_wall_s"],
        peak_bytes=peak,
        against=f"{total['fold_wall_s'] / total['copy_wall_s']:.1f} × the time of the copy",
        remarks=f"{moved / total['fold_wall_s'] / 1e6:.0f} MB/s read and written",
    )
    part.row(
        "plain copy of the same bytes",
        cpu_s=total["copy_cpu_s"],
        wall_s=total["copy_wall_s"],
        remarks=f"{copied / total['copy_wall_s'] / 1e6:.0f} MB/s read and written",
    )
    part.goal("finishes within 2 GiB of memory", f"{peak / 2**20:.0f} MiB", met=peak <= LARGE_LIMIT_BYTES)
    part.raw |= total | {"peak_bytes": peak, "master_bytes": plan["bytes"], "delta_bytes": moved - copied}
    part.notes += [
        "The masters are made, folded and removed group by group, since parent and child together would need "
        f"{plan['bytes'] * 2.5 / 1e9:.0f} GB of disk. One process folds all groups; only its calls of fold_group are "
        "timed. Object storage is a folder of the same disk: blobs are linked into it after fsync. Before a fold and "
        "before a copy the master is dropped from the page cache; the deltas stay in it.",
        "A fold reads the master, hashes it, and writes the new master and the bfloat16 export, hashed as well. The "
        "copy reads as many bytes and writes as many, with fsync, in the same run, group by group.",
    ]
    return part


def _fold_groups(
    groups: Sequence[Sequence[str]], maker: Stream, folding: Stream, folder: Path, say: Say
) -> dict[str, float]:
    total = dict.fromkeys(("fold_cpu_s", "fold_wall_s", "copy_cpu_s", "copy_wall_s", "read", "written"), 0.0)
    for number, names in enumerate(groups):
        say(f"group {number + 1} of {len(groups)}: {total['fold_wall_s']:.0f} s of folding so far")
        made = maker.ask(names)
        blob = Path(made["blob"])
        _forget(blob)
        answer = folding.ask(made["manifest"])
        total["fold_cpu_s"] += answer["cpu_s"]
        total["fold_wall_s"] += answer["wall_s"]
        for path in answer["files"]:
            Path(path).unlink()
        if answer["written"]:  # a group that no contribution changes is neither read nor written
            _forget(blob)
            cpu, wall = time.process_time(), time.perf_counter()
            _copy(blob, folder / "copy", folder / "half")
            total["copy_cpu_s"] += time.process_time() - cpu
            total["copy_wall_s"] += time.perf_counter() - wall
            total["read"] += made["bytes"]
            total["written"] += answer["written"]
        blob.unlink()
    return total


def _forget(path: Path) -> None:
    """Drop a file that is on disk from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _copy(source: Path, whole: Path, half: Path) -> None:
    """Write all of a file, and half of it again: as many bytes as a master and its bfloat16 export."""
    with source.open("rb") as old, whole.open("wb") as first, half.open("wb") as second:
        while piece := old.read(PIECE_BYTES):
            first.write(piece)
            second.write(piece[: len(piece) // 2])
        for file in (first, second):
            file.flush()
            os.fsync(file.fileno())
    whole.unlink()
    half.unlink()
