"""The bookkeeper with a real Valkey: every version and every lost round once, also when it is killed in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import pytest
from gateway_world import make_manifest, publish
from test_reputation import cohort, member, refused

from coordinator import people_settling
from coordinator.ledger import Ledger
from coordinator.ledger_types import Worker
from coordinator.people_scores import Gain, Part
from coordinator.people_settling import Bookkeeper, parse_mark, parts_of
from coordinator.reputation import Place, games
from coordinator.rounds import Cancel
from rankup.message import canonical_json
from rankup.protocol import DeviceProfile, RoundRequest
from rankup.records import BlobRef, Manifest, Receipt, Revocation, RoundRecord, Term
from rankup.settings import LedgerSettings
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore
from rankup.targets import Target
from rankup.versions import cohort_key, manifest_digest, receipt_key

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

NOW = 1_800_000_000.0
UNIT = 2**16


class World:
    """A bucket with a chain of versions of one model, and the ledger that is to follow from it."""

    def __init__(self, settings: LedgerSettings) -> None:
        self.settings = settings
        self.store = MemoryStore()
        self.key = parse_private_key(generate_private_key())
        self.chain: list[Manifest] = []
        self.add()

    def add(self, *rows: tuple[int, int, int], **changes: Any) -> Manifest:
        """The next version; rows are (worker, tokens, coefficient), contributions are numbered through."""
        number = len(self.chain)
        parent = manifest_digest(self.chain[-1]) if self.chain else None
        terms = tuple(
            Term(
                contribution=f"{100 * number + place:064x}",
                size_bytes=1,
                worker_id=f"w-{worker}",
                worker_name="Ada",
                shard=place,
                tokens=tokens,
                coefficient=coefficient,
            )
            for place, (worker, tokens, coefficient) in enumerate(rows)
        )
        made = make_manifest(number, parent).model_copy(update={"terms": terms, **changes})
        self.chain.append(made)
        publish(self.store, self.key, made)
        return made

    def judge(self, made: Manifest, slopes: list[float], *, refused_ones: tuple[Receipt, ...] = ()) -> None:
        """Write what was measured of a version's contributions."""
        members = [
            member(int(term.contribution, 16), slope=slope) for term, slope in zip(made.terms, slopes, strict=True)
        ]
        decided = cohort(*members).model_copy(update={"round_id": made.round_id})
        self.store.put(cohort_key(decided.round_id), canonical_json(decided))
        for receipt in refused_ones:
            sha256 = receipt.submission.statement.sha256
            self.store.put(receipt_key(decided.round_id, sha256), canonical_json(receipt))

    def play(self, scenario: Callable[[Ledger, Bookkeeper], Coroutine[Any, Any, None]]) -> None:
        async def run() -> None:
            ledger = await Ledger.connect(self.settings.model_copy(update={"require_fsync": False}))
            keeper = Bookkeeper(ledger, self.store, public_key_hex(self.key))
            try:
                await scenario(ledger, keeper)
            finally:
                await ledger.close()

        asyncio.run(run())


@pytest.fixture
def world(valkey: ValkeyServer) -> World:
    return World(valkey.ledger_settings)


async def credits_of(ledger: Ledger, count: int) -> list[tuple[int, int]]:
    return [(score.settled, score.credit) for score in await ledger.people.scores.of([f"w-{n}" for n in range(count)])]


