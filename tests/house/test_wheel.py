"""The wheel as a stranger gets it: built, installed into an empty environment without extras, started."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `bin` of a fresh environment that has the wheel and its plain dependencies, at the pinned versions."""
    scratch = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(scratch)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = scratch.glob("*.whl")
    venv = scratch / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True, capture_output=True)
    return venv / "bin"


@pytest.mark.slow
def test_the_plain_wheel_starts_in_under_a_second_without_torch_ray_or_boto3(installed: Path) -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        shown = subprocess.run([installed / "rankup", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - began)
    assert "pull" in shown.stdout
    assert min(times) < 1.0
    script = "import sys, json, rankup.cli; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    loaded = json.loads(subprocess.check_output([installed / "python", "-c", script]))
    assert not {"torch", "ray", "boto3"} & set(loaded)


@pytest.mark.slow
def test_a_command_that_needs_an_extra_says_which(installed: Path) -> None:
    asked = subprocess.run(
        [installed / "rankup", "worker", "join", "http://127.0.0.1:1"], capture_output=True, text=True
    )
    assert asked.returncode == 78
    assert "rankup[worker]" in asked.stderr


@pytest.mark.slow
def test_an_unreachable_server_gives_cause_remedy_and_exit_code(installed: Path) -> None:
    asked = subprocess.run([installed / "rankup", "versions", "http://127.0.0.1:1"], capture_output=True, text=True)
    assert asked.returncode == 75
    assert "does not answer" in asked.stderr
    assert "remedy:" in asked.stderr
