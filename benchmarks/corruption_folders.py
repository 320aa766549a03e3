"""Folders for benchmarks/corruption.py: object storage, versions as pulls left them, and one to work in.

What always holds: each method that returns files has made the working folder anew, so nothing of an earlier attempt is
in it; which of the files is damaged is the caller's choice.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Final

from corruption_history import MODEL, History

from rankup.folder import ENVELOPE_NAME, PARTIAL_NAME
from rankup.lineage import CONTRIBUTIONS_NAME
from rankup.message import canonical_json
from rankup.proofs import contribution_digest, prove_contribution
from rankup.pull import pull
from rankup.sources import FolderSource

OLDER: Final = 1
LATEST: Final = 2
DELTA: Final = "my.delta"
PROOF: Final = "my.proof"


class Folders:
    """Object storage, folders as pulls left them, and one to work in."""

    def __init__(self, room: Path, history: History) -> None:
        self.source = FolderSource(history.store.folder)
        self.history = history
        self._room = room
        self.work = room / "work"
        self.good: dict[int, dict[str, str]] = {}
        for version in (OLDER, LATEST):
            pull(self.source, MODEL, version, self._kept(version), publisher_key=history.publisher_key)
            self.good[version] = contents(self._kept(version))

    def _kept(self, version: int) -> Path:
        return self._room / f"version-{version}"

    def fresh(self, version: int | None) -> Path:
        """The working folder with a version in it, or empty."""
        shutil.rmtree(self.work, ignore_errors=True)
        if version is not None:
            shutil.copytree(self._kept(version), self.work)
        return self.work

    def stored(self, kind: str, version: int | None) -> list[Path]:
        """Files of object storage, once the working folder is ready."""
        self.fresh(version)
        return self.history.files[kind]

    def stored_others(self) -> list[Path]:
        """The same for what lies beside the tensors of a version."""
        self.fresh(None)
        return [path for name, paths in self.history.files.items() if "." in name for path in paths]

    def pulled(self, names: list[str]) -> list[Path]:
        return [self.fresh(LATEST) / name for name in names]

    def interrupted(self) -> list[Path]:
        """The first half of a patch, as an interrupted update leaves it."""
        patch = self.history.files["patch"][0]
        part = self.fresh(OLDER) / PARTIAL_NAME / patch.name
        part.parent.mkdir()
        part.write_bytes(patch.read_bytes()[: patch.stat().st_size // 2])
        return [part]

    def evidence(self) -> list[Path]:
        """What a contributor has: the delta, a proof, and a folder with the manifest and the list of contributions."""
        to = self.fresh(LATEST)
        delta = self.history.files["delta"][0]
        shutil.copyfile(delta, to / DELTA)
        proof, _ = prove_contribution(to, contribution_digest(str(to / DELTA)))
        (to / PROOF).write_bytes(canonical_json(proof))
        return [to / DELTA, to / PROOF, to / ENVELOPE_NAME, to / CONTRIBUTIONS_NAME]


def contents(folder: Path) -> dict[str, str]:
    """Name -> sha256 of what a user sees in a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir() if folder.is_dir() else ())
        if path.is_file() and not path.name.startswith(".")
    }
