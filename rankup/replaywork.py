"""The steps of a verification: opening manifests, fetching what they name, replaying rounds one after the other.

What always holds:
- a manifest that was opened twice had the same digest both times;
- states that are made lie in a scratch folder inside the cache, which goes at the end however that comes; at any time
  they are those that a later round needs and the one that is being made;
- with `keep` downloads stay in the cache; without, contributions go as soon as their round is done.

`rankup.replay` says which steps prove what.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rankup.chain import Chain
from rankup.chainread import Opened, VersionReader, read_chain
from rankup.checkfiles import Level, Report, Tally, require_members
from rankup.dtypes import master_dtype
from rankup.errors import IntegrityError, NotFoundError
from rankup.folder import disk_errors
from rankup.foldrows import Law, TileHashes, fold_tiles
from rankup.lineage import Plan
from rankup.records import BlobRef, Manifest, TensorEntry
from rankup.refold import require_stored
from rankup.replayround import Round, State
from rankup.tensorfile import TensorFile
from rankup.versions import History, require_same_tensors


@dataclass(frozen=True)
class Work:
    """One verification of the version `top`; downloads lie in `cache` as `<sha256>`."""

    reader: VersionReader
    top: Opened
    cache: Path
    keep: bool
    tally: Tally
    fetch: Callable[[Iterable[BlobRef], Path], None]

    def start(self, stage: str, total_bytes: int) -> None:
        """Begin to count from 0."""
        self.tally.stage, self.tally.done_bytes, self.tally.total_bytes = stage, 0, total_bytes

    def report(
        self, level: Level, contributions: int, note: str, proved: Sequence[str], unproved: Sequence[str]
    ) -> Report:
        """The report on the top version."""
        top = self.top
        return self.tally.report(
            top.manifest,
            top.digest,
            top.key,
            level,
            contributions=contributions,
            note=note,
            proved=proved,
            unproved=unproved,
        )

    # -- manifests -----------------------------------------------------------------------------------------------------

    def chain(self) -> Chain:
        """Every manifest down to version 0."""
        self.start("checking", len(self.top.envelope) * (self.top.manifest.version + 1))
        chain = read_chain(self.reader, self.top, on_bytes=self.tally.add_bytes)
        self.tally.versions = len(chain.manifests)
        return chain

    def parent(self) -> Opened:
        """The version before the top one, to which that must fit."""
        top = self.top
        parent = self.reader.open(top.manifest.version - 1)
        History().admit(parent.manifest, parent.digest, as_latest=False).admit(
            top.manifest, top.digest, as_latest=False
        )
        require_same_tensors(top.manifest, parent.manifest)
        return parent

    def version(self, number: int, chain: Chain | None) -> Opened:
        """A version of the chain, again with its table of tensors."""
        one = self.top if number == self.top.manifest.version else self.reader.open(number)
        if chain is not None and one.digest != chain.digests[number]:
            raise IntegrityError(f"version {number} has another digest than before: the history was rewritten")
        return one

    # -- tensors -------------------------------------------------------------------------------------------------------

    def have(self, what: str, refs: Iterable[BlobRef]) -> None:
        """Fetch what is not in the cache."""
        try:
            self.fetch(refs, self.cache)
        except NotFoundError as exc:
            raise NotFoundError(
                f"{what} is not kept whole: {exc.cause}",
                remedy="`--level all` needs only version 0 and the contributions; `--level chain` needs neither.",
            ) from exc

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for states."""
        with disk_errors(self.cache):
            folder = tempfile.TemporaryDirectory(prefix=".replay-", dir=self.cache)
        with folder as path:
            yield Path(path)

    def replay(
        self, plan: Plan, chain: Chain | None, state: State, scratch: Path, *, last: Path | None, consume: bool
    ) -> State:
        """`state` after the rounds of a plan; their manifests are opened one at a time.

        The state after the last round is written only where `last` says so; with `consume` the files of `state` go on
        the way, if they were made here.
        """
        for place, number in enumerate(plan.rounds):
            one = Round(self.version(number, chain).manifest, self.cache, without=plan.revoked)
            self.have(f"the round of version {number}", one.deltas)
            into = last if place == len(plan.rounds) - 1 else scratch / f"between-{place % 2}"
            state = one.replay(state, self.tally, into=into, consume=consume or place > 0)
            for ref in () if self.keep else one.deltas:
                (self.cache / ref.sha256).unlink(missing_ok=True)
        return state

    def check_genesis(self, manifest: Manifest) -> None:
        """Version 0's masters, from the cache, have their hashes and give its exports; what does not is a mismatch."""
        for group in manifest.groups:
            with TensorFile.open(self.cache / group.master.sha256) as file:
                require_members(file, group.tensors, group.master.path)
                for name in group.tensors:
                    right = _exported(file, name, manifest.tensors[name]) == manifest.tensors[name]
                    if not right and name not in self.tally.mismatches:
                        self.tally.mismatches.append(name)
            self.tally.add_bytes(group.master.size_bytes)


def _exported(file: TensorFile, name: str, entry: TensorEntry) -> TensorEntry | None:
    """The entry that follows from the stored master; None where that is not the one of `entry`."""
    hashes = TileHashes()
    try:
        require_stored(file, name, master_dtype(entry.export_dtype), entry.shape)
        for tile in fold_tiles(name, entry, [], Law(0), master=partial(file.read_part, name)):
            hashes.update(tile)
    except IntegrityError:
        return None
    return hashes.entry(entry.shape, entry.export_dtype, entry.role)
