"""The cheapest way to every file of a version, from what is at hand: what a plan is, and the plan for the files that
`from_pretrained` reads, made without any I/O. `rankup.roundroutes` plans for masters and momenta.

For each file one of these:

    here      the bytes are at hand, under whatever name
    patches   a file that is at hand, and the patches that lead from it to the wanted one, oldest first
    rounds    masters and momenta: those of an older version, and the deltas of every round since
    full      the whole file

A patch belongs to the version that it leads to and starts from a file of the version before. Files are followed by
digest: through versions that did not change them, and through a rollback to the version whose files it brought back.

What always holds:
- no route costs more than the whole file, unless that is not there;
- older manifests are asked for one by one, as long as they may lead to something cheaper, at most `MAX_HOPS` of them,
  and all of them together are no larger than the files that they may save;
- what `Retained` calls gone is avoided while there is another way: it is a hint, not a fact;
- the same arguments give the same plan.

It does not know which blobs can really be had: whoever finds one missing or wrong plans again without it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from rankup.records import BlobRef, FileEntry, Group, Manifest, Part, Patch, Retained, Rollback

MAX_HOPS: Final = 64
"""Patches in one chain, rounds in one replay, and older manifests that are read for one plan."""

Kind = Literal["here", "patches", "rounds", "full"]

ManifestOf = Callable[[int], Manifest | None]
"""Version -> its checked manifest; None where that cannot be had."""


@dataclass(frozen=True)
class Stock:
    """What is at hand, and what has turned out not to be."""

    held: frozenset[str] = frozenset()
    """Digests of complete files."""
    arrived: Mapping[str, int] = field(default_factory=dict)
    """Digest -> bytes of a download that was interrupted."""
    floor: int = 0
    """No file that is held belongs only to versions before this one."""
    avoid: frozenset[str] = frozenset()
    """Blobs that are missing or wrong at the source."""
    whole: frozenset[str] = frozenset()
    """Files that must be fetched whole: another way to them gave wrong bytes."""

    def cost(self, ref: BlobRef) -> int:
        """Bytes still to be fetched."""
        return 0 if ref.sha256 in self.held else max(0, ref.size_bytes - self.arrived.get(ref.sha256, 0))


@dataclass(frozen=True)
class Route:
    """How one file is had."""

    file: FileEntry
    kind: Kind
    patches: tuple[Patch, ...] = ()
    """In the order in which they are applied."""
    base: str | None = None
    """Digest of the file that the patches start from."""
    fetched: tuple[BlobRef, ...] = ()
    """What is downloaded for this file alone; a replay's deltas stand in the plan."""


@dataclass(frozen=True)
class Plan:
    """How a version is had."""

    manifest: Manifest
    routes: tuple[Route, ...]
    """One for each file, in the order of the manifest."""
    fetch_bytes: int
    """What is downloaded in all."""
    full_bytes: int
    """What the whole files that are not here would cost."""
    chain: tuple[Manifest, ...] = ()
    """For files made by rounds: the manifests from the version that is at hand to the wanted one."""
    deltas: tuple[BlobRef, ...] = ()
    """The contributions of those rounds."""

    @property
    def refs(self) -> tuple[BlobRef, ...]:
        """Every blob to download, once."""
        refs = itertools.chain(self.deltas, *(route.fetched for route in self.routes))
        return tuple({ref.sha256: ref for ref in refs}.values())


def plan_exports(
    manifest: Manifest, stock: Stock, retained: Retained, manifest_of: ManifestOf, *, manifest_bytes: int
) -> Plan:
    """The plan for the files that `from_pretrained` reads. `manifest_bytes`: about what an older manifest costs."""
    files = manifest.export_files()
    search = _Search(manifest, stock, retained, manifest_of, manifest_bytes)
    patched = {group.export.sha256 for group in manifest.groups}
    routes = tuple(
        search.cheapest(file) if file.sha256 in patched and file.sha256 not in stock.held else direct(file, stock)
        for file in files
    )
    return make_plan(manifest, routes, stock)


def state_of(group: Group) -> tuple[FileEntry, ...]:
    """A group's master file and, where there is one, its momentum file."""
    return (group.master,) if group.momentum is None else (group.master, group.momentum)


def state_files(manifest: Manifest) -> tuple[FileEntry, ...]:
    """Every master and momentum file of a version."""
    return tuple(file for group in manifest.groups for file in state_of(group))


def same_group(group: Group, manifest: Manifest) -> Group | None:
    """The group of a version that holds the same tensors."""
    return next((other for other in manifest.groups if set(other.tensors) == set(group.tensors)), None)


def direct(file: FileEntry, stock: Stock) -> Route:
    """The file from what is at hand, or whole."""
    return Route(file, "here") if file.sha256 in stock.held else Route(file, "full", fetched=(file,))


