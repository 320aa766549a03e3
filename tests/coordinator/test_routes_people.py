"""Joining, tokens, approvals, bans and the record of all that, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from gateway_world import INVITE, ORGANISER_TOKEN, Volunteer, World, furnished_gateway
from pydantic import SecretStr

from coordinator import actions
from coordinator.access import SHORT_HASH, token_hash
from rankup.errors import UnreachableError
from rankup.membership import Action, Invite, Leaderboard, PeoplePage, Person
from rankup.protocol import Problem, Standing
from rankup.store import MemoryStore

if TYPE_CHECKING:
    from conftest import ValkeyServer


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings) as made:
        yield made


@contextmanager
def served(valkey: ValkeyServer, **changes: Any) -> Iterator[World]:
    parts = {name: changes.pop(name) for name in ("store", "clock") if name in changes}
    with furnished_gateway(valkey.ledger_settings, changes=changes, **parts) as made:
        yield made


def enrol(world: World, volunteer: Volunteer, now: float | None = None, **changes: Any) -> httpx2.Response:
    answer = world.http.post("/v1/workers", json=volunteer.enrolment(now or time.time(), **changes))
    if answer.status_code == 201:
        volunteer.token, volunteer.worker_id = answer.json()["token"], answer.json()["worker_id"]
    return answer


def manage(world: World, path: str, body: Any = None) -> httpx2.Response:
    answer = world.http.post(path, json=body or {}, headers=world.organiser)
    assert answer.status_code < 300, answer.text
    return answer


def invited(world: World, **asked: Any) -> str:
    code: str = manage(world, "/v1/invites", asked).json()["code"]
    return code


def works(world: World, volunteer: Volunteer) -> int:
    return world.http.get("/v1/contributions", headers=volunteer.auth).status_code


# -- joining -----------------------------------------------------------------------------------------------------------


JOINING: dict[str, tuple[str, str, str, str]] = {
    # how the server takes people in, the invite in its settings, the one that is given -> standing, or refused
    "invite: the right one": ("invite", INVITE, INVITE, "member"),
    "invite: a wrong one": ("invite", INVITE, "guess", "refused"),
    "invite: none": ("invite", INVITE, "", "refused"),
    "invite: the server has none of its own": ("invite", "", "", "refused"),
    "open: none": ("open", "", "", "member"),
    "open: one of yesterday": ("open", "", "i-00000000-00000000000000000000", "member"),
    "approval: none": ("approval", INVITE, "", "waiting"),
    "approval: the right one": ("approval", INVITE, INVITE, "member"),
    "approval: a wrong one": ("approval", INVITE, "guess", "refused"),
}


@pytest.mark.parametrize("name", JOINING)
def test_who_joins_how(valkey: ValkeyServer, name: str) -> None:
    enrolment, own, given, wanted = JOINING[name]
    with served(valkey, enrolment=enrolment, invite=SecretStr(own)) as world:
        assert world.http.get("/v1/info").json()["invite_needed"] == (enrolment == "invite")
        ada = Volunteer("ada")
        answer = enrol(world, ada, invite=given)
        if wanted == "refused":
            assert (answer.status_code, Problem.model_validate(answer.json()).type.rpartition("/")[2]) == (
                403,
                "denied",
            )
            return
        assert (answer.status_code, answer.json()["standing"]) == (201, wanted)
        # A known key needs no invite, whatever has become of it.
        assert enrol(world, ada, invite="").json()["standing"] == wanted


def test_who_waits_gets_work_once_it_is_approved(valkey: ValkeyServer) -> None:
    with served(valkey, enrolment="approval") as world:
        world.open_round()
        ada, bob, eve = Volunteer("ada"), Volunteer("bob"), Volunteer("eve")
        for one in (ada, bob, eve):
            enrol(world, one, invite="")
        told = world.http.post("/v1/leases", json={}, headers=ada.auth).json()
        assert (told["lease"], told["why"]) == (None, "waiting")
        assert told["retry_after_s"] > 0
        waiting = world.http.get("/v1/people?standing=waiting", headers=world.organiser).json()
        assert {one.name for one in PeoplePage.model_validate(waiting).people} == {"ada", "bob", "eve"}
        manage(world, f"/v1/people/{eve.worker_id}/ban", {"reason": "unknown"})
        done = manage(world, "/v1/people/approve", {"workers": [ada.worker_id, eve.worker_id]}).json()["workers"]
        assert done == [ada.worker_id]
        assert world.claim(ada).shard == 0
        assert manage(world, "/v1/people/approve", {"everybody": True}).json()["workers"] == [bob.worker_id]
        assert world.claim(bob).shard == 1
        assert works(world, eve) == 403
        dan = Volunteer("dan")
        assert enrol(world, dan, invite="").json()["standing"] == "waiting"
        assert enrol(world, dan, invite=invited(world)).json()["standing"] == "member"
        found = actions.replay(actions.read(world.store), actions.read_enrolments(world.store))
        assert found.workers[dan.worker_id].standing is Standing.MEMBER


@pytest.mark.parametrize("body", [{}, {"workers": ["w-none"]}, {"workers": ["w-none"], "everybody": True}])
def test_an_approval_names_somebody_who_is_there(world: World, body: dict[str, Any]) -> None:
    assert world.http.post("/v1/people/approve", json=body, headers=world.organiser).status_code in (400, 404)


def test_an_invite_lets_in_its_number_and_puts_them_into_its_team(world: World) -> None:
    code = invited(world, uses=2, team="lovelace", note="seminar")
    people = [Volunteer(f"v{number}") for number in range(3)]
    assert [enrol(world, one, invite=code).status_code for one in people] == [201, 201, 403]
    assert enrol(world, people[0], invite=code).status_code == 201
    shown = world.http.get(f"/v1/people/{people[0].worker_id}", headers=world.organiser).json()
    assert Person.model_validate(shown).team == "lovelace"
    # Nobody says of themselves that they are in it.
    stranger = Volunteer("stranger")
    assert enrol(world, stranger, team="lovelace").status_code == 403
    assert enrol(world, stranger, team="babbage").status_code == 201
    assert enrol(world, stranger, team="lovelace").status_code == 403
    [kept] = world.http.get("/v1/invites", headers=world.organiser).json()["invites"]
    assert (kept["left"], kept["uses"], kept["note"]) == (0, 2, "seminar")
    assert manage(world, f"/v1/invites/{kept['invite_id']}/withdraw").json() == {"invites": []}
    assert enrol(world, people[0], name="another name").status_code == 201
    board = Leaderboard.model_validate(world.http.get("/v1/leaderboard?by=team").json())
    assert [(row.team, row.members) for row in board.teams] == [("lovelace", 2), ("babbage", 1)]


def test_a_member_goes_to_another_team_with_an_invite_to_it(world: World) -> None:
    ada = world.join("ada")
    code = invited(world, uses=1, team="lovelace")
    assert enrol(world, ada, team="lovelace", invite=code).status_code == 201
    rows = world.http.get("/v1/people", headers=world.organiser).json()["people"]
    assert [(row["team"], row["standing"]) for row in rows] == [("lovelace", "member")]


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_worker_is_told_what_the_organiser_says_of_it(valkey: ValkeyServer) -> None:
    with served(valkey, enrolment="approval") as world:
        ada = Volunteer("ada")
        enrol(world, ada, invite="", team="harbour")

        def me() -> httpx2.Response:
            return world.http.get("/v1/workers/me", headers=ada.auth)

        assert me().json() == {
            "worker_id": ada.worker_id,
            "name": "ada",
            "team": "harbour",
            "standing": Standing.WAITING.value,
        }
        manage(world, "/v1/people/approve", {"workers": [ada.worker_id]})
        assert me().json()["standing"] == Standing.MEMBER.value
        manage(world, f"/v1/people/{ada.worker_id}/ban", {"reason": "copies"})
        assert me().status_code == 403
        assert world.http.get("/v1/workers/me").status_code == 401


def test_a_worker_changes_its_token_and_the_old_one_is_worth_nothing(world: World) -> None:
    ada = world.join()
    answer = world.http.post("/v1/workers/me/token", headers=ada.auth)
    assert answer.status_code == 201
    assert works(world, ada) == 401
    ada.token = answer.json()["token"]
    assert works(world, ada) == 200
    assert answer.json()["expires_at"] == pytest.approx(time.time() + 90 * 86_400, abs=60)


def test_a_token_runs_out_and_the_key_gets_the_next_one(valkey: ValkeyServer) -> None:
    now = [1_800_000_000.0]
    with served(valkey, clock=lambda: now[0], token_days=2.0) as world:
        ada = Volunteer("ada")
        enrol(world, ada, now[0])
        now[0] += 2 * 86_400 - 1
        assert works(world, ada) == 200
        now[0] += 1
        assert works(world, ada) == 401
        enrol(world, ada, now[0], invite="")
        assert works(world, ada) == 200


def test_a_revoked_token_is_unknown_at_once_and_the_key_enrols_again(world: World) -> None:
    ada = world.join()
    manage(world, f"/v1/people/{ada.worker_id}/revoke")
    assert works(world, ada) == 401
    assert enrol(world, ada, invite="").status_code == 201
    assert works(world, ada) == 200


def test_a_ban_refuses_every_call_says_why_and_frees_the_shard(world: World) -> None:
    round_id = world.open_round(shards=1)["round_id"]
    eve, ada = world.join("eve"), world.join("ada")
    lease = world.claim(eve)
    person = manage(world, f"/v1/people/{eve.worker_id}/ban", {"reason": "copies of other deltas"}).json()
    assert (person["standing"], person["note"]) == (Standing.BANNED, "copies of other deltas")
    beat = {"fence": lease.fence, "step": 1}
    for refused in (
        world.http.post(f"/v1/leases/{lease.lease_id}/heartbeat", json=beat, headers=eve.auth),
        world.http.post("/v1/leases", json={}, headers=eve.auth),
        world.http.post("/v1/workers/me/token", headers=eve.auth),
        enrol(world, eve),
    ):
        assert refused.status_code == 403
        assert "copies of other deltas" in refused.json()["detail"]
    assert world.claim(ada).shard == lease.shard
    manage(world, f"/v1/people/{eve.worker_id}/ban", {"reason": "copies of other deltas"})
    manage(world, f"/v1/people/{eve.worker_id}/unban")
    assert works(world, eve) == 200
    assert world.http.get(f"/v1/rounds/{round_id}").json()["state"] == "open"


def test_a_ban_frees_the_shard_that_is_trained_and_the_one_whose_delta_is_on_its_way(world: World) -> None:
    world.open_round(shards=2)
    eve, ada, bob = world.join("eve"), world.join("ada"), world.join("bob")
    first = world.claim(eve)
    second = world.http.post("/v1/leases", json={"delivering": first.lease_id}, headers=eve.auth).json()["lease"]
    assert {first.shard, second["shard"]} == {0, 1}
    manage(world, f"/v1/people/{eve.worker_id}/ban", {"reason": "copies"})
    assert {world.claim(ada).shard, world.claim(bob).shard} == {0, 1}


def test_the_organiser_sees_what_a_worker_did(world: World) -> None:
    round_id = world.open_round(shards=1)["round_id"]
    ada = world.join("ada")
    world.hand_in(ada, world.claim(ada))
    world.judge_all(round_id)
    person = Person.model_validate(world.http.get(f"/v1/people/{ada.worker_id}", headers=world.organiser).json())
    assert (person.accepted, person.tokens, person.escrow, person.valid_in_a_row) == (1, 100, 100.0, 1)
    assert person.seen_at == pytest.approx(time.time(), abs=60)
    assert world.http.get("/v1/people/w-none", headers=world.organiser).status_code == 404


ORGANISERS = [
    ("GET", "/v1/people"),
    ("GET", "/v1/people/w-1"),
    ("POST", "/v1/people/approve"),
    ("POST", "/v1/people/w-1/ban"),
    ("POST", "/v1/people/w-1/unban"),
    ("POST", "/v1/people/w-1/revoke"),
    ("GET", "/v1/invites"),
    ("POST", "/v1/invites"),
    ("POST", "/v1/invites/i-1/withdraw"),
    ("GET", "/v1/actions"),
]


def test_only_the_organiser_manages_people(world: World) -> None:
    ada = world.join()
    for method, path in ORGANISERS:
        body = {"reason": "x", "everybody": True} if method == "POST" else None
        assert world.http.request(method, path, json=body).status_code in (401, 422), path
        assert world.http.request(method, path, json=body, headers=ada.auth).status_code in (403, 422), path
    assert list(actions.read(world.store)) == []


# -- the record --------------------------------------------------------------------------------------------------------


def recorded(world: World) -> list[Action]:
    found = world.http.get("/v1/actions", headers=world.organiser).json()["actions"]
    return [Action.model_validate(one) for one in found]


def test_every_change_by_the_organiser_is_on_record_with_who_when_and_from_where(world: World) -> None:
    round_id = world.open_round()["round_id"]
    ada = world.join()
    code = invited(world, uses=3)
    manage(world, f"/v1/people/{ada.worker_id}/ban", {"reason": "spam"})
    headers = world.organiser | {"X-Request-Id": "desk-17"}
    assert world.http.post(f"/v1/rounds/{round_id}/cancel", headers=headers).status_code == 200
    world.http.get("/v1/people", headers=world.organiser)
    world.http.post(f"/v1/rounds/{round_id}/pause", headers=world.organiser)  # Refused: it is over.
    done = recorded(world)
    assert [one.what for one in done] == ["cancel_round", "ban", "make_invite", "create_round"]
    cancel, ban, invite, create = done
    assert (cancel.subject, cancel.request_id) == ({"round_id": round_id}, "desk-17")
    assert (ban.subject, ban.arguments) == ({"worker_id": ada.worker_id}, {"reason": "spam"})
    assert (create.arguments["model"], create.arguments["recipe"]["max_tokens"] > 0) == ("tiny", True)  # type: ignore[index, call-overload, operator]
    assert {one.by for one in done} == {token_hash(ORGANISER_TOKEN)[:SHORT_HASH]}
    assert {one.address for one in done} == {"127.0.0.1"}
    assert Invite.model_validate(invite.outcome).uses == 3
    kept = b"".join(world.store.get(key, max_bytes=10**6) for key in world.store.list("organiser/"))
    for secret in (code, ORGANISER_TOKEN, ada.token, INVITE):
        assert secret.encode() not in kept


class Forgetful(MemoryStore):
    """Does not take records while `full`."""

    full = False

    def put(self, key: str, data: bytes, **options: Any) -> str:
        if self.full and key.startswith(actions.ACTIONS):
            raise UnreachableError("no room")
        return super().put(key, data, **options)


def test_a_call_that_cannot_be_recorded_is_not_answered_with_success_and_may_be_repeated(valkey: ValkeyServer) -> None:
    store = Forgetful()
    with served(valkey, store=store) as world:
        ada = world.join()
        store.full = True
        path, body = f"/v1/people/{ada.worker_id}/ban", {"reason": "spam"}
        assert world.http.post(path, json=body, headers=world.organiser).status_code == 503
        store.full = False
        manage(world, path, body)
        assert [one.what for one in recorded(world)] == ["ban"]


def test_an_empty_ledger_gets_its_people_and_invites_back_from_the_record(valkey: ValkeyServer) -> None:
    store = MemoryStore()
    with served(valkey, store=store, enrolment="approval") as world:
        code = invited(world, uses=3, team="red")
        ada, bob, eve, dan = (Volunteer(name) for name in ("ada", "bob", "eve", "dan"))
        assert enrol(world, ada, invite=code).status_code == 201
        for one in (bob, eve, dan):
            enrol(world, one, invite="", team="blue")
        manage(world, "/v1/people/approve", {"workers": [bob.worker_id]})
        manage(world, f"/v1/people/{eve.worker_id}/ban", {"reason": "spam"})
        found = actions.replay(actions.read(store), actions.read_enrolments(store))
        rows = world.http.get("/v1/people", headers=world.organiser).json()["people"]
    live = {row["worker_id"]: (row["name"], row["team"], row["standing"], row["note"]) for row in rows}
    back = {key: (one.name, one.team, one.standing.value, one.note) for key, one in found.workers.items()}
    assert back == live
    assert sorted(standing for _, _, standing, _ in back.values()) == ["banned", "member", "member", "waiting"]
    assert [(one.left, one.team) for one in found.invites.values()] == [(2, "red")]


def test_limits_hold_over_real_http_and_come_as_problems(valkey: ValkeyServer) -> None:
    with served(valkey, enrols_per_min=2) as world:
        answers = [enrol(world, Volunteer(f"v{number}")) for number in range(3)]
    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert int(answers[2].headers["retry-after"]) >= 1
    assert answers[2].headers["rankup-request-id"]
    assert Problem.model_validate(answers[2].json()).retry_after_s is not None
