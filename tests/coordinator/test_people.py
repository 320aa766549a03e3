"""Workers in a real Valkey: tokens, standings, invites, teams and scores, by many at the same time too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coordinator import ledger_keys, people_keys
from coordinator.ledger_types import Worker
from coordinator.people import FOR_EVER, SEEN_EVERY_S, People
from coordinator.people_keys import Score, parse_score, rating_text
from coordinator.people_scores import Gain, Part
from coordinator.reputation import Rating
from coordinator.valkey import Valkey
from rankup.errors import DeniedError, InputError, NotFoundError
from rankup.membership import InviteRequest
from rankup.protocol import DeviceProfile, Standing

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

NOW = 1_800_000_000.0


def worker(number: int = 1, **changes: Any) -> Worker:
    return replace(Worker(f"w-{number}", "Ada", f"{number:064x}", DeviceProfile(), NOW), **changes)


def token(number: int) -> str:
    return f"{number:064x}"


def play(valkey: ValkeyServer, scenario: Callable[[People], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        connected = await Valkey.connect(valkey.ledger_settings)
        try:
            await scenario(People(connected))
        finally:
            await connected.close()

    asyncio.run(run())


def test_a_token_ends_at_its_time_and_the_worker_stays(valkey: ValkeyServer) -> None:
    async def scenario(people: People) -> None:
        await people.enrol(worker(), token(1), NOW + 100)
        assert await people.by_token(token(1), NOW + 99) == worker()
        assert await people.by_token(token(1), NOW + 100) is None
        assert await people.worker("w-1") == worker()
        await people.enrol(worker(), token(2), NOW + 300)
        assert await people.by_token(token(2), NOW + 200) == worker()

    play(valkey, scenario)
    assert valkey.client().hlen(ledger_keys.TOKENS) == 1


def test_another_token_ends_the_one_before_and_a_revoked_one_is_worth_nothing(valkey: ValkeyServer) -> None:
    async def scenario(people: People) -> None:
        await people.enrol(worker(), token(1))
        await people.give_token("w-1", token(2), FOR_EVER)
        await people.give_token("w-1", token(2), FOR_EVER)
        assert await people.by_token(token(1), NOW) is None
        assert await people.by_token(token(2), NOW) == worker()
        for _ in range(2):
            await people.revoke_token("w-1")
        assert await people.by_token(token(2), NOW) is None
        await people.enrol(worker(), token(3))
        assert await people.by_token(token(3), NOW) is not None
        for call in (people.give_token("w-9", token(4), NOW), people.revoke_token("w-9")):
            with pytest.raises(NotFoundError):
                await call
        with pytest.raises(InputError):
            await people.give_token("w-1", "the token itself", NOW)

    play(valkey, scenario)
    assert valkey.client().hkeys(ledger_keys.TOKENS) == [token(3)]


def test_enrolling_again_changes_the_name_but_not_the_standing(valkey: ValkeyServer) -> None:
    async def scenario(people: People) -> None:
        await people.enrol(worker(standing=Standing.WAITING), token(1))
        again = await people.enrol(worker(name="Ada L.", enrolled_at=NOW + 50), token(2))
        assert again == worker(name="Ada L.", standing=Standing.WAITING)
        assert await people.set_standing("w-1", Standing.BANNED, NOW, "copies") == (
            replace(again, standing=Standing.BANNED, note="copies"),
            True,
        )
        assert (await people.set_standing("w-1", Standing.BANNED, NOW, "copies"))[1] is False
        with pytest.raises(DeniedError, match="copies"):
            await people.enrol(worker(), token(3))
        # It is still known by its token, so that it can be told why it is refused.
        found = await people.by_token(token(2), NOW)
        assert found is not None
        assert found.note == "copies"
        with pytest.raises(NotFoundError):
            await people.set_standing("w-9", Standing.BANNED, NOW)

    play(valkey, scenario)


def test_lists_show_each_standing_and_the_last_to_join_first(valkey: ValkeyServer) -> None:
    async def scenario(people: People) -> None:
        for number in range(1, 6):
            standing = Standing.WAITING if number % 2 else Standing.MEMBER
            await people.enrol(worker(number, enrolled_at=NOW + number, standing=standing), token(number))
        await people.set_standing("w-1", Standing.MEMBER, NOW)
        await people.set_standing("w-2", Standing.BANNED, NOW, "x")

        async def ids(standing: Standing | None, limit: int = 10, offset: int = 0) -> list[str]:
            return [one.worker_id for one, _ in await people.listed(standing, limit, offset)]

        assert await ids(None) == ["w-5", "w-4", "w-3", "w-2", "w-1"]
        assert await ids(None, 2, 1) == ["w-4", "w-3"]
        assert await ids(Standing.WAITING) == ["w-5", "w-3"]
        assert await ids(Standing.BANNED) == ["w-2"]
        assert await ids(Standing.MEMBER) == ["w-4", "w-1"]

    play(valkey, scenario)


def test_the_last_call_is_noted_now_and_then(valkey: ValkeyServer) -> None:
    async def scenario(people: People) -> None:
        await people.enrol(worker(), token(1))
        assert await people.seen_at("w-1") is None
        for later, noted in ((0.0, 0.0), (SEEN_EVERY_S - 1, 0.0), (SEEN_EVERY_S, SEEN_EVERY_S)):
            await people.by_token(token(1), NOW + later)
            assert await people.seen_at("w-1") == NOW + noted

    play(valkey, scenario)


def test_an_invite_lets_in_as_many_as_it_has_uses_however_many_come_at_once(valkey: ValkeyServer) -> None:
    async def scenario(people: People) -> None:
        made = await people.invites.make(InviteRequest(uses=10), NOW)
        asked = [people.invites.use(made.code, f"w-{number % 32}", NOW) for number in range(64)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        let_in = {number % 32 for number, found in enumerate(outcomes) if not isinstance(found, BaseException)}
        assert len(let_in) == 10
        assert all(isinstance(found, DeniedError) for found in outcomes if isinstance(found, BaseException))
        assert [one.left for one in await people.invites.all()] == [0]
        # Whoever lost the answer asks again.
        await people.invites.use(made.code, f"w-{min(let_in)}", NOW)

    play(valkey, scenario)


@pytest.mark.parametrize("case", ["over", "withdrawn", "of another", "guessed", "without its secret", "nonsense"])
def test_an_invite_that_is_not_good_is_refused(valkey: ValkeyServer, case: str) -> None:
    async def scenario(people: People) -> None:
        made = await people.invites.make(InviteRequest(uses=5, for_s=100), NOW)
        other = await people.invites.make(InviteRequest(), NOW)
        code, at = made.code, NOW
        if case == "over":
            at = NOW + 100
        elif case == "withdrawn":
            await people.invites.use(code, "w-1", NOW)
            await people.invites.withdraw(made.invite.invite_id)
        elif case == "of another":
            code = other.invite.invite_id + code.removeprefix(made.invite.invite_id)
        else:
            bad = {
                "guessed": code[:-1] + ("0" if code[-1] != "0" else "1"),
                "without its secret": made.invite.invite_id,
            }
            code = bad.get(case, "\u202e" * 200)
        with pytest.raises(DeniedError):
            await people.invites.use(code, "w-1", at)

    play(valkey, scenario)


def test_codes_are_stored_nowhere_and_a_team_with_an_invite_is_closed(valkey: ValkeyServer) -> None:
    codes = []

    async def scenario(people: People) -> None:
        made = await people.invites.make(InviteRequest(team="lovelace"), NOW)
        codes.append(made.code)
        assert await people.invites.is_closed("lovelace")
        assert not await people.invites.is_closed("babbage")
        with pytest.raises(NotFoundError):
            await people.invites.withdraw("i-00000000")
        await people.invites.withdraw(made.invite.invite_id)
        assert await people.invites.all() == []
        assert await people.invites.is_closed("lovelace")
        await people.invites.restore(made.invite)
        assert await people.invites.all() == [made.invite]

    play(valkey, scenario)
    client = valkey.client()
    stored = [str(client.hgetall(key)) for key in client.keys("*") if client.type(key) == "hash"]
    assert codes[0] not in "".join(stored)


def test_what_was_restored_knows_everybody_and_no_token(valkey: ValkeyServer) -> None:
    async def scenario(people: People) -> None:
        await people.restore(worker(1, standing=Standing.BANNED, note="x", team="red"))
        # It joined the empty ledger before the others were restored.
        await people.enrol(worker(2, name="Bob now"), token(2))
        await people.restore(worker(2, name="Bob", standing=Standing.BANNED, note="y"))
        assert await people.worker("w-1") == worker(1, standing=Standing.BANNED, note="x", team="red")
        assert await people.worker("w-2") == worker(2, name="Bob now", standing=Standing.BANNED, note="y")
        assert len(await people.listed(Standing.BANNED, 10)) == 2

    play(valkey, scenario)


def test_the_leaderboard_goes_by_credit_then_tokens_and_teams_by_what_was_earned_in_them(valkey: ValkeyServer) -> None:
    client = valkey.client()
    tokens = {1: 500, 2: 100, 3: 900, 4: 300}
    for number, count in tokens.items():
        client.hset(ledger_keys.worker_key(f"w-{number}", "score"), mapping={"accepted": 1, "tokens": count})
        client.zadd(ledger_keys.BOARD, {f"w-{number}": count})

    async def scenario(people: People) -> None:
        for number in tokens:
            await people.enrol(worker(number, team="red" if number < 3 else ""), token(number))
        gains = {"w-1": Gain(settled=400, credit=50), "w-2": Gain(settled=100, credit=100)}
        part = Part(gains, {"w-1": Rating(30.0, 5.0)})
        assert await people.scores.settle("tiny", part, mark="1:all", after=None)
        assert not await people.scores.settle("tiny", part, mark="1:all", after=None)
        assert await people.scores.settle_round("r1", {"w-3": Gain(unpublished=200)})
        assert not await people.scores.settle_round("r1", {"w-3": Gain(unpublished=200)})
        assert await people.scores.unsettled_rounds(["r1", "r2"]) == ["r2"]
        rows = await people.scores.leaderboard()
        found = [(row.worker_id, row.credit, row.escrow, row.reputation) for row in rows]
        assert found == [
            ("w-2", 100.0, 0.0, None),
            ("w-1", 50.0, 100.0, 15.0),
            ("w-3", 0.0, 700.0, None),
            ("w-4", 0.0, 300.0, None),
        ]
        assert [row.worker_id for row in await people.scores.leaderboard(3)] == ["w-2", "w-1", "w-3"]
        await people.enrol(worker(1, team="blue"), token(1))
        await people.scores.settle("tiny", Part({"w-1": Gain(credit=7)}), mark="2:all", after="1:all")
        teams = [(row.team, row.members, row.credit) for row in await people.scores.teams()]
        assert teams == [("red", 1, 150.0), ("blue", 1, 7.0)]

    play(valkey, scenario)


def test_trust_is_what_was_earned_less_where_the_rating_is_bad(valkey: ValkeyServer) -> None:
    key = ledger_keys.worker_key("w-1", "score")

    async def scenario(people: People) -> None:
        assert await people.scores.trust("w-1", "tiny") == 0
        valkey.client().hset(key, "valid_in_a_row", 40)
        assert await people.scores.trust("w-1", "tiny") == 40
        valkey.client().hset(key, people_keys.rating_field("tiny"), rating_text(Rating(0.0, 8.0)))
        assert await people.scores.trust("w-1", "tiny") == 0
        assert await people.scores.trust("w-1", "other") == 0
        valkey.client().hset(key, people_keys.rating_field("other"), rating_text(Rating(30.0, 8.0)))
        assert await people.scores.trust("w-1", "other") == 40

    play(valkey, scenario)


def test_a_score_reads_back_to_the_bit() -> None:
    rating = Rating(24.123456789012345, 8.300000000000001)
    found = parse_score({"tokens": "9", "rating:a-b": rating_text(rating), "tokens_per_s:tiny": "12.5"})
    assert found == Score(tokens=9, ratings={"a-b": rating})
    assert found.escrow == 9