def make_plan(
    manifest: Manifest,
    routes: tuple[Route, ...],
    stock: Stock,
    chain: tuple[Manifest, ...] = (),
    deltas: tuple[BlobRef, ...] = (),
) -> Plan:
    """The plan with these routes, and what it costs."""
    missing = {route.file.sha256: route.file for route in routes if route.kind != "here"}
    plan = Plan(manifest, routes, 0, sum(stock.cost(file) for file in missing.values()), chain, deltas)
    return replace(plan, fetch_bytes=sum(stock.cost(ref) for ref in plan.refs))


def is_gone(retained: Retained, version: int, part: Part) -> bool:
    """The record says that this part of the version is no longer kept whole."""
    return part in retained.gone.get(version, ())


# -- chains of patches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """From a file of `version` with this digest to the wanted one."""

    version: int
    digest: str
    patches: tuple[Patch, ...] = ()
    start: FileEntry | None = None
    """The file is fetched whole; without it, and `digest` not held, the way goes on."""


@dataclass(frozen=True)
class _Seen:
    """What a search keeps of a manifest; the table of tensors is the most of that."""

    groups: Mapping[str, Group]
    """By the digest of the export file."""
    rolled_back_to: int | None

    @classmethod
    def of(cls, manifest: Manifest) -> _Seen:
        to = manifest.change.to if isinstance(manifest.change, Rollback) else None
        return cls({group.export.sha256: group for group in manifest.groups}, to)


class _Search:
    """Dijkstra's algorithm, backwards through the versions; the manifests that it reads are shared by all files."""

    def __init__(
        self, manifest: Manifest, stock: Stock, retained: Retained, manifest_of: ManifestOf, manifest_bytes: int
    ) -> None:
        self._target = manifest
        self._stock = stock
        self._retained = retained
        self._manifest_of = manifest_of
        own = {file.sha256: file for file in manifest.export_files()}
        self._bases = bool(stock.held - own.keys())
        missing_bytes = sum(stock.cost(file) for file in own.values())
        self._loads = min(MAX_HOPS, missing_bytes // max(1, manifest_bytes))
        self._seen: dict[int, _Seen | None] = {manifest.version: _Seen.of(manifest)}

    def cheapest(self, file: FileEntry) -> Route:
        """The route to an export file of the target that is not held."""
        whole = Route(file, "full", fetched=(file,))
        lost = file.sha256 in self._stock.avoid or is_gone(self._retained, self._target.version, "export")
        if file.sha256 in self._stock.whole or not (self._bases or lost):
            return whole
        order = itertools.count()
        heap: list[tuple[int, int, int, _Way]] = []

        def push(cost: int, way: _Way) -> None:
            heapq.heappush(heap, (cost, len(way.patches), next(order), way))

        first = _Way(self._target.version, file.sha256)
        push(0, first)
        if not lost:
            push(self._stock.cost(file), replace(first, start=file))
        seen: set[tuple[int, str]] = set()
        while heap:
            cost, _, _, way = heapq.heappop(heap)
            if way.start is not None or way.digest in self._stock.held:
                return self._route(file, way)
            if (way.version, way.digest) not in seen:
                seen.add((way.version, way.digest))
                for more, longer in self._longer(way, lost=lost):
                    push(cost + more, longer)
        return whole

    def _route(self, file: FileEntry, way: _Way) -> Route:
        if not way.patches:
            return Route(file, "full", fetched=(file,))
        start = (way.start,) if way.start is not None else ()
        return Route(file, "patches", way.patches, way.digest, (*way.patches, *start))

    def _longer(self, way: _Way, *, lost: bool) -> list[tuple[int, _Way]]:
        """The ways that are one version longer, with what that costs."""
        if way.version <= self._stock.floor and not lost:
            return []
        seen = self._version(way.version, lost=lost)
        group = seen.groups.get(way.digest) if seen is not None else None
        if seen is None or group is None:
            return []
        longer: list[tuple[int, _Way]] = []
        patch = group.patch
        if patch is None:
            longer.append((0, replace(way, version=way.version - 1)))
        elif (
            patch.sha256 not in self._stock.avoid
            and not is_gone(self._retained, way.version, "patch")
            and len(way.patches) < MAX_HOPS
        ):
            step = _Way(way.version - 1, patch.base, (patch, *way.patches))
            longer.append((self._stock.cost(patch), step))
        if seen.rolled_back_to is not None:
            longer.append((0, replace(way, version=seen.rolled_back_to)))
        if (
            way.version < self._target.version
            and group.export.sha256 not in self._stock.avoid
            and not is_gone(self._retained, way.version, "export")
        ):
            longer.append((self._stock.cost(group.export), replace(way, start=group.export)))
        return longer

    def _version(self, version: int, *, lost: bool) -> _Seen | None:
        if version not in self._seen:
            if version < 0 or len(self._seen) > (MAX_HOPS if lost else self._loads):
                return None
            manifest = self._manifest_of(version)
            self._seen[version] = None if manifest is None else _Seen.of(manifest)
        return self._seen[version]
