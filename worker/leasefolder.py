"""The folder of a lease on this machine: what it was granted, its log, and what its training has to go on from.

What always holds: a folder is gone with its lease unless it is kept, and what is kept is enough to go on from: a
checkpoint, or answers of a teacher, beside the grant. No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rankup.durable import write_file
from rankup.protocol import LeaseGrant
from worker.answers import answers_progress
from worker.checkpoint import checkpoint_progress
from worker.identity import ServerFolder
from worker.job import ANSWERS_NAME

MAX_GRANT_BYTES = 16 * 1024**2
KEPT_LOGS = 20


@dataclass
class Lease:
    """One granted lease and its place on this machine."""

    grant: LeaseGrant
    folder: Path
    log_file: Path
    kept: bool = False
    """Whether the folder outlives this run."""

    @property
    def checkpoint_file(self) -> Path:
        return self.folder / "checkpoint"

    def begun(self) -> Begun:
        """What is there to go on from."""
        return begun_in(self.folder)


@contextmanager
def lease_folder(server: ServerFolder, grant: LeaseGrant) -> Iterator[Lease]:
    """The lease's folder, removed afterwards unless it is `kept`, and its log, of which the last `KEPT_LOGS` stay."""
    folder = server.jobs / grant.lease_id
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "grant.json", grant.model_dump_json().encode())
    for old in sorted(server.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)[: 1 - KEPT_LOGS]:
        old.unlink()
    lease = Lease(grant, folder, server.logs / f"{grant.lease_id}.log")
    try:
        yield lease
    finally:
        if not lease.kept:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Begun:
    """What a lease's folder has to go on from; false: nothing."""

    step: int
    """Of the checkpoint."""
    answers: int
    """Of a teacher, which the training has not begun without."""
    seconds: float
    """Spent on it."""

    def __bool__(self) -> bool:
        return self.step > 0 or self.answers > 0


def begun_in(folder: Path) -> Begun:
    """What is kept in the folder of a lease, without torch."""
    step, trained_s = checkpoint_progress(folder / "checkpoint")
    answers, answered_s = answers_progress(folder / ANSWERS_NAME)
    return Begun(step, answers, max(trained_s, answered_s))


def kept_grants(server: ServerFolder) -> list[LeaseGrant]:
    """The leases of earlier runs whose training can go on; folders with nothing to go on from are removed."""
    found = []
    for folder in sorted(server.jobs.iterdir()):
        if begun_in(folder):
            try:
                with (folder / "grant.json").open("rb") as file:
                    grant = LeaseGrant.model_validate_json(file.read(MAX_GRANT_BYTES))
            except (OSError, ValidationError):
                grant = None
            if grant is not None and grant.lease_id == folder.name:
                found.append(grant)
                continue
        shutil.rmtree(folder, ignore_errors=True)
    return found
