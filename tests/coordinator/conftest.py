"""Real Valkey servers for the coordinator's tests: on a unix socket in a short folder, with an append-only file."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from rankup.local import LocalSettings, find_valkey
from rankup.settings import LedgerSettings

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """A test run that is killed leaves no server behind (prctl(2))."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ValkeyServer:
    """One server that a test may kill and start again on the same data."""

    def __init__(self, folder: Path, *, append_only: bool = True) -> None:
        self.folder = folder
        self.append_only = append_only
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def ledger_settings(self) -> LedgerSettings:
        return LedgerSettings(url=SecretStr(f"unix://{self.folder}/v.sock"), timeout_s=5.0)

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=f"{self.folder}/v.sock", decode_responses=True)

    def start(self) -> None:
        command = [str(find_valkey(LocalSettings())), "--port", "0", "--unixsocket", f"{self.folder}/v.sock"]
        command += ["--unixsocketperm", "700", "--dir", str(self.folder), "--save", "", "--daemonize", "no"]
        command += ["--appendonly", "yes" if self.append_only else "no", "--appendfsync", "everysec"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client().ping()
            except redis.exceptions.RedisError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """SIGKILL: no farewell, nothing flushed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer(Path(tempfile.mkdtemp(prefix="rk-", dir="/tmp")))
    server.start()
    yield server
    server.kill()
    shutil.rmtree(server.folder)


@pytest.fixture
def valkey(shared_valkey: ValkeyServer) -> ValkeyServer:
    """An empty server, shared by tests one after the other: do not kill it."""
    shared_valkey.client().flushall()
    return shared_valkey


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    """A server that this test may kill."""
    server = ValkeyServer(Path(tempfile.mkdtemp(prefix="rk-", dir="/tmp")))
    server.start()
    yield server
    server.kill()
    shutil.rmtree(server.folder)
