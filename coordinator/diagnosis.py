"""`rankup doctor`: does what a server stands on hold? Each check is made on the real thing, not read from a setting.

    network     what listens beyond loopback, and whether Ray asks for a token
    storage     conditional writes, signed uploads, privacy, the clock (storage_probe.py)
    ledger      what Valkey says of itself, and a write that is waited for
    machine     disk, the publisher's key, the secrets

What always holds: every finding that is not ok has a remedy; a check that cannot be made says so and the others go on;
no secret is in a finding; nothing but scratch objects under `doctor/` and the ledger's barrier key is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.ledger import Ledger
from coordinator.ledger_probe import ServerFacts, server_facts, write_to_disk
from coordinator.storage_probe import storage
from rankup.errors import BusyError, RankupError
from rankup.finding import Finding, Grade, fail, guarded, ok, warn
from rankup.settings import CoordinatorSettings, LedgerSettings, StoreSettings
from rankup.signing import load_private_key
from rankup.store import open_store

__all__ = ["Finding", "Grade", "Patient", "examine"]

DISK_WARN_BYTES, DISK_FAIL_BYTES = 20 * 1024**3, 2 * 1024**3
MIN_SECRET_CHARS = 16
MIN_VALKEY, MIN_REDIS = (7, 2), (7, 2)
RAY_NAMES = ("gcs_server", "raylet", "ray::", "/ray/")
RAY_DAEMONS = ("gcs_server", "raylet")
RAY_AUTH_MODE = "RAY_AUTH_MODE"
SERVER_NAMES = ("valkey", "redis", "weed")
"""Programs that must never be reachable from elsewhere."""


@dataclass(frozen=True)
class Listener:
    """A TCP socket that takes connections. `process` is how its command line begins, empty where the system does not
    tell whose it is; of its environment only what is looked at is kept."""

    address: str
    port: int
    process: str
    environment: Mapping[str, str] | None
    """None: it cannot be read."""


# -- network -----------------------------------------------------------------------------------------------------------


def listeners() -> list[Listener]:
    """Every listening TCP socket of this machine that this user may see."""
    import psutil

    found = []
    for link in psutil.net_connections(kind="tcp"):
        if link.status != psutil.CONN_LISTEN:
            continue
        name, wanted = "", None
        if link.pid:
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(link.pid)
                name = " ".join(process.cmdline()[:3]) or process.name()
                environment = process.environ()
                wanted = {key: environment[key] for key in (RAY_AUTH_MODE,) if key in environment}
        found.append(Listener(link.laddr.ip, link.laddr.port, name, wanted))
    return found


def is_open(address: str) -> bool:
    """Whether other machines may reach a socket on this address."""
    return not ipaddress.ip_address(address.partition("%")[0]).is_loopback


def network(found: Sequence[Listener], *, gateway_port: int) -> Iterator[Finding]:
    """What can be reached from elsewhere, and whether Ray, which binds every interface, asks for a token."""
    open_ones = [each for each in found if is_open(each.address)]
    ray = [each for each in found if _is_ray(each)]
    # Only of the daemons: Ray's agents write their title over the environment that others may read.
    daemons = [each for each in ray if any(name in each.process for name in RAY_DAEMONS)]
    unlocked = [each for each in daemons if each.environment is not None and not _asks_for_token(each)]
    seen = any(_asks_for_token(each) for each in ray)
    if unlocked:
        yield fail(
            "ray authentication",
            f"Ray on port(s) {_ports(unlocked)} asks for no token: who reaches one may run code here",
            "Start Ray with RAY_AUTH_MODE=token, as `rankup up` does, and let a firewall close the ports.",
        )
    elif ray and not seen:
        yield warn(
            "ray authentication",
            f"cannot be seen of the processes on port(s) {_ports(ray)}",
            "Run the doctor as the user who runs the server.",
        )
    elif ray:
        yield ok("ray authentication", "Ray asks for a token")
    else:
        yield ok("ray authentication", "no Ray on this machine")
    risky = [each for each in open_ones if _short(each).startswith(SERVER_NAMES)]
    if risky:
        yield fail(
            "open ports",
            f"reachable from other machines: {', '.join(f'{_short(each)} on {each.port}' for each in risky)}",
            "Bind them to 127.0.0.1 or a private network, or let a firewall close the ports.",
        )
    others = sorted({each.port for each in open_ones if each not in risky and not _is_ray(each)} - {gateway_port})
    guarded_ray = [each for each in open_ones if _is_ray(each) and each.port != gateway_port]
    if others or guarded_ray:
        parts = [f"Ray: {_ports(guarded_ray)}"] if guarded_ray else []
        parts += [f"others: {', '.join(map(str, others[:20]))}"] if others else []
        yield warn(
            "open ports",
            f"beyond loopback besides the gateway: {'; '.join(parts)}",
            "Let a firewall close every port but the gateway's (and object storage, where volunteers use it).",
        )
    elif not risky:
        yield ok("open ports", "nothing but the gateway can be reached from other machines")


def _asks_for_token(listener: Listener) -> bool:
    return listener.environment is not None and listener.environment.get(RAY_AUTH_MODE) == "token"


def _is_ray(listener: Listener) -> bool:
    return any(name in listener.process for name in RAY_NAMES)


def _short(listener: Listener) -> str:
    return Path(listener.process.split()[0]).name if listener.process else "?"


def _ports(found: Iterable[Listener]) -> str:
    ports = sorted({each.port for each in found})
    return ", ".join(map(str, ports[:12])) + (f" and {len(ports) - 12} more" if len(ports) > 12 else "")


# -- ledger ------------------------------------------------------------------------------------------------------------


async def ledger(settings: LedgerSettings) -> list[Finding]:
    """All checks of Valkey: what it says of itself, and a write that is waited for."""
    try:
        client = await Ledger.connect(settings)
    except RankupError as exc:
        return [fail("valkey", exc.cause, exc.remedy)]
    findings: list[Finding] = []
    try:
        findings += server_findings(await server_facts(client))
        started = time.perf_counter()
        await write_to_disk(client)
        findings.append(_fsync_finding(settings, (time.perf_counter() - started) * 1000))
    except BusyError as exc:
        findings.append(fail("valkey fsync", exc.cause, "Look at the disk of Valkey and at its log."))
    except RankupError as exc:
        findings.append(fail("valkey fsync" if findings else "valkey", exc.cause, exc.remedy))
    finally:
        await client.close()
    return findings


def _fsync_finding(settings: LedgerSettings, waited_ms: float) -> Finding:
    if not settings.require_fsync:
        return warn(
            "valkey fsync",
            "RANKUP_LEDGER_REQUIRE_FSYNC is off: a submission is acknowledged before it is on a disk",
            "Turn it on, unless the server cannot have an append-only file.",
        )
    return ok("valkey fsync", f"WAITAOF answered after {waited_ms:.0f} ms")


def server_findings(facts: ServerFacts) -> Iterator[Finding]:
    """What a server's own words mean for us."""
    name = f"{facts.name} {facts.version or 'of unknown version'}"
    if _too_old(facts):
        yield fail("valkey version", name, "Use Valkey 8 or newer, or Redis 7.2: older ones have no WAITAOF.")
    elif facts.replica:
        yield fail("valkey version", f"{name}, a replica", "Point RANKUP_LEDGER_URL at the primary.")
    else:
        yield ok("valkey version", name)
    yield _persistence(facts)
    limit = f"{facts.used_bytes / 1e6:.0f} MB of {facts.limit_bytes / 1e6:.0f} MB" if facts.limit_bytes else "no limit"
    if not facts.eviction:
        yield warn("valkey memory", "the server does not tell its maxmemory-policy", "It must be noeviction.")
    elif facts.eviction != "noeviction":
        yield fail(
            "valkey memory",
            f"maxmemory-policy is {facts.eviction}: leases and tokens would vanish when memory is short",
            "Set maxmemory-policy noeviction.",
        )
    elif facts.limit_bytes and facts.used_bytes > 0.8 * facts.limit_bytes:
        yield warn("valkey memory", f"noeviction, {limit}", "Raise maxmemory: a full server takes no submissions.")
    else:
        yield ok("valkey memory", f"noeviction, {limit}")