def test_every_version_is_settled_once_in_order_and_a_revocation_takes_back(world: World) -> None:
    first = world.add((0, 100, UNIT // 2), (1, 100, UNIT // 2))

    async def scenario(ledger: Ledger, keeper: Bookkeeper) -> None:
        assert await keeper.look() == 2
        assert await keeper.look() == 0
        assert await credits_of(ledger, 3) == [(100, 100), (100, 100), (0, 0)]
        world.add((2, 50, UNIT), (0, 50, 0))
        world.add(round_id=None, change=Revocation(contributions=(first.terms[1].contribution,)))
        assert await keeper.look() == 2
        assert await keeper.look() == 0
        assert await credits_of(ledger, 3) == [(150, 100), (100, 0), (50, 50)]
        assert await ledger.people.scores.settled("tiny") == "3:all"

    world.play(scenario)


def everything(rows: list[Any]) -> list[Any]:
    return [(score.settled, score.credit, dict(score.ratings)) for score in rows]


def test_a_bookkeeper_that_is_killed_between_two_parts_gives_nothing_twice_and_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people_settling, "GAMES_PER_PART", 1)
    count = 40
    made = world.add(*((number, 100, UNIT // count) for number in range(count)))
    world.judge(made, [float(number) for number in range(count)], refused_ones=(refused("w-77", "audit"),))
    names = [*(f"w-{number}" for number in range(count)), "w-77"]
    outcomes: list[list[Any]] = []

    async def undisturbed(ledger: Ledger, keeper: Bookkeeper) -> None:
        assert await keeper.look() == 2
        outcomes.append(everything(await ledger.people.scores.of(names)))
        await ledger.valkey.call("FLUSHALL")

    world.play(undisturbed)

    async def killed(ledger: Ledger, keeper: Bookkeeper) -> None:
        settle, made_parts = ledger.people.scores.settle, 0

        async def dying(model: str, part: Part, *, mark: str, after: str | None) -> bool:
            nonlocal made_parts
            made_parts += 1
            if made_parts % 2 == 0:
                raise RuntimeError("killed")
            return await settle(model, part, mark=mark, after=after)

        monkeypatch.setattr(ledger.people.scores, "settle", dying)
        deaths = 0
        while True:
            try:
                await keeper.look()
                break
            except RuntimeError:
                deaths += 1
        assert deaths > 3
        outcomes.append(everything(await ledger.people.scores.of(names)))

    world.play(killed)
    assert outcomes[0] == outcomes[1]
    settled, credit, ratings = zip(*outcomes[0], strict=True)
    assert (sum(settled), sum(credit)) == (100 * count, 100 * count)
    reputations = [one["tiny"].reputation for one in ratings]
    assert min(reputations) == reputations[-1] < 0 < reputations[count - 1]


def test_two_bookkeepers_at_once_give_nothing_twice(world: World) -> None:
    for _ in range(5):
        world.add((0, 100, UNIT // 2), (1, 100, UNIT // 2))

    async def scenario(ledger: Ledger, keeper: Bookkeeper) -> None:
        other = Bookkeeper(ledger, world.store, public_key_hex(world.key))
        for _ in range(8):
            await asyncio.gather(keeper.look(), other.look())
        assert await credits_of(ledger, 2) == [(500, 500), (500, 500)]

    world.play(scenario)


def test_refusals_after_the_decision_do_not_count_so_that_a_rebuild_finds_the_same(world: World) -> None:
    made = world.add((0, 100, UNIT // 2), (1, 100, UNIT // 2))
    late = refused("w-9", "audit").model_copy(update={"judged_at": 2_000.0})
    world.judge(made, [0.5, 0.1], refused_ones=(late,))

    async def scenario(ledger: Ledger, keeper: Bookkeeper) -> None:
        await keeper.look()
        scores = await ledger.people.scores.of(["w-0", "w-1", "w-9"])
        assert [set(score.ratings) for score in scores] == [{"tiny"}, {"tiny"}, set()]

    world.play(scenario)


def test_tokens_of_a_round_without_a_version_leave_the_escrow_without_credit(world: World) -> None:
    record = RoundRecord(
        round_id="r1",
        request=RoundRequest(model="tiny", dataset="docs", shards=2, quorum=2),
        index=0,
        base_version=0,
        base_manifest="0" * 64,
        shards=tuple(BlobRef(sha256=f"{shard:064x}", size_bytes=10) for shard in range(2)),
        targets={"q.weight": Target(d_out=4, d_in=4)},
        opened_at=NOW,
    )

    async def scenario(ledger: Ledger, keeper: Bookkeeper) -> None:
        await ledger.people.enrol(Worker("w-1", "Ada", "0" * 64, DeviceProfile(), NOW), "a" * 64)
        await ledger.create_round(record, NOW)
        given = refused("w-1", "audit").submission.statement.tokens
        receipt = refused("w-1", "audit").model_copy(update={"accepted": True})

        async def receipts(_: str) -> list[Receipt]:
            return [receipt, receipt]

        ledger.receipts = receipts  # type: ignore[method-assign]
        assert await keeper.look() == 1
        await ledger.apply("r1", Cancel("enough"), NOW)
        assert await keeper.look() == 1
        assert await keeper.look() == 0
        [score] = await ledger.people.scores.of(["w-1"])
        assert (score.unpublished, score.credit, score.settled) == (2 * given, 0, 0)

    world.play(scenario)


@pytest.mark.parametrize(("mark", "wanted"), [(None, (0, 0)), ("7:all", (8, 0)), ("7:0", (7, 0)), ("12:3", (12, 3))])
def test_a_mark_says_what_comes_next(mark: str | None, wanted: tuple[int, int]) -> None:
    assert parse_mark(mark) == wanted


@pytest.mark.parametrize(("players", "others"), [(0, 0), (0, 600), (9, 0), (600, 300), (256, 1)])
def test_parts_hold_everybody_once_and_are_small(players: int, others: int) -> None:
    places = [Place(f"p-{number}", (0, float(number))) for number in range(players)]
    gains = {f"p-{number}": Gain(1, 1) for number in range(0, players, 2)} | {
        f"o-{number}": Gain(1, 1) for number in range(others)
    }
    parts = list(parts_of(gains, games(places)))
    assert parts
    assert sorted(name for some, _ in parts for name in some) == sorted(gains)
    assert sorted(place.worker_id for _, some in parts for game in some for place in game) == sorted(
        place.worker_id for place in places
    )
    assert all(len(some) <= 256 for some, _ in parts)
