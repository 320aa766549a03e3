"""What of a model's versions must stay, by the rules that an organiser chose; no I/O.

What always holds:
- the newest versions, every `checkpoint_every`-th and every version that an open round is based on keep their full
  export files. Any other one loses them only while chains of patches from a version that has them lead to it and to
  all that lost theirs before, each no longer than `MAX_CHAIN` and no more expensive than the full files;
- masters and momenta stay of the newest versions, of those that their replays begin with, and of what open rounds are
  based on. While every contribution is kept, version 0's stay too: any version can be made again from them;
- every version keeps its small files and its patches.

What is kept besides versions is for `aggregator.retention`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rankup.errors import InputError
from rankup.lineage import kept_terms, replay_plan
from rankup.records import BlobRef, Manifest
from rankup.retained import parts_of
from rankup.store import StoredObject

MAX_CHAIN: Final = 32
"""Patches in one chain: half of what a pull follows."""


@dataclass(frozen=True)
class Rules:
    """What is kept. Raises InputError where that would be too little."""

    keep_exports: int = 4
    """Newest versions that keep their full export files."""
    keep_masters: int = 3
    """Newest versions that keep masters and momenta, and with them the versions that their replays begin with."""
    checkpoint_every: int = 8
    """Every so many versions one keeps its full export files for good."""
    keep_contributions: int | None = None
    """Newest versions whose contributions are kept, and whose replays stay possible; None: of all, so that everything
    can be made again from version 0, and any contribution can be revoked."""
    grace_s: float = 48 * 3600.0
    """Longer than a fold, a revocation or an upload may take."""

    def __post_init__(self) -> None:
        for name in ("keep_exports", "keep_masters", "checkpoint_every", "keep_contributions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: at least 1 is kept")
        if self.checkpoint_every > MAX_CHAIN:
            raise InputError(f"checkpoint_every is {self.checkpoint_every}: a chain has at most {MAX_CHAIN} patches")
        if self.grace_s < 3600:
            raise InputError("the grace period is below an hour: what is just being written would be taken for waste")


@dataclass(frozen=True)
class ModelHistory:
    """Versions 0, 1, … of a model, with the digests of their manifests; the tables of tensors are not needed."""

    chain: tuple[Manifest, ...]
    digests: tuple[str, ...]
    latest: int
    """Where the pointer is."""


def needed_blobs(
    history: ModelHistory, rules: Rules, blobs: Mapping[str, StoredObject], bases: Collection[str]
) -> Iterator[BlobRef]:
    """Every blob that must stay for the sake of this model's versions, some more than once.

    `blobs` (by digest) are those that are there, `bases` the digests of the manifests that open rounds are based on.
    Raises IntegrityError where manifests contradict each other.
    """
    return _Keeper(history, rules, blobs, bases).needed()


class _Keeper:
    """The blobs that one model's versions need."""

    def __init__(
        self, history: ModelHistory, rules: Rules, blobs: Mapping[str, StoredObject], bases: Collection[str]
    ) -> None:
        self._chain = history.chain
        self._rules = rules
        self._blobs = blobs
        self._latest = history.latest
        self._bases = {version for version, digest in enumerate(history.digests) if digest in bases}
        self._steps = [self._step(version) for version in range(len(self._chain))]

    def needed(self) -> Iterator[BlobRef]:
        for manifest in self._chain:
            yield from manifest.files
            yield from parts_of(manifest)["patch"]
        for version in self._full():
            yield from parts_of(self._chain[version])["export"]
        for version in self._with_state():
            parts = parts_of(self._chain[version])
            yield from parts["master"]
            yield from parts["momentum"]
        yield from self._contributions()

    def _newest(self, count: int) -> set[int]:
        """The newest versions, and those that the pointer and open rounds name."""
        return {self._latest, *self._bases, *range(max(0, len(self._chain) - count), len(self._chain))}

    def _with_state(self) -> set[int]:
        """Versions that keep masters and momenta."""
        window = self._newest(max(self._rules.keep_masters, self._rules.keep_contributions or 0))
        found = self._newest(self._rules.keep_masters)
        found |= {replay_plan(self._chain, version).start for version in window}
        if self._rules.keep_contributions is None:
            found.add(0)
        return found

    def _contributions(self) -> Iterator[BlobRef]:
        window = self._rules.keep_contributions
        versions = range(len(self._chain)) if window is None else sorted(self._newest(window))
        for version in versions:
            plan = replay_plan(self._chain, version)
            own = self._chain[version].terms
            replayed = (term for number in plan.rounds for term in kept_terms(self._chain[number], plan.revoked))
            for term in (*own, *replayed):
                yield BlobRef(sha256=term.contribution, size_bytes=term.size_bytes)

    # full export files

    def _full(self) -> list[int]:
        """Versions that keep their full export files, oldest first."""
        forced = self._newest(self._rules.keep_exports)
        kept: list[int] = []
        for version in range(len(self._chain)):
            if not self._is_whole(version):
                continue
            checkpoint = version % self._rules.checkpoint_every == 0
            if checkpoint or version in forced or not kept or not self._is_spare(version, kept[-1]):
                kept.append(version)
        return kept

    def _is_whole(self, version: int) -> bool:
        return all(ref.sha256 in self._blobs for ref in parts_of(self._chain[version])["export"])

    def _is_spare(self, version: int, checkpoint: int) -> bool:
        """Patches lead from `checkpoint` to this version, and to those after it that have no full files either."""
        if version - checkpoint >= self._rules.checkpoint_every:
            return False
        last = version
        while last + 1 < len(self._chain) and not self._is_whole(last + 1):
            last += 1
        return all(self._leads(checkpoint, each) for each in range(version, last + 1))

    def _leads(self, checkpoint: int, version: int) -> bool:
        """A chain of patches leads from one version to the other, short and cheap enough."""
        steps = self._steps[checkpoint + 1 : version + 1]
        spent_bytes = 0
        for step in steps:
            if step is None:
                return False
            spent_bytes += step
        full_bytes = sum(ref.size_bytes for ref in parts_of(self._chain[version])["export"])
        return len(steps) <= MAX_CHAIN and spent_bytes <= full_bytes

    def _step(self, version: int) -> int | None:
        """Bytes of the patches from the version before; None where they do not lead to every file, or are gone."""
        if version == 0:
            return None
        before = {group.export.sha256 for group in self._chain[version - 1].groups}
        total_bytes = 0
        for group in self._chain[version].groups:
            if group.export.sha256 in before:
                continue
            patch = group.patch
            if patch is None or patch.base not in before or patch.sha256 not in self._blobs:
                return None
            total_bytes += patch.size_bytes
        return total_bytes
