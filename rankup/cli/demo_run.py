"""The run behind `rankup demo`: starts everything, drives it through the doors that people use, measures, cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from rankup.cli.demo_report import DemoResult, Undone, Update, VolunteerStats, rank_of_update
from rankup.cli.http import call
from rankup.cli.stack import ServerAccess, Stack
from rankup.errors import SetupError
from rankup.protocol import RoundRequest, RoundView, VersionView
from rankup.recipe import Recipe
from rankup.settings import CoordinatorSettings

if TYPE_CHECKING:
    from aggregator.genesis import Base

T = TypeVar("T")
MODEL, DATASET = "demo", "pydocs"
NAMES = ("ada", "grace", "edsger", "barbara", "donald", "radia", "alan", "frances")
ROUND_TIMEOUT_S = 1800.0


@dataclass
class Stage:
    """Names what is going on, on stderr, and remembers how long each stage took (seconds)."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        from rich.console import Console

        console = Console(stderr=True)
        began = time.monotonic()
        with console.status(f"[bold]{text}[/bold]"):
            yield
        self.seconds[name] = time.monotonic() - began
        console.print(f"[green]done[/green] {text} [dim]({self.seconds[name]:.1f} s)[/dim]")


class Background(Generic[T]):
    """A call in a thread of its own, which a Ctrl-C need not wait for."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as exc:  # noqa: BLE001 - raised again where the result is asked for
            self._error = exc

    def result(self) -> T:
        """What the call returned or raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return cast(T, self._result)