def _persistence(facts: ServerFacts) -> Finding:
    check = "valkey persistence"
    if facts.appendonly is None:
        return warn(check, "the server does not tell whether it has an append-only file", "It needs one.")
    if not facts.appendonly:
        return fail(check, "no append-only file: a restart loses rounds, leases and tokens", "Set appendonly yes.")
    if not facts.last_write_ok:
        return fail(check, "the last write to the append-only file failed", "Look at the server's disk and log.")
    if facts.appendfsync == "no":
        return fail(check, "appendfsync is no: WAITAOF would wait for ever", "Set appendfsync everysec or always.")
    return ok(check, f"append-only file, appendfsync {facts.appendfsync or 'not told'}")


def _too_old(facts: ServerFacts) -> bool:
    numbers = tuple(int(part) for part in facts.version.split(".")[:2] if part.isdecimal())
    return len(numbers) == 2 and numbers < (MIN_VALKEY if facts.name == "valkey" else MIN_REDIS)


# -- machine -----------------------------------------------------------------------------------------------------------


def machine(settings: CoordinatorSettings, folders: Sequence[Path]) -> Iterator[Finding]:
    """Disk space where `folders` lie, the publisher's key and the secrets."""
    yield from guarded("disk", lambda: disk(folders))
    yield from guarded("publisher's key", lambda: [publisher_key(settings.publisher_key_file)])
    yield from _secrets(settings)


