"""A systemd user unit that runs `rankup worker join`: the text of the unit, and where it goes.

What always holds: the unit starts the interpreter directly, without a shell; no word in it is taken for anything but
itself (quoting and `%` as in systemd.syntax(7)); it holds no secret, so the machine must have joined once before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankup.durable import write_file
from rankup.errors import InputError, SetupError

UNIT_NAME = "rankup-worker.service"
_TEMPLATE = """\
[Unit]
Description=Rankup worker: lends this machine to {server}
Documentation=https://github.com/rankup/rankup/tree/main/docs
StartLimitIntervalSec=1h
StartLimitBurst=6

[Service]
Type=exec
ExecStart={command}
Environment={environment}
WorkingDirectory={home}
Restart=on-failure
RestartSec=60
# 65: another publisher key, 77: not allowed, 78: something is missing here; starting again cures none of them.
RestartPreventExitStatus=65 77 78
# SIGTERM goes to the agent, which writes the trainer's checkpoint and ends it.
KillMode=mixed
TimeoutStopSec=30

# A guest: last in line for processor, disk and memory.
Nice=10
IOSchedulingClass=idle
CPUWeight=20
OOMScoreAdjust=500

# What every user's service manager can do. Options that need mounts or capabilities (ProtectHome=, PrivateTmp=,
# CapabilityBoundingSet=) keep a user's service from starting on some systems.
NoNewPrivileges=yes
UMask=0077
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native

[Install]
WantedBy=default.target
"""


def unit_text(server: str, home: Path, *, interpreter: str = sys.executable, options: Sequence[str] = ()) -> str:
    """The unit for a worker of `server` with its folder `home`; `options` are further ones of `worker join`.

    Raises `InputError` for words that a unit cannot hold.
    """
    command = (interpreter, "-P", "-m", "rankup", "worker", "join", server, *options)
    return _TEMPLATE.format(
        server=_plain(server),
        command=" ".join(_quoted(word, dollar=True) for word in command),
        environment=_quoted(f"RANKUP_WORKER_HOME={home}"),
        home=_path(home),
    )


def unit_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where systemd looks for a user's own units."""
    config = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".config")
    return Path(config) / "systemd" / "user"


def install(text: str, folder: Path) -> Path:
    """Write the unit into `folder` and return its path. Raises `SetupError`."""
    path = folder / UNIT_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode(), mode=0o644)
    except OSError as exc:
        raise SetupError(f"{path} cannot be written: {exc.strerror}") from exc
    return path


def _plain(text: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise InputError(f"{text!r} has characters that no unit file can hold")
    return text.replace("%", "%%")


def _quoted(word: str, *, dollar: bool = False) -> str:
    escaped = _plain(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped.replace("$", "$$") if dollar else escaped}"'


def _path(path: Path) -> str:
    """A path where systemd takes one. Spaces separate some lists of paths and not others, and quoting differs."""
    text = _plain(str(path))
    if any(character in text for character in " \"'\\"):
        raise InputError(
            f"{path} has spaces or quotes, which this unit cannot hold",
            remedy="Choose another folder with RANKUP_WORKER_HOME.",
        )
    return text
