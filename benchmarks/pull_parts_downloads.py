"""Part 2 of benchmarks/pull.py: downloads from a server on loopback, as fast as it goes and over a line.

The server counts bytes and, where a line is asked for, lets no more than its rate pass. What always holds: after every
download the folder is compared with the version's files; ways take turns.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from aggregate_run import MissingError, Ran, run
from pull_part import Scale, hashes, megabytes, seconds
from pull_site import HUB, RANKUP, Site, folder_before, kind_of, site_of
from results import Part, Say

SLACK: Final = 1.05


def downloads(scale: Scale, peers: Path, say: Say) -> Part:
    part = Part("Downloads from a server on loopback")
    part.table("", "way", "wall s", "CPU s", "MB sent", "requests", "peak MB", "against", "remarks")
    for case in scale.cases:
        site = site_of(scale, case, peers)
        with site.server:
            steps = [(None, 1), (0, 1), (0, 2)] if site.folder(2).exists() else [(None, 1), (0, 1)]
            for before, after in steps:
                for rate in (None, scale.line_bytes_per_s):
                    _compare(part, site, before, after, rate, say)
            _masters(part, site, say)
    part.notes += [
        f"Whole processes, imports counted; the fastest by wall clock of {scale.repeat} where the server sends as fast "
        f"as it can, and one where it sends no more than {scale.line_bytes_per_s / 1e6:g} MB/s in all "
        f"({8 * scale.line_bytes_per_s / 1e6:g} Mbit/s). Both ways may use as many threads as they like; numerical "
        "libraries get one. MB sent are bodies of answers, as the server counts.",
        "rankup pull checks a signature, the SHA-256 of every file that it leaves in the folder, and of what was "
        "there; snapshot_download trusts the server and compares sizes.",
    ]
    return part


def _compare(part: Part, site: Site, before: int | None, after: int, rate: float | None, say: Say) -> None:
    found: dict[str, tuple[Ran, int, int]] = {}
    kind = kind_of(before, after)
    for number in range(site.scale.repeat if rate is None else 1):
        for way in (RANKUP, HUB):
            say(f"{site.case}: {way}, {kind}{'' if rate is None else ', over a line'}, run {number + 1}")
            try:
                to = folder_before(site, way, version=before)
                site.server.reset(bytes_per_s=rate)
                ran = run(site.command(way, after, to))
            except MissingError as exc:
                part.row(f"{site.case}: {way}, {kind}", *[""] * 6, f"missing: {exc} is not installed")
                continue
            sent, answers = site.server.settled(), len(site.server.answers())
            assert site.holds(to, after), f"{way}: the folder does not hold the version"
            part.versions |= ran.answer.get("versions", {})
            if way not in found or ran.wall_s < found[way][0].wall_s:
                found[way] = (ran, sent, answers)
    speed = "as fast as it goes" if rate is None else f"{8 * rate / 1e6:g} Mbit/s"
    part.raw[f"{site.case}, {kind}, {speed}"] = {
        way: {"wall_s": ran.wall_s, "cpu_s": ran.cpu_s, "sent": sent, "peak_bytes": ran.peak_bytes}
        for way, (ran, sent, _) in found.items()
    }
    for way, (ran, sent, answers) in found.items():
        against = ""
        if way == RANKUP and HUB in found:
            other, other_sent, _ = found[HUB]
            against = f"{HUB} takes {other.wall_s / ran.wall_s:.1f} × the time, {other_sent / sent:.1f} × the bytes"
        part.row(
            f"{site.case}: {way}, {kind}, {speed}",
            seconds(ran.wall_s),
            seconds(ran.cpu_s),
            megabytes(sent),
            str(answers),
            f"{ran.peak_bytes / 1e6:.0f}",
            against,
            "",
        )
    if RANKUP in found and HUB in found:
        (mine, sent, _), (theirs, their_sent, _) = found[RANKUP], found[HUB]
        even = (their_sent - sent) / max(1e-9, mine.wall_s - theirs.wall_s)
        pays = (
            f"; it is faster over any line of less than {8 * even / 1e9:.1f} Gbit/s" if their_sent > 1.5 * sent else ""
        )
        part.goal(
            f"{site.case}: {kind}, {speed}: at most {SLACK - 1:.0%} more time than {HUB}",
            f"{mine.wall_s:.2f} s against {theirs.wall_s:.2f} s",
            met=mine.wall_s <= SLACK * theirs.wall_s,
            why=f"{mine.cpu_s:.1f} s of CPU time for imports, hashes and decoding{pays}",
        )


def _masters(part: Part, site: Site, say: Say) -> None:
    """What an aggregator or a sceptic has: float32 masters of version 1, out of those of version 0 and the deltas."""
    say(f"{site.case}: masters")
    to = site.scale.scratch / "masters"
    shutil.rmtree(to, ignore_errors=True)
    run([*site.command(RANKUP, 0, to), "--master"])
    site.server.reset()
    ran = run([*site.command(RANKUP, 1, to), "--master"])
    sent, answers = site.server.settled(), len(site.server.answers())
    manifest = site.manifest(1)
    wanted = {group.master.path: group.master.sha256 for group in manifest.groups}
    assert hashes(to, sorted(wanted)) == wanted, "the folder does not hold the masters"
    whole = sum(group.master.size_bytes for group in manifest.groups)
    shutil.rmtree(to)
    part.row(
        f"{site.case}: {RANKUP} --master, {kind_of(0, 1)}, as fast as it goes",
        seconds(ran.wall_s),
        seconds(ran.cpu_s),
        megabytes(sent),
        str(answers),
        f"{ran.peak_bytes / 1e6:.0f}",
        f"all masters have {whole / sent:.0f} × the bytes",
        "made again from the round's contributions, bit for bit",
    )
    part.raw[f"{site.case}, masters"] = {"wall_s": ran.wall_s, "sent": sent, "whole_bytes": whole}
