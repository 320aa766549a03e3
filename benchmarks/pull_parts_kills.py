"""Part 3 of benchmarks/pull.py: downloads that are killed with SIGKILL and started again, and what is sent twice.

What always holds: the second run ends with the version's bytes; what the folder holds after the kill is looked at
before that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aggregate_run import QUIET, THREADS, MissingError, run
from pull_part import Scale
from pull_site import HUB, RANKUP, Site, folder_before, kind_of, site_of
from results import Part, Say

from rankup.folder import STATE_NAME

POLL_S: Final = 0.002
RESENT_BYTES: Final = 2**20
"""Far less than one of the files that a version has."""


@dataclass(frozen=True)
class Undisturbed:
    sent: int
    wall_s: float


@dataclass(frozen=True)
class Kill:
    """One download that was killed and started again."""

    point: float
    """Share of an undisturbed download's bytes, or of its time."""
    killed: bool
    """False: it had finished before."""
    sent_before: int
    resent: int
    """Bytes of both runs that an undisturbed download does not need."""
    left: str
    """What the folder held after the kill."""


def kills(scale: Scale, peers: Path, say: Say) -> Part:
    part = Part(f"kill -9 at {scale.kills} points, then the same command again")
    part.table("", "way", "killed", "most sent again, MB", "mean, MB", "remarks")
    site = site_of(scale, scale.cases[0], peers)
    with site.server:
        for way, update in ((RANKUP, False), (RANKUP, True), (HUB, False)):
            kind = kind_of(0 if update else None, 1)
            try:
                usual = _undisturbed(site, way, update)
                found = []
                for number in range(1, scale.kills + 1):
                    say(f"{way}, {kind}: kill {number} of {scale.kills}")
                    found.append(_kill(site, way, update, number / (scale.kills + 1), usual))
            except MissingError as exc:
                part.row(f"{way}, {kind}", *[""] * 3, f"missing: {exc} is not installed")
                continue
            most = max(one.resent for one in found)
            left = Counter(one.left for one in found)
            remarks = "the folder held " + ", ".join(f"{what}: {count} ×" for what, count in left.items())
            part.row(
                f"{way}, {kind}",
                f"{sum(one.killed for one in found)} × at shares of its {'time' if update else 'bytes'}",
                f"{most / 1e6:.2f}",
                f"{sum(one.resent for one in found) / len(found) / 1e6:.2f}",
                remarks,
            )
            part.raw[f"{way}, {kind}"] = [vars(one) for one in found]
            if way == RANKUP:
                part.goal(
                    f"{kind}: at most {RESENT_BYTES / 2**20:g} MiB sent again after a kill",
                    f"{most / 2**20:.2f} MiB at most",
                    met=most <= RESENT_BYTES,
                    why="what was under way on every connection is lost",
                )
    part.notes += [
        f"The server sends no more than {scale.kill_bytes_per_s / 1e6:g} MB/s in all. Sent again: bytes of both runs "
        "without those of an undisturbed one; what the kernel had taken from the server and the killed process had not "
        "read yet is among it, and so is the manifest, which the second run reads anew. Every folder held the version "
        "at the end.",
        "This huggingface_hub gives each download a temporary name of its own: a new process begins files anew that "
        "were not finished, and finished ones are put in place at once. rankup pull changes no file of the folder "
        "before all have arrived and been checked.",
    ]
    return part


def _undisturbed(site: Site, way: str, update: bool) -> Undisturbed:
    """The fastest of three: what is killed at a share of that time has hardly ever finished before."""
    found = []
    for _ in range(3):
        to = folder_before(site, way, version=0 if update else None)
        site.server.reset(bytes_per_s=site.scale.kill_bytes_per_s)
        ran = run(site.command(way, 1, to))
        found.append(Undisturbed(site.server.settled(), ran.wall_s))
    return min(found, key=lambda one: one.wall_s)


def _kill(site: Site, way: str, update: bool, point: float, usual: Undisturbed) -> Kill:
    to = folder_before(site, way, version=0 if update else None)
    site.server.reset(bytes_per_s=site.scale.kill_bytes_per_s)
    process = subprocess.Popen(
        [str(part) for part in site.command(way, 1, to)],
        env={**os.environ, **QUIET, **THREADS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = time.monotonic()
    while process.poll() is None:
        elapsed_s = time.monotonic() - started
        share = elapsed_s / usual.wall_s if update else site.server.sent() / usual.sent
        if share >= point:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(POLL_S)
    killed = process.wait() == -signal.SIGKILL
    sent_before = site.server.settled()
    left = _left(site, to)
    run(site.command(way, 1, to))
    sent = site.server.settled()
    assert site.holds(to, 1), f"{way}: the folder does not hold the version after a kill"
    return Kill(point, killed, sent_before, max(0, sent - usual.sent), left)


def _left(site: Site, to: Path) -> str:
    """What somebody finds who loads the folder now."""
    for version in (0, 1):
        if site.holds(to, version):
            return f"version {version}"
    if not any(path.is_file() and not path.name.startswith(".") for path in to.glob("*")):
        return "no file yet"
    return "some of the files" if _state(to).get("complete", True) else "some of the files, and a note that says so"


def _state(folder: Path) -> Mapping[str, Any]:
    path = folder / STATE_NAME
    state: Mapping[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return state
