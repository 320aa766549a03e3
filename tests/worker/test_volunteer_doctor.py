"""`rankup worker doctor` and what `join` says first: in a terminal, in a pipe, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gateway import FakeGateway, serve
from rich.console import Console
from typer.testing import CliRunner

from rankup.cli import volunteer_doctor
from rankup.cli.volunteer import app
from rankup.errors import DeniedError
from rankup.finding import Finding, Grade
from worker.doctor import Examination
from worker.plan import Memory, Part, Plan, Task

NOW = 1_000_000.0
TASK = Task(
    round_id="smollm2-r0007-ab12cd",
    model="smollm2",
    base_version=6,
    method="sft",
    rank=8,
    tier="for 6 GiB of memory or more",
    steps=25,
    licence="CC-BY-4.0\u202e",
    teacher="big version 4",
    deadline_at=NOW + 7_200,
    download_bytes=31_000_000,
    download_origin="patches, and what is not here",
    disk_bytes=269_000_000,
    memory=Memory(3_100_000_000, "bfloat16", 1),
    upload_bytes=4_900_000,
    parts=(Part("download", 0.4, ""), Part("training", 1200.0, "as long as others took"), Part("upload", None, "?")),
    first_credit_s=None,
    notes=("the round is for volunteers whom the organiser has named",),
)
PLAN = Plan(TASK, others=tuple(f"r{n} (tiny)" for n in range(5)), refused=("x: the organiser has paused it",))
FINDINGS = (
    Finding("python", Grade.OK, "Python 3.11"),
    Finding("graphics", Grade.WARN, "[red]no[/red] CUDA", "Install one."),
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    monkeypatch.setenv("RANKUP_WORKER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RANKUP_WORKER_DEDICATED", "true")
    with serve(FakeGateway()) as served:
        yield served


def test_the_plan_in_words() -> None:
    lines = volunteer_doctor.plan_lines(PLAN, NOW)
    assert lines[0] == ("round", "smollm2-r0007-ab12cd: smollm2 version 6, given under CC-BY-4.0; closes in 2 h")
    assert dict(lines[1:8]) == {
        "training": "sft, rank 8 (for 6 GiB of memory or more), 25 steps a shard",
        "teacher": "big version 4 answers the prompts",
        "memory": "about 3.1 GB: base in bfloat16, 1 example at a time",
        "download": "31.0 MB (patches, and what is not here)",
        "disk": "269.0 MB for the base",
        "upload": "about 4.9 MB for each lease",
        "credit": "the first cannot be told yet: download < 1 s + training 20 min + upload unknown (?)",
    }
    assert lines[8:10] == [
        ("", "an estimate. Training: as long as others took"),
        ("note", "the round is for volunteers whom the organiser has named"),
    ]
    assert [name for name, _ in lines[10:]] == ["or", "or", "or", "or", "not"]
    assert volunteer_doctor.plan_lines(Plan(None, waits="no round is open"), NOW) == [("waits", "no round is open")]


def test_lines_where_output_goes_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    volunteer_doctor.show(Examination(FINDINGS, Plan(None, waits="no round is open")), NOW)
    assert capsys.readouterr().out.splitlines() == [
        "ok   python    Python 3.11",
        "warn graphics  [red]no[/red] CUDA",
        "               -> Install one.",
        "waits     no round is open",
    ]


def test_a_terminal_gets_tables_and_no_markup_of_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda: console)
    volunteer_doctor.show(Examination(FINDINGS, PLAN), NOW)
    shown = screen.getvalue()
    assert "warn  graphics  [red]no[/red] CUDA" in shown
    assert "→ Install one." in shown
    assert "What it will do" in shown
    assert "\u202e" not in shown


def test_the_doctor_as_json_has_findings_and_plan(fake: FakeGateway) -> None:
    done = CliRunner().invoke(app, ["doctor", fake.url, "--json"])
    told = json.loads(done.output)
    assert done.exit_code == 0
    assert [finding["check"] for finding in told["findings"]][-4:] == ["server", "member", "clock", "links"]
    assert told["plan"]["waits"].startswith("no round is open")
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)["plan"] is None


def test_a_doctor_that_finds_a_failure_ends_with_one(fake: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKUP_WORKER_DEVICE", "xpu")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "fail device" in done.output


def test_a_join_says_what_it_found_before_anything_else_and_ends_where_that_is_no_use(fake: FakeGateway) -> None:
    done = CliRunner().invoke(app, ["join", fake.url, "--json"])
    events = [json.loads(line) for line in done.output.splitlines()]
    assert [event["event"] for event in events] == ["doctor", "plan"]
    assert [f["check"] for f in events[0]["findings"] if f["grade"] == "fail"] == ["member"]
    assert events[1]["task"] is None
    assert isinstance(done.exception, DeniedError)
    assert fake.names == {}


def test_a_join_without_the_doctor_asks_the_server_at_once(fake: FakeGateway) -> None:
    done = CliRunner().invoke(app, ["join", fake.url, "--json", "--no-doctor"])
    assert isinstance(done.exception, DeniedError)
    assert [json.loads(line)["event"] for line in done.output.splitlines()] != ["doctor", "plan"]
    assert fake.measured == []
