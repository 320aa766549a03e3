"""One server for all integration tests, started by `rankup up`; stopped, none of its processes may be left."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from running_server import Server, processes_below, start_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start_server(tmp_path_factory.mktemp("up"))
    yield running
    children = processes_below(running.process.pid)
    running.stop()
    assert running.process.returncode == 0, (running.home / "up.log").read_text()
    left = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"rankup up left these running: {left}"


@pytest.fixture(scope="session")
def campaign_data(server: Server) -> str:
    """Model `tiny` and dataset `pydocs`, made by the commands of the README."""
    server.rankup("model", "import", "tiny", "--name", "tiny")
    server.rankup("dataset", "build", "pydocs", "--pydocs", "--shard-rows", "64")
    return "tiny"
