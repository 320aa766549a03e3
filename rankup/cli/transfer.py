"""Progress bars for bytes: downloads, as `rankup.pull` reports them, and what goes into object storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankup.pull import PullProgress


@contextmanager
def transfer_bar(title: str, *, quiet: bool = False) -> Iterator[Callable[[PullProgress], None] | None]:
    """Yields the callback that draws; None when nothing shall be drawn."""
    if quiet:
        yield None
        return
    with _bar(title) as draw:
        yield lambda state: draw(state.stage, state.done_bytes, state.total_bytes)


@contextmanager
def storing_bar(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """The same for bytes on their way into object storage: the callback takes (done, total)."""
    if quiet:
        yield None
        return
    with _bar(title) as draw:
        yield lambda done, total: draw("storing", done, total)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, title=title)

        def draw(stage: str, done_bytes: int, total_bytes: int) -> None:
            progress.update(task, total=total_bytes or None, completed=done_bytes, description=stage)

        yield draw
