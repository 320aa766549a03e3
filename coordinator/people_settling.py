"""The bookkeeper: gives credit and ratings for what was published, once, whatever happens in between.

    every version of every model, in order:   credit (`coordinator.credit`), ratings (`coordinator.reputation`)
    every round that ended without a version:  its tokens leave the escrow, without credit

What always holds:
- a version is settled in parts of some hundred workers, each stored together with the mark "version:parts done" (or
  "version:all"): killed at any point, the next bookkeeper goes on where this one stopped, and two of them at once give
  nothing twice;
- all of it follows from what object storage holds, in the order of versions, so an empty ledger whose people and
  verdicts were restored gets the same credit and the same ratings again;
- versions that no round made are settled too: a revocation takes credit back.

It decides nothing about rounds, and no round waits for it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

import structlog

from coordinator.catalogue import read_manifest, read_pointer
from coordinator.credit import shares, taken_back
from coordinator.ledger import Ledger
from coordinator.people_scores import Gain, Part
from coordinator.reputation import Place, Rating, games, rate, standings_of
from rankup.errors import RetryableError
from rankup.protocol import RoundState
from rankup.records import Cohort, Manifest, Receipt
from rankup.store import Store
from rankup.stored import find_record, read_record
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    cohort_key,
    manifest_key,
    open_envelope,
    receipt_key,
    receipt_prefix,
    require_asked,
)

GAMES_PER_PART: Final = 32
WORKERS_PER_PART: Final = 256
ROUNDS_LOOKED_AT: Final = 100
MAX_REFUSED: Final = 1_000
"""Refused contributions of a round that are looked at, the first by digest: nobody chooses which."""
SETTLE_S: Final = 10.0
"""Pause between two looks of a running server's bookkeeper."""
DONE: Final = "all"

log = structlog.get_logger(__name__)


