"""A campaign on a whole server that somebody disturbs, and the judgement of what came out of it.

World       one `rankup up`, a proxy before its gateway and one before its object storage
Door        a thread that asks for the latest version all the time: a history, and when nobody answered
run         one campaign from version 0 to its last, with disturbances on the way -> Outcome
judge       what must hold of every outcome, whatever was disturbed
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from crowd import TOKENS, Crowd, Event
from running_server import Server, start_server
from tcp_proxy import TcpProxy

from aggregator.genesis import fetch_base, make_version_zero
from rankup.cli.demo_run import free_port
from rankup.cli.http import call
from rankup.errors import RankupError
from rankup.protocol import RoundRequest
from rankup.recipe import Aggregation, Recipe
from rankup.records import Manifest
from rankup.settings import CoordinatorSettings, StoreSettings
from rankup.signing import load_private_key
from rankup.store import open_store
from rankup.versions import MAX_ENVELOPE_BYTES, manifest_key, open_envelope

DATASET = "pydocs"
ROUNDS = 2
SHARDS = len(TOKENS)
VOLUNTEERS = 6
LEASE_S = 60.0
CAMPAIGN_S = 300.0
VERDICTS_S = 30.0
DOOR_TIMEOUT_S = 2.0
DOOR_PAUSE_S = 0.1

Bits = dict[str, tuple[str, str, str | None]]
"""Tensor -> hashes of its master, its export and its momentum."""


class World:
    """A server, with a proxy before its gateway and, where the world starts it, one before its object storage."""

    def __init__(self, start: Path | Server, *, seed: int) -> None:
        """`start`: the state folder of a server to start, or a running one."""
        self.seed = seed
        self._port = free_port() if isinstance(start, Path) else int(start.url.rpartition(":")[2])
        self.gateway = TcpProxy(lambda: ("127.0.0.1", self._port), seed=seed)
        self.storage = TcpProxy(self._storage_address, seed=seed + 1)
        self._variables = {"RANKUP_STORE_PUBLIC_ENDPOINT_URL": self.storage.url}
        self.server = start_server(start, self._port, **self._variables) if isinstance(start, Path) else start

    def _storage_address(self) -> tuple[str, int]:
        address = urlsplit(StoreSettings.from_wire(self.server.access["store"]).endpoint_url)
        return str(address.hostname), int(address.port or 80)

    def start_again(self) -> None:
        """After the server was killed: `rankup up` in the same folder, on the same port."""
        self.server = start_server(self.server.home, self._port, **self._variables)

    def close(self) -> None:
        """End the proxies; the server goes on."""
        self.gateway.close()
        self.storage.close()

    def import_model(self, name: str) -> None:
        access = self.server.access
        with tempfile.TemporaryDirectory() as folder:
            make_version_zero(
                self.store(),
                load_private_key(Path(access["publisher_key_file"])),
                model=name,
                base=fetch_base("tiny", Path(folder)),
                group_bytes=CoordinatorSettings().fold_group_bytes,
                now=time.time(),
            )

    def store(self) -> Any:
        return open_store(StoreSettings.from_wire(self.server.access["store"]))

    def open_campaign(self, model: str, rounds: int, lease_s: float) -> None:
        """Open its first round."""
        request = RoundRequest(
            model=model,
            dataset=DATASET,
            recipe=Recipe(
                rank=4,
                aggregation=Aggregation(clip_norm_ratio=1e6, max_cosine=None, max_loss_mads=None, min_descent=None),
            ),
            shards=SHARDS,
            min_contributions=SHARDS,
            repeat=rounds,
            max_loss_increase=10.0,
            copies=1,
            max_shards_per_lease=1,
            grace_s=1.0,
            lease_s=lease_s,
        )
        body = request.model_dump(mode="json")
        token = self.server.access["organiser_token"]
        call("POST", self.server.url, "/v1/rounds", token=token, body=body)

    def rounds(self, model: str) -> list[dict[str, Any]]:
        """Newest first; empty while nobody answers."""
        try:
            found = call("GET", self.server.url, "/v1/rounds")["rounds"]
        except RankupError:
            return []
        return [each for each in found if each["model"] == model]

    def manifests(self, model: str, rounds: int) -> list[Manifest]:
        """Of versions 1 to `rounds`."""
        store = self.store()
        keys = [manifest_key(model, version) for version in range(1, rounds + 1)]
        return [open_envelope(store.get(key, max_bytes=MAX_ENVELOPE_BYTES), publisher_key=None)[0] for key in keys]


@dataclass(frozen=True)
class Answer:
    asked_at: float
    at: float
    version: int | None
    """None: no answer."""


class Door:
    """Asks the gateway itself, not through the proxy, for the latest version."""

    def __init__(self, url: str, model: str) -> None:
        self.answers: list[Answer] = []
        self._url = f"{url}/v1/models/{model}/latest"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @property
    def latest(self) -> int | None:
        return next((each.version for each in reversed(self.answers) if each.version is not None), None)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(DOOR_PAUSE_S):
            asked_at = time.monotonic()
            try:
                answer = httpx2.get(self._url, timeout=DOOR_TIMEOUT_S)
                version = answer.json()["version"] if answer.status_code == 200 else None
            except (httpx2.HTTPError, ValueError):
                version = None
            self.answers.append(Answer(asked_at, time.monotonic(), version))


@dataclass
class Scene:
    """What a disturbance gets to see and to touch."""

    world: World
    model: str
    crowd: Crowd
    hits: list[float] = field(default_factory=list)
    """When something was disturbed, in monotonic seconds."""

    def hit(self) -> None:
        self.hits.append(time.monotonic())

    def wait_for_submits(self, count: int) -> None:
        """Until the server has acknowledged this many deltas."""
        self.wait_until(lambda: self.crowd.count("submit") >= count)

    def wait_for_state(self, index: int, *states: str) -> str:
        """Until round `index` of the campaign is in one of the states, or past them all; the state."""
        found = ""

        def reached() -> bool:
            nonlocal found
            views = {view["index"]: view["state"] for view in self.world.rounds(self.model)}
            found = views.get(index, "")
            return found in (*states, "published", "rejected", "cancelled")

        self.wait_until(reached)
        return found

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + CAMPAIGN_S
        while not condition():
            assert time.monotonic() < deadline, "the campaign did not get there"
            time.sleep(0.02)


@dataclass(frozen=True)
class Outcome:
    """What a campaign left behind."""

    model: str
    seconds: float
    events: Sequence[Event]
    answers: Sequence[Answer]
    hits: Sequence[float]
    manifests: Sequence[Manifest]
    rounds: Sequence[dict[str, Any]]

    @property
    def bits(self) -> Bits:
        return {name: (one.master, one.export, one.momentum) for name, one in self.manifests[-1].tensors.items()}


def run(
    world: World,
    model: str,
    folder: Path,
    disturb: Callable[[Scene], None] | None = None,
    *,
    rounds: int = ROUNDS,
    lease_s: float = LEASE_S,
    oversleep_s: float = 0.0,
) -> Outcome:
    """One campaign. Raises AssertionError when it does not come to its last version in time."""
    world.import_model(model)
    crowd = Crowd(
        world.gateway.url, world.server.invite, model, folder, size=VOLUNTEERS, seed=world.seed, oversleep_s=oversleep_s
    )
    door = Door(world.server.url, model)
    scene = Scene(world, model, crowd)
    began = time.monotonic()
    try:
        world.open_campaign(model, rounds, lease_s)
        crowd.start()
        if disturb is not None:
            disturb(scene)
        deadline = time.monotonic() + CAMPAIGN_S
        while door.latest != rounds:
            assert time.monotonic() < deadline, (door.latest, world.rounds(model), crowd.events[-20:])
            time.sleep(0.1)
        seconds = time.monotonic() - began
        deadline = time.monotonic() + VERDICTS_S
        while crowd.verdicts_awaited() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        crowd.stop()
        door.stop()
    scene.wait_for_state(rounds - 1, "published")
    return Outcome(
        model, seconds, crowd.events, door.answers, scene.hits, world.manifests(model, rounds), world.rounds(model)
    )


def judge(outcome: Outcome, expected: Bits) -> None:
    """Nothing accepted is lost or counted twice, `latest` never goes back, the bits are those of `expected`."""
    terms = [(manifest.version, term) for manifest in outcome.manifests for term in manifest.terms]
    digests = [term.contribution for _, term in terms]
    assert len(digests) == len(set(digests)), "a contribution stands in two versions or twice in one"
    for manifest in outcome.manifests:
        shards = sorted((term.shard, term.coefficient) for term in manifest.terms)
        assert shards == [(shard, TOKENS[shard] * 2**16 // sum(TOKENS)) for shard in range(SHARDS)], manifest.version
        assert len({term.round_id for term in manifest.terms}) == 1

    handed_in = {event.lease_id: event.contribution for event in outcome.events if event.kind == "submit"}
    ended = {event.lease_id: event for event in outcome.events if event.kind in ("accepted", "rejected", "dropped")}
    for lease_id, contribution in handed_in.items():
        if contribution in digests:
            assert lease_id not in ended or ended[lease_id].kind != "rejected", ended[lease_id]
        else:
            # Only one way out: somebody else's delta of the same shard was accepted, and its volunteer was told so.
            assert lease_id in ended, f"{lease_id} was acknowledged and is lost"
            assert ended[lease_id].kind != "accepted", f"{lease_id} was accepted and is in no version"

    seen = [answer.version for answer in outcome.answers if answer.version is not None]
    assert seen == sorted(seen), f"latest went back: {seen}"
    assert seen[-1] == len(outcome.manifests)
    assert [each["state"] for each in outcome.rounds] == ["published"] * len(outcome.manifests), outcome.rounds
    assert outcome.bits == expected, "other bits than without disturbance"
