"""Who downloads what from where in parts 2 and 3 of benchmarks/pull.py: the commands, and folders to begin with.

`rankup pull` and `huggingface_hub.snapshot_download` fetch the same versions from the same server
(benchmarks/pull_server.py), each in a process of its own, imports counted.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aggregate_run import FOLDER, run
from pull_part import Scale, hashes
from pull_server import LocalServer

from rankup.records import Manifest
from rankup.sources import FolderSource
from rankup.versions import open_envelope

RANKUP: Final = "rankup pull"
HUB: Final = "huggingface_hub"


@dataclass(frozen=True)
class Site:
    """One case, as it is served: the hub's revisions are numbered as the versions are."""

    scale: Scale
    case: str
    server: LocalServer
    peers: Path

    def folder(self, version: int) -> Path:
        return self.scale.rounds / self.case / str(version)

    def command(self, way: str, version: int, to: Path) -> list[str | Path]:
        if way == RANKUP:
            name = f"smollm2-{self.case}@{version}"
            return [sys.executable, "-m", "rankup", "pull", self.server.url, name, "--to", to, "--json"]
        arguments = {
            "way": "hub_download",
            "endpoint": self.server.url,
            "repository": f"rankup/{self.case}",
            "revision": str(version),
            "to": str(to),
        }
        return [self.peers, FOLDER / "pull_peers.py", json.dumps(arguments)]

    def manifest(self, version: int) -> Manifest:
        source = FolderSource(self.scale.rounds / "store")
        return open_envelope(source.envelope(f"smollm2-{self.case}", version), publisher_key=None)[0]

    def holds(self, to: Path, version: int) -> bool:
        """Whether every file of the version is there with its bytes."""
        wanted = self.folder(version)
        names = sorted(path.name for path in wanted.iterdir())
        return hashes(to, names) == hashes(wanted, names)


def site_of(scale: Scale, case: str, peers: Path) -> Site:
    folders = [path for path in (scale.rounds / case).iterdir() if path.name.isdigit()]
    hub = {(f"rankup/{case}", folder.name): folder for folder in folders}
    return Site(scale, case, LocalServer(scale.rounds / "store", hub), peers)


def kind_of(before: int | None, after: int) -> str:
    return f"version {after} into an empty folder" if before is None else f"version {after} where version {before} is"


def folder_before(site: Site, way: str, *, version: int | None) -> Path:
    """An empty folder, or one that the way itself has filled with a version; made once, then copied."""
    room = site.scale.scratch / "downloads"
    to = room / "model"
    shutil.rmtree(to, ignore_errors=True)
    if version is None:
        shutil.rmtree(room / "hub-home", ignore_errors=True)
        room.mkdir(parents=True, exist_ok=True)
        return to
    kept = room / f"{way.replace(' ', '-')}-{site.case}-{version}"
    if not kept.exists():
        site.server.reset()
        run(site.command(way, version, kept))
        assert site.holds(kept, version), f"{way}: the folder does not hold the version"
    shutil.copytree(kept, to)
    return to
