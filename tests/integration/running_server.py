"""A whole server as a user starts it, `rankup up` in a process of its own, and the commands that talk to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rankup.cli.demo_run import free_port

START_S = 120
STOP_S = 60


@dataclass
class Server:
    """A running `rankup up` and the commands that go with it."""

    home: Path
    url: str
    process: subprocess.Popen[bytes]

    @property
    def access(self) -> dict[str, Any]:
        return json.loads((self.home / "server" / "server.json").read_text())

    @property
    def invite(self) -> str:
        return json.loads((self.home / "server" / "secrets.json").read_text())["invite"]

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"RANKUP_HOME": str(self.home), "HF_HUB_OFFLINE": "1"} | more

    def rankup(self, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "rankup", *arguments],
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert not check or done.returncode == 0, f"rankup {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.rankup(*arguments, "--json").stdout)

    def join(self, name: str, *options: str) -> subprocess.Popen[str]:
        """A volunteer of its own."""
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "rankup", "worker", "join", self.url, "--invite", self.invite),
                *("--name", name, "--threads", "1", "--json", *options),
            ],
            env=self.environment(RANKUP_WORKER_HOME=str(self.home / name), RANKUP_WORKER_DEDICATED="true"),
            stdout=subprocess.PIPE,
            stderr=(self.home / f"{name}.log").open("w"),
            text=True,
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(STOP_S)


def start_server(home: Path, port: int | None = None, **more: str) -> Server:
    """`rankup up`, ready to be joined; `more` goes into its environment."""
    port = port or free_port()
    home.mkdir(parents=True, exist_ok=True)
    log = home / "up.log"
    process = subprocess.Popen(
        [sys.executable, "-m", "rankup", "up", "--port", str(port)],
        env=os.environ | {"RANKUP_HOME": str(home)} | more,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    server = Server(home, f"http://127.0.0.1:{port}", process)
    deadline = time.monotonic() + START_S
    while "Ready." not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            process.wait(STOP_S)
            raise AssertionError(log.read_text())
        time.sleep(0.2)
    return server


def processes_below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)
