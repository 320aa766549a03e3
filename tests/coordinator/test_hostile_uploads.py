"""What comes of hostile deltas and requests: refused with a reason, and neither memory nor harm is left behind.

`hostile_run.py` plays all of them in a process of its own; the tests read what it found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hostile_deltas import BAIT, CRAFTED, DAMAGE
from hostile_requests import CLOSED, REQUESTS

from rankup.problems import MEDIA_TYPE
from rankup.protocol import Problem

if TYPE_CHECKING:
    from conftest import ValkeyServer

SEED = 7
MAX_GROWTH_MIB = 100


def besiege(valkey: ValkeyServer, damaged: int, over_http: int) -> dict[str, Any]:
    valkey.client().flushall()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("hostile_run.py")), valkey.ledger_settings.to_wire()]
        command += [folder, str(damaged), str(over_http), str(SEED)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert list(Path(folder).iterdir()) == [], "a refused upload was left on the disk"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(shared_valkey: ValkeyServer) -> dict[str, Any]:
    return besiege(shared_valkey, 200, 30)


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_delta_is_refused_for_the_right_reason(found: dict[str, Any], name: str) -> None:
    word, came = CRAFTED[name][1], found["crafted"][name]
    assert not came["is_delta"]
    if word.isdecimal():
        assert (came["state"], came["status"]) == ("ticket", int(word))
    else:
        assert came["state"] == "rejected"
    assert word in f"{came['reason']} {came.get('status', '')}"


@pytest.mark.parametrize("name", REQUESTS)
def test_a_crafted_request_is_refused_with_the_right_status(found: dict[str, Any], name: str) -> None:
    allowed, came = REQUESTS[name][0], found["requests"][name]
    assert came["status"] in allowed, came
    if came["media"] == MEDIA_TYPE:
        problem = Problem.model_validate_json(came["body"])
        assert problem.status == came["status"]
        assert problem.remedy
    else:
        assert CLOSED in allowed, "only what is no HTTP is refused before the application sees it"


def check_damaged(found: dict[str, Any], count: int) -> None:
    came = found["damaged"]
    assert came["wrong"] == []
    assert sum(came["checks"].values()) == count
    assert {kind.partition(":")[0] for kind in came["kinds"]} == set(DAMAGE)
    assert {"structure", "digest", "intake", "accepted"} <= set(came["checks"])
    assert {came["state"] for _, came in found["damaged over HTTP"]} <= {"rejected", "upload", "ticket"}
    assert all(400 <= came.get("status", 400) < 500 and came["reason"] for _, came in found["damaged over HTTP"])


def check_the_rest(found: dict[str, Any]) -> None:
    assert [came["state"] for came in found["honest"]] == ["accepted", "accepted"], "the server still does its work"
    assert found["accepted"] == 2
    assert found["grown_mib"] < MAX_GROWTH_MIB


def test_a_damaged_delta_is_accepted_only_where_it_is_still_one(found: dict[str, Any]) -> None:
    check_damaged(found, 200)


def test_after_all_of_them_the_server_serves_and_has_not_grown(found: dict[str, Any]) -> None:
    check_the_rest(found)


def test_a_pickle_was_never_run(found: dict[str, Any]) -> None:
    assert found["crafted"]["a pickle that runs a command"]["state"] == "rejected"
    assert not BAIT.exists()


@pytest.mark.long
def test_five_thousand_damaged_deltas(shared_valkey: ValkeyServer) -> None:
    found = besiege(shared_valkey, 5_000, 500)
    check_damaged(found, 5_000)
    check_the_rest(found)
