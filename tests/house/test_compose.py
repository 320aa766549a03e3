"""The compose file and what belongs to it: syntax, names of settings, secrets, and what is reachable from outside."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankup.local import LocalSettings
from rankup.settings import CoordinatorSettings, LedgerSettings, RoomSettings, StoreSettings, WorkerSettings

ROOT = Path(__file__).parents[2]
ROOMS: tuple[type[RoomSettings], ...] = (
    StoreSettings,
    LedgerSettings,
    CoordinatorSettings,
    WorkerSettings,
    LocalSettings,
)
KNOWN = {f"{room.model_config['env_prefix']}{name.upper()}" for room in ROOMS for name in room.model_fields}
FILES = ("docker-compose.yml", "infra/README.md", "infra/docker/Dockerfile", "infra/docker/env.example")
NAME = re.compile(r"\bRANKUP_[A-Z_]+\b(?!\*)")


@pytest.fixture
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_setting_that_is_named_exists(file: str) -> None:
    named = set(NAME.findall((ROOT / file).read_text()))
    assert named <= KNOWN | {"RANKUP_HOME"}


def test_the_settings_of_the_coordinator_are_accepted(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in compose["services"]["coordinator"]["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+(:\?[^}]*|:-)\}", "value", value))
    assert StoreSettings().endpoint_url == "http://seaweedfs:8333"
    assert LedgerSettings().url.get_secret_value() == "redis://:value@valkey:6379/0"
    assert CoordinatorSettings().invite.get_secret_value() == "value"


def test_every_variable_of_the_compose_file_stands_in_the_example(compose: dict[str, Any]) -> None:
    wanted = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    offered = set(re.findall(r"^(\w+)=", (ROOT / "infra/docker/env.example").read_text(), re.MULTILINE))
    assert wanted == offered
    assert ".env" in (ROOT / "infra/docker/.gitignore").read_text().split()


def test_only_the_gateway_is_published_and_the_servers_have_no_way_out(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["coordinator"]
    internal = {name for name, network in compose["networks"].items() if network.get("internal")}
    for name in ("valkey", "seaweedfs"):
        assert set(services[name]["networks"]) <= internal
    assert "ledger" not in services["worker"]["networks"]


def test_every_service_checks_its_health_and_the_images_are_built_without_root(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert all("healthcheck" in services[name] for name in ("valkey", "seaweedfs", "coordinator"))
    assert "shm_size" in services["coordinator"]
    for name in ("coordinator", "worker"):
        dockerfile = (ROOT / services[name]["build"]["dockerfile"]).read_text()
        assert "USER rankup" in dockerfile.rpartition("FROM ")[2]
        sources = [
            line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY ") and "--" not in line
        ]
        assert all((ROOT / source).exists() for line in sources for source in line)