class Bookkeeper:
    """Settles what is published. Everything that it touches is handed in."""

    def __init__(self, ledger: Ledger, store: Store, publisher_key: str) -> None:
        self._ledger = ledger
        self._scores = ledger.people.scores
        self._store = store
        self._publisher_key = publisher_key

    async def run(self, every_s: float) -> None:
        """Look until cancelled. Servers that do not answer are waited for."""
        while True:
            try:
                await self.look()
            except RetryableError as exc:
                log.warning("bookkeeper_waits", cause=exc.cause)
            except Exception:
                log.exception("bookkeeper_failed")
            await asyncio.sleep(every_s)

    async def look(self, rounds: int = ROUNDS_LOOKED_AT) -> int:
        """Settle what is not settled yet, of the newest `rounds` rounds and of all versions; how many that were."""
        count = 0
        for model in await asyncio.to_thread(self._models):
            count += await self._settle_model(model)
        return count + await self._settle_rounds(rounds)

    # -- versions ------------------------------------------------------------------------------------------------------

    async def _settle_model(self, model: str) -> int:
        pointer = await asyncio.to_thread(read_pointer, self._store, model)
        version, done = parse_mark(await self._scores.settled(model))
        if version > pointer.version:
            return 0
        latest = await asyncio.to_thread(read_manifest, self._store, pointer, publisher_key=self._publisher_key)
        count = 0
        for number in range(version, latest.version + 1):
            if not await self._settle_version(latest, number, done if number == version else 0):
                break  # Another bookkeeper is at it.
            count += 1
        return count

    async def _settle_version(self, latest: Manifest, version: int, done: int) -> bool:
        """Whether all of it is settled now, by this one."""
        model = latest.model
        manifest = await asyncio.to_thread(self._manifest, latest, version)
        gains, standings = await asyncio.to_thread(self._outcome, latest, manifest)
        parts = list(parts_of(gains, games(standings)))
        for number in range(done, len(parts)):
            part_gains, part_games = parts[number]
            ratings = await self._rated(model, part_games)
            after = await self._scores.settled(model)
            if parse_mark(after) != (version, number):
                return False
            mark = f"{version}:{DONE if number + 1 == len(parts) else number + 1}"
            if not await self._scores.settle(model, Part(part_gains, ratings), mark=mark, after=after):
                return False
        if manifest.terms:
            log.info("version_settled", model=model, version=version, workers=len(gains))
        return True

    async def _rated(self, model: str, part_games: Sequence[Sequence[Place]]) -> dict[str, Rating]:
        names = [place.worker_id for game in part_games for place in game]
        found = dict(zip(names, await self._scores.of(names), strict=True))
        known = {name: score.ratings[model] for name, score in found.items() if model in score.ratings}
        return {name: rating for game in part_games for name, rating in rate(known, game).items()}

    def _outcome(self, latest: Manifest, manifest: Manifest) -> tuple[dict[str, Gain], list[Place]]:
        """What a version gives each worker, and who did better than whom in its round."""
        if manifest.change is not None:
            earlier = (self._manifest(latest, number) for number in range(manifest.version - 1, 0, -1))
            return {name: Gain(credit=-lost) for name, lost in taken_back(manifest, earlier).items()}, []
        gains = {name: Gain(share.tokens, share.credit) for name, share in shares(manifest).items()}
        cohort = None if manifest.round_id is None else self._cohort(manifest.round_id)
        if cohort is None:
            return gains, []
        worker_of = {term.contribution: term.worker_id for term in manifest.terms}
        return gains, standings_of(cohort, worker_of, self._refused(cohort))

    def _models(self) -> list[str]:
        parts = (key.split("/") for key in self._store.list("models/"))
        return sorted(part[1] for part in parts if len(part) == 3 and part[2] == "latest")

    def _manifest(self, latest: Manifest, version: int) -> Manifest:
        """A version, by the keys that the latest one names."""
        if version == latest.version:
            return latest
        data = self._store.get(manifest_key(latest.model, version), max_bytes=MAX_ENVELOPE_BYTES)
        manifest, digest, _ = open_envelope(data, publisher_key=self._publisher_key, known_changes=latest.keys)
        require_asked(manifest, digest, model=latest.model, version=version)
        return manifest

    def _cohort(self, round_id: str) -> Cohort | None:
        return find_record(self._store, cohort_key(round_id), Cohort)

    def _refused(self, cohort: Cohort) -> list[Receipt]:
        """Receipts of the contributions that admission had refused when the cohort was decided."""
        members = {receipt_key(cohort.round_id, member.contribution) for member in cohort.members}
        others = (key for key in self._store.list(receipt_prefix(cohort.round_id)) if key not in members)
        found = []
        for key in islice(others, MAX_REFUSED):
            receipt = read_record(self._store, key, Receipt)
            if not receipt.accepted and receipt.judged_at <= cohort.decided_at:
                found.append(receipt)
        return found

    # -- rounds without a version --------------------------------------------------------------------------------------

    async def _settle_rounds(self, limit: int) -> int:
        given_up = (RoundState.REJECTED, RoundState.CANCELLED)
        found = [one for one in await self._ledger.rounds(limit) if one.facts.state in given_up]
        names = await self._scores.unsettled_rounds([one.record.round_id for one in found])
        for round_id in names:
            tokens: defaultdict[str, int] = defaultdict(int)
            for receipt in await self._ledger.receipts(round_id):
                tokens[receipt.submission.worker_id] += receipt.submission.statement.tokens
            gains = {name: Gain(unpublished=count) for name, count in sorted(tokens.items())}
            await self._scores.settle_round(round_id, gains)
        return len(names)


def parse_mark(mark: str | None) -> tuple[int, int]:
    """The version that is to be settled next, and how many of its parts are."""
    if mark is None:
        return 0, 0
    version, _, done = mark.partition(":")
    return (int(version) + 1, 0) if done == DONE else (int(version), int(done))


def parts_of(
    gains: Mapping[str, Gain], all_games: Sequence[Sequence[Place]]
) -> Iterator[tuple[dict[str, Gain], Sequence[Sequence[Place]]]]:
    """The same in parts: games with the gains of their players, then the gains of all others; at least one part."""
    playing: set[str] = set()
    for start in range(0, len(all_games), GAMES_PER_PART):
        some = all_games[start : start + GAMES_PER_PART]
        players = [place.worker_id for game in some for place in game]
        playing.update(players)
        yield {name: gains[name] for name in players if name in gains}, some
    others = [name for name in gains if name not in playing]
    if others or not all_games:
        for start in range(0, max(1, len(others)), WORKERS_PER_PART):
            yield {name: gains[name] for name in others[start : start + WORKERS_PER_PART]}, ()