class Volunteer:
    """A `rankup worker join` process and what its event lines told."""

    def __init__(self, name: str, url: str, invite: str, home: Path, *, threads: int) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.stats = VolunteerStats(name)
        self._log = (home / "worker.log").open("wb")
        command = [sys.executable, "-m", "rankup", "worker", "join", url, "--name", name, "--json"]
        command += ["--invite", invite] if invite else []
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            env=os.environ
            | {
                "RANKUP_WORKER_HOME": str(home),
                "RANKUP_WORKER_DEDICATED": "true",
                "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            },
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            try:
                self.stats.see(json.loads(line))
            except ValueError:
                continue

    @property
    def failed(self) -> bool:
        return self._process.poll() not in (None, 0)

    def stop(self) -> None:
        """Ctrl-C, then harder."""
        for number, patience_s in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
            if self._process.poll() is None:
                self._process.send_signal(number)
                try:
                    self._process.wait(patience_s)
                except subprocess.TimeoutExpired:
                    continue
        self._reader.join(timeout=5)
        self._log.close()


def free_port() -> int:
    """A TCP port that is free now on loopback, outside Ray's worker range (10002-19999)."""
    import random
    import socket

    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SetupError("no free port between 20000 and 30000", remedy="Stop other servers on this machine.")


def run_demo(home: Path, *, base: str, recipe: Recipe, rounds: int, volunteers: int, question: str) -> DemoResult:
    """Run it in `home`; raises RankupError with a remedy when a part fails. Nothing is left running either way."""
    os.environ |= {"RANKUP_HOME": str(home), "TQDM_DISABLE": "1"}
    stage = Stage()
    # A crowd that waits on one machine may ask more often than one that is spread over the world.
    stack = Stack(CoordinatorSettings(port=free_port(), poll_s=1.0, heartbeat_s=5.0))
    crowd: list[Volunteer] = []
    began = time.monotonic()
    fetching = Background(lambda: _fetch_base(base, home / "base"))
    try:
        with stage("server", "Starting Valkey, SeaweedFS, Ray, gateway and keeper"):
            stack.start()
        access = ServerAccess.of_this_machine()
        cores = os.cpu_count() or 1
        for number in range(volunteers):
            name = NAMES[number] if number < len(NAMES) else f"volunteer-{number + 1}"
            threads = max(1, cores // volunteers)
            crowd.append(Volunteer(name, access.url, stack.invite, home / name, threads=threads))
        with stage("dataset", "Building a dataset from the standard library's docstrings"):
            _build_dataset(access, recipe)
        with stage("base", f"Making {base} version 0"):
            _publish_base(access, fetching.result())
        request = RoundRequest(model=MODEL, dataset=DATASET, recipe=recipe, shards=volunteers, repeat=rounds)
        body = request.model_dump(mode="json")
        first = RoundView.model_validate(
            call("POST", access.url, "/v1/rounds", token=access.organiser_token, body=body)
        )
        began_rounds = time.monotonic()
        views = _watch(access.url, first, rounds, crowd)
        stage.seconds["rounds"] = time.monotonic() - began_rounds
        for volunteer in crowd:
            volunteer.stop()
        result = _examine(access, home, stage, question)
        result.rounds = views
        result.volunteers = [volunteer.stats for volunteer in crowd]
        result.seconds = stage.seconds | {"total": time.monotonic() - began}
        return result
    finally:
        for volunteer in crowd:
            volunteer.stop()
        stack.stop()


def _fetch_base(base: str, to: Path) -> Base:
    from aggregator.genesis import fetch_base

    return fetch_base(base, to)


def _publish_base(access: ServerAccess, base: Base) -> None:
    from aggregator.genesis import make_version_zero
    from rankup.signing import load_private_key
    from rankup.store import open_store

    make_version_zero(
        open_store(access.store),
        load_private_key(access.publisher_key_file),
        model=MODEL,
        base=base,
        group_bytes=CoordinatorSettings().fold_group_bytes,
        now=time.time(),
    )


def _build_dataset(access: ServerAccess, recipe: Recipe) -> None:
    from coordinator import pydocs
    from coordinator.dataset import build_dataset
    from rankup.store import open_store

    build_dataset(
        open_store(access.store),
        dataset=DATASET,
        rows=pydocs.rows(),
        source=pydocs.source(),
        licence="PSF-2.0",
        shard_rows=recipe.steps * recipe.batch_size,
        heldout_rows=64,
        seed=0,
        now=time.time(),
    )


def _watch(url: str, first: RoundView, rounds: int, crowd: list[Volunteer]) -> list[RoundView]:
    """Draw progress until the last round of the campaign has ended."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.fields[who]}", style="bold"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    ended: dict[int, RoundView] = {}
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {v.stats.name: progress.add_task("", who=v.stats.name, total=first.recipe.steps) for v in crowd}
        campaign = progress.add_task("", who="round", total=rounds)
        while len(ended) < rounds:
            views = [RoundView.model_validate(row) for row in call("GET", url, "/v1/rounds")["rounds"]]
            for view in sorted(views, key=lambda v: v.index):
                if view.state.ended and view.index not in ended:
                    ended[view.index] = view
                    if view.state != "published":
                        raise SetupError(
                            f"round {view.round_id} ended {view.state}: {view.reason}",
                            remedy="Look at the logs with --keep DIR.",
                        )
                elif not view.state.ended:
                    progress.update(
                        campaign,
                        completed=view.index,
                        description=f"{view.round_id} {view.state} {view.accepted}/{view.quorum}",
                    )
            for volunteer in crowd:
                stats = volunteer.stats
                total = stats.steps or first.recipe.steps
                progress.update(bars[stats.name], completed=stats.step, total=total, description=stats.doing)
                if volunteer.failed:
                    raise SetupError(
                        f"{stats.name} ended with an error: {stats.error}",
                        remedy="Look at its worker.log with --keep DIR.",
                    )
            if time.monotonic() > deadline:
                raise SetupError("the rounds did not end in time", remedy="Look at the logs with --keep DIR.")
            time.sleep(0.3)
        progress.update(campaign, completed=rounds, description="all rounds published")
    return [ended[index] for index in sorted(ended)]


def _examine(access: ServerAccess, home: Path, stage: Stage, question: str) -> DemoResult:
    """What somebody does who wants the model: pull, verify, load, ask. And the rank, as a measure of what is new."""
    from aggregator.evaluate import answer
    from rankup.pull import GatewaySource, pull
    from rankup.replay import verify_version
    from rankup.store import open_store

    source = GatewaySource(access.url)
    with stage("pull", "Pulling version 0, and the latest as patches of it"):
        oldest = pull(source, MODEL, 0, home / "version-0")
        latest = pull(source, MODEL, None, home / "latest", bases=[home / "version-0"])
    with stage("verify", "Replaying the latest version from its parent and its contributions"):
        report = verify_version(source, MODEL, latest.manifest.version, cache=home / "verify", publisher_key=None)
    with stage("rank", "Measuring the rank of the accumulated update"):
        rank = rank_of_update(open_store(access.store), oldest.manifest, latest.manifest)
    with stage("ask", "Asking both versions"):
        answers = {
            v: answer(home / f, question, max_new_tokens=60)
            for v, f in ((0, "version-0"), (latest.manifest.version, "latest"))
        }
    rows = call("GET", access.url, f"/v1/models/{MODEL}/versions")["versions"]
    with stage("undo", "Taking one contribution of the first round back"):
        undone = _undo(access, home / "verify")
    return DemoResult(
        versions=sorted((VersionView.model_validate(row) for row in rows), key=lambda view: view.version),
        verify=report,
        rank=rank,
        update=Update(fetched_bytes=latest.fetched_bytes, full_bytes=latest.plan.full_bytes),
        undone=undone,
        question=question,
        answers=answers,
    )


def _undo(access: ServerAccess, cache: Path) -> Undone:
    """Publish the latest version without the first contribution of the first round; it is replayed before that."""
    from aggregator.rehearsal import rehearsal
    from aggregator.revoke import contributions_of, revoke
    from rankup.signing import load_private_key, public_key_hex
    from rankup.store import open_store

    store, key = open_store(access.store), load_private_key(access.publisher_key_file)
    first = contributions_of(store, MODEL, publisher_key=public_key_hex(key))[0]
    made = revoke(
        store,
        key,
        model=MODEL,
        contributions=[first.term.contribution],
        reason="shown by the demo",
        now=time.time(),
        check=rehearsal(store, key, cache),
    )
    return Undone(first.term.worker_name, first.version, made.version, made.log.size)
