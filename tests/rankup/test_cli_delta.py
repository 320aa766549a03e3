"""`rankup delta …` as a user types it: what it prints, what it returns, what it says when something is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rankup.cli.delta import app
from rankup.cli.output import exit_for
from rankup.delta import DeltaHeader, write_delta
from rankup.fixedpoint import quantise

HEAVY = ("torch", "ray", "transformers", "peft", "datasets", "boto3", "fastapi")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def rankup(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command as `rankup.cli.main` runs it, in this process and in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> Done:
        try:
            code = app(list(map(str, args)), standalone_mode=False)
        except Exception as exc:  # noqa: BLE001
            code = exit_for(exc)
        out, err = capsys.readouterr()
        return Done(code or 0, out, err)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`one.delta`: two layers with two linear weights each, and a norm. `plain.delta`: without the norm."""
    rng = np.random.default_rng(0)
    factors = {
        f"model.layers.{layer}.{name}.weight": quantise(
            rng.standard_normal((shape[0], 2)), rng.standard_normal((2, shape[1]))
        )
        for layer in range(2)
        for name, shape in {"q_proj": (6, 4), "up_proj": (8, 6)}.items()
    }
    norm = {"model.norm.weight": quantise(rng.standard_normal((6, 1)), np.ones((1, 1)))}
    header = DeltaHeader(model="toy", round_id="round-1", lease_id="lease-7", base_manifest="ab" * 32)
    write_delta(tmp_path / "plain.delta", header, factors)
    write_delta(tmp_path / "one.delta", header, factors | norm)
    return tmp_path


def test_there_and_back_again_says_what_it_did_and_what_to_do_next(folder: Path, rankup: Callable[..., Done]) -> None:
    there = rankup("to-peft", "plain.delta", "--to", "adapter", "--base-name", "someone/toy")
    assert there.returncode == 0, there.stderr
    assert "plain.delta is an adapter in adapter" in there.stdout
    assert "4 of 4" in there.stdout
    assert "PeftModel.from_pretrained(base_model, 'adapter')" in there.stdout
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/toy"
    back = rankup("from-peft", "adapter", "--out", "again.delta")
    assert back.returncode == 0, back.stderr
    assert "bit for bit" in back.stdout
    assert hashlib.sha256((folder / "plain.delta").read_bytes()).hexdigest() in back.stdout
    assert (folder / "again.delta").read_bytes() == (folder / "plain.delta").read_bytes()


def test_what_is_left_out_is_said_in_text_and_json(folder: Path, rankup: Callable[..., Done]) -> None:
    refused = rankup("to-peft", "one.delta", "--to", "adapter")
    assert refused.returncode == 2
    assert "1 of the delta's 5 weights, such as model.norm.weight: a vector" in refused.stderr
    assert "--partial" in refused.stderr
    made = rankup("to-peft", "one.delta", "--to", "adapter", "--partial", "--dtype", "bfloat16")
    assert "warning: left out model.norm.weight" in made.stderr
    assert "rounded to bfloat16" in made.stdout
    assert "from-peft" not in made.stdout
    again = rankup("to-peft", "one.delta", "--to", "second", "--partial", "--json")
    told = json.loads(again.stdout)
    assert (told["exact"], told["weights"], list(told["left_out"])) == (True, 4, ["model.norm.weight"])
    like = rankup("from-peft", "adapter", "--like", "one.delta", "--out", "new.delta", "--json")
    told = json.loads(like.stdout)
    assert (told["identical"], told["missing"]) == (False, ["model.norm.weight"])
    assert told["header"]["lease_id"] == "lease-7"
    assert told["contribution"]["sha256"] == hashlib.sha256((folder / "new.delta").read_bytes()).hexdigest()


def test_show_groups_the_weights_and_names_round_and_base(folder: Path, rankup: Callable[..., Done]) -> None:
    shown = rankup("show", "one.delta")
    assert shown.returncode == 0, shown.stderr
    for part in ("round-1, lease lease-7", "ab" * 32, "model.layers.q_proj ", "over 5 weights"):
        assert part in shown.stdout
    told = json.loads(rankup("show", "one.delta", "--json").stdout)
    assert told["contribution"] == hashlib.sha256((folder / "one.delta").read_bytes()).hexdigest()
    norms = [weight["norm"] for weight in told["weights"].values()]
    assert told["norm"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5)
    listed = rankup("show", "one.delta", "--weights")
    assert "model.layers.1.up_proj.weight" in listed.stdout


WRONG = {
    "no such delta": (("to-peft", "nothing.delta", "--to", "a"), 2, "no delta nothing.delta"),
    "no such base": (("to-peft", "plain.delta", "--to", "a", "--base", "./nowhere"), 2, "no folder ./nowhere"),
    "a full folder": (("to-peft", "plain.delta", "--to", "."), 2, "not empty"),
    "a type in words": (("to-peft", "plain.delta", "--to", "a", "--dtype", "small"), 2, "no type 'small'"),
    "no adapter": (("from-peft", ".", "--out", "b.delta"), 2, "has no rankup.json"),
    "not an adapter either": (("from-peft", ".", "--like", "one.delta", "--out", "b.delta"), 2, "not a PEFT adapter"),
    "no delta at all": (("show", "notes.txt"), 2, "header claims"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_a_remedy(case: str, folder: Path, rankup: Callable[..., Done]) -> None:
    (folder / "notes.txt").write_text("these are my notes, honestly")
    args, code, cause = WRONG[case]
    done = rankup(*args)
    assert done.returncode == code, done.stderr
    assert cause in done.stderr
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "b.delta").exists()


def test_the_commands_import_no_heavy_library(folder: Path) -> None:
    script = (
        "import sys\n"
        "from rankup.cli.delta import app\n"
        "for line in ('to-peft plain.delta --to adapter', 'from-peft adapter --out b.delta', 'show b.delta'):\n"
        "    app(line.split(), standalone_mode=False)\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"
