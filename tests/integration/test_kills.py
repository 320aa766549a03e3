"""kill -9 in one campaign, of the keeper, of Valkey and of the gateway's replica: the short form of `make chaos`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import SHARDS, Scene, World, judge, run
from faults import KEEPER, REPLICA, VALKEY, kill
from running_server import Server

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def world(server: Server, campaign_data: str) -> Iterator[World]:
    made = World(server, seed=1)
    yield made
    made.close()


def three_kills(scene: Scene) -> None:
    """Spread over the deltas of one round."""
    for title, after in ((KEEPER, 2), (VALKEY, SHARDS // 2), (REPLICA, SHARDS - 2)):
        scene.wait_for_submits(after)
        kill(scene, title)


def test_a_round_outlives_three_killed_processes_and_counts_every_delta_once(world: World, tmp_path: Path) -> None:
    undisturbed = run(world, "undisturbed", tmp_path / "calm", rounds=1)
    judge(undisturbed, undisturbed.bits)
    judge(run(world, "disturbed", tmp_path / "kills", three_kills, rounds=1), undisturbed.bits)
