"""`rankup doctor`'s checks: on real servers that are well, on some that are not, and on one that takes everything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from coordinator import diagnosis
from coordinator.diagnosis import Listener, Patient, disk_finding, examine, listeners, machine, network, publisher_key
from coordinator.ledger_probe import ServerFacts
from coordinator.storage_probe import clock_finding, storage
from rankup.finding import Finding, Grade
from rankup.settings import CoordinatorSettings, LedgerSettings, StoreSettings
from rankup.signing import generate_private_key, save_private_key
from rankup.store import S3Store

if TYPE_CHECKING:
    from conftest import ValkeyServer

    from rankup.local import LocalServices


def grades(findings: list[Finding]) -> dict[str, Grade]:
    return {finding.check: finding.grade for finding in findings}


@pytest.fixture
def settings(tmp_path: Path) -> CoordinatorSettings:
    path = tmp_path / "publisher.key"
    save_private_key(path, generate_private_key())
    return CoordinatorSettings(publisher_key_file=path, organiser_token=SecretStr("o" * 32))


def test_the_embedded_servers_are_well_and_nothing_stays_behind(
    local_services: LocalServices, settings: CoordinatorSettings, tmp_path: Path
) -> None:
    patient = Patient(settings, local_services.store_settings, local_services.ledger_settings, (tmp_path,))
    found = asyncio.run(examine(patient))
    bad = [
        finding
        for finding in found
        if finding.grade is not Grade.OK and finding.check not in ("open ports", "ray authentication", "disk")
    ]
    assert bad == []
    wanted = {"s3 write once", "s3 compare and swap", "s3 signed uploads", "s3 privacy", "clock", "disk", "secrets"}
    wanted |= {"s3 uploads in parts"}
    wanted |= {"valkey version", "valkey persistence", "valkey memory", "valkey fsync", "publisher's key", "open ports"}
    assert wanted <= {finding.check for finding in found}
    assert list(S3Store(local_services.store_settings).list("doctor/")) == []
    secret = local_services.store_settings.secret_key.get_secret_value()
    assert not any(secret in finding.found + finding.remedy for finding in found)


class CarelessS3(BaseHTTPRequestHandler):
    """Takes every write, serves every read, and looks at neither conditions nor signatures nor checksums."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"same"')
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.objects[self.path.partition("?")[0]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.objects else 404)

    def do_GET(self) -> None:
        body = self.objects.get(self.path.partition("?")[0], b"<ListBucketResult/>")
        self._answer(200, body)

    def do_DELETE(self) -> None:
        self._answer(204)


