"""Orders to a running agent, over a unix socket in the worker's home: one JSON line in, one JSON line out.

What always holds:
- the socket has mode 600 in a folder of mode 700: who can write to it could as well end the process;
- a request is read up to `MAX_REQUEST_BYTES` and an answer up to `MAX_ANSWER_BYTES`, each within `TIMEOUT_S`, and
  parsed as frozen models; what is no request gets an answer that says so;
- a socket that nobody listens on is the rest of a dead agent: askers pass over it, the next agent replaces it;
- the agent's work never waits for an asker.

What an order does is `worker.desk`'s; nothing of the network, and nothing but the agent's own status and limits, can be
reached through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from rankup.errors import NotFoundError, SetupError, StateError, UnreachableError
from rankup.message import Answer, Finite, Message
from worker.status import Status

MAX_REQUEST_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 1024**2
TIMEOUT_S = 5.0
_LOOK_S = 0.2
_LONGEST_ADDRESS = 100
"""Bytes of a path that fit into a socket address on every system."""

Order = Literal["status", "pause", "resume", "finish", "leave", "limits"]


class Request(Message):
    """What somebody asks of the agent."""

    order: Order
    seconds: Annotated[Finite, Field(gt=0, le=31_536_000)] | None = None
    """Of a pause; None: until `resume`."""
    changes: Annotated[tuple[Annotated[str, Field(max_length=8192)], ...], Field(max_length=64)] = ()
    """Of limits: NAME=VALUE, as for `rankup worker limits set`."""


class Reply(Answer):
    """The agent's answer: its status after the order, or what is wrong with the request."""

    error: str = ""
    status: Status | None = None


def socket_path(home: Path, server: str) -> Path:
    """Where the agent of `server` listens; a home may have agents of several servers."""
    return home / f"control-{hashlib.sha256(server.encode()).hexdigest()[:8]}.sock"


# -- the agent's side --------------------------------------------------------------------------------------------------


class ControlServer:
    """Listens at `path` from entering the `with` block to leaving it; `answer` runs in its thread.

    Entering raises `SetupError` where another agent listens there.
    """

    def __init__(self, path: Path, answer: Callable[[Request], Reply]) -> None:
        self._path = path
        self._answer = answer
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def __enter__(self) -> ControlServer:
        if is_alive(self._path):
            self._socket.close()
            raise SetupError(
                f"another worker listens at {self._path}", remedy="Stop it first: `rankup worker finish` or `leave`."
            )
        self._path.unlink(missing_ok=True)
        try:
            with _address(self._path) as address:
                self._socket.bind(address)
            self._path.chmod(0o600)
            self._socket.listen(8)
        except OSError as exc:
            self._socket.close()
            raise SetupError(f"no socket can be made at {self._path}: {exc}") from exc
        self._socket.settimeout(_LOOK_S)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                asker, _ = self._socket.accept()
            except OSError:
                continue  # nobody within the time, or an asker who has gone already
            with asker, contextlib.suppress(OSError):
                asker.settimeout(TIMEOUT_S)
                reply = self._reply(asker)
                asker.sendall(reply.model_dump_json().encode() + b"\n")

    def _reply(self, asker: socket.socket) -> Reply:
        line = _read_line(asker, MAX_REQUEST_BYTES)
        if line is None:
            return Reply(error=f"a request is one line of at most {MAX_REQUEST_BYTES} bytes")
        try:
            request = Request.model_validate_json(line)
        except ValidationError as exc:
            return Reply(error=f"this is not a request: {exc.errors()[0]['msg']}")
        return self._answer(request)


# -- the asker's side --------------------------------------------------------------------------------------------------


def find_socket(home: Path, server: str | None = None) -> Path:
    """The socket of the agent that runs in this home: that of `server`, or the only one there is.

    Raises `NotFoundError` where no agent runs, `StateError` where several do and none is named.
    """
    candidates = [socket_path(home, server)] if server is not None else sorted(home.glob("control-*.sock"))
    alive = [path for path in candidates if is_alive(path)]
    if not alive:
        stale = f" ({candidates[0].name} is left from one that died)" if any(p.exists() for p in candidates) else ""
        raise NotFoundError(
            f"no worker runs in {home}{stale}",
            remedy="Start one with `rankup worker join`, or name its folder with RANKUP_WORKER_HOME.",
        )
    if len(alive) > 1:
        raise StateError(f"{len(alive)} workers run in {home}", remedy="Say which one with --server URL.")
    return alive[0]


def ask(path: Path, request: Request) -> Status:
    """Send `request` and return the status after it.

    Raises `UnreachableError` where the agent does not answer in time, `StateError` where it does not take the request.
    """
    try:
        with _connect(path) as line:
            line.sendall(request.model_dump_json().encode() + b"\n")
            text = _read_line(line, MAX_ANSWER_BYTES)
        reply = Reply.model_validate_json(text or b"")
    except (OSError, ValidationError) as exc:
        raise UnreachableError(f"the worker at {path} does not answer: {exc}") from exc
    if reply.status is None:
        raise StateError(f"the worker does not take this: {reply.error}", remedy="Update rankup on both sides.")
    return reply.status


def is_alive(path: Path) -> bool:
    """Whether somebody listens at `path`."""
    try:
        with _connect(path):
            return True
    except OSError:
        return False


@contextmanager
def _connect(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(TIMEOUT_S)
        with _address(path) as address:
            line.connect(address)
        yield line


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """The path as a socket address. One that is too long is reached through its folder's descriptor."""
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def _read_line(line: socket.socket, limit: int) -> bytes | None:
    """The bytes before the first newline; None when there are more than `limit` or the other side closes before."""
    received = bytearray()
    while b"\n" not in received:
        if len(received) > limit:
            return None
        piece = line.recv(4096)
        if not piece:
            return None
        received += piece
    text = bytes(received).partition(b"\n")[0]
    return text if len(text) <= limit else None
