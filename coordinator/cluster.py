"""The Ray cluster of the coordinator: the one place that calls `ray.init`, and that takes the cluster down again.

What always holds for a cluster that is started here:
- every connection needs a token, made here and kept in a file of mode 600 (Ray binds wildcard ports whatever it is
  told, and who reaches an open one may run code);
- Ray starts in a private, empty folder: it puts the folder of its driver ahead of site-packages in its workers, where a
  stray `worker.py` would be executed. The caller's own working folder is as before when `start_cluster` returns;
- the workers import the same `rankup` as this process, installed or from a checkout;
- after `stop_cluster` no process and no temporary folder of it is left. If this process is killed, the kernel ends
  Ray's daemons; the next start ends what outlived them and removes the folder.

Ray cannot start a daemon of its head again, and ends this process a minute after its control service has died.
`lost_daemon` says so in time: the cluster must then be stopped, and Ray wants a fresh process for the next one.

With an address (argument or `RAY_ADDRESS`) the process joins that cluster instead: its token comes from the
environment, as Ray documents it, and stopping only disconnects.

What it does not do: start the embedded servers (`rankup.local`), deploy the gateway or the keeper. One cluster a
process; `start_cluster` changes the working folder for as long as it runs, so call it while no other thread uses it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rankup
from rankup.errors import SetupError, UnreachableError

NAMESPACE = "rankup"
OBJECT_STORE_BYTES = 512 * 1024**2
"""Ray's own default is 30 % of the machine's memory."""
STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that this process is connected to."""

    address: str
    """`host:port` of its control service."""
    owned: bool
    """Started here, so `stop_cluster` ends it."""
    state_dir: Path
    namespace: str = NAMESPACE


@dataclass(slots=True)
class _Running:
    cluster: Cluster
    temp_dir: Path | None
    environment_before: dict[str, str | None]
    daemons: dict[str, Any]
    """Name -> process of what an own cluster cannot live without."""
    serve: bool = False


_turn = threading.RLock()
_running: _Running | None = None


def start_cluster(
    state_dir: Path,
    *,
    num_cpus: int | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    address: str | None = None,
) -> Cluster:
    """Start a cluster on this machine, or join the one at `address` (default: `RAY_ADDRESS`).

    `state_dir` keeps the token and the private working folder. `num_cpus`: what Ray may hand out; default: all cores.
    Called again with the same folder it returns the running cluster.

    Raises SetupError (Ray missing, another cluster in this process, Ray does not come up), UnreachableError (nobody
    answers at the address).
    """
    global _running
    state_dir = state_dir.absolute()
    with _turn:
        if _running is not None:
            if _running.cluster.state_dir != state_dir:
                raise SetupError(
                    f"this process already runs a cluster in {_running.cluster.state_dir}", remedy="Stop it first."
                )
            return _running.cluster
        address = address or os.environ.get("RAY_ADDRESS") or None
        folder = state_dir / "ray"
        with _setup(f"cannot use the folder {folder}", "Choose another one with RANKUP_HOME."):
            for path in (state_dir, folder, folder / "cwd"):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "cwd").chmod(0o700)
            wanted = _environment(state_dir, own=address is None)
            before = {name: os.environ.get(name) for name in wanted}
            folder_before = str(Path.cwd())
            os.chdir(folder / "cwd")
        temp_dir: Path | None = None
        ray: Any = None
        try:
            _set(wanted)
            ray = _import_ray()
            on_sigterm = signal.getsignal(signal.SIGTERM)
            common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.WARNING}
            if address is None:
                _remove_leftover(folder)
                _end_orphans(token_file(state_dir))
                # Short: the paths of Ray's sockets begin with it, and the kernel allows 107 bytes.
                temp_dir = Path(tempfile.mkdtemp(prefix="rankup-ray-", dir="/tmp"))
                (folder / "temp-folder").write_text(str(temp_dir))
                context = ray.init(
                    num_cpus=num_cpus,
                    object_store_memory=object_store_bytes,
                    include_dashboard=False,
                    _temp_dir=str(temp_dir),
                    # Loopback: the cluster of one machine must outlive a change of network.
                    _node_ip_address="127.0.0.1",
                    **common,
                )
            else:
                context = ray.init(address=address, **common)
            if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
                # Ray puts a handler of its own there, which exits before anything else is taken down.
                signal.signal(signal.SIGTERM, on_sigterm)
        except BaseException as exc:
            if ray is not None:
                _take_down(temp_dir, token_file(state_dir))
            _set(before)
            if not isinstance(exc, Exception) or isinstance(exc, SetupError):
                raise
            if address is not None:
                raise UnreachableError(
                    f"no Ray cluster answers at {address}: {exc}",
                    remedy="Check RAY_ADDRESS, and RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH if it wants a token.",
                ) from exc
            raise SetupError(f"Ray does not start: {exc}", remedy="Check memory, /dev/shm and free ports.") from exc
        finally:
            os.chdir(folder_before)
        cluster = Cluster(address=str(context.address_info["gcs_address"]), owned=address is None, state_dir=state_dir)
        _running = _Running(cluster, temp_dir, before, {} if temp_dir is None else _daemons(temp_dir))
        return cluster


def start_serve(host: str, port: int) -> None:
    """Start Ray Serve with one HTTP proxy, on `host` and `port` only; everything else stays as Serve has it.

    Raises SetupError where no cluster runs or the port is taken.
    """
    with _turn:
        if _running is None:
            raise SetupError("there is no cluster to serve from", remedy="Call start_cluster first.")
        if _running.serve:
            return
        if _running.cluster.owned:
            _check_port(host, port)
        with _setup("Ray Serve does not start", "Look into the logs of Ray."):
            from ray import serve

            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        _running.serve = True


