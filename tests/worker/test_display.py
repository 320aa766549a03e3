"""Every event has words, a JSON line and a place in the live view."""

from __future__ import annotations

import io
import json
from typing import get_args

import pytest
from rich.console import Console

from rankup.errors import DiskFullError
from rankup.protocol import NoWorkCode
from worker.display import LiveDisplay, PlainDisplay, describe, event_fields, open_display, write_json
from worker.events import (
    Abandoned,
    Answering,
    Claimed,
    Downloading,
    Dropped,
    Enrolled,
    Kept,
    NoWork,
    Paused,
    Problem,
    Resumed,
    Retrying,
    Starting,
    Step,
    Submitted,
    Uploading,
    Verdict,
    Waiting,
    WorkerEvent,
)

EVENTS: dict[str, tuple[WorkerEvent, str]] = {
    "enrolled": (Enrolled("w-1", "ada", "http://host", new=True), "Joined http://host as ada (w-1)"),
    "claimed": (Claimed("l1", "r1", "tiny", 3, 5, 25), "Got shard 5 of round r1: 25 steps on tiny version 3"),
    "no-work": (NoWork("", 5.0), "No work now: no open round; asking again in 5 s"),
    "downloading": (Downloading("base", 1024**2, 5 * 1024**3), "Downloading the base version: 1.0 MiB of 5.0 GiB"),
    "starting": (Starting("l1"), "Loading the model"),
    "answering": (Answering(12, 100), "The teacher answers 12 of 100 prompts"),
    "step": (Step(3, 25, 2.34567, 81.4), "Step 3 of 25: loss 2.346, 81 tokens/s"),
    "paused": (Paused("cs2 is running", "l1"), "Paused: cs2 is running"),
    "resumed": (Resumed("l1"), "Going on"),
    "retrying": (
        Retrying("l1", "no memory", 7, 2),
        "The trainer failed, starting it again at step 7 with 2 examples at a time: no memory",
    ),
    "kept": (
        Kept("l1", 7, 25),
        "Kept step 7 of 25: the next start goes on from there, if the lease is still valid then",
    ),
    "uploading": (Uploading("l1", 10, 2048), "Uploading the delta: 10 B of 2.0 KiB"),
    "submitted": (Submitted("l1", "ab" * 32, 99), "Handed in abababababab: 99 tokens; the verdict follows"),
    "verdict": (Verdict("l1", False, "too large"), "Rejected: too large"),
    "dropped": (Dropped("l1", "closed"), "A finished delta is of no use any more: closed"),
    "abandoned": (Abandoned("l1", "over", returned=True), "Lease ended without a delta and given back: over"),
    "waiting": (Waiting("no answer", 2.0), "Waiting for the server: no answer; next try in 2 s"),
    "problem": (Problem(DiskFullError("full", remedy="free it")), "Problem: full\n  free it"),
}


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_has_words_and_a_json_line(name: str) -> None:
    event, words = EVENTS[name]
    assert describe(event) == words
    stream = io.StringIO()
    write_json(event, stream)
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue())["event"] == name


def test_several_shards_are_told_as_a_range() -> None:
    assert describe(Claimed("l1", "r1", "tiny", 3, 4, 100, 4)).startswith("Got shards 4-7 of round r1: 100 steps")


@pytest.mark.parametrize("why", get_args(NoWorkCode))
def test_every_reason_for_no_work_has_words_and_those_of_the_server_come_first(why: NoWorkCode) -> None:
    assert len(describe(NoWork("", 5.0, why))) > len("No work now: ; asking again in 5 s") + 10
    assert describe(NoWork("Come back at nine.", 5.0, why)) == "No work now: Come back at nine; asking again in 5 s"


def test_who_waits_for_approval_is_told() -> None:
    assert "has to approve" in describe(Enrolled("w-1", "ada", "http://host", new=True, waiting=True))


def test_a_problem_is_told_by_code_cause_and_remedy() -> None:
    fields = event_fields(EVENTS["problem"][0])
    assert fields == {"event": "problem", "code": "disk-full", "cause": "full", "remedy": "free it"}


def test_the_live_view_shows_every_event_and_keeps_what_lasts() -> None:
    output = io.StringIO()
    with LiveDisplay(Console(file=output, force_terminal=True, width=120)) as display:
        for event, _ in EVENTS.values():
            display(event)
    assert "Rejected: too large" in output.getvalue()
    assert "free it" in output.getvalue()


def test_plain_lines_thin_out_steps_but_keep_first_and_last() -> None:
    now = [0.0]
    lines: list[str] = []
    display = PlainDisplay(lines.append, clock=lambda: now[0])
    for step in range(1, 11):
        display(Step(step, 10, 1.0, 1.0))
        now[0] += 0.5
    assert [line.split()[1] for line in lines] == ["1", "5", "9", "10"]


def test_an_upload_and_the_steps_of_the_next_lease_thin_out_each_for_itself() -> None:
    now = [0.0]
    lines: list[str] = []
    display = PlainDisplay(lines.append, clock=lambda: now[0])
    display(Claimed("l2", "r1", "tiny", 3, 5, 20))
    for step in range(1, 21):
        display(Step(step, 20, 1.0, 1.0))
        display(Uploading("l1", step * 1024, 21 * 1024))
        now[0] += 0.5
    assert [line.split()[0] for line in lines].count("Step") == 6
    assert [line.split()[0] for line in lines].count("Uploading") == 5


def test_the_live_view_shows_an_upload_beside_the_training_of_the_next_lease() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    display = LiveDisplay(console)
    for event in (
        Claimed("l1", "r1", "tiny", 3, 5, 25),
        Uploading("l1", 1, 2048),
        Claimed("l2", "r1", "tiny", 3, 6, 25),
        Step(3, 25, 2.0, 81.0),
        Uploading("l1", 1024, 2048),
    ):
        display(event)
    with console.capture() as shown:
        console.print(display)
    assert "Step 3 of 25" in shown.get()
    assert "Uploading the delta: 1.0 KiB of 2.0 KiB (of the lease before)" in shown.get()
    display(Submitted("l1", "ab" * 32, 99))
    with console.capture() as shown:
        console.print(display)
    assert "of the lease before" not in shown.get()


def test_output_that_is_no_terminal_gets_plain_lines() -> None:
    output = io.StringIO()
    with open_display(console=Console(file=output, width=20)) as report:
        report(EVENTS["claimed"][0])
    assert output.getvalue() == EVENTS["claimed"][1] + "\n"


def test_json_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display(as_json=True) as report:
        report(EVENTS["step"][0])
    assert json.loads(capsys.readouterr().out)["tokens_per_s"] == 81.4
