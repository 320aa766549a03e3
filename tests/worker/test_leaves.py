"""What leaves the machine is what the list says, in the program and on paper."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from rankup.cli.volunteer import app
from rankup.protocol import (
    ClaimRequest,
    DeviceProfile,
    EnrolRequest,
    EnrolStatement,
    Heartbeat,
    RestoreRequest,
    ReturnRequest,
    SubmitRequest,
    SubmitStatement,
    UploadRequest,
)
from worker.leaves import LEAVING, STAYING, public_reason

SENT = (
    ClaimRequest,
    DeviceProfile,
    EnrolRequest,
    EnrolStatement,
    Heartbeat,
    RestoreRequest,
    ReturnRequest,
    SubmitRequest,
    SubmitStatement,
    UploadRequest,
)
CONTAINERS = {"statement", "device"}
PRIVACY = Path(__file__).parents[2] / "docs" / "privacy.md"


def named() -> set[str]:
    return {word for item in LEAVING for word in re.findall(r"[A-Za-z_0-9-]+", item.name)}


@pytest.mark.parametrize("message", SENT, ids=lambda message: message.__name__)
def test_every_field_that_is_sent_is_listed(message: type[BaseModel]) -> None:
    assert set(message.model_fields) - CONTAINERS <= named()


def test_the_page_says_what_the_program_says() -> None:
    page = PRIVACY.read_text(encoding="utf-8")
    assert [item.name for item in LEAVING if f"`{item.name}`" not in page and item.name not in page] == []
    assert [words for words in STAYING if words.split(":")[0].split(";")[0] not in page] == []


@pytest.mark.parametrize(
    ("cause", "sent"),
    [
        (
            "the trainer ended with code 1\n/home/ada/x/l1.log ends with:\n    secret",
            "the trainer ended with code 1",
        ),
        ("no room left on the disk of /home/ada/.local", "no room left on the disk of (path)"),
        ("[Errno 2] No such file: '/home/ada/x'", "[Errno 2] No such file: '(path)'"),
        (r"cannot open C:\Users\ada\x", "cannot open (path)"),
        ("http://host:8420/v1/leases does not answer", "http://host:8420/v1/leases does not answer"),
        ("the base has no weight a/b", "the base has no weight a/b"),
        ("x" * 600, "x" * 512),
    ],
)
def test_reasons_name_no_path_of_this_machine(cause: str, sent: str) -> None:
    assert public_reason(cause) == sent


def test_the_doctor_prints_the_list() -> None:
    table = CliRunner().invoke(app, ["doctor", "--what-leaves"]).output
    found = json.loads(CliRunner().invoke(app, ["doctor", "--what-leaves", "--json"]).output)
    assert [item["name"] for item in found["leaves"]] == [item.name for item in LEAVING]
    assert found["stays"] == list(STAYING)
    assert "tokens_per_s" in table
    assert all(words in table for words in STAYING)
