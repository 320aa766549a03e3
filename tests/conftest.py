"""Real servers for the tests: one embedded Valkey and SeaweedFS for the whole run, one Ray cluster where asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from rankup.local import LocalServices
from rankup.settings import LedgerSettings
from rankup.store import MemoryStore, S3Store

if TYPE_CHECKING:
    from coordinator.cluster import Cluster


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets up the logs; the next test must not inherit that."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def local_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    with LocalServices(tmp_path_factory.mktemp("local")) as services:
        yield services


@pytest.fixture(scope="session")
def s3_store(local_services: LocalServices) -> S3Store:
    """One bucket for the whole run: give keys a prefix of your own."""
    return S3Store(local_services.store_settings)


@pytest.fixture
def memory_store() -> MemoryStore:
    """Empty for every test."""
    return MemoryStore()


@pytest.fixture(scope="session")
def ledger_settings(local_services: LocalServices) -> LedgerSettings:
    """One Valkey for the whole run: clean up, or use ids of your own."""
    return local_services.ledger_settings


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    from coordinator.cluster import start_cluster, stop_cluster

    state: Path = tmp_path_factory.mktemp("cluster")
    yield start_cluster(state, num_cpus=4, object_store_bytes=128 * 1024**2)
    stop_cluster()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests run in two processes: those of a file share one, and so their module's fixtures are made once; all that
    need a cluster or a whole server share one too, so that there is never more than one of these at a time."""
    for item in items:
        shared = "ray_cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("stack")
        item.add_marker(pytest.mark.xdist_group("shared" if shared else item.path.name))
