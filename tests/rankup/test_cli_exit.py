"""The exit code of the `rankup` command, as a shell sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "help": (["--help"], 0),
    "an unknown command": (["frobnicate"], 2),
    "a folder that is not there": (["merge", "/nowhere/base", "/nowhere/adapter", "--out", "/nowhere/out"], 2),
}


@pytest.mark.parametrize(("arguments", "code"), CASES.values(), ids=CASES)
def test_the_shell_sees_how_a_command_ended(tmp_path: Path, arguments: list[str], code: int) -> None:
    env = {**os.environ, "RANKUP_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-m", "rankup", *arguments], env=env, capture_output=True, check=False)
    assert ended.returncode == code, ended.stderr.decode()


def test_a_command_that_exits_with_a_code_of_its_own_ends_the_process_with_it(tmp_path: Path) -> None:
    script = (
        "import sys, typer, rankup.cli as cli\n"
        "@cli.app.command('leave')\n"
        "def leave() -> None:\n"
        "    raise typer.Exit(7)\n"
        "sys.argv = ['rankup', 'leave']\n"
        "cli.main()\n"
    )
    env = {**os.environ, "RANKUP_HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == 7
