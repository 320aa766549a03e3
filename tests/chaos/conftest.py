"""One server for all scenarios, the bits of an undisturbed campaign on it, and the report of all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from campaign import Outcome, World, run
from chaos_report import Report

SEED = int(os.environ.get("RANKUP_CHAOS_SEED", "1"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("world")
    made = World(home, seed=SEED)
    made.server.rankup("dataset", "build", "pydocs", "--pydocs", "--shard-rows", "64")
    yield made
    made.close()
    made.server.stop()
    assert made.server.process.returncode == 0, (home / "up.log").read_text()
    assert processes_naming(home) == [], "processes are left over"


def processes_naming(home: Path) -> list[str]:
    """Whatever runs and has the folder in its command line or, as Ray's workers do, in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(home / "server") in word for word in words):
            found.append(" ".join(process.cmdline())[:100])
    return found


@pytest.fixture(scope="session")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(world, "undisturbed", tmp_path_factory.mktemp("crowd"))


@pytest.fixture(scope="session")
def report(undisturbed: Outcome) -> Report:
    """Written into the file that `RANKUP_CHAOS_REPORT` names, if it does."""
    path = os.environ.get("RANKUP_CHAOS_REPORT")
    made = Report(SEED, Path(path) if path else None)
    made.add("undisturbed", "nothing", undisturbed)
    return made
