"""`rankup merge` as a user types it: what it prints, what it returns, what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rankup.tensorfile import TensorFile, write_tensor_file

HEAVY = ("torch", "ray", "transformers", "peft", "datasets", "boto3", "fastapi")
Q = "model.layers.0.q_proj"


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensor_file(path, {name: ("F32", x.shape, x.astype("<f4").tobytes()) for name, x in tensors.items()})


def rankup(*args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankup", *map(str, args)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base of ones, and two adapters that add 1 and 10 to every weight."""
    write(tmp_path / "base" / "model.safetensors", {f"{Q}.weight": np.ones((3, 4))})
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    for name, size in {"one": 1.0, "ten": 10.0}.items():
        halves = {"lora_A": np.ones((2, 4)), "lora_B": np.full((3, 2), size / 4)}
        write(
            tmp_path / name / "adapter_model.safetensors",
            {f"base_model.model.{Q}.{half}.weight": value for half, value in halves.items()},
        )
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    return tmp_path


def merged(folder: Path) -> np.ndarray:
    with TensorFile.open(folder / "model.safetensors") as file:
        return np.frombuffer(file.read(f"{Q}.weight"), "<f4")


def test_a_merge_says_what_it_did_and_what_to_do_next(folder: Path) -> None:
    done = rankup("merge", "base", "one", "ten", "--weights", "0.5,-0.25", "--out", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "base with 2 adapters is in out" in done.stdout
    assert "ten: weight -0.25, scaling 2" in done.stdout
    assert "1 of 1 changed" in done.stdout
    assert "from_pretrained('out')" in done.stdout
    np.testing.assert_allclose(merged(folder / "out"), 1 + 0.5 * 1 - 0.25 * 10)
    again = rankup("merge", "base", "one", "ten", "--weights", "0.5,-0.25", "--out", "out", folder=folder)
    assert "all of it was there already" in again.stdout


def test_json_is_one_object_with_the_record(folder: Path) -> None:
    done = rankup("merge", "base", "one", "--rule", "mean", "--out", "out", "--json", folder=folder)
    answer = json.loads(done.stdout)
    assert answer["record"] == json.loads((folder / "out" / "rankup-merge.json").read_text())
    assert answer["record"]["adapters"][0]["coefficient"] == 2**30
    assert answer["folder"] == str(folder / "out")
    assert answer["warnings"] == []


def test_verify_agrees_with_its_own_merge_and_not_with_a_changed_one(folder: Path) -> None:
    rankup("merge", "base", "one", "--out", "out", folder=folder)
    good = rankup("merge", "base", "one", "--out", "out", "--verify", folder=folder)
    assert good.returncode == 0
    assert "bit-identical" in good.stdout
    path = folder / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    bad = rankup("merge", "base", "one", "--out", "out", "--verify", folder=folder)
    assert bad.returncode == 65
    assert f"{Q}.weight" in bad.stderr
    as_json = rankup("merge", "base", "one", "--out", "out", "--verify", "--json", folder=folder)
    assert json.loads(as_json.stdout)["mismatches"] == [f"{Q}.weight"]
    assert as_json.returncode == 65


WRONG = {
    "no such base": (("nowhere", "one"), 2, "there is no folder nowhere", "hf download"),
    "a hub that is out of reach": (("org/model", "one"), 75, "the hub cannot be reached", "local folder"),
    "no such adapter": (("base", "nowhere"), 2, "there is no folder nowhere", "hf download"),
    "an adapter as base": (("one", "ten"), 2, "no readable config.json", "model's folder"),
    "a base as adapter": (("base", "base"), 2, "it is not a PEFT adapter", "save_pretrained"),
    "a weight too few": (("base", "one", "ten", "--weights", "1"), 2, "1 weights for 2 adapters", "one weight"),
    "a weight in words": (("base", "one", "--weights", "half"), 2, "'half' is no weight", "0.7,0.3"),
    "a rule in words": (("base", "one", "--rule", "best"), 2, "no rule 'best'", "geometric_median"),
    "nothing to verify": (("base", "one", "--verify"), 2, "no finished merge", "without --verify"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_a_remedy(case: str, folder: Path) -> None:
    args, code, cause, remedy = WRONG[case]
    done = rankup("merge", *args, "--out", "out", folder=folder)
    assert done.returncode == code
    assert "error: " in done.stderr
    assert cause in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()


def test_ctrl_c_ends_a_merge_with_130_and_the_next_one_goes_on(folder: Path) -> None:
    """A large base makes the merge slow enough to be interrupted between two files."""
    for index in range(4):
        write(
            folder / "large" / f"part-{index}.safetensors",
            {f"model.layers.{index}.q_proj.weight": np.ones((3000, 4000))},
        )
    table = {f"model.layers.{index}.q_proj.weight": f"part-{index}.safetensors" for index in range(4)}
    (folder / "large" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "large" / "config.json").write_text("{}")
    halves = {"lora_A": np.ones((2, 4000)), "lora_B": np.ones((3000, 2))}
    tensors = {f"base_model.model.model.layers.{i}.q_proj.{h}.weight": v for i in range(4) for h, v in halves.items()}
    write(folder / "wide" / "adapter_model.safetensors", tensors)
    (folder / "wide" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    command = [sys.executable, "-m", "rankup", "merge", "large", "wide", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        journal = folder / "out" / ".rankup-merge.json"
        while not (journal.exists() and "part-0" in journal.read_text()):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    left = {path.name for path in (folder / "out").iterdir()}
    assert "part-0.safetensors" in left
    assert not [name for name in left if name.endswith(".partial")]
    assert "rankup-merge.json" not in left
    done = rankup("merge", "large", "wide", "--out", "out", "--json", folder=folder)
    assert json.loads(done.stdout)["bytes_written"] < 4 * 48_000_000
    assert rankup("merge", "large", "wide", "--out", "out", "--verify", folder=folder).returncode == 0


def test_the_command_imports_no_heavy_library(folder: Path) -> None:
    script = (
        "import sys; sys.argv = ['rankup', 'merge', 'base', 'one', '--out', 'out', '--rule', 'geometric_median']\n"
        "from rankup.cli import main\n"
        "main()\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"
