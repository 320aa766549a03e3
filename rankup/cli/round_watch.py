"""`rankup round watch`: a round as it goes on, and the rounds of its campaign after it, until the last one has ended.

What always holds: what is shown is a function of what the server said (`Seen`); ages and times left go by the server's
clock; text by strangers loses invisible characters; a server that is away for a while ends nothing. Nothing here
changes anything on the server.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rankup.cli.http import call
from rankup.errors import NotFoundError, RetryableError
from rankup.protocol import LeasesAtWork, RoundState, RoundView, VersionView

BAR_CELLS: Final = 48
ROWS_SHOWN: Final = 20
VERSIONS_SHOWN: Final = 6
NEXT_ROUND_S: Final = 60.0
"""How long the next round of a campaign is waited for: the keeper opens it within seconds."""
_STYLES: Final = {"accepted": "green", "submitted": "cyan", "training": "yellow", "free": "bright_black"}
_STATE_STYLES: Final = {RoundState.PUBLISHED: "green", RoundState.REJECTED: "red", RoundState.CANCELLED: "red"}


@dataclass(frozen=True)
class Seen:
    """What the server said last. `away` says why it says nothing now."""

    view: RoundView
    work: LeasesAtWork
    history: tuple[VersionView, ...] = ()
    """Versions of the model, oldest first."""
    away: str = ""

    def changed(self, before: Seen | None) -> bool:
        """Whether anything but the clock differs."""
        if before is None or (self.view, self.history, self.away) != (before.view, before.history, before.away):
            return True
        return self.work.leases != before.work.leases


# -- from the server ---------------------------------------------------------------------------------------------------


def newest_round(url: str) -> RoundView:
    """The newest round that has not ended, else the newest one. Raises NotFoundError."""
    views = _rounds(url)
    if not views:
        raise NotFoundError("there is no round yet", remedy="Create one: rankup round create --help")
    return next((view for view in views if not view.state.ended), views[0])


def watch(
    url: str,
    round_id: str,
    *,
    every_s: float,
    follow: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Seen]:
    """What is seen of the round every `every_s` seconds, and with `follow` of those after it in its campaign.

    Raises:
        NotFoundError: there is no such round.
        UnreachableError: the server does not answer the first call; later ones are repeated.
    """
    seen = _look(url, round_id, None)
    waited_s = 0.0
    while True:
        yield seen
        if seen.view.state.ended and not seen.away:
            if not follow or not _goes_on(seen.view) or waited_s > NEXT_ROUND_S:
                return
            waited_s += every_s
        sleep(every_s)
        try:
            following = _next_round(url, seen.view) if seen.view.state.ended else None
            if following is not None:
                waited_s = 0.0
            seen = _look(url, following or seen.view.round_id, seen)
        except RetryableError as exc:
            seen = replace(seen, away=exc.cause)


def _goes_on(view: RoundView) -> bool:
    """Whether the campaign has a round after this one."""
    return view.state is not RoundState.CANCELLED and view.index + 1 < view.repeat


def _next_round(url: str, view: RoundView) -> str | None:
    """The round after `view` in its campaign: rounds of one share the end of their names."""
    if not _goes_on(view):
        return None
    mark = view.round_id.rpartition("-")[2]
    for other in _rounds(url):
        if (other.model, other.index) == (view.model, view.index + 1) and other.round_id.rpartition("-")[2] == mark:
            return other.round_id
    return None


def _rounds(url: str) -> list[RoundView]:
    return [RoundView.model_validate(row) for row in call("GET", url, "/v1/rounds")["rounds"]]


def _look(url: str, round_id: str, before: Seen | None) -> Seen:
    view = RoundView.model_validate(call("GET", url, f"/v1/rounds/{round_id}"))
    work = LeasesAtWork.model_validate(call("GET", url, f"/v1/rounds/{round_id}/leases"))
    history = before.history if before is not None else ()
    if before is None or view.published_version != before.view.published_version or view.model != before.view.model:
        path = f"/v1/models/{view.model}/versions?limit={VERSIONS_SHOWN}"
        history = tuple(VersionView.model_validate(row) for row in reversed(call("GET", url, path)["versions"]))
    return Seen(view, work, history)


# -- words -------------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Text by a stranger without characters that are invisible or turn the direction of what follows."""
    return "".join(char for char in text if char.isprintable()).strip() or "(no name)"


def span(seconds: float) -> str:
    """A length of time in two units: `3 h 20 min`, `45 s`."""
    whole = max(0, int(seconds))
    for unit, size, lesser, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {lesser}" if rest else "")
    return f"{whole} s"


def time_words(view: RoundView, now: float) -> str:
    """Until when, or since when."""
    if view.state.ended:
        return f"closed after {span(view.closed_at - view.opened_at)}" if view.closed_at else "ended"
    if view.paused and view.state is RoundState.OPEN:
        return "paused: the deadline waits"
    if view.state is RoundState.OPEN:
        left = view.deadline_at - now
        return f"closes in {span(left)} at the latest" if left > 0 else "deadline reached"
    return f"closed {span(now - view.closed_at)} ago" if view.closed_at else ""


def state_words(view: RoundView) -> str:
    return f"{view.state.value}, paused" if view.paused and not view.state.ended else view.state.value


def history_words(history: Sequence[VersionView]) -> str:
    """`0: 3.4600 → 1: 3.1200 → 2: 2.9000`."""
    return " → ".join(
        f"{v.version}: {'-' if v.heldout_loss is None else format(v.heldout_loss, '.4f')}" for v in history
    )


