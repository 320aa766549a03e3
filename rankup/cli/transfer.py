"""A progress bar for downloads, fed by `rankup.pull.PullProgress`."""

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

        def draw(state: PullProgress) -> None:
            progress.update(task, total=state.total_bytes or None, completed=state.done_bytes, description=state.stage)

        yield draw
