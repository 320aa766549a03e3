"""Ray as the coordinator starts it: behind a token, in a private folder, and gone without a trace when stopped."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import rankup
from coordinator.cluster import NAMESPACE, Cluster, start_cluster
from rankup.errors import SetupError

pytestmark = pytest.mark.stack
ROOT = Path(rankup.__file__).parents[1]


def _run(script: str, *arguments: str, **environment: str | None) -> Any:
    """Run Python in a process of its own, outside the checkout, and read the JSON of its last line."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd="/",
        env={name: value for name, value in env.items() if value is not None},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _processes_naming(text: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if text in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def _eventually(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


def test_workers_know_the_rooms_and_start_in_the_private_folder(ray_cluster: Cluster) -> None:
    import ray

    @ray.remote
    def look() -> dict[str, Any]:
        import coordinator.cluster
        import rankup

        return {
            "rankup": rankup.__file__,
            "cluster": coordinator.cluster.__file__,
            "cwd": str(Path.cwd()),
            "path": sys.path,
        }

    seen = ray.get(look.remote())
    assert Path(seen["rankup"]) == Path(rankup.__file__)
    private = ray_cluster.state_dir / "ray" / "cwd"
    assert Path(seen["cwd"]) == private
    assert list(private.iterdir()) == []
    assert private.stat().st_mode & 0o777 == 0o700
    assert "" not in seen["path"]
    assert ray.get_runtime_context().namespace == NAMESPACE == ray_cluster.namespace


def test_the_token_is_a_private_file_and_the_callers_folder_stays(ray_cluster: Cluster) -> None:
    token = ray_cluster.state_dir / "ray" / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) >= 32
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert Path.cwd() != ray_cluster.state_dir / "ray" / "cwd"


def test_starting_again_gives_the_same_cluster_and_another_folder_is_refused(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    assert start_cluster(ray_cluster.state_dir) is ray_cluster
    with pytest.raises(SetupError, match="already runs a cluster"):
        start_cluster(tmp_path)


JOIN = """
import json, sys
from pathlib import Path
from coordinator.cluster import start_cluster, stop_cluster
from rankup.errors import UnreachableError
try:
    cluster = start_cluster(Path(sys.argv[1]))
except UnreachableError as exc:
    print(json.dumps({"error": exc.remedy}))
else:
    import ray
    answer = ray.get(ray.remote(lambda: "hello").remote())
    stop_cluster()
    print(json.dumps({"owned": cluster.owned, "address": cluster.address, "answer": answer}))
"""


def test_another_process_joins_with_the_token_and_leaves_the_cluster_alive(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    joined = _run(JOIN, str(tmp_path), RAY_ADDRESS=ray_cluster.address)
    assert joined == {"owned": False, "address": ray_cluster.address, "answer": "hello"}
    import ray

    assert ray.get(ray.remote(lambda: 1).remote()) == 1


@pytest.mark.slow
def test_a_process_with_another_token_is_kept_out(ray_cluster: Cluster, tmp_path: Path) -> None:
    wrong = {"RAY_AUTH_TOKEN": "x" * 43, "RAY_AUTH_TOKEN_PATH": None}
    refused = _run(JOIN, str(tmp_path), RAY_ADDRESS=ray_cluster.address, **wrong)
    assert "RAY_AUTH_TOKEN_PATH" in refused["error"]


LIFE = """
import json, os, socket, sys, urllib.request
from pathlib import Path
import ray  # before start_cluster: the token must be asked for all the same
import psutil
from coordinator.cluster import start_cluster, start_serve, stop_cluster
from rankup.errors import SetupError

state, port = Path(sys.argv[1]), int(sys.argv[2])
report = {"env_before": sorted(k for k in os.environ if k.startswith("RAY_"))}
before = {each.pid for each in psutil.Process().children(recursive=True)}
stop_cluster()
try:
    start_serve("127.0.0.1", port)
except SetupError:
    report["no cluster"] = True
start_cluster(state, num_cpus=2, object_store_bytes=100 * 1024**2)
with socket.create_server(("127.0.0.1", port)):
    try:
        start_serve("127.0.0.1", port)
    except SetupError as exc:
        report["taken"] = str(exc)
start_serve("127.0.0.1", port)
start_serve("127.0.0.1", port)
from fastapi import FastAPI
from ray import serve
app = FastAPI()
@app.get("/")
def hello():
    import coordinator.cluster
    return {"module": coordinator.cluster.__file__}
@serve.deployment
@serve.ingress(app)
class Hello:
    pass
serve.run(Hello.bind(), name="hello")
report["answer"] = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30))
listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
report["proxy"] = sorted({c.laddr.ip for c in listening})
started = {each.pid: each for each in psutil.Process().children(recursive=True)}
report["started"] = len(set(started) - before)
temp = Path((state / "ray" / "temp-folder").read_text())
stop_cluster()
stop_cluster()
def alive(each):
    return each.is_running() and each.status() != psutil.STATUS_ZOMBIE
report["left"] = [pid for pid, each in started.items() if pid not in before and alive(each)]
report["children"] = [each.pid for each in psutil.Process().children(recursive=True) if alive(each)]
report["temp folder"] = temp.exists()
report["env_after"] = sorted(k for k in os.environ if k.startswith("RAY_"))
start_cluster(state, num_cpus=1, object_store_bytes=100 * 1024**2)
report["again"] = ray.get(ray.remote(lambda: 7).remote())
stop_cluster()
print(json.dumps(report))
"""


@pytest.mark.slow
def test_a_whole_life_with_serve_leaves_no_process_no_folder_and_no_variable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    clean = {name: None for name in os.environ if name.startswith("RAY_")}
    report = _run(LIFE, str(tmp_path / "state"), str(port), **clean)
    assert report["no cluster"]
    assert str(port) in report["taken"]
    assert Path(report["answer"]["module"]).is_relative_to(ROOT)
    assert report["proxy"] == ["127.0.0.1"]
    assert report["started"] >= 5
    assert report["left"] == report["children"] == []
    assert not report["temp folder"]
    assert report["env_after"] == report["env_before"]
    assert report["again"] == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from coordinator.cluster import start_cluster
start_cluster(Path(sys.argv[1]), num_cpus=1, object_store_bytes=100 * 1024**2)
print((Path(sys.argv[1]) / "ray" / "temp-folder").read_text(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
def test_a_killed_parent_takes_its_cluster_along_and_the_next_start_removes_its_folder(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    died = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=120, check=False)
    temp = Path(died.stdout.strip())
    assert temp.exists()
    _eventually(lambda: _processes_naming(str(temp)) == [])
    script = KILLED.replace("os.kill(", "from coordinator.cluster import stop_cluster; stop_cluster(); print(0) #")
    assert _run(script, str(tmp_path), **{name: None for name in os.environ if name.startswith("RAY_")}) == 0
    assert not temp.exists()


LOST = """
import json, os, signal, sys, time
from pathlib import Path
import psutil
from coordinator.cluster import lost_daemon, start_cluster, stop_cluster
import ray
report = {"before": lost_daemon()}
start_cluster(Path(sys.argv[1]), num_cpus=1, object_store_bytes=100 * 1024**2)
report["alive"] = lost_daemon()
class Forever:
    def pid(self):
        return os.getpid()
actor = ray.remote(Forever).options(lifetime="detached", name="forever").remote()
worker = psutil.Process(ray.get(actor.pid.remote()))
for each in psutil.Process().children():
    if each.name() == sys.argv[2]:
        each.kill()
while lost_daemon() is None:
    time.sleep(0.05)
report["lost"] = lost_daemon()
report["worker"] = worker.is_running()
began = time.monotonic()
stop_cluster()
report["seconds"] = time.monotonic() - began
report["worker after"] = worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
report["after"] = lost_daemon()
print(json.dumps(report))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.long
def test_a_dead_daemon_is_named_and_a_stop_then_ends_also_the_workers_that_outlived_it(tmp_path: Path) -> None:
    clean = {name: None for name in os.environ if name.startswith("RAY_")}
    report = _run(LOST, str(tmp_path), "raylet", **clean)
    assert report["before"] is report["alive"] is report["after"] is None
    assert report["lost"] == "raylet"
    assert report["worker"], "this test needs a worker that outlives its raylet"
    assert not report["worker after"]
    assert report["seconds"] < 20


def test_stopping_and_serving_without_a_cluster_is_harmless_or_says_so() -> None:
    script = """
from coordinator.cluster import start_serve, stop_cluster
from rankup.errors import SetupError
import sys
stop_cluster()
try:
    start_serve("127.0.0.1", 1)
except SetupError:
    print("ray" in sys.modules and 1 or 0)
"""
    assert _run(script) == 0
