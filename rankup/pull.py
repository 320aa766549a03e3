"""Pulling a version into a folder that `from_pretrained` can read, by the cheapest route from what lies there.

    trust       the manifest, by the rules of `rankup.versions`             rankup.reader
    look        what of its files is at hand                               rankup.holdings
    plan        patches, rounds made again, or whole files                 rankup.routes
    assemble    fetch, apply, check, all beside the model                  rankup.assemble
    install     rename                                                     rankup.install

What always holds:
- nothing in the folder is replaced before every new file has arrived and has the hash that the signed manifest names;
- the folder remembers in `.rankup.json` the publisher's key from the first contact on, the digests of the versions
  seen and the highest version that was latest;
- a killed pull goes on where it stopped: parts lie in `.partial/`, and `.rankup.json` says `complete: false` while
  files are being moved into place. Only files that a pull put there are ever removed;
- a cheaper route that does not lead to the right bytes is given up for another, at last for the whole file;
- one process at a time writes to a folder; folders that only lend their files (`bases`) are never changed.

The sealed manifest stays beside the files as `.rankup.manifest.json`, so that they can be verified without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from rankup.assemble import CountedSource, Means, assemble
from rankup.chainread import Opened
from rankup.download import Limit, OnProgress, PullProgress
from rankup.errors import RankupError, StateError
from rankup.folder import (
    PARTIAL_NAME,
    FolderState,
    Want,
    folder_lock,
    read_folder_state,
    wanted_files,
    write_folder_state,
)
from rankup.holdings import Hashed, Holdings, look
from rankup.install import forget_parts, install
from rankup.reader import Reader
from rankup.records import Manifest, Retained
from rankup.remake import Setback
from rankup.roundroutes import plan_masters
from rankup.routes import Plan, Stock, plan_exports
from rankup.sources import GatewaySource, Patience, Source, StoreSource, patiently

__all__ = [
    "GatewaySource",
    "Planned",
    "PullProgress",
    "Pulled",
    "Source",
    "StoreSource",
    "Want",
    "plan_pull",
    "pull",
]

OnPlan = Callable[["Planned"], None]


@dataclass(frozen=True)
class Planned:
    """A version whose manifest is trusted, and the way to it. `publisher_key` (hex) signed it."""

    manifest: Manifest
    digest: str
    publisher_key: str
    plan: Plan


@dataclass(frozen=True)
class Pulled:
    """A version that lies in `folder`, complete and checked. `publisher_key` (hex) signed it."""

    manifest: Manifest
    digest: str
    folder: Path
    publisher_key: str
    plan: Plan
    """The first plan; with `warnings` it may not have been the last."""
    fetched_bytes: int
    """Bytes of blobs that came from the source."""
    warnings: tuple[str, ...] = ()
    """What went wrong on the way and was got round."""


def pull(
    source: Source,
    model: str,
    version: int | str | None,
    to: Path,
    *,
    publisher_key: str | None = None,
    want: Want = "export",
    bases: Sequence[Path] = (),
    on_plan: OnPlan | None = None,
    progress: OnProgress | None = None,
    parallel: int = 4,
    patience: Patience | None = None,
    limit: Limit | None = None,
) -> Pulled:
    """Have version `version` of `model` in the folder `to`: a number, the beginning of its manifest's digest (8 hex
    digits or more), or None for the latest.

    `publisher_key` (hex) replaces the key that the folder has pinned, and then forgets the history seen under the old
    one, unless signed changes lead from one to the other; without either, the key of the first manifest is pinned.
    `bases` are folders of other pulls whose files may be linked to and patched from; they stay as they are. `on_plan`
    is told what will be fetched, and again when that must change.

    Raises:
        IntegrityError: a signature, hash, chain or pointer is not what it must be; the old files are untouched.
        NotFoundError: there is no such model or version.
        DiskFullError: no room; what has arrived is kept.
        StateError: another process pulls into this folder, or it holds another model.
        RetryableError: the source cannot be reached for longer than `patience`.
    """
    counted = CountedSource(source)
    with folder_lock(to):
        task = _Task.begin(counted, model, version, to, publisher_key, want, bases, patience or Patience())
        write_folder_state(to, task.state)
        holdings = task.look(progress)
        first = plan = task.plan(holdings)
        while holdings.missing:
            if on_plan is not None:
                on_plan(task.planned(plan))
            forget_parts(to, task.kept_parts(plan, holdings))
            means = Means(counted, holdings, to / PARTIAL_NAME, parallel, task.patience, limit, progress)
            setback = assemble(plan, holdings.missing, means)
            if setback is None:
                break
            task.learn(setback)
            holdings = task.look(progress)
            plan = task.plan(holdings)
            if any(ref.sha256 in task.stock.avoid for ref in plan.refs):
                raise setback.cause
        if progress is not None:
            total_bytes = sum(route.file.size_bytes for route in plan.routes)
            progress(PullProgress("installing", total_bytes, total_bytes))
        opened = task.opened
        state = task.reader.remembered(task.state).model_copy(
            update={"version": opened.manifest.version, "manifest": opened.digest, "want": want}
        )
        aside = install(to, state, wanted_files(opened.manifest, want), holdings.missing, opened.envelope)
    return Pulled(
        manifest=opened.manifest,
        digest=opened.digest,
        folder=to,
        publisher_key=opened.key,
        plan=first,
        fetched_bytes=counted.fetched_bytes,
        warnings=(*task.warnings, *(f"a file that was in the way is now {path}" for path in aside)),
    )


def plan_pull(
    source: Source,
    model: str,
    version: int | str | None,
    to: Path,
    *,
    publisher_key: str | None = None,
    want: Want = "export",
    bases: Sequence[Path] = (),
    progress: OnProgress | None = None,
    patience: Patience | None = None,
) -> Planned:
    """What `pull` with the same arguments would do; nothing is written, and no key is pinned. Raises as `pull` does."""
    counted = CountedSource(source)
    task = _Task.begin(counted, model, version, to, publisher_key, want, bases, patience or Patience())
    return task.planned(task.plan(task.look(progress)))


@dataclass
class _Task:
    """One pull: what is trusted, what is wanted, and what has turned out not to be there."""

    source: Source
    reader: Reader
    opened: Opened
    state: FolderState
    folder: Path
    want: Want
    bases: Sequence[Path]
    patience: Patience
    stock: Stock
    warnings: list[str]
    lost: frozenset[str] = frozenset()
    hashed: Hashed = field(default_factory=dict)
    retained: Retained | None = None

    @classmethod
    def begin(
        cls,
        source: Source,
        model: str,
        version: int | str | None,
        to: Path,
        publisher_key: str | None,
        want: Want,
        bases: Sequence[Path],
        patience: Patience,
    ) -> Self:
        """Read what the folder remembers, and the manifest."""
        before = read_folder_state(to)
        if before is not None and before.model != model:
            raise StateError(f"{to} holds the model {before.model}, not {model}", remedy="Choose another folder.")
        reader = Reader(source, model, before, publisher_key=publisher_key, patience=patience)
        opened = reader.open(reader.find(version) if isinstance(version, str) else version)
        if isinstance(version, str):
            reader.require_prefix(opened, version)
        state = reader.remembered(before)
        return cls(source, reader, opened, state, to, want, bases, patience, Stock(), [])

    def look(self, progress: OnProgress | None) -> Holdings:
        files = wanted_files(self.opened.manifest, self.want)
        return look(self.folder, files, self.state, bases=self.bases, hashed=self.hashed, progress=progress)

    def plan(self, holdings: Holdings) -> Plan:
        """The cheapest way, as far as is known now."""
        self.stock = replace(
            self.stock,
            held=frozenset(holdings.files) - self.lost,
            arrived=holdings.arrived,
            floor=holdings.floor,
        )
        manifest = self.opened.manifest
        make = plan_exports if self.want == "export" else plan_masters
        retained = self._retained() if holdings.missing else Retained(model=manifest.model)
        plan = make(manifest, self.stock, retained, self.reader.older, manifest_bytes=len(self.opened.envelope))
        self.warnings += self.reader.warnings
        self.reader.warnings.clear()
        return plan

    def planned(self, plan: Plan) -> Planned:
        return Planned(self.opened.manifest, self.opened.digest, self.opened.key, plan)

    def learn(self, setback: Setback) -> None:
        """Do without what failed; raise its cause where that was known before."""
        stock = replace(self.stock, avoid=self.stock.avoid | setback.avoid, whole=self.stock.whole | setback.whole)
        if stock == self.stock and setback.lost <= self.lost:
            raise setback.cause
        self.stock, self.lost = stock, self.lost | setback.lost
        self.warnings.append(setback.cause.cause)

    def kept_parts(self, plan: Plan, holdings: Holdings) -> set[str]:
        """Parts that this plan can use: parts of anything else only take room."""
        bases = {route.base for route in plan.routes if route.base is not None}
        states = {file.sha256 for manifest in plan.chain for file in wanted_files(manifest, "master")}
        blobs = {ref.sha256 for ref in plan.refs} | {delta.sha256 for delta in plan.deltas}
        patches = {patch.sha256 for route in plan.routes for patch in route.patches}
        return {file.sha256 for file in holdings.missing} | bases | states | blobs | patches

    def _retained(self) -> Retained:
        """What the source no longer has; a hint, so nothing is lost where it cannot be read."""
        if self.retained is None:
            model = self.opened.manifest.model
            try:
                self.retained = patiently(lambda: self.source.retained(model), self.patience)
            except RankupError as exc:
                self.warnings.append(f"what the source no longer has is not known: {exc.cause}")
                self.retained = Retained(model=model)
        return self.retained