def line_of(seen: Seen) -> str:
    """Everything that matters in one line, for output that is not a terminal."""
    view = seen.view
    words = [
        f"{view.round_id}: {state_words(view)}",
        f"{view.accepted} of {view.shards} shards accepted, closes with {view.quorum}",
        f"{view.submitted} awaiting a verdict",
        f"{view.leased} training",
        f"{view.free} free",
    ]
    if view.rejected:
        words.append(f"{view.rejected} rejected")
    if view.published_version is not None:
        words.append(f"version {view.published_version}")
        words.append(f"held-out loss {_loss(view.parent_heldout_loss)} → {_loss(view.heldout_loss)}")
    if view.reason:
        words.append(shown(view.reason))
    if seen.away:
        words.append(f"no answer at the moment: {seen.away}")
    return ", ".join(words)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


# -- displays ----------------------------------------------------------------------------------------------------------


class Display(Protocol):
    """Shows what was seen; called once for every look."""

    def __call__(self, seen: Seen) -> None: ...


class JsonDisplay:
    """One JSON object a line and a change: `round`, `leases` as the API has them, `away` while the server is."""

    def __init__(self) -> None:
        self._last: Seen | None = None

    def __call__(self, seen: Seen) -> None:
        if seen.changed(self._last):
            told = {
                "round": seen.view.model_dump(mode="json", exclude={"recipe"}),
                "leases": seen.work.model_dump(mode="json"),
                "versions": [v.model_dump(mode="json", include={"version", "heldout_loss"}) for v in seen.history],
                "away": seen.away,
            }
            sys.stdout.write(json.dumps(told, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        self._last = seen


class LineDisplay:
    """One line of text a change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __call__(self, seen: Seen) -> None:
        line = line_of(seen)
        if line != self._last:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last = line


class LiveDisplay:
    """The round in place; what has ended scrolls above it."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console = console
        self._live = live
        self._ended: set[str] = set()

    def __call__(self, seen: Seen) -> None:
        view = seen.view
        if view.state.ended and view.round_id not in self._ended:
            self._ended.add(view.round_id)
            self._console.print(Text(line_of(seen), style=_STATE_STYLES.get(view.state, "")))
        self._live.update(picture(seen), refresh=True)


def picture(seen: Seen) -> Group:
    """The round as a terminal shows it."""
    view, now = seen.view, seen.work.at
    title = Text.assemble(
        (view.round_id, "bold"),
        "  ",
        (state_words(view), "yellow" if view.paused else _STATE_STYLES.get(view.state, "cyan")),
        f"  round {view.index + 1} of {view.repeat}" if view.repeat > 1 else "",
    )
    about = f"{view.model} from version {view.base_version}, on {view.dataset}; {time_words(view, now)}"
    rows: list[Text | Table] = [title, Text(about, style="dim"), _bar(view), _legend(view), _counts(view)]
    if view.reason:
        rows.append(Text(shown(view.reason), style="yellow"))
    if seen.away:
        rows.append(Text(f"No answer at the moment: {seen.away}", style="red"))
    if seen.history:
        rows.append(Text.assemble(("held-out loss by version  ", "dim"), history_words(seen.history)))
    if seen.work.leases and not view.state.ended:
        rows.append(leases_table(seen.work))
    return Group(*rows)


def _bar(view: RoundView) -> Text:
    bar, filled, so_far = Text(), 0, 0
    for name, shards in view.whereabouts().items():
        so_far += shards
        end = round(BAR_CELLS * so_far / max(1, view.shards))
        bar.append("█" * (end - filled), _STYLES[name])
        filled = end
    return bar


def _legend(view: RoundView) -> Text:
    words = Text()
    for name, shards in view.whereabouts().items():
        words.append("■ ", _STYLES[name]).append(f"{name} {shards}  ")
    return words


def _counts(view: RoundView) -> Text:
    words = Text(f"closes with {view.quorum} of {view.shards} shards; contributions: {view.contributions}", "dim")
    if view.rejected:
        words.append(f", {view.rejected} rejected", "red")
    return words


def leases_table(work: LeasesAtWork) -> Table:
    """Who is training, those that were heard of last first."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for name in ("volunteer", "shards"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=28)
    for name in ("step", "loss", "gradient", "tokens/s", "energy", "done in", "heard of"):
        table.add_column(name, justify="right", no_wrap=True)
    for lease in work.leases[:ROWS_SHOWN]:
        last = lease.shard + lease.shards - 1
        table.add_row(
            Text(shown(lease.name)),
            str(lease.shard) if lease.shards == 1 else f"{lease.shard}-{last}",
            f"{lease.step}/{lease.steps}",
            "-" if lease.loss is None else f"{lease.loss:.3f}",
            "-" if lease.grad_norm is None else f"{lease.grad_norm:.2f}",
            "-" if lease.tokens_per_s is None else f"{lease.tokens_per_s:.0f}",
            "-" if lease.energy_j is None else f"{lease.energy_j / 3600:.1f} Wh",
            "-" if lease.done_at is None else span(lease.done_at - work.at),
            f"{span(work.at - lease.seen_at)} ago",
        )
    if work.total > ROWS_SHOWN:
        table.add_row(Text(f"and {work.total - ROWS_SHOWN} more", style="dim"), *[""] * 8)
    return table


def show(url: str, round_id: str, *, every_s: float, follow: bool, as_json: bool) -> None:
    """Watch in the way that fits where the output goes; Ctrl-C ends it."""
    console = Console()
    try:
        if as_json or not console.is_terminal:
            display: Display = JsonDisplay() if as_json else LineDisplay(console)
            for seen in watch(url, round_id, every_s=every_s, follow=follow):
                display(seen)
            return
        with Live(console=console, auto_refresh=False) as live:
            display = LiveDisplay(console, live)
            for seen in watch(url, round_id, every_s=every_s, follow=follow):
                display(seen)
    except KeyboardInterrupt:
        return