@pytest.fixture
def careless_store() -> Iterator[S3Store]:
    handler = type("Handler", (CarelessS3,), {"objects": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield S3Store(StoreSettings(endpoint_url=url, access_key="a", secret_key=SecretStr("b")))
        server.shutdown()


def test_a_storage_that_takes_everything_is_found_out(careless_store: S3Store) -> None:
    found = storage(careless_store, clock=lambda: 0.0)
    assert grades(found) == {
        "s3 write once": Grade.FAIL,
        "s3 compare and swap": Grade.FAIL,
        "s3 signed uploads": Grade.FAIL,
        "s3 uploads in parts": Grade.FAIL,
        "s3 privacy": Grade.FAIL,
        "clock": Grade.FAIL,
    }
    assert all(finding.remedy for finding in found)
    privacy = next(finding.found for finding in found if finding.check == "s3 privacy")
    assert all(word in privacy for word in ("read", "list", "write"))


def test_servers_that_are_away_are_findings_and_the_other_checks_go_on(
    settings: CoordinatorSettings, tmp_path: Path
) -> None:
    store = StoreSettings(endpoint_url="http://127.0.0.1:9", access_key="a", secret_key=SecretStr("swordfish"))
    ledger = LedgerSettings(url=SecretStr("redis://:swordfish@127.0.0.1:9/0"), timeout_s=0.5)
    found = asyncio.run(examine(Patient(settings, store, ledger, (tmp_path,))))
    assert grades(found)["s3"] is grades(found)["valkey"] is Grade.FAIL
    assert grades(found)["publisher's key"] is Grade.OK
    assert not any("swordfish" in finding.found for finding in found)
    nowhere = asyncio.run(examine(Patient(settings, None, None, (tmp_path,), "nothing runs here")))
    assert [f.found for f in nowhere if f.check in ("s3", "valkey")] == ["nothing runs here"] * 2


def test_a_valkey_that_forgets_is_found_out(own_valkey: ValkeyServer) -> None:
    client = own_valkey.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    found = grades(asyncio.run(diagnosis.ledger(own_valkey.ledger_settings)))
    assert found["valkey memory"] is Grade.FAIL
    assert found["valkey persistence"] is found["valkey fsync"] is Grade.OK
    client.config_set("appendonly", "no")
    found = grades(asyncio.run(diagnosis.ledger(own_valkey.ledger_settings)))
    assert found["valkey persistence"] is found["valkey fsync"] is Grade.FAIL
    relaxed = own_valkey.ledger_settings.model_copy(update={"require_fsync": False})
    assert grades(asyncio.run(diagnosis.ledger(relaxed)))["valkey fsync"] is Grade.WARN


GOOD = ServerFacts("valkey", "9.1.2", True, "everysec", "noeviction", True, 10, 0, False)
SERVERS: dict[str, tuple[dict[str, object], str, Grade]] = {
    "all is well": ({}, "valkey persistence", Grade.OK),
    "too old": ({"name": "redis", "version": "7.0.15"}, "valkey version", Grade.FAIL),
    "old enough": ({"name": "redis", "version": "7.2.0"}, "valkey version", Grade.OK),
    "a replica": ({"replica": True}, "valkey version", Grade.FAIL),
    "no file": ({"appendonly": False}, "valkey persistence", Grade.FAIL),
    "it does not tell": ({"appendonly": None}, "valkey persistence", Grade.WARN),
    "its disk is full": ({"last_write_ok": False}, "valkey persistence", Grade.FAIL),
    "never synced": ({"appendfsync": "no"}, "valkey persistence", Grade.FAIL),
    "sync is not told": ({"appendfsync": ""}, "valkey persistence", Grade.OK),
    "it evicts": ({"eviction": "volatile-ttl"}, "valkey memory", Grade.FAIL),
    "eviction is not told": ({"eviction": ""}, "valkey memory", Grade.WARN),
    "nearly full": ({"used_bytes": 81, "limit_bytes": 100}, "valkey memory", Grade.WARN),
    "room left": ({"used_bytes": 79, "limit_bytes": 100}, "valkey memory", Grade.OK),
}


@pytest.mark.parametrize("name", SERVERS)
def test_what_a_server_says_of_itself_is_judged(name: str) -> None:
    changes, check, grade = SERVERS[name]
    found = list(diagnosis.server_findings(replace(GOOD, **changes)))  # type: ignore[arg-type]
    assert grades(found)[check] is grade
    assert all(finding.remedy for finding in found if finding.grade is not Grade.OK)


EVERYWHERE = "0.0.0.0"  # noqa: S104 - nothing listens there
RAY, TOKEN = "/site/ray/core/gcs_server --x", {"RAY_AUTH_MODE": "token", "PATH": "/bin"}
SOCKETS: dict[str, tuple[list[Listener], Grade, Grade]] = {
    "nothing listens": ([], Grade.OK, Grade.OK),
    "all on loopback": (
        [Listener("127.0.0.1", 1, "valkey-server", {}), Listener("::1", 2, "weed", {})],
        Grade.OK,
        Grade.OK,
    ),
    "the gateway is open": ([Listener(EVERYWHERE, 8420, "ray::ProxyActor", TOKEN)], Grade.OK, Grade.OK),
    "the gateway of another process": ([Listener(EVERYWHERE, 8420, "nginx", {})], Grade.OK, Grade.OK),
    "ray with a token": ([Listener(EVERYWHERE, 6379, RAY, TOKEN)], Grade.OK, Grade.WARN),
    "ray without a token": ([Listener(EVERYWHERE, 6379, RAY, {"PATH": "/bin"})], Grade.FAIL, Grade.WARN),
    "ray of another user": ([Listener(EVERYWHERE, 6379, RAY, None)], Grade.WARN, Grade.WARN),
    "an agent of ray beside its daemon": (
        [Listener(EVERYWHERE, 6379, RAY, TOKEN), Listener("::", 6380, "ray::DashboardAgent", {})],
        Grade.OK,
        Grade.WARN,
    ),
    "an agent of ray alone": ([Listener("127.0.0.1", 6380, "ray::DashboardAgent", {})], Grade.WARN, Grade.OK),
    "valkey is open": ([Listener("::", 6379, "/usr/bin/valkey-server *:6379", {})], Grade.OK, Grade.FAIL),
    "storage is open": ([Listener("10.0.0.1", 8333, "weed mini", {})], Grade.OK, Grade.FAIL),
    "something unknown is open": ([Listener(EVERYWHERE, 22, "", {})], Grade.OK, Grade.WARN),
    "a scope in the address": ([Listener("fe80::1%eth0", 22, "sshd", {})], Grade.OK, Grade.WARN),
}


@pytest.mark.parametrize("name", SOCKETS)
def test_open_ports_and_rays_token_are_judged(name: str) -> None:
    found, authentication, ports = SOCKETS[name]
    findings = list(network(found, gateway_port=8420))
    assert grades(findings) == {"ray authentication": authentication, "open ports": ports}


def test_a_listener_of_this_process_is_seen(careless_store: S3Store) -> None:
    port = int(careless_store.presign_get("x").split(":")[2].split("/")[0])
    [found] = [each for each in listeners() if each.port == port]
    assert found.address == "127.0.0.1"
    assert set(found.environment or {}) <= {"RAY_AUTH_MODE"}


CLOCKS = {
    "exact": ("Sun, 22 Nov 2026 10:00:00 GMT", 1_795_341_600.4, Grade.OK),
    "half a minute": ("Sun, 22 Nov 2026 10:00:00 GMT", 1_795_341_635.0, Grade.WARN),
    "behind": ("Sun, 22 Nov 2026 10:00:00 GMT", 1_795_341_000.0, Grade.FAIL),
    "not told": (None, 0.0, Grade.WARN),
    "no date": ("yesterday", 0.0, Grade.WARN),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_the_clock_is_judged_by_the_date_header(name: str) -> None:
    date, now, grade = CLOCKS[name]
    assert clock_finding(date, now).grade is grade


@pytest.mark.parametrize(("free", "grade"), [(10**9, Grade.FAIL), (10**10, Grade.WARN), (10**11, Grade.OK)])
def test_disk_space_is_judged(free: int, grade: Grade, tmp_path: Path) -> None:
    assert disk_finding(tmp_path, free).grade is grade


def test_the_key_must_be_there_readable_and_private(settings: CoordinatorSettings, tmp_path: Path) -> None:
    path = settings.publisher_key_file
    assert publisher_key(path).grade is Grade.OK
    path.chmod(0o640)
    assert publisher_key(path).remedy == f"Run: chmod 600 {path}"
    assert publisher_key(tmp_path / "none").grade is Grade.FAIL
    garbage = tmp_path / "garbage"
    garbage.write_text("no key")
    garbage.chmod(0o600)
    found = list(machine(settings.model_copy(update={"publisher_key_file": garbage}), [tmp_path]))
    assert grades(found)["publisher's key"] is Grade.FAIL


TOKENS = {"long": ("x" * 32, "", Grade.OK), "short": ("x" * 8, "", Grade.WARN), "none": ("", "", Grade.WARN)}
TOKENS["short one for metrics"] = ("x" * 32, "y" * 8, Grade.WARN)


@pytest.mark.parametrize("name", TOKENS)
def test_short_tokens_are_named_and_not_shown(name: str, settings: CoordinatorSettings, tmp_path: Path) -> None:
    organiser, scraper, grade = TOKENS[name]
    changed = settings.model_copy(update={"organiser_token": SecretStr(organiser), "metrics_token": SecretStr(scraper)})
    [finding] = [each for each in machine(changed, [tmp_path]) if each.check == "secrets"]
    assert finding.grade is grade
    assert "xxx" not in finding.found
    assert "yyy" not in finding.found
