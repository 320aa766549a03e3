"""A fold that is killed (SIGKILL) goes on with the groups that it lacks, to the same bits.

The killing runs in a process of its own, this file as a script: it makes the world once, and forks a process for each
try. A try dies at a seeded call of the store: before it, in the middle of the bytes, or after it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from folder_store import FolderStore
from test_fold import LOG2, NESTEROV, child_of, contribute, fold
from toy_world import make_world, random_model, store_model

from aggregator.fold import fold_digest, fold_group, next_tensors
from rankup.records import Manifest, Term
from rankup.store import ObjectInfo, Progress
from rankup.versions import fold_key, manifest_digest

SEEDS = 20
ROUND = "killed-round"


@pytest.mark.slow
def test_a_killed_fold_ends_in_the_same_bits_and_folds_no_finished_group_twice(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path), str(SEEDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    undisturbed, trials = report["undisturbed"], report["trials"]
    assert len(trials) == SEEDS
    everything = set(range(1, report["groups"] + 1))
    for trial in trials:
        *killed, last = trial["tries"]
        assert killed, "every trial is killed at least once"
        assert all(one["signal"] == signal.SIGKILL for one in killed)
        assert last["signal"] == 0
        for one in trial["tries"]:
            assert not set(one["folded"]) & set(one["known"]), "a finished group was folded again"
            assert set(one["found"]) <= set(one["known"])
        assert set(last["folded"]) | set(last["found"]) == everything
        assert trial["result"] == undisturbed
    assert {phase for trial in trials for phase in trial["phases"]} == {"before", "during", "after"}
    assert len({len(one["known"]) for trial in trials for one in trial["tries"]}) > 2, "kills hit early and late"
    assert any(len(trial["tries"]) > 2 for trial in trials), "some are killed again"


# -- the process that kills --------------------------------------------------------------------------------------------


class DyingStore(FolderStore):
    """Kills its process before or after its `at`-th call (from 0), or during its `at`-th file, half-way through."""

    def __init__(self, folder: Path, at: int | None, phase: str) -> None:
        super().__init__(folder)
        self.calls = 0
        self.files = 0
        self._counting = threading.Lock()
        self._at = at
        self._phase = phase

    def _watched(self, call: Callable[[], Any]) -> Any:
        with self._counting:
            mine = self.calls
            self.calls += 1
        self._die_if(mine, "before")
        result = call()
        self._die_if(mine, "after")
        return result

    def _die_if(self, call: int, phase: str) -> None:
        if (call, phase) == (self._at, self._phase):
            os.kill(os.getpid(), signal.SIGKILL)

    def in_the_middle(self) -> None:
        self._die_if(self.files, "during")
        self.files += 1

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data: bytes = self._watched(lambda: super(DyingStore, self).get_range(key, start, length))
        return data

    def head(self, key: str) -> ObjectInfo | None:
        found: ObjectInfo | None = self._watched(lambda: super(DyingStore, self).head(key))
        return found

    def put(self, key: str, data: bytes, *, if_absent: bool = False, content_type: str = "") -> str:
        etag: str = self._watched(lambda: super(DyingStore, self).put(key, data, if_absent=if_absent))
        return etag

    def put_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        self._watched(lambda: super(DyingStore, self).put_file(key, path))


def fold_everything(store: DyingStore, parent: Manifest, terms: Sequence[Term]) -> str:
    """The hash of all that a fold gives; tensors and groups are logged to standard error."""
    digest = fold_digest(manifest_digest(parent), terms, LOG2, NESTEROV)
    parts = [
        fold_group(
            store,  # type: ignore[arg-type]
            parent,
            number,
            terms,
            LOG2,
            outer=NESTEROV,
            record_key=fold_key(ROUND, digest, number),
            tile_bytes=256,
        )
        for number in range(1, len(parent.groups) + 1)
    ]
    groups, entries = next_tensors(parts)
    return manifest_digest(child_of(parent, groups, dict(entries)))


def write_line(descriptor: int, event: Any) -> Any:
    """A log that no kill can hold back: nothing of it is buffered."""
    os.write(descriptor, f"{json.dumps(event)}\n".encode())
    raise structlog.DropEvent


def attempt(store_folder: Path, parent: Manifest, terms: Sequence[Term], at: int | None, phase: str) -> dict[str, Any]:
    """One try in a forked process: what was finished before, what it folded and found, how it ended."""
    log_path = store_folder / "log"
    log_path.write_bytes(b"")
    known = [int(key.rpartition("/")[2][:5]) for key in FolderStore(store_folder).list(f"rounds/{ROUND}/fold/")]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
            structlog.configure(processors=[lambda _, __, event: write_line(log, event)])
            tempfile.tempdir = str(store_folder / "unfinished")
            store = DyingStore(store_folder, at, phase)
            (store_folder / "result").write_text(fold_everything(store, parent, terms))
            (store_folder / "counts").write_text(f"{store.calls} {store.files}")
            status = 0
        except Exception:  # noqa: BLE001 - only the exit status leaves this process
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    of_tensor = {name: number for number, group in enumerate(parent.groups, start=1) for name in group.tensors}
    return {
        "known": known,
        "folded": sorted({of_tensor[line["tensor"]] for line in lines if line["event"] == "tensor_folded"}),
        "found": [line["group"] for line in lines if line["event"] == "group_found"],
        "signal": os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else -os.WEXITSTATUS(ended),
    }


def main(folder: Path, seeds: int) -> None:
    world = make_world(folder, group_bytes=10**6)
    terms, _ = contribute(world, 3)
    trained = {name: array for name, array in random_model().items() if name.startswith("layer.")}
    first = store_model(world.store, trained, 1600)
    parent = child_of(first, *fold(world.store, first, terms[:2], NESTEROV))
    origin = folder / "origin"
    for key in world.store.list("blobs/"):
        FolderStore(origin).put(key, world.store.get(key, max_bytes=10**6))
    clean = folder / "clean"
    shutil.copytree(origin, clean)
    alone = attempt(clean, parent, terms, None, "")
    assert alone["signal"] == 0
    undisturbed = (clean / "result").read_text()
    calls, files = map(int, (clean / "counts").read_text().split())
    trials = []
    for seed in range(seeds):
        rng = random.Random(seed)
        store_folder = folder / f"seed-{seed}"
        shutil.copytree(origin, store_folder)
        tries: list[dict[str, Any]] = []
        phases: list[str] = []
        while not tries or tries[-1]["signal"] == signal.SIGKILL:
            again = not tries or (len(tries) < 4 and rng.random() < 0.6)
            phases.append(rng.choice(["before", "during", "after"]) if again else "never")
            at = rng.randrange(files if phases[-1] == "during" else calls) if again else None
            tries.append(attempt(store_folder, parent, terms, at, phases[-1]))
        trials.append({"tries": tries, "phases": phases[:-1], "result": (store_folder / "result").read_text()})
        shutil.rmtree(store_folder)
    report = {"undisturbed": undisturbed, "groups": len(parent.groups), "trials": trials}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
