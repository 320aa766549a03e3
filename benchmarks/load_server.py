"""The servers that benchmarks/load.py puts under load: a whole `rankup up`, and the same application on plain uvicorn.

What always holds: every server is a process of its own, so that what the volunteers cost is not in its figures; a
server that was started here is stopped here. Nothing of it is changed but its environment: the settings that a run
needs are those that any organiser can set, and rate limits are lifted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
from aggregate_run import FOLDER

LIFTED: Final = {
    # All volunteers come from one address, and those of part "rates" call far more often than anybody may.
    f"RANKUP_COORDINATOR_{kind}_PER_MIN": "0"
    for kind in ("ENROLS", "CLAIMS", "HEARTBEATS", "DELIVERIES", "REQUESTS", "REFUSALS")
}
START_S: Final = 180.0
STOP_S: Final = 90.0


@dataclass(frozen=True)
class Server:
    """A running server, as its clients and its organiser see it."""

    url: str
    access: Mapping[str, Any]
    """What stands in its server.json: organiser's token, addresses of store and ledger, the publisher's key."""
    pid: int
    home: Path
    environment: Mapping[str, str]

    @property
    def organiser(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.access['organiser_token']}"}


def free_port() -> int:
    """Below the range that Ray and the kernel hand out."""
    for port in random.sample(range(8700, 8800), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 8700 and 8800")


@contextlib.contextmanager
def whole_server(home: Path, changes: Mapping[str, str]) -> Iterator[Server]:
    """`rankup up --open` on loopback with its embedded services, until the block ends. `changes`: its environment."""
    port = free_port()
    environment = (
        os.environ | {"RANKUP_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | LIFTED | dict(changes)
    )
    # From any folder the commands of this checkout, not those of another one that is installed.
    environment["PYTHONPATH"] = str(FOLDER.parent)
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rankup", "up", "--open", "--port", str(port)]
    with (home / "up.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        written = home / "server" / "server.json"
        written.unlink(missing_ok=True)  # What a killed server left behind.
        wait_ready(process, url, home / "up.log", written)
        access = json.loads(written.read_text())
        yield Server(url, access, process.pid, home, environment)
    finally:
        stop(process)


@contextlib.contextmanager
def bare_server(server: Server, what: str) -> Iterator[Server]:
    """`load_bare.py` on the ledger and the store of `server`: the gateway, or as little as a heartbeat can cost."""
    port = free_port()
    settings = json.dumps({"what": what, "port": port, "access": dict(server.access)})
    log_path = server.home / f"{what}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, FOLDER / "load_bare.py"],
            env=dict(server.environment),
            cwd=server.home,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    try:
        assert process.stdin is not None
        process.stdin.write(settings.encode())
        process.stdin.close()
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url, log_path)
        yield Server(url, server.access, process.pid, server.home, server.environment)
    finally:
        stop(process)


def wait_ready(process: subprocess.Popen[bytes], url: str, log: Path, written: Path | None = None) -> None:
    """Until it takes requests and, where it writes such a file, has written it."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/v1/ready", timeout=5).status_code == 200 and (written is None or written.exists()):
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server does not come up:\n{log.read_text(errors='replace')[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