def lost_daemon() -> str | None:
    """Name of a daemon without which the cluster that was started here is dead; None while all of them live."""
    running = _running
    return None if running is None else _ended(running.daemons)


def _ended(daemons: dict[str, Any]) -> str | None:
    import psutil

    for name, process in daemons.items():
        # Its parent is this process, which does not wait for it: what has ended stays there as a zombie.
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                continue
        return name
    return None


def stop_cluster() -> None:
    """End the cluster that `start_cluster` started, or leave the one it joined. Fine where there is none."""
    global _running
    with _turn:
        if _running is None:
            return
        running, _running = _running, None
        try:
            lost = _ended(running.daemons) is not None
            _take_down(running.temp_dir, token_file(running.cluster.state_dir), polite=not lost)
        finally:
            _set(running.environment_before)


# -- parts -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _setup(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except SetupError:
        raise
    except (OSError, ImportError, RuntimeError, ValueError) as exc:
        raise SetupError(f"{what}: {exc}", remedy=remedy) from exc


def token_file(state_dir: Path) -> Path:
    """Where the token of the cluster in this state folder lies: `RAY_AUTH_TOKEN_PATH` for who wants to join it."""
    return (state_dir / "ray" / "token").absolute()


def _environment(state_dir: Path, *, own: bool) -> dict[str, str | None]:
    """Variables for this process and for all that Ray starts from it; None: to be removed."""
    wanted: dict[str, str | None] = {
        # Under `uv run` Ray would build a new environment for every worker.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    root = Path(rankup.__file__).resolve().parent.parent
    if root != Path(sysconfig.get_path("purelib")).resolve():
        wanted["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    if own:
        _make_token(token_file(state_dir))
        # Ray prefers a token in the environment to one in a file; there must be no doubt which one holds.
        wanted |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": None,
            "RAY_AUTH_TOKEN_PATH": str(token_file(state_dir)),
            # Ray runs all its workers at niceness 15, so the door would stand behind everything else on a busy machine;
            # tasks make themselves nicer again (aggregator.tasks).
            "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112 - Ray's own spelling
            # Nobody gets in without Serve's proxy: a dead one is replaced after three looks, by default 10 s apart.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": os.environ.get("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1"),
        }
    return wanted


def _make_token(path: Path) -> None:
    """Write the token once, readable for nobody else from the start."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(secrets.token_urlsafe(32))
    if not path.read_text().strip():
        raise SetupError(f"{path} is empty", remedy="Delete it and start again.")


def _import_ray() -> Any:
    imported_before = "ray" in sys.modules
    try:
        import ray
    except ImportError as exc:
        raise SetupError("Ray is missing", remedy="Install it: pip install 'rankup[coordinator]'") from exc
    if ray.is_initialized():
        raise SetupError("Ray already runs in this process", remedy="Call ray.shutdown() first.")
    if imported_before:
        # Ray's core reads the environment once, on import; Ray itself renews it this way when it turns tokens on.
        core = importlib.import_module("ray._raylet")
        core.Config.initialize("")
        core.AuthenticationTokenLoader.instance().reset_cache()
    return ray


def _check_port(host: str, port: int) -> None:
    """Serve would try a taken port again and again instead of saying so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise SetupError(
                f"cannot listen on {host}:{port}: {exc.strerror}",
                remedy="Choose another one with --port or RANKUP_COORDINATOR_PORT.",
            ) from exc


def _processes_of(temp_dir: Path) -> list[Any]:
    """Ray's daemons of this session, which name its folder, and all that descends from them."""
    import psutil

    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(str(temp_dir) in part for part in process.cmdline()):
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = each
    return list(found.values())


def _daemons(temp_dir: Path) -> dict[str, Any]:
    """The control service and the node's manager of the cluster with this folder."""
    found: dict[str, Any] = {}
    for process in _processes_of(temp_dir):
        name = process.name()
        if name in ("gcs_server", "raylet"):
            found[name] = process
    return found


def _end_orphans(token: Path) -> None:
    """End the workers whose raylet has died: they do not notice, and a keeper among them would go on.

    They are known by the token of this state folder and by the raylet, which Ray writes into their environment.
    """
    import psutil

    orphans = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            ours = variables.get("RAY_AUTH_TOKEN_PATH") == str(token) and "RAY_RAYLET_PID" in variables
            if ours and not _is_raylet(int(variables["RAY_RAYLET_PID"])):
                process.kill()
                orphans.append(process)
    psutil.wait_procs(orphans, timeout=STOP_S)


def _is_raylet(pid: int) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        return bool(process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _take_down(temp_dir: Path | None, token: Path, *, polite: bool = True) -> None:
    """Disconnect; for an own cluster also wait for its processes, end those that stay, and remove its folder.

    Not `polite`: the cluster is dead, and Ray would wait for it.
    """
    ray = sys.modules.get("ray")
    if temp_dir is None:
        if ray is not None:
            ray.shutdown()
        return
    import psutil

    processes = _processes_of(temp_dir)
    if ray is not None and polite:
        ray.shutdown()
    known = {each.pid for each in processes}
    processes += [each for each in _processes_of(temp_dir) if each.pid not in known]
    _, alive = psutil.wait_procs(processes, timeout=STOP_S if polite else 0)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_S)
    _end_orphans(token)
    shutil.rmtree(temp_dir, ignore_errors=True)


def _remove_leftover(folder: Path) -> None:
    """Remove the temporary folder of a run that was killed, unless somebody still uses it."""
    note = folder / "temp-folder"
    with contextlib.suppress(OSError):
        old = Path(note.read_text())
        if old.name.startswith("rankup-ray-") and not _processes_of(old):
            shutil.rmtree(old, ignore_errors=True)
        note.unlink()


def _set(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
