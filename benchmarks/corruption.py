"""Benchmark: one byte of a published history is changed, 1,000 times over, and whether that is found.

Claim: whatever file it is in, damage is never taken for the model: a pull refuses it, or fetches what is right instead;
a verification says so; and a folder that held a good version holds it still. The goal is met or missed.

    python benchmarks/corruption.py               # 1,000 bytes; writes its part of docs/results/pull.md
    python benchmarks/corruption.py --count 100   # fewer; writes no page

Kinds of files take turns. The byte is drawn from the whole file half of the time, else from its first or its last 256
bytes, where formats keep their structure, and gets another value. Then it is what a user would do next: pull into an
empty folder, update an older version, verify a round, verify a folder. Everything runs in this process, over the
history of benchmarks/corruption_history.py.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import structlog
from corruption_folders import DELTA, LATEST, OLDER, PROOF, Folders, contents
from corruption_history import MODEL, make_history
from pull import HEAD, ORDER
from results import Part, Say, keep, measure, show

from rankup.checkfiles import verify_files
from rankup.errors import RankupError
from rankup.folder import ENVELOPE_NAME, STATE_NAME
from rankup.proofs import check_proof, contribution_digest, prove_contribution, read_proof
from rankup.pull import pull
from rankup.replay import verify_version
from rankup.sources import Patience

Level = Literal["chain", "round", "all"]

COUNT: Final = 1000
EDGE_BYTES: Final = 256
AT_ONCE: Final = Patience(attempts=1)
STORE_FOLDER: Final = "store"
ALL_WELL: Final = "the report says that all is well"
PROVED_BY: Final[tuple[tuple[str, Level], ...]] = (
    ("manifest of the parent", "chain"),
    ("master", "round"),
    ("momentum", "round"),
    ("delta", "round"),
    ("delta", "all"),
)
NOTES: Final = (
    "Refused: an error with a cause and a remedy, or a report that is not ok, and every file of the model as it was. "
    "Got round: the pull ended with exactly the version's bytes, and with a warning. No harm: the same without a word, "
    "as where the byte says when a pointer was written or what a folder has seen before, or where a part of a download "
    "is fetched again. Missed: anything else, another kind of error among it.",
    "Every action was made once without damage as well, and found nothing wrong.",
)

Outcome = Literal["refused", "got round", "no harm", "MISSED"]
"""refused: an error that says what is wrong and what to do, or a report that is not ok, and no file of the folder has
changed; got round: the right bytes, and a warning; no harm: the right bytes without a word; MISSED: all else."""


@dataclass(frozen=True)
class Kind:
    """Files that may be damaged, and what is done when one is."""

    name: str
    action: str
    prepare: Callable[[], list[Path]]
    """Makes the working folder; returns the files of which one will be damaged."""
    attempt: Callable[[], tuple[Outcome, str]]
    """The outcome, and what went wrong where the damage was missed."""


# -- what is done when a file is damaged -------------------------------------------------------------------------------


def update(folders: Folders) -> tuple[Outcome, str]:
    """Pull the latest version into the working folder."""
    held = contents(folders.work)
    try:
        found = pull(folders.source, MODEL, None, folders.work, patience=AT_ONCE)
    except RankupError as exc:
        kept = contents(folders.work) == held
        return ("refused", "") if kept and exc.remedy else ("MISSED", f"files are as before: {kept}; {exc}")
    if contents(folders.work) != folders.good[LATEST]:
        return "MISSED", "the folder has other bytes than the version"
    return ("got round" if found.warnings else "no harm"), ""


def replay(folders: Folders, level: Level) -> tuple[Outcome, str]:
    """Verify the latest version from what object storage holds."""
    key = folders.history.publisher_key
    try:
        report = verify_version(
            folders.source, MODEL, LATEST, cache=folders.work, level=level, publisher_key=key, patience=AT_ONCE
        )
    except RankupError as exc:
        return ("refused", "") if exc.remedy else ("MISSED", f"no remedy: {exc}")
    return ("MISSED", ALL_WELL) if report.ok else ("refused", "")


def check(folders: Folders) -> tuple[Outcome, str]:
    """Verify the files of the working folder; then pull the same version again, which must mend it or refuse."""
    held = contents(folders.work)
    try:
        ok = verify_files(folders.work, publisher_key=folders.history.publisher_key).ok
    except RankupError:
        ok = False
    if contents(folders.work) != held:
        return "MISSED", "verify changed the folder"
    try:
        pull(folders.source, MODEL, LATEST, folders.work, patience=AT_ONCE)
    except RankupError as exc:
        if contents(folders.work) != held or not exc.remedy:
            return "MISSED", f"a pull failed and changed files: {exc}"
        return "refused", ""
    if contents(folders.work) != folders.good[LATEST]:
        return "MISSED", "a pull left the damage"
    return ("no harm" if ok else "refused"), ""


def prove(folders: Folders) -> tuple[Outcome, str]:
    """Show that a delta is in the sum: from the folder, and by the proof that was made before."""
    key = folders.history.publisher_key
    ways: tuple[Callable[[str], object], ...] = (
        lambda delta: prove_contribution(folders.work, delta, publisher_key=key),
        lambda delta: check_proof(read_proof(folders.work / PROOF), delta, folders.work, publisher_key=key),
    )
    refused = 0
    for way in ways:
        try:
            way(contribution_digest(str(folders.work / DELTA)))
        except RankupError as exc:
            if not exc.remedy:
                return "MISSED", f"no remedy: {exc}"
            refused += 1
    return ("refused", "") if refused else ("MISSED", ALL_WELL)


# -- kinds -------------------------------------------------------------------------------------------------------------


def kinds(folders: Folders) -> Iterator[Kind]:
    """Files in object storage first, then those on the user's disk."""
    pulling = partial(update, folders)
    for name in ("pointer", "manifest", "patch", "record of what is not kept"):
        yield Kind(name, "pull over an older version", partial(folders.stored, name, OLDER), pulling)
    for name in ("manifest", "export"):
        yield Kind(name, "pull into an empty folder", partial(folders.stored, name, None), pulling)
    yield Kind("what lies beside the tensors", "pull into an empty folder", folders.stored_others, pulling)
    for name, level in PROVED_BY:
        yield Kind(
            name, f"verify --level {level}", partial(folders.stored, name, None), partial(replay, folders, level)
        )
    for name, names in (
        ("a file of a pulled folder", sorted(folders.good[LATEST])),
        ("the manifest in a pulled folder", [ENVELOPE_NAME]),
        ("what a pulled folder remembers", [STATE_NAME]),
    ):
        yield Kind(name, "verify the folder, then pull", partial(folders.pulled, names), partial(check, folders))
    yield Kind(
        "delta, proof, list of contributions", "verify --contribution", folders.evidence, partial(prove, folders)
    )
    yield Kind("part of an interrupted download", "pull over an older version", folders.interrupted, pulling)


