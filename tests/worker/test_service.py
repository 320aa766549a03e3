"""The systemd unit: what it runs, that nothing in it is misread, and what systemd thinks of it."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from rankup.errors import InputError
from worker.service import UNIT_NAME, install, unit_folder, unit_text

HOME = Path("/var/lib/ada/rankup")


def test_words_are_taken_for_nothing_but_themselves() -> None:
    text = unit_text("http://h/%n?$HOME", HOME, interpreter='/opt/my "python"', options=("--device", "cuda:1"))
    line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    expected = '"/opt/my \\"python\\"" "-P" "-m" "rankup" "worker" "join" "http://h/%%n?$$HOME" "--device" "cuda:1"'
    assert line == f"ExecStart={expected}"
    assert 'Environment="RANKUP_WORKER_HOME=/var/lib/ada/rankup"' in text
    assert not any(shell in text for shell in ("/bin/sh", "bash"))


@pytest.mark.parametrize(
    ("server", "home"),
    [("http://h/\nExecStartPre=/bin/true", HOME), ("http://h", Path("/a b")), ("http://h\x7f", HOME)],
)
def test_what_a_unit_cannot_hold_is_refused(server: str, home: Path) -> None:
    with pytest.raises(InputError):
        unit_text(server, home)


def test_the_unit_goes_where_systemd_looks(tmp_path: Path) -> None:
    assert unit_folder({"HOME": "/home/ada"}) == Path("/home/ada/.config/systemd/user")
    path = install("[Unit]\n", unit_folder({"XDG_CONFIG_HOME": str(tmp_path)}))
    assert path == tmp_path / "systemd" / "user" / UNIT_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    path = install(unit_text("http://127.0.0.1:8420", tmp_path), tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path], capture_output=True, text=True
    )
    assert UNIT_NAME not in done.stderr, done.stderr
