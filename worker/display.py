"""What a volunteer sees: a live view in a terminal, plain lines elsewhere, or one JSON object per event.

What always holds: every display is a function of events only, nothing here decides anything; a JSON line is
`{"event": "<name in kebab case>", ...fields}`, its names are part of the command line's interface; errors are shown
with their remedy.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rankup.protocol import NoWorkCode
from worker.events import (
    Abandoned,
    Answering,
    Claimed,
    Downloading,
    Dropped,
    Enrolled,
    Kept,
    NoWork,
    PageOpened,
    Paused,
    Problem,
    Resumed,
    Retrying,
    Starting,
    Step,
    Submitted,
    Uploading,
    Verdict,
    Waiting,
    WorkerEvent,
    shards_in_words,
)

_DOWNLOADED: Mapping[str, str] = {"base": "the base version", "teacher": "the teacher"}
Report = Callable[[WorkerEvent], None]
_QUIET_S = 2.0
_NO_WORK: Mapping[NoWorkCode | None, str] = {
    None: "no open round",
    "no_round": "no open round",
    "all_handed_out": "every shard is being trained",
    "paused": "the organiser has paused the round",
    "too_little_memory": "the open rounds need more memory than is free here",
    "too_little_time": "no lease fits into the time that your hours leave",
    "other_models": "no open round trains a model that you asked for (--model)",
    "not_listed": "the open rounds are for volunteers that the organiser chose",
    "waiting": "the organiser has not approved this machine yet",
    "busy": "two leases are under way already",
}
"""Where the server gives a code without words."""


@contextmanager
def open_display(*, as_json: bool = False, console: Console | None = None) -> Iterator[Report]:
    """The display that fits: JSON when asked, a live view in a terminal, plain lines where output goes elsewhere."""
    console = console or Console()
    if as_json:
        yield lambda event: write_json(event, sys.stdout)
    elif console.is_terminal:
        with LiveDisplay(console) as display:
            yield display
    else:
        yield PlainDisplay(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


# -- words -------------------------------------------------------------------------------------------------------------


def event_fields(event: WorkerEvent) -> dict[str, Any]:
    """The event as the JSON object of `--json`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(event).__name__).lower()
    if isinstance(event, Problem):
        return {"event": name, "code": event.error.code, "cause": event.error.cause, "remedy": event.error.remedy}
    return {"event": name, **dataclasses.asdict(event)}


def write_json(event: WorkerEvent, stream: IO[str]) -> None:
    """One line, flushed, so that a reader at the other end of a pipe sees it at once."""
    stream.write(json.dumps(event_fields(event), ensure_ascii=False) + "\n")
    stream.flush()


def describe(event: WorkerEvent) -> str:
    """The event in plain words, one line."""
    match event:
        case Enrolled():
            wait = "; the organiser has to approve this machine before it gets work" if event.waiting else ""
            return f"{'Joined' if event.new else 'Back at'} {event.server} as {event.name} ({event.worker_id}){wait}"
        case PageOpened():
            return f"What it does is shown at {event.address} (`rankup worker page --open`)"
        case Claimed():
            return (
                f"Got {shards_in_words(event.shard, event.shards)} of round {event.round_id}: {event.steps} steps on "
                f"{event.model} version {event.base_version}"
            )
        case NoWork():
            reason = event.reason.rstrip(".") or _NO_WORK[event.why]
            return f"No work now: {reason}; asking again in {event.retry_after_s:.0f} s"
        case Downloading():
            name = _DOWNLOADED.get(event.what, "the examples")
            return f"Downloading {name}: {_amount(event.done)} of {_amount(event.total)}"
        case Starting():
            return "Loading the model"
        case Answering():
            return f"The teacher answers {event.done} of {event.total} prompts"
        case Step():
            return f"Step {event.step} of {event.steps}: loss {event.loss:.3f}, {event.tokens_per_s:.0f} tokens/s"
        case Paused():
            return f"Paused: {event.reason}"
        case Resumed():
            return "Going on"
        case Retrying():
            return (
                f"The trainer failed, starting it again at step {event.step} with {event.micro_batch} examples at a "
                f"time: {event.reason}"
            )
        case Kept():
            return (
                f"Kept step {event.step} of {event.steps}: the next start goes on from there, if the lease is still "
                "valid then"
            )
        case Uploading():
            return f"Uploading the delta: {_amount(event.done)} of {_amount(event.total)}"
        case Submitted():
            return f"Handed in {event.contribution[:12]}: {event.tokens} tokens; the verdict follows"
        case Verdict():
            return "Accepted" if event.accepted else f"Rejected: {event.reason or event.lease_id}"
        case Dropped():
            return f"A finished delta is of no use any more: {event.reason}"
        case Abandoned():
            return f"Lease ended without a delta{' and given back' if event.returned else ''}: {event.reason}"
        case Waiting():
            return f"Waiting for the server: {event.reason}; next try in {event.next_try_s:.0f} s"
        case Problem():
            return f"Problem: {event.error.cause}\n  {event.error.remedy}"


