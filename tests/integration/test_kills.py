"""kill -9 in the middle of a round, of the keeper and of the gateway's replica: the round goes on."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from hand_volunteer import HandVolunteer, good_delta
from running_server import Server, processes_below
from test_first_light import wait_for_round

from rankup.protocol import LeaseState

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(300)]


def kill_process_named(server: Server, title: str) -> None:
    """SIGKILL to every process of the server whose title holds `title`; there must be one."""
    found = [p for p in processes_below(server.process.pid) if title in " ".join(p.cmdline())]
    assert found, [" ".join(p.cmdline())[:60] for p in processes_below(server.process.pid)]
    for process in found:
        process.kill()
    psutil.wait_procs(found, timeout=10)


@pytest.mark.parametrize("title", ["ray::KeeperActor", "ray::ServeReplica"])
def test_a_round_outlives_a_killed_process_and_counts_every_delta_once(
    server: Server, campaign_data: str, tmp_path: Path, title: str
) -> None:
    opened = server.json("round", "create", "--model", campaign_data, "--dataset", "pydocs", "--shards", "2")
    ada, grace = (HandVolunteer(server.url, server.invite, name) for name in ("ada", "grace"))
    first = ada.claim()
    assert ada.hand_in(first, good_delta(first, tmp_path, seed=1)).state is LeaseState.ACCEPTED

    second = grace.claim()
    path = good_delta(second, tmp_path, seed=2)
    grace.upload(second, path)
    kill_process_named(server, title)
    began = time.monotonic()
    grace.submit(second, path)
    assert grace.verdict(second).state is LeaseState.ACCEPTED
    assert time.monotonic() - began < 60

    view = wait_for_round(server, opened["round_id"])
    assert view["accepted"] == 2
    assert view["state"] in ("published", "rejected")  # random deltas may not pass the release gate