def disk(folders: Sequence[Path]) -> Iterator[Finding]:
    seen: set[int] = set()
    for folder in folders:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        device = existing.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        yield disk_finding(existing, shutil.disk_usage(existing).free)


def disk_finding(folder: Path, free_bytes: int) -> Finding:
    found = f"{free_bytes / 1e9:.1f} GB free at {folder}"
    remedy = "Free some space: versions, the append-only file and Ray's spilled objects need it."
    if free_bytes < DISK_FAIL_BYTES:
        return fail("disk", found, remedy)
    return warn("disk", found, remedy) if free_bytes < DISK_WARN_BYTES else ok("disk", found)


def publisher_key(path: Path) -> Finding:
    check = "publisher's key"
    if not path.exists():
        return fail(
            check, f"there is no {path}", "`rankup up` makes one; or set RANKUP_COORDINATOR_PUBLISHER_KEY_FILE."
        )
    facts = path.stat()
    mode = facts.st_mode & 0o777
    if mode & 0o077:
        return fail(check, f"{path} has mode {mode:o}: others may read it", f"Run: chmod 600 {path}")
    if facts.st_uid != os.geteuid():
        return warn(check, f"{path} belongs to another user", "Run the doctor as the user who runs the server.")
    load_private_key(path)
    return ok(check, f"{path}, mode {mode:o}")


def _secrets(settings: CoordinatorSettings) -> Iterator[Finding]:
    told = {
        "organiser's token": settings.organiser_token.get_secret_value(),
        "token for metrics": settings.metrics_token.get_secret_value(),
    }
    short = [name for name, secret in told.items() if secret and len(secret) < MIN_SECRET_CHARS]
    if short:
        yield warn("secrets", f"shorter than {MIN_SECRET_CHARS} characters: {', '.join(short)}", "openssl rand -hex 24")
    elif not told["organiser's token"]:
        yield warn("secrets", "there is no organiser's token: nobody can open a round", "Set one, or use `rankup up`.")
    else:
        yield ok("secrets", "the tokens are long enough")


# -- everything --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """What is examined; None: it is not known where that is, and `missing` says why."""

    settings: CoordinatorSettings
    store: StoreSettings | None
    ledger: LedgerSettings | None
    folders: tuple[Path, ...]
    missing: str = ""


async def examine(patient: Patient) -> list[Finding]:
    """All findings, in the order of this module."""
    port = patient.settings.port
    findings = guarded("open ports", lambda: network(listeners(), gateway_port=port))
    remedy = "Start the server, or set RANKUP_STORE_ENDPOINT_URL and RANKUP_LEDGER_URL as it has them."
    if patient.store is None:
        findings.append(fail("s3", patient.missing, remedy))
    else:
        findings += await asyncio.to_thread(storage, open_store(patient.store))
    if patient.ledger is None:
        findings.append(fail("valkey", patient.missing, remedy))
    else:
        findings += await ledger(patient.ledger)
    return [*findings, *machine(patient.settings, patient.folders)]
