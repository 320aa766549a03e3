"""The control socket, and the commands that use it."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankup.cli.control import describe, parse_duration
from rankup.cli.interrupt import interruptible
from rankup.cli.volunteer import _noticing_sigterm, app
from rankup.errors import InputError, NotFoundError, SetupError, StateError, UnreachableError
from worker import control
from worker.control import MAX_REQUEST_BYTES, ControlServer, Reply, Request, ask, find_socket, socket_path
from worker.limits import Limits
from worker.status import Credit, Doing, LeaseStatus, Status, UploadStatus

STATUS = Status(
    pid=7,
    server="http://h",
    name="ada",
    worker_id="w-1",
    doing=Doing.TRAINING,
    lease=LeaseStatus(
        lease_id="l1",
        round_id="r1",
        model="tiny",
        base_version=3,
        shard=4,
        step=2,
        steps=5,
        loss=1.5,
        tokens_per_s=81.4,
        eta_s=600.0,
    ),
    credit=Credit(handed_in=3, accepted=2, rejected=1, tokens=99),
    bytes_up=12_300_000,
    limits=Limits(exclusive_app=("cs2",), week={"sun": "off"}),
    unread=("no battery",),
    uptime_s=7200.0,
)


class Agent:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def answer(self, request: Request) -> Reply:
        self.asked.append(request)
        return Reply(status=STATUS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKUP_WORKER_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def agent(home: Path) -> Iterator[Agent]:
    there = Agent()
    with ControlServer(socket_path(home, "http://h"), there.answer):
        yield there


def send(path: Path, data: bytes) -> Reply:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        received = b""
        while piece := line.recv(4096):
            received += piece
    return Reply.model_validate_json(received)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}\n",
        b'{"order": "rm"}\n',
        b'{"order": "pause", "seconds": -1}\n',
        b'{"order":"status","x":1}\n',
        b"\xff\n",
    ],
)
def test_what_is_no_request_is_told_so_and_the_next_one_is_answered(agent: Agent, home: Path, data: bytes) -> None:
    path = find_socket(home)
    reply = send(path, data)
    assert reply.error
    assert reply.status is None
    assert agent.asked == []
    assert ask(path, Request(order="status")) == STATUS


def test_a_request_without_end_is_not_held_in_memory(agent: Agent, home: Path) -> None:
    assert "at most" in send(find_socket(home), b" " * (MAX_REQUEST_BYTES + 1)).error
    assert "at most" in send(find_socket(home), b" " * MAX_REQUEST_BYTES + b"{}\n").error


def test_an_asker_who_says_nothing_holds_up_nobody_for_long(
    agent: Agent, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TIMEOUT_S", 0.2)
    path = find_socket(home)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        monkeypatch.setattr(control, "TIMEOUT_S", 5.0)
        threading.Timer(0.5, silent.close).start()
        assert ask(path, Request(order="status")) == STATUS


def test_several_workers_of_one_home_are_told_apart(agent: Agent, home: Path) -> None:
    with ControlServer(socket_path(home, "http://other"), agent.answer):
        with pytest.raises(StateError, match="2 workers"):
            find_socket(home)
        assert find_socket(home, "http://other") == socket_path(home, "http://other")
        with (
            pytest.raises(SetupError, match="another worker"),
            ControlServer(find_socket(home, "http://h"), agent.answer),
        ):
            pass
    with pytest.raises(NotFoundError):
        find_socket(home, "http://third")


def test_a_home_too_deep_for_a_socket_address_works_too(agent: Agent, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with ControlServer(socket_path(deep, "http://h"), agent.answer):
        assert ask(find_socket(deep), Request(order="resume")) == STATUS


def test_an_answer_that_is_none_is_told(home: Path) -> None:
    path = socket_path(home, "http://h")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            asker, _ = listener.accept()
            with asker:
                asker.recv(4096)
                asker.sendall(b"hello\n")

        threading.Thread(target=answer).start()
        with pytest.raises(UnreachableError, match="does not answer"):
            ask(path, Request(order="status"))


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "order", "seconds"),
    [
        (["status"], "status", None),
        (["pause"], "pause", None),
        (["pause", "2h"], "pause", 7200.0),
        (["resume"], "resume", None),
        (["finish", "--server", "h"], "finish", None),
        (["leave"], "leave", None),
    ],
)
def test_commands_carry_orders_and_show_the_status(
    agent: Agent, command: list[str], order: str, seconds: float | None
) -> None:
    done = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(done.output)["lease"]["eta_s"] == 600.0
    assert [(request.order, request.seconds) for request in agent.asked] == [(order, seconds)]
    assert "step 2 of 5, loss 1.500, 81 tokens/s, about 10 min to go" in CliRunner().invoke(app, command).output


def test_the_status_tells_everything_in_a_few_lines() -> None:
    assert dict(describe(STATUS)) == {
        "worker": "ada at http://h, process 7, up 2.0 h",
        "state": "training",
        "lease": "shard 4 of r1, tiny version 3",
        "": "step 2 of 5, loss 1.500, 81 tokens/s, about 10 min to go",
        "outbox": "0 to upload, 0 waiting for their verdict",
        "today": "12.3 MB up, 0 B down",
        "credit": "2 accepted, 1 rejected, 99 tokens",
        "limits": "week=sun off, exclusive_app=cs2",
        "note": "no battery",
    }


def test_the_status_tells_how_far_an_upload_is() -> None:
    uploading = STATUS.model_copy(
        update={"outbox_ready": 1, "upload": UploadStatus(lease_id="l0", done=500_000, total=2_000_000)}
    )
    assert dict(describe(uploading))["outbox"] == ("1 to upload (500.0 kB of 2.0 MB sent), 0 waiting for their verdict")


@pytest.mark.parametrize(("options", "shown"), [([], "shard 4 of r1"), (["--json"], '"lease_id":"l1"')])
def test_a_watched_status_is_shown_again_and_again(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, options: list[str], shown: str
) -> None:
    def sleep(seconds: float) -> None:
        if len(agent.asked) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    done = CliRunner().invoke(app, ["status", "--watch", *options])
    assert shown in done.output
    assert len(agent.asked) == 3


def test_an_order_about_limits_carries_its_changes(agent: Agent, home: Path) -> None:
    ask(find_socket(home), Request(order="limits", changes=("nice=19",)))
    assert agent.asked == [Request(order="limits", changes=("nice=19",))]


def test_limits_are_shown_and_set_without_a_running_worker(home: Path) -> None:
    run = CliRunner().invoke
    assert json.loads(run(app, ["limits", "--json"]).output) == Limits().model_dump(mode="json")
    run(app, ["limits", "set", "idle_time_to_run=5", "exclusive_app=[a, b]"])
    assert json.loads(run(app, ["limits", "--json"]).output)["exclusive_app"] == ["a", "b"]
    assert "idle_time_to_run" in run(app, ["limits"]).output


def test_logs_are_the_last_lines_of_the_newest_file(home: Path) -> None:
    assert isinstance(CliRunner().invoke(app, ["logs"]).exception, NotFoundError)
    folder = home / "servers" / "h"
    (folder / "logs").mkdir(parents=True)
    (folder / "agent.log").write_text("one\ntwo\nthree\n")
    (folder / "logs" / "l1.log").write_text("torch\n")
    assert CliRunner().invoke(app, ["logs", "-n", "2"]).output == "two\nthree\n"
    assert CliRunner().invoke(app, ["logs", "--trainer"]).output == "torch\n"


def test_a_sigterm_is_told_from_a_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number, told in ((signal.SIGTERM, True), (signal.SIGINT, False)):
        with interruptible() as stopped, _noticing_sigterm() as terminated:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
            assert stopped.is_set()
            assert terminated.is_set() is told
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_service_needs_a_machine_that_has_joined(home: Path) -> None:
    done = CliRunner().invoke(app, ["install-service", "http://h"])
    assert isinstance(done.exception, SetupError)
    assert "join" in done.exception.remedy


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("30s", 30), ("20m", 1200), ("1.5h", 5400), ("1d", 86400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1h", "2w", "1e9", "soon", "9999999d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_duration(text)
