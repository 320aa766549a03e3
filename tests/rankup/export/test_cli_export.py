"""`rankup export` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tinymodel import make_model, pull_model

HEAVY = ("torch", "ray", "transformers", "peft", "boto3", "fastapi", "llama_cpp", "tokenizers")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    "COLUMNS": "200",
    "PATH": "",
    "RANKUP_LLAMA_CPP": "",
    "RANKUP_LLAMA_PYTHON": "",
}


def rankup(*args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankup", *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model")
    pull_model(tmp_path / "model")
    return tmp_path


def test_an_export_says_what_it_is_and_what_to_do_with_it(folder: Path) -> None:
    done = rankup("export", "gguf", "model", "--out", "out/tiny.gguf", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "out/tiny.gguf is complete (tiny version 7, bf16" in done.stdout
    assert "manifest  sha256:" in done.stdout
    assert "llama-cli -m out/tiny.gguf" in done.stdout


def test_json_is_a_list_with_one_entry_for_each_file(folder: Path) -> None:
    done = rankup("export", "gguf", "model", "--out", "tiny.gguf", "--type", "f16", "--json", folder=folder)
    [answer] = json.loads(done.stdout)
    assert (answer["path"], answer["type"], answer["version"]) == (str(folder / "tiny.gguf"), "f16", 7)
    assert answer["bytes"] == (folder / "tiny.gguf").stat().st_size
    assert answer["warnings"] == []


def test_an_ollama_folder_says_how_to_run_it(folder: Path) -> None:
    done = rankup("export", "ollama", "model", "--to", "for-ollama", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "template found" in done.stdout
    assert "ollama create tiny -f for-ollama/Modelfile" in done.stdout
    assert sorted(path.name for path in (folder / "for-ollama").iterdir()) == ["Modelfile", "model.gguf"]


WRONG = {
    "no such type": (("gguf", "model", "--out", "x.gguf", "--type", "bf8"), 2, "'bf8' is no type", "bf16"),
    "no llama.cpp": (("gguf", "model", "--out", "x.gguf", "-q", "q4_k_m"), 78, "needs llama.cpp", "rankup[llama]"),
    "a folder in use": (("ollama", "model", "--to", "model"), 2, "model is not empty", "--force"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_a_remedy(case: str, folder: Path) -> None:
    args, code, cause, remedy = WRONG[case]
    before = sorted(folder.rglob("*"))
    done = rankup("export", *args, folder=folder)
    assert done.returncode == code, done.stderr
    assert cause in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_the_command_imports_no_heavy_library(folder: Path) -> None:
    script = (
        "import sys; sys.argv = ['rankup', 'export', 'ollama', 'model', '--to', 'out']\n"
        "from rankup.cli import main\n"
        "main()\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_ctrl_c_ends_the_converter_too_and_leaves_nothing(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import os, sys, time\n"
        "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('GGUF')\n"
        "open('pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    command = [
        sys.executable,
        "-m",
        "rankup",
        "export",
        "gguf",
        "model",
        "--out",
        "out/x.gguf",
        "--converter",
        "slow.py",
    ]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not (folder / "pid").exists() or not (folder / "pid").read_text():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not list((folder / "out").iterdir())
    assert not Path(f"/proc/{(folder / 'pid').read_text()}").exists()
