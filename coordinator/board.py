"""What the status page shows, as plain values: pure functions from views to numbers, texts and points of a chart.

What always holds: text that volunteers chose loses invisible and direction-changing characters here and is escaped by
the template; nothing here is HTML. Times are Unix seconds, losses nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankup.membership import TeamRow
from rankup.protocol import ContributorRow, LeaseProgress, LeasesAtWork, RoundState, RoundView, VersionView

CHART_WIDTH, CHART_HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 14, 34
"""Room around the plotted area for labels, in the chart's own units."""
MAX_POINTS = 60
X_LABELS = 6
WORKERS_SHOWN = 8
"""Of those who are training a round."""


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class LossChart:
    """Held-out loss by version: a polyline, its dots and both axes, in a box of CHART_WIDTH x CHART_HEIGHT."""

    line: str
    dots: tuple[Dot, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    summary: str


@dataclass(frozen=True)
class Part:
    """A piece of the progress bar; `start` and `width` in percent."""

    name: str
    count: int
    start: float
    width: float


@dataclass(frozen=True)
class WorkRow:
    """A lease under way."""

    name: str
    shards: str
    done: float
    """Percent."""
    steps: str
    loss: str
    left: str
    """How long it will take, in words."""


@dataclass(frozen=True)
class RoundBoard:
    view: RoundView
    state: str
    """Pill of the page: `open`, `paused`, `published`, ..."""
    parts: tuple[Part, ...]
    place: str
    when: str
    """Since when, or until when, in words."""
    opened: str
    work: tuple[WorkRow, ...] = ()
    more_work: int = 0
    """Leases under way that are not listed."""


@dataclass(frozen=True)
class ModelBoard:
    name: str
    latest: VersionView | None
    published: str
    change: float | None
    """Loss of the newest measured version minus that of the oldest one shown."""
    first: int | None
    """The oldest version shown that has a loss."""
    chart: LossChart | None


def loss_chart(versions: Sequence[VersionView]) -> LossChart | None:
    """The chart of up to MAX_POINTS newest versions that have a loss; None for fewer than two."""
    measured = sorted(((v.version, v.heldout_loss) for v in versions if v.heldout_loss is not None), key=lambda p: p[0])
    measured = measured[-MAX_POINTS:]
    if len(measured) < 2:
        return None
    first, last = measured[0][0], measured[-1][0]
    low, high = min(loss for _, loss in measured), max(loss for _, loss in measured)
    margin = max((high - low) * 0.12, abs(high) * 1e-3, 1e-6)
    low, high = low - margin, high + margin

    def x_of(version: int) -> float:
        return round(LEFT + (CHART_WIDTH - LEFT - RIGHT) * (version - first) / (last - first), 1)

    def y_of(loss: float) -> float:
        return round(TOP + (CHART_HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low), 1)

    dots = tuple(Dot(x_of(version), y_of(loss), f"version {version}: {loss:.4f}") for version, loss in measured)
    digits = 2 if high - low >= 0.05 else 4
    rows = tuple(Tick(y_of(loss), f"{loss:.{digits}f}") for loss in (low + (high - low) * k / 4 for k in range(5)))
    every = max(1, -(-(last - first) // X_LABELS))
    columns = tuple(Tick(x_of(version), str(version)) for version in range(first, last + 1, every))
    return LossChart(
        line=" ".join(f"{dot.x},{dot.y}" for dot in dots),
        dots=dots,
        rows=rows,
        columns=columns,
        summary=f"Held-out loss by version, from {measured[0][1]:.4f} to {measured[-1][1]:.4f}",
    )


def model_board(name: str, versions: Sequence[VersionView], now: float) -> ModelBoard:
    """A model by its versions, newest first."""
    latest = versions[0] if versions else None
    measured = [(v.version, v.heldout_loss) for v in versions if v.heldout_loss is not None]
    return ModelBoard(
        name=name,
        latest=latest,
        published=ago(now - latest.created_at) if latest is not None else "",
        change=measured[0][1] - measured[-1][1] if len(measured) > 1 else None,
        first=measured[-1][0] if measured else None,
        chart=loss_chart(versions),
    )


def round_board(view: RoundView, now: float, work: LeasesAtWork | None = None) -> RoundBoard:
    """A round with its shards as pieces of a bar, most finished first, and those who are training it."""
    parts, start = [], 0.0
    for name, count in view.whereabouts().items():
        width = 100 * count / view.shards
        parts.append(Part(name, count, round(start, 3), round(width, 3)))
        start += width
    opened = ago(now - view.opened_at)
    if view.state is RoundState.OPEN and view.paused:
        when = f"opened {opened}; while it is paused, no shards are handed out and the deadline waits"
    elif view.state is RoundState.OPEN:
        left = view.deadline_at - now
        when = f"closes in {span(left)} at the latest" if left > 0 else "deadline reached"
    else:
        when = f"opened {opened}"
    listed = work.leases[:WORKERS_SHOWN] if work is not None and not view.state.ended else ()
    return RoundBoard(
        view=view,
        state="paused" if view.paused and not view.state.ended else view.state.value,
        parts=tuple(parts),
        place=f"{view.index + 1} of {view.repeat}" if view.repeat > 1 else "",
        when=when,
        opened=opened,
        work=tuple(work_row(lease, work.at) for lease in listed) if work is not None else (),
        more_work=max(0, work.total - len(listed)) if work is not None and listed else 0,
    )


def work_row(lease: LeaseProgress, now: float) -> WorkRow:
    """A lease under way, in words and per cent."""
    last = lease.shard + lease.shards - 1
    return WorkRow(
        name=shown(lease.name),
        shards=str(lease.shard) if lease.shards == 1 else f"{lease.shard}–{last}",
        done=round(100 * min(1.0, lease.step / max(1, lease.steps)), 1),
        steps=f"{lease.step}/{lease.steps}",
        loss="–" if lease.loss is None else f"{lease.loss:.3f}",
        left="–" if lease.done_at is None else brief_span(lease.done_at - now),
    )


def contributor(row: ContributorRow) -> tuple[str, str, str, str, str, int, int]:
    """Name, team, id, credit, tokens in escrow, accepted, rejected, as shown."""
    team = shown(row.team) if row.team else ""
    return shown(row.name), team, row.worker_id, short(row.credit), short(row.escrow), row.accepted, row.rejected


def team(row: TeamRow) -> tuple[str, int, str]:
    """Name, members, credit as shown."""
    return shown(row.team), row.members, short(row.credit)


def shown(text: str) -> str:
    """Text by a stranger without characters that are invisible or turn the direction of what follows."""
    clean = "".join(char for char in text if char.isprintable()).strip()
    return clean or "(no name)"


def short(number: float) -> str:
    """1234567 -> `1.2 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def span(seconds: float) -> str:
    """A length of time in its largest whole unit."""
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a minute"


def brief_span(seconds: float) -> str:
    """A length of time for a narrow column."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "< 1 min"


def ago(seconds: float) -> str:
    return f"{span(seconds)} ago" if seconds >= 60 else "just now"
