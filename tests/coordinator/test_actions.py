"""The records of what the organiser did, and the standings and invites that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import actions
from rankup.errors import ConflictError, IntegrityError
from rankup.membership import Action, Enrolment, Invite
from rankup.protocol import Standing
from rankup.store import MemoryStore

NOW = 1_800_000_000.0


def action(what: str, at: float = NOW, **changes: Any) -> Action:
    return Action(what=what, by="0123456789abcdef", at=at, **changes)


def enrolment(number: int = 1, **changes: Any) -> Enrolment:
    about: dict[str, Any] = {"name": "Ada", "standing": Standing.MEMBER, "enrolled_at": NOW} | changes
    return Enrolment(worker_id=f"w-{number}", public_key=f"{number:064x}", **about)


def invited(invite_id: str = "i-1", uses: int = 3, team: str = "") -> Action:
    made = Invite(
        invite_id=invite_id, sha256="a" * 64, uses=uses, left=uses, team=team, made_at=NOW, expires_at=NOW + 9
    )
    return action("make_invite", outcome=made.model_dump(mode="json"))


def banned(worker_id: str, reason: str = "copies") -> Action:
    return action("ban", subject={"worker_id": worker_id}, arguments={"reason": reason})


def test_records_are_written_once_and_read_in_order_of_time() -> None:
    store = MemoryStore()
    for number in (3, 1, 2):
        actions.write(store, action(f"a{number}", at=float(number)))
    actions.write_command(store, "roll_back", {"model": "tiny", "to": 3}, 10**10)
    assert [one.what for one in actions.read(store)] == ["a1", "a2", "a3", "roll_back"]
    assert [one.what for one in actions.read(store, 2)] == ["a3", "roll_back"]
    assert [one.by for one in actions.read(store, 1)] == ["command"]
    key = next(iter(store.list(actions.ACTIONS)))
    assert key.startswith("organiser/actions/000000000001000-")
    with pytest.raises(ConflictError):
        store.put(key, b"{}", if_absent=True)
    store.put(key, b"{}")
    with pytest.raises(IntegrityError, match="cannot be read"):
        list(actions.read(store))


@given(st.lists(st.floats(0, 1e10), max_size=20))
def test_the_order_of_keys_is_the_order_of_time(times: list[float]) -> None:
    keys = [actions.action_key(at, "0") for at in sorted(times)]
    assert keys == sorted(keys)


def test_secrets_are_left_out_at_any_depth_and_settings_that_only_sound_like_one_stay() -> None:
    said = {"token": "t", "recipe": {"max_tokens": 512, "secret": 1}, "list": [{"invite": "i"}, "invite"]}
    assert actions.without_secrets(said) == {
        "token": "(not recorded)",
        "recipe": {"max_tokens": 512, "secret": "(not recorded)"},
        "list": [{"invite": "(not recorded)"}, "invite"],
    }


def test_how_somebody_joined_stays_on_record_when_they_call_themselves_otherwise() -> None:
    store = MemoryStore()
    actions.keep_enrolment(store, enrolment(standing=Standing.WAITING))
    later: dict[str, Any] = {"name": "Ada L.", "team": "lovelace"}
    actions.keep_enrolment(store, enrolment(standing=Standing.WAITING, enrolled_at=NOW + 5, **later))
    assert list(actions.read_enrolments(store)) == [enrolment(standing=Standing.WAITING, **later)]
    actions.keep_enrolment(store, enrolment(invite_id="i-1", enrolled_at=NOW + 9, **later))
    actions.keep_enrolment(store, enrolment(standing=Standing.WAITING, enrolled_at=NOW + 9, **later))
    assert list(actions.read_enrolments(store)) == [enrolment(invite_id="i-1", **later)]


CASES: dict[str, tuple[list[Action], dict[str, tuple[str, str]]]] = {
    "nothing was done": ([], {"w-1": ("member", ""), "w-2": ("waiting", "")}),
    "approved": ([action("approve", outcome={"workers": ["w-2"]})], {"w-2": ("member", "")}),
    "banned": ([banned("w-1")], {"w-1": ("banned", "copies")}),
    "banned and taken back": (
        [banned("w-1"), action("unban", subject={"worker_id": "w-1"})],
        {"w-1": ("member", "")},
    ),
    "approved, then banned": (
        [action("approve", outcome={"workers": ["w-2"]}), banned("w-2", "spam")],
        {"w-2": ("banned", "spam")},
    ),
    "about somebody unknown, and about rounds": ([banned("w-9"), action("create_round")], {"w-1": ("member", "")}),
}


@pytest.mark.parametrize("name", CASES)
def test_standings_follow_from_the_records(name: str) -> None:
    done, wanted = CASES[name]
    joined = [enrolment(1), enrolment(2, standing=Standing.WAITING, team="lovelace")]
    found = actions.replay(done, joined).workers
    assert {one: (found[one].standing.value, found[one].note) for one in wanted} == wanted
    assert set(found) == {"w-1", "w-2"}
    assert (found["w-2"].team, found["w-2"].enrolled_at) == ("lovelace", NOW)


def test_invites_come_back_with_the_uses_that_are_left_and_teams_stay_closed() -> None:
    done = [invited("i-1", 3, "red"), invited("i-2", 1), invited("i-3", 5, "blue")]
    done.append(action("withdraw_invite", subject={"invite_id": "i-3"}))
    joined = [enrolment(1, invite_id="i-1"), enrolment(2, invite_id="i-2"), enrolment(3, invite_id="i-2"), enrolment(4)]
    found = actions.replay(done, joined)
    assert {one.invite_id: one.left for one in found.invites.values()} == {"i-1": 2, "i-2": 0}
    assert found.closed_teams == {"red", "blue"}


def test_an_invite_that_cannot_be_read_is_an_error_and_not_a_gap() -> None:
    with pytest.raises(IntegrityError, match="invite"):
        actions.replay([action("make_invite", outcome={"uses": 3})], [])