@contextmanager
def damaged(path: Path, rng: random.Random) -> Iterator[str]:
    """Change one byte of a file for the time of the block; yields which. What was stored by then stays changed."""
    data = path.read_bytes()
    edge = min(EDGE_BYTES, len(data))
    start, stop = rng.choice([(0, len(data)), (0, len(data)), (0, edge), (len(data) - edge, len(data))])
    place = rng.randrange(start, stop)
    value = data[place] ^ rng.randrange(1, 256)
    path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
    try:
        yield f"{path.name}, byte {place} of {len(data)}: {data[place]} -> {value}"
    finally:
        if STORE_FOLDER in path.parts:
            path.write_bytes(data)


def corrupt(count: int, say: Say) -> Part:
    """`count` damaged bytes, kind by kind in turn."""
    columns = ("file", "then", "bytes changed", "refused", "got round", "no harm", "missed")
    part = Part(f"{count} single bytes changed, over all kinds of files")
    part.table("", *columns)
    rng = random.Random(0)
    outcomes: dict[tuple[str, str], Counter[str]] = {}
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rankup-corruption-") as room:
        folders = Folders(Path(room), make_history(Path(room)))
        every = list(kinds(folders))
        for number in range(count):
            kind = every[number % len(every)]
            if number % len(every) == 0:
                say(f"byte {number + 1} of {count}")
            with damaged(rng.choice(kind.prepare()), rng) as where:
                outcome, why = _attempt(kind)
            outcomes.setdefault((kind.name, kind.action), Counter())[outcome] += 1
            if outcome == "MISSED":
                missed.append(f"{kind.name}, {kind.action}: {where}: {why}")
        accused = [kind.name for kind in every if not _finds_nothing_wrong(kind)]
    for (name, action), found in outcomes.items():
        cells = [str(found[outcome]) for outcome in ("refused", "got round", "no harm", "MISSED")]
        part.row(name, action, str(found.total()), *cells)
    part.goal(
        f"all {count} detected: refused, or the right bytes all the same",
        f"{len(missed)} missed",
        met=not missed and not accused,
        why="; ".join([*missed[:5], *(f"undamaged, but refused: {name}" for name in accused)]),
    )
    part.raw = {"missed": missed, "outcomes": {" / ".join(key): dict(found) for key, found in outcomes.items()}}
    part.notes += NOTES
    return part


def _attempt(kind: Kind) -> tuple[Outcome, str]:
    try:
        return kind.attempt()
    except Exception as exc:  # noqa: BLE001 - whatever is not an error with a cause and a remedy is a miss
        return "MISSED", f"{type(exc).__name__}: {exc}"


def _finds_nothing_wrong(kind: Kind) -> bool:
    """The same without damage: a benchmark in which everything is refused would show nothing."""
    kind.prepare()
    outcome, why = _attempt(kind)
    return outcome == "no harm" or (outcome == "MISSED" and why == ALL_WELL)


def main() -> None:
    parser = argparse.ArgumentParser(description="One byte changed, and whether that is found.")
    parser.add_argument("--count", type=int, default=COUNT, help="how many bytes, one at a time")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    result = measure("corruption", "python benchmarks/corruption.py", partial(corrupt, options.count))
    if options.count == COUNT:
        keep("pull", HEAD, ORDER, "corruption", result)
    show({"corruption": result})
    sys.exit(not all(goal["met"] for goal in result["goals"]))


if __name__ == "__main__":
    main()
