"""What the API says of itself is true: requests made from its description, good and bad ones, by strangers, volunteers
and the organiser, get answers that the description allows, and never a fault of the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from gateway_world import SHARDS, Volunteer, World, furnished_gateway, sha256
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from coordinator.access import GatewayDeps
from coordinator.gateway import create_app
from coordinator.ledger import Ledger
from rankup.problems import MEDIA_TYPE
from rankup.protocol import LeaseGrant, Problem
from rankup.settings import CoordinatorSettings
from rankup.store import MemoryStore

if TYPE_CHECKING:
    from conftest import ValkeyServer

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
DELTA = b"a good delta"


async def no_ledger() -> Ledger:
    raise AssertionError


def described() -> dict[str, Any]:
    settings = CoordinatorSettings(organiser_token=SecretStr("x"))
    return create_app(GatewayDeps(no_ledger, MemoryStore(), settings, "d7" * 32, lambda: 0.0)).openapi()


SCHEMA = schemathesis.openapi.from_dict(described(), config=SchemathesisConfig())
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}


@dataclass
class Scene:
    """A gateway with an open round, and a volunteer with a lease of it."""

    world: World
    round_id: str
    ada: Volunteer
    lease: LeaseGrant

    @property
    def callers(self) -> list[Mapping[str, str]]:
        return [{}, self.ada.auth, self.ada.auth, self.world.organiser, {"Authorization": "Bearer nobody"}]

    @property
    def known(self) -> dict[str, Any]:
        """What stands there under the name of a path's parameter."""
        return {
            "round_id": self.round_id,
            "lease_id": self.lease.lease_id,
            "worker_id": self.ada.worker_id,
            "model": "tiny",
            "version": 0,
            "sha256": self.lease.shard_links[0].sha256,
        }


@pytest.fixture(scope="module")
def served(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    changes = {"transfer": "proxied", "spool_dir": tmp_path_factory.mktemp("spool")}
    with furnished_gateway(shared_valkey.ledger_settings, changes=changes) as world:
        yield world


@pytest.fixture
def scene(served: World, valkey: ValkeyServer) -> Scene:
    round_id = served.open_round(shards=SHARDS)["round_id"]
    ada = served.join("ada")
    lease = served.claim(ada)
    ticket = {"fence": lease.fence, "sha256": sha256(DELTA), "size_bytes": len(DELTA)}
    served.http.post(f"/v1/leases/{lease.lease_id}/upload", json=ticket, headers=ada.auth)
    return Scene(served, round_id, ada, lease)


def can_be_wrong(label: str) -> bool:
    """Whether there is anything in a request but who asks."""
    return bool(OPERATIONS[label].body) or any(True for _ in OPERATIONS[label].iter_parameters())


def check(scene: Scene, label: str, examples: int) -> None:
    operation = OPERATIONS[label]
    made = st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE])

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        database=None,
    )
    @given(case=made.flatmap(operation.as_strategy), caller=st.integers(0, 4), real=st.booleans())
    def ask(case: Case, caller: int, real: bool) -> None:
        if real and case.path_parameters:
            case.path_parameters |= {name: value for name, value in scene.known.items() if name in case.path_parameters}
        answer = case.call(base_url=str(scene.world.http.base_url), headers=dict(scene.callers[caller]), timeout=20)
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == [MEDIA_TYPE]
            problem = Problem.model_validate_json(answer.content)
            assert problem.status == answer.status_code
            assert problem.remedy

    ask()


@pytest.mark.parametrize("label", OPERATIONS)
def test_an_operation_answers_as_it_is_described(scene: Scene, label: str) -> None:
    check(scene, label, 5 if can_be_wrong(label) else 3)


@pytest.mark.long
@pytest.mark.parametrize("label", OPERATIONS)
def test_an_operation_answers_a_thousand_times_as_it_is_described(scene: Scene, label: str) -> None:
    check(scene, label, 1_000 if can_be_wrong(label) else 20)
