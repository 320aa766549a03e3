"""A lease with a teacher: pulled beside the base, and its answers outlive pauses and restarts of the worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_gateway import BASE_MANIFEST, FakeGateway, serve
from test_guest import Guest
from test_guest import brisk as brisk

from rankup.protocol import LeaseGrant, VersionRef
from worker import cache
from worker.display import describe
from worker.events import Answering, Downloading, Kept, Paused, Problem, Resumed, Step
from worker.limitsfile import change_limits
from worker.status import Doing

SAGE = VersionRef(model="sage", version=5, manifest="cd" * 32)
TRAINER = (sys.executable, str(Path(__file__).with_name("teaching_trainer.py")))


class Puller:
    """Stands in for pulls; remembers what was asked for."""

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.asked: list[tuple[str, int, str]] = []
        self.sage = SAGE.manifest

    def __call__(self, server: str, model: str, version: int, folder: Path, *, progress: Any, **_: Any) -> str:
        self.asked.append((model, version, folder.name))
        progress(self.size, self.size)
        (folder / "model.safetensors").write_bytes(bytes(self.size))
        (folder / "config.json").write_text(f'{{"of": "{model}"}}')
        return self.sage if model == "sage" else BASE_MANIFEST


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serve(FakeGateway()) as fake:
        plain = fake.grant

        def taught(lease_id: str) -> LeaseGrant:
            grant = plain(lease_id)
            recipe = grant.recipe.model_copy(update={"method": "distillation"})
            return grant.model_copy(update={"teacher": SAGE, "recipe": recipe})

        fake.grant = taught  # type: ignore[method-assign]
        fake.offer("l1")
        yield fake


@pytest.fixture
def guest(gateway: FakeGateway, tmp_path: Path) -> Iterator[Guest]:
    machine = Guest(tmp_path / "home", gateway.url)
    yield machine
    machine.stop.set()


def test_base_and_teacher_are_pulled_and_stay_together_in_a_cache_that_is_too_small(guest: Guest) -> None:
    store = guest.home / "cache"
    old = cache.version_folder(store, "ef" * 32)
    old.mkdir(parents=True)
    (old / "model.safetensors").write_bytes(bytes(1000))
    change_limits(guest.home, ["disk_max_used_gb=0.000001"])
    pull = Puller(size=900)
    guest.start(pull=pull, trainer_command=TRAINER)
    assert guest.end().accepted == 1
    assert pull.asked == [("tiny", 3, BASE_MANIFEST), ("sage", 5, SAGE.manifest)]
    downloads = {event.what: describe(event).partition(":")[0] for event in guest.of(Downloading)}
    assert downloads == {
        "base": "Downloading the base version",
        "teacher": "Downloading the teacher",
        "shard": "Downloading the examples",
    }
    assert {folder.name for folder in store.iterdir()} == {BASE_MANIFEST, SAGE.manifest}


def test_a_pause_while_the_teacher_answers_loses_no_answer(guest: Guest) -> None:
    guest.start(pull=Puller(), trainer_command=TRAINER)
    guest.wait_for(Answering, done=3)
    status = guest.ask("status")
    assert status.doing is Doing.ANSWERING
    assert status.reason.endswith("of 8 prompts")
    guest.ask("pause")
    guest.wait_for(Paused)
    told = max(event.done for event in guest.of(Answering))
    guest.ask("resume")
    guest.wait_for(Resumed)
    assert guest.end().accepted == 1
    first, second = guest.starts()
    assert first == "0"
    assert int(second) >= told
    assert [event.done for event in guest.of(Answering)][-1] == 8
    assert [event.step for event in guest.of(Step)] == [1, 2, 3, 4, 5]


def test_a_worker_that_ends_while_the_teacher_answers_goes_on_at_its_next_start(
    gateway: FakeGateway, guest: Guest
) -> None:
    guest.start(pull=Puller(), trainer_command=TRAINER, keep_lease=lambda: True)
    guest.wait_for(Answering, done=3)
    guest.end(stop=True)
    assert guest.of(Kept)[0].step == 0
    assert gateway.returned == {}
    again = Guest(guest.home, guest.url).start(pull=Puller(), trainer_command=TRAINER)
    assert again.end().accepted == 1
    assert int(again.starts()[1]) >= 3


def test_a_teacher_that_is_not_the_rounds_is_not_learned_from(gateway: FakeGateway, guest: Guest) -> None:
    pull = Puller()
    pull.sage = "00" * 32
    guest.start(pull=pull, trainer_command=TRAINER)
    assert guest.end().submitted == 0
    assert "version 5 is 0000" in guest.of(Problem)[0].error.cause
    assert list(gateway.returned) == ["l1"]
    assert guest.of(Answering) == []
