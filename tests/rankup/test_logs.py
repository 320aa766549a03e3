"""Log events of servers and commands: form, ids, and no secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from rankup import logs
from rankup.errors import SetupError


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANKUP_LOG", "RANKUP_LOG_LEVEL", "RANKUP_LOG_FILE"):
        monkeypatch.delenv(name, raising=False)
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


SECRETS: dict[str, dict[str, Any]] = {
    "by its name": {"organiser_token": "swordfish"},
    "by its short name": {"invite": "swordfish"},
    "inside a mapping": {"settings": {"secret": "swordfish", "port": 1}},
    "inside a list of mappings": {"all": [{"password": "swordfish"}]},
    "a SecretStr under any name": {"thing": SecretStr("swordfish")},
    "in an address": {"cause": "cannot reach redis://user:swordfish@valkey:6379/0 now"},
    "in a header": {"headers": "Authorization: Bearer swordfish"},
    "in a presigned URL": {"url": "https://s3/b/k?X-Amz-Expires=60&X-Amz-Signature=swordfish&x=1"},
    "in a ticket's URL": {"path": "/v1/uploads/l/aa?size=1&signature=swordfish"},
    "in an exception": {"error": ValueError("redis://:swordfish@h")},
}


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("name", SECRETS)
def test_no_secret_is_written(name: str, form: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKUP_LOG", form)
    logs.configure_server("gateway")
    structlog.get_logger().warning("something", **SECRETS[name])
    written = capsys.readouterr().err
    assert "something" in written
    assert "swordfish" not in written
    assert "hidden" in written or "*****" in written


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_shows_no_local_variables(form: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKUP_LOG", form)
    logs.configure_server("keeper")
    password, address = "sword" + "fish", "redis://:" + "trout" + "@h"
    try:
        raise ValueError(f"cannot read {address}, {len(password)}")
    except ValueError:
        structlog.get_logger().exception("failed")
    written = capsys.readouterr().err
    assert "ValueError" in written
    assert "swordfish" not in written
    assert "trout@h" not in written


def test_an_event_of_a_server_is_one_line_of_json_with_its_ids(capsys: Any) -> None:
    logs.configure_server("task")
    with structlog.contextvars.bound_contextvars(round_id="r-1", request_id="q"):
        structlog.get_logger("x").info("judged", lease_id="l-1", digits=[1, 2.5], text="two\nlines ä")
        structlog.get_logger("x").debug("not shown")
    [line] = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert isinstance(event.pop("pid"), int)
    assert event == {
        "event": "judged",
        "level": "info",
        "role": "task",
        "round_id": "r-1",
        "request_id": "q",
        "lease_id": "l-1",
        "digits": [1, 2.5],
        "text": "two\nlines ä",
    }


def test_a_command_writes_warnings_as_text_unless_told_otherwise(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure_command(verbose=False)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    written = capsys.readouterr().err
    assert "loud" in written
    assert "quiet" not in written
    assert not written.startswith("{")
    logs.configure_command(verbose=True)
    structlog.get_logger().debug("quiet")
    assert "quiet" in capsys.readouterr().err
    monkeypatch.setenv("RANKUP_LOG", "json")
    logs.configure_command(verbose=False)
    structlog.get_logger().warning("loud")
    assert json.loads(capsys.readouterr().err)["event"] == "loud"


@pytest.mark.parametrize(
    ("name", "value"), [("RANKUP_LOG", "xml"), ("RANKUP_LOG_LEVEL", "loud"), ("RANKUP_LOG_FILE", "/proc/none/x")]
)
def test_a_setting_that_makes_no_sense_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SetupError) as caught:
        logs.configure_server("gateway")
    assert name in caught.value.cause + caught.value.remedy


PROCESS = """
import structlog, sys
from rankup.logs import configure_server
configure_server("gateway")
for n in range(300):
    structlog.get_logger().info("line", who=sys.argv[1], n=n, filling="x" * 9000)
"""


def test_lines_of_several_processes_in_one_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "logs" / "server.log"
    monkeypatch.setenv("RANKUP_LOG_FILE", str(path))
    writers = [subprocess.Popen([sys.executable, "-c", PROCESS, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((event["who"], event["n"]) for event in events) == [(who, n) for who in "ab" for n in range(300)]
    assert path.stat().st_mode & 0o777 == 0o600