def _amount(size_bytes: int) -> str:
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


# -- displays ----------------------------------------------------------------------------------------------------------


class PlainDisplay:
    """One line an event; of steps and transfers only the first, the last and one every `quiet_s` seconds."""

    def __init__(
        self,
        write: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet_s: float = _QUIET_S,
    ) -> None:
        self._write = write
        self._clock = clock
        self._quiet_s = quiet_s
        self._last: dict[type[WorkerEvent], float] = {}
        """When a line of each kind was written, since the last event that has one of its own."""

    def __call__(self, event: WorkerEvent) -> None:
        now = self._clock()
        kind = type(event)
        if isinstance(event, Step | Answering | Downloading | Uploading | Waiting | NoWork):
            # Two kinds may take turns: an upload and the steps of the next lease.
            if kind in self._last and now - self._last[kind] < self._quiet_s and not _is_last(event):
                return
        else:
            self._last.clear()
        self._last[kind] = now
        self._write(describe(event))


def _is_last(event: WorkerEvent) -> bool:
    match event:
        case Step():
            return event.step == event.steps
        case Answering() | Downloading() | Uploading():
            return event.done == event.total
    return False


class LiveDisplay:
    """A few lines that stay in place: what is going on, a bar, loss and speed; what has happened scrolls above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._now = Text("Starting")
        self._bar: tuple[int, int] | None = None
        self._lease = self._beside = ""
        self._numbers = ""
        self._accepted = self._rejected = self._tokens = 0
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def __call__(self, event: WorkerEvent) -> None:
        words = describe(event)
        if isinstance(event, Uploading) and self._lease not in ("", event.lease_id):
            self._beside = words
            return
        self._now = Text(words.partition("\n")[0])
        match event:
            case Step():
                self._bar = (event.step, event.steps)
                self._numbers = f"loss {event.loss:.3f} · {event.tokens_per_s:.0f} tokens/s"
            case Answering() | Downloading() | Uploading():
                self._bar = (event.done, max(1, event.total))
            case Submitted():
                self._beside = ""
                self._tokens += event.tokens
                self._lasting(words, "cyan")
            case Verdict():
                self._accepted += event.accepted
                self._rejected += not event.accepted
                self._lasting(words, "green" if event.accepted else "red")
            case Problem() | Dropped() | Retrying():
                self._lasting(words, "red")
            case Abandoned() | Paused() | Kept():
                self._lasting(words, "yellow")
            case Enrolled() | PageOpened() | Claimed():
                self._lease = event.lease_id if isinstance(event, Claimed) else ""
                self._numbers = ""
                self._lasting(words, "bold")
            case NoWork() | Waiting() | Starting() | Resumed():
                self._bar = None

    def __rich__(self) -> Group:
        row = Table.grid(padding=(0, 2))
        done, total = self._bar or (0, 1)
        row.add_row(ProgressBar(total=total, completed=done, width=32), Text(self._numbers))
        score = (
            f"{self._accepted} accepted · {self._rejected} rejected · {self._tokens} tokens handed in · Ctrl-C stops"
        )
        beside = [Text(f"{self._beside} (of the lease before)", style="cyan")] if self._beside else []
        return Group(self._now, row, *beside, Text(score, style="dim"))

    def _lasting(self, words: str, style: str) -> None:
        self._bar = None
        self._console.print(Text(words, style=style))
