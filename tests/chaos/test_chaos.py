"""Whole campaigns under kill -9 and on bad networks: nothing accepted is lost, the bits are the same (`make chaos`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign import ROUNDS, SHARDS, Outcome, World, judge, run
from chaos_report import Report
from faults import (
    CONTROLLER,
    GCS,
    KEEPER,
    PROXY,
    RAYLET,
    REPLICA,
    SEAWEEDFS,
    VALKEY,
    Disturbance,
    cuts,
    flush,
    kill_aggregation,
    kill_once,
    kill_server,
    kill_under_load,
    lose_data,
    resets,
    silence,
    slow_links,
    storm,
)

pytestmark = [pytest.mark.chaos, pytest.mark.stack, pytest.mark.timeout(900)]

SCENARIOS: dict[str, tuple[str, Disturbance]] = {
    "replica": ("kill -9 of the gateway's replica", kill_under_load(REPLICA)),
    "proxy": ("kill -9 of Serve's HTTP proxy", kill_once(PROXY)),
    "controller": ("kill -9 of Serve's controller", kill_under_load(CONTROLLER)),
    "keeper": ("kill -9 of the keeper", kill_under_load(KEEPER)),
    "valkey": ("kill -9 of Valkey", kill_under_load(VALKEY)),
    "seaweedfs": ("kill -9 of SeaweedFS", kill_under_load(SEAWEEDFS)),
    "aggregation": ("kill -9 of the keeper and of all tasks, in a fold and in an evaluation", kill_aggregation),
    "gcs": ("kill -9 of Ray's control service", kill_once(GCS)),
    "head": ("kill -9 of Ray's control service and raylet", kill_once(GCS, RAYLET)),
    "server": ("kill -9 of `rankup up`, then `rankup up` again", kill_server),
    "data": ("kill -9 of Valkey, its append-only file removed", lose_data),
    "flush": ("all of Valkey's data deleted, then `rankup admin rebuild`", flush),
    "resets": ("one read in seven ends in a reset", resets),
    "slow": ("links of 20 kB/s", slow_links),
    "cuts": ("all connections cut, none accepted for 5 s", cuts),
    "silence": ("connections stay open, nothing passes for 3 s", silence),
    "storm": ("ten times a random one of replica, keeper, Valkey, SeaweedFS, controller, every 1 to 4 s", storm),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_disturbed_campaign_ends_with_the_bits_of_an_undisturbed_one(
    world: World, undisturbed: Outcome, report: Report, tmp_path: Path, name: str
) -> None:
    what, disturb = SCENARIOS[name]
    try:
        outcome = run(world, f"m-{name}", tmp_path, disturb)
    finally:
        world.gateway.heal()
        world.storage.heal()
    judge(outcome, undisturbed.bits)
    report.add(name, what, outcome)


def test_leases_that_run_out_under_kills_count_each_shard_once(
    world: World, undisturbed: Outcome, report: Report, tmp_path: Path
) -> None:
    outcome = run(world, "m-late", tmp_path, kill_under_load(REPLICA, VALKEY), lease_s=1.0, oversleep_s=4.0)
    judge(outcome, undisturbed.bits)
    assert sum(event.kind == "claim" for event in outcome.events) > ROUNDS * SHARDS, "no lease ran out"
    report.add("late", "leases of 1 s, every third training takes 4 s longer; kill -9 of replica and Valkey", outcome)


def test_an_undisturbed_campaign_stands_up_to_the_same_judgement(undisturbed: Outcome) -> None:
    judge(undisturbed, undisturbed.bits)
