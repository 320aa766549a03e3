"""How the agent gets a base version: a pull from the gateway, seen as one function so that tests can stand in for it.

What always holds: when it returns, every file in the folder has the hash that the manifest signed by `publisher_key`
names, and the digest returned is that manifest's; other versions in the cache stay as they are. Retries are the
caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rankup.download import Limit


class PullBase(Protocol):
    """Have version `version` of `model` in `folder`; returns the digest of its manifest."""

    def __call__(
        self,
        server: str,
        model: str,
        version: int,
        folder: Path,
        *,
        publisher_key: str,
        progress: Callable[[int, int], None],
        working: Callable[[], None],
        limit: Limit | None,
    ) -> str: ...


def pull_base(
    server: str,
    model: str,
    version: int,
    folder: Path,
    *,
    publisher_key: str,
    progress: Callable[[int, int], None],
    working: Callable[[], None],
    limit: Limit | None,
) -> str:
    """`rankup.pull.pull` from the gateway at `server`; raises what that raises, after two tries a request.

    Where an older version of the model lies beside `folder`, what did not change is linked from there and the rest
    patched, so that mostly patches are fetched. `progress` is told of bytes that are fetched; `working` is called while
    files are made out of what is here; `limit` is asked with every piece that arrives, and while it is waited for. What
    any of them raises ends the pull, and the next one goes on with what has arrived.
    """
    from rankup.pull import PullProgress, pull
    from rankup.sources import GatewaySource, Patience
    from worker.cache import nearest_version

    def on_progress(at: PullProgress) -> None:
        if at.stage == "downloading":
            progress(at.done_bytes, at.total_bytes)
        else:
            working()

    with GatewaySource(server) as source:
        pulled = pull(
            source,
            model,
            version,
            folder,
            publisher_key=publisher_key,
            bases=nearest_version(folder.parent, model, version, without=folder),
            progress=on_progress,
            patience=Patience(attempts=2),
            limit=limit,
        )
    return pulled.digest
