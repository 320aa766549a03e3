"""`rankup people` and `rankup leaderboard` against a real gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from gateway_world import ORGANISER_TOKEN, Volunteer, World, furnished_gateway
from typer.testing import CliRunner

from rankup.cli import app
from rankup.cli.people import seconds_of
from rankup.errors import DeniedError, InputError, NotFoundError

if TYPE_CHECKING:
    from conftest import ValkeyServer

Run = Callable[..., str]


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings, changes={"enrolment": "approval"}) as made:
        yield made


@pytest.fixture
def run(world: World, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command and give what it prints; raise what it raises."""
    monkeypatch.setenv("RANKUP_SERVER", str(world.http.base_url))
    monkeypatch.setenv("RANKUP_ORGANISER_TOKEN", ORGANISER_TOKEN)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words: str) -> str:
        return CliRunner().invoke(app, list(words), catch_exceptions=False).output

    return invoke


def join(world: World, name: str, invite: str = "") -> Volunteer:
    volunteer = Volunteer(name)
    answer = world.http.post("/v1/workers", json=volunteer.enrolment(time.time(), invite=invite))
    assert answer.status_code == 201, answer.text
    volunteer.token, volunteer.worker_id = answer.json()["token"], answer.json()["worker_id"]
    return volunteer


def test_an_organiser_invites_approves_bans_and_sees_all_of_it(world: World, run: Run) -> None:
    code = run("people", "invite", "--uses", "2", "--for", "12h", "--team", "lovelace").split("\n")[0]
    ada, bob = join(world, "ada", code), join(world, "bob")
    assert "1 │    2" in run("people", "invites")
    assert [name in run("people", "waiting") for name in ("ada", "bob")] == [False, True]
    assert bob.worker_id in run("people", "approve", "--all")
    assert "nobody was waiting" in run("people", "approve", bob.worker_id)
    assert "is banned: spam" in run("people", "ban", bob.worker_id, "--reason", "spam")
    assert "standing    banned: spam" in run("people", "show", bob.worker_id)
    assert "is member" in run("people", "unban", bob.worker_id)
    assert "has no valid token" in run("people", "revoke", bob.worker_id)
    assert "is withdrawn" in run("people", "uninvite", code[:10])
    rows: Any = json.loads(run("people", "list", "--json"))["people"]
    assert {row["name"]: (row["team"], row["standing"]) for row in rows} == {
        "ada": ("lovelace", "member"),
        "bob": ("", "member"),
    }
    assert "lovelace" in run("leaderboard", "--teams")
    assert json.loads(run("leaderboard", "--json")) == []
    done = [action["what"] for action in json.loads(run("people", "log", "--json"))]
    wanted = ["make_invite", "approve", "approve", "ban", "unban", "revoke_token", "withdraw_invite"]
    assert done[::-1] == wanted
    assert ada.worker_id in run("people", "list", "--standing", "member")


def test_mistakes_say_what_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="w-none"):
        run("people", "show", "w-none")
    with pytest.raises(InputError, match="standing"):
        run("people", "list", "--standing", "friend")
    monkeypatch.setenv("RANKUP_ORGANISER_TOKEN", "wrong")
    with pytest.raises(DeniedError):
        run("people", "list")


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5_400), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600)])
def test_lengths_of_time_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1.5h", "7 d", "9999999d"])
def test_anything_else_is_no_length_of_time(text: str) -> None:
    with pytest.raises(InputError):
        seconds_of(text)
