"""Who this machine is to one server: an Ed25519 key, a token, and the publisher key that it pinned on first contact.

What always holds:
- one folder per server under `<home>/servers`, mode 700; key and identity file have mode 600 and are written whole
  or not at all;
- the private key never leaves the folder, the token goes to its own server only;
- the publisher key is pinned with the first enrolment; another one later is refused, not adopted;
- one process at a time works in such a folder (`ServerFolder.lock`).

Nothing here talks to the network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rankup import signing
from rankup.durable import write_file
from rankup.errors import IntegrityError, SetupError
from rankup.message import Identifier, Message, PublicKey
from rankup.protocol import Enrolled


class Identity(Message):
    """What was said at enrolment, and what the server gave."""

    server: str
    name: str
    team: str = ""
    worker_id: Identifier
    token: str
    publisher_key: PublicKey


@dataclass(frozen=True)
class ServerFolder:
    """Everything that the worker keeps for one server."""

    root: Path

    @property
    def key_file(self) -> Path:
        return self.root / "worker.key"

    @property
    def identity_file(self) -> Path:
        return self.root / "identity.json"

    @property
    def outbox(self) -> Path:
        return self.root / "outbox"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the operating system lets go of it when the process ends, however it ends.

        Raises `SetupError` when another worker holds it.
        """
        with (self.root / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise SetupError(
                    f"another worker for this server already runs in {self.root}",
                    remedy="Stop it first, or give this one its own folder with RANKUP_WORKER_HOME.",
                ) from exc
            yield


def normalise_url(url: str) -> str:
    """The server's address without a trailing slash; `http://` is added to a bare host.

    Raises `SetupError` for anything but http and https.
    """
    text = url.strip()
    if "://" not in text:
        text = f"http://{text}"
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise SetupError(f"{url!r} is not the address of a server", remedy="Give an address like https://host:8420.")
    return text.rstrip("/")


def folder_of(home: Path, url: str) -> ServerFolder:
    """The folder for `url` under `home`, whether it is there or not."""
    host = re.sub(r"[^a-z0-9.-]+", "-", url.split("://", 1)[-1].lower()).strip("-")[:48]
    return ServerFolder(home / "servers" / f"{host}-{hashlib.sha256(url.encode()).hexdigest()[:8]}")


def open_folder(home: Path, url: str) -> ServerFolder:
    """The folder for `url` under `home`, created with mode 700 where it is missing."""
    folder = folder_of(home, url)
    for path in (home, folder.root, folder.outbox, folder.jobs, folder.logs):
        path.mkdir(parents=True, exist_ok=True)
    for path in (home, folder.root):
        path.chmod(0o700)
    return folder


def load_or_create_key(folder: ServerFolder) -> signing.Ed25519PrivateKey:
    """The worker's private key for this server; made on first use."""
    if not folder.key_file.exists():
        signing.save_private_key(folder.key_file, signing.generate_private_key())
    return signing.load_private_key(folder.key_file)


def load_identity(folder: ServerFolder) -> Identity | None:
    """The identity of an earlier enrolment, or None.

    Raises `IntegrityError` when the file is damaged.
    """
    try:
        return Identity.model_validate_json(folder.identity_file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        raise IntegrityError(
            f"{folder.identity_file} cannot be read",
            remedy=f"Delete {folder.identity_file} and join again with the organiser's line.",
        ) from exc


def check_publisher(pinned: Identity | None, publisher_key: str) -> None:
    """Compare the key that a server shows with the one that was pinned.

    Raises `IntegrityError` when they differ: versions signed by another key must not be trained on unseen.
    """
    if pinned is not None and pinned.publisher_key != publisher_key:
        raise IntegrityError(
            f"the server shows publisher key {publisher_key[:16]}…, pinned here is {pinned.publisher_key[:16]}…",
            remedy="Ask the organiser whether the key was changed on purpose; if so, remove the server's folder.",
        )


def save_identity(folder: ServerFolder, server: str, name: str, answer: Enrolled, *, team: str = "") -> Identity:
    """Store what enrolment gave (mode 600, atomic) and return it."""
    identity = Identity(
        server=server,
        name=name,
        team=team,
        worker_id=answer.worker_id,
        token=answer.token,
        publisher_key=answer.publisher_key,
    )
    _write(folder, identity)
    return identity


def pin(folder: ServerFolder, identity: Identity, publisher_key: PublicKey) -> Identity:
    """The identity with another publisher's key, stored; the caller has seen that the pinned key leads to it."""
    pinned = identity.model_copy(update={"publisher_key": publisher_key})
    _write(folder, pinned)
    return pinned


def _write(folder: ServerFolder, identity: Identity) -> None:
    write_file(folder.identity_file, identity.model_dump_json(indent=2).encode())
