"""kill -9, and other ways to disturb a server."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import time
from collections.abc import Callable

import psutil
from campaign import ROUNDS, SHARDS, Scene
from running_server import processes_below

from rankup.settings import LedgerSettings

Disturbance = Callable[[Scene], None]

REPLICA, PROXY, CONTROLLER, KEEPER = "ray::ServeReplica", "ray::ProxyActor", "ray::ServeController", "ray::KeeperActor"
VALKEY, SEAWEEDFS = "valkey-server", "/weed "
GCS, RAYLET = "gcs/gcs_server", "raylet/raylet"
STORM_KILLS = 10
TASKS = "ray::_"
"""The title of a worker that carries out a step of an aggregation begins like this."""


def find(scene: Scene, title: str) -> list[psutil.Process]:
    """The server's processes whose title holds `title`."""
    found = []
    for process in processes_below(scene.world.server.process.pid):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill(scene: Scene, *titles: str) -> None:
    """SIGKILL to every process with one of the titles; there must be one of each."""
    found = [process for title in titles for process in find(scene, title)]
    assert len(found) >= len(titles), titles
    scene.hit()
    for process in found:
        process.kill()


def points(scene: Scene, salt: str) -> list[int]:
    """After how many acknowledged deltas to disturb: somewhere in each round of the campaign, by the world's seed."""
    rng = random.Random(f"{scene.world.seed}|{salt}")
    return [SHARDS * index + rng.randint(1, SHARDS - 1) for index in range(ROUNDS)]


def kill_under_load(*titles: str) -> Disturbance:
    """Once in each round, while deltas come in."""

    def disturb(scene: Scene) -> None:
        for point in points(scene, titles[0]):
            scene.wait_for_submits(point)
            kill(scene, *titles)

    return disturb


def kill_once(*titles: str) -> Disturbance:
    """Once in the campaign, while deltas come in."""

    def disturb(scene: Scene) -> None:
        scene.wait_for_submits(points(scene, titles[0])[0])
        kill(scene, *titles)

    return disturb


def kill_aggregation(scene: Scene) -> None:
    """The keeper and whatever runs for it: in the fold of the first round, in the evaluation of the second."""
    for index, state in ((0, "aggregating"), (1, "evaluating")):
        found = scene.wait_for_state(index, state, "evaluating")
        assert found in (state, "evaluating"), f"round {index} was {found} before it could be disturbed"
        time.sleep(random.Random(f"{scene.world.seed}|{state}").uniform(0.0, 0.3))
        kill(scene, KEEPER)
        for process in find(scene, TASKS):
            with contextlib.suppress(psutil.Error):
                process.kill()


def kill_server(scene: Scene) -> None:
    """`rankup up` itself, with all that dies of it; then it is started again."""
    scene.wait_for_submits(points(scene, "server")[0])
    scene.hit()
    scene.world.server.process.kill()
    scene.world.server.process.wait()
    scene.world.start_again()


def lose_data(scene: Scene) -> None:
    """kill -9 of Valkey, and its append-only file is gone: `rankup up` finds it empty and restores it."""
    scene.wait_for_submits(points(scene, "data")[0])
    shutil.rmtree(scene.world.server.home / "server" / "services" / "valkey" / "appendonlydir")
    kill(scene, VALKEY)


def flush(scene: Scene) -> None:
    """Everything in Valkey is deleted while it runs, then `rankup admin rebuild`, in each round of the campaign."""
    url = LedgerSettings.from_wire(scene.world.server.access["ledger"]).url.get_secret_value()
    for point in points(scene, "flush"):
        scene.wait_for_submits(point)
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(url.removeprefix("unix://"))
            link.sendall(b"FLUSHALL\r\n")
            scene.hit()
            assert link.recv(64) == b"+OK\r\n"
        scene.world.server.rankup("admin", "rebuild", "--yes")


def storm(scene: Scene) -> None:
    """One kill after the other, by the seed."""
    rng = random.Random(f"{scene.world.seed}|storm")
    for _ in range(STORM_KILLS):
        with contextlib.suppress(AssertionError):  # what was killed may not be back
            kill(scene, rng.choice((REPLICA, KEEPER, VALKEY, SEAWEEDFS, CONTROLLER)))
        time.sleep(rng.uniform(1.0, 4.0))


# -- the network -------------------------------------------------------------------------------------------------------


def resets(scene: Scene) -> None:
    """One read in seven ends in a reset, to the gateway and to object storage, all the time."""
    scene.hit()
    scene.world.gateway.reset(1 / 7)
    scene.world.storage.reset(1 / 7)
    scene.wait_for_submits(SHARDS * ROUNDS)


def slow_links(scene: Scene) -> None:
    """20 kB/s in each direction."""
    scene.hit()
    scene.world.gateway.slow(20_000)
    scene.world.storage.slow(20_000)
    scene.wait_for_submits(SHARDS * ROUNDS)


def cuts(scene: Scene) -> None:
    """Nobody can connect for 5 s, once in each round."""
    for point in points(scene, "cuts"):
        scene.wait_for_submits(point)
        for proxy in (scene.world.gateway, scene.world.storage):
            proxy.cut()
        time.sleep(5.0)
        scene.hit()
        for proxy in (scene.world.gateway, scene.world.storage):
            proxy.heal()


def silence(scene: Scene) -> None:
    """Connections stay open and nothing passes for 3 s, once in each round; those that it met never speak again."""
    for point in points(scene, "silence"):
        scene.wait_for_submits(point)
        for proxy in (scene.world.gateway, scene.world.storage):
            proxy.silence()
        time.sleep(3.0)
        scene.hit()
        for proxy in (scene.world.gateway, scene.world.storage):
            proxy.heal()
