"""What `rankup demo` measured and how it is shown. Every number comes from the run."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rankup.cli.output import human_bytes, human_loss, print_table
from worker.events import shards_in_words

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from rankup.checkfiles import Report
    from rankup.protocol import RoundView, VersionView
    from rankup.records import Manifest
    from rankup.store import Store


@dataclass
class VolunteerStats:
    """One volunteer, as told by the event lines of its process."""

    name: str
    doing: str = "starting"
    step: int = 0
    steps: int = 0
    """Of the present lease."""
    tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    downloaded_bytes: int = 0
    uploaded_bytes: int = 0
    tokens_per_s: float = 0.0
    error: str = ""

    def see(self, event: dict[str, Any]) -> None:
        """Take in one line of `rankup worker join --json`."""
        match event.get("event"):
            case "claimed":
                shards = shards_in_words(event["shard"], event["shards"])
                self.step, self.steps, self.doing = 0, event["steps"], f"{shards} of {event['round_id']}"
            case "downloading":
                self.doing = f"downloading {event['what']} {human_bytes(event['done'])}"
                if event["done"] == event["total"]:
                    self.downloaded_bytes += event["total"]
            case "starting":
                self.doing = "loading the model"
            case "step":
                self.step, self.tokens_per_s = event["step"], event["tokens_per_s"]
                self.doing = f"loss {event['loss']:.3f}, {event['tokens_per_s']:.0f} tokens/s"
            case "uploading":
                self.doing = f"uploading {human_bytes(event['done'])}"
                if event["done"] == event["total"]:
                    self.uploaded_bytes += event["total"]
            case "submitted":
                self.tokens, self.doing = self.tokens + event["tokens"], "handed in"
            case "verdict":
                if event["accepted"]:
                    self.accepted += 1
                else:
                    self.rejected += 1
                self.doing = "accepted" if event["accepted"] else f"rejected: {event['reason']}"
            case "no-work":
                self.doing = event["reason"]
            case "problem":
                self.error = str(event.get("cause") or event.get("error"))


@dataclass(frozen=True)
class RankOfUpdate:
    """Rank of what the versions changed in one layer, against the rank of one delta."""

    tensor: str
    shape: tuple[int, ...]
    delta_rank: int
    accumulated_rank: int
    """Singular values of master(latest) - master(0) above what float32 rounding of the masters can make."""
    deltas: int


@dataclass(frozen=True)
class Update:
    """What the latest version cost somebody who had version 0."""

    fetched_bytes: int
    full_bytes: int
    """What the whole files would have cost."""


@dataclass(frozen=True)
class Undone:
    """A contribution that was taken back: whose, from the round of which version, in which version, what is left."""

    name: str
    of_version: int
    version: int
    contributions: int


@dataclass
class DemoResult:
    """Everything that the demo shows."""

    versions: list[VersionView]
    verify: Report
    rank: RankOfUpdate
    update: Update
    undone: Undone
    question: str
    answers: dict[int, str]
    rounds: list[RoundView] = field(default_factory=list)
    volunteers: list[VolunteerStats] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def losses(self) -> list[float | None]:
        """Held-out loss by version, from 0 on."""
        return [view.heldout_loss for view in self.versions]

    @property
    def falling(self) -> bool:
        """Whether held-out loss falls from every version to the next."""
        known = [loss for loss in self.losses if loss is not None]
        return len(known) == len(self.losses) and all(a > b for a, b in itertools.pairwise(known))

    @property
    def good(self) -> bool:
        return self.verify.ok and self.falling and self.rank.accumulated_rank > self.rank.delta_rank


def rank_of_update(store: Store, oldest: Manifest, latest: Manifest) -> RankOfUpdate:
    """Numerical rank of the accumulated update of the middle trained layer, from the published masters alone."""
    import numpy as np

    names = [name for name, target in latest.targets().items() if target.role == "linear"]
    name = names[len(names) // 2]
    newest = _master(store, latest, name)
    update = newest.astype(np.float64) - _master(store, oldest, name).astype(np.float64)
    rounds = latest.version - oldest.version
    return RankOfUpdate(
        tensor=name,
        shape=update.shape,
        delta_rank=latest.recipe.rank if latest.recipe else 0,
        accumulated_rank=numerical_rank(update, noise_per_entry=rounds * 2.0**-24 * float(np.abs(newest).max())),
        deltas=rounds * len(latest.terms),
    )


def numerical_rank(update: npt.NDArray[np.float64], *, noise_per_entry: float) -> int:
    """Singular values of `update` (m, n) above the largest that independent noise of `noise_per_entry` makes.

    A random m x n matrix with entries of size s has a largest singular value near s * (sqrt(m) + sqrt(n))
    (Davidson and Szarek 2001); twice that is the threshold.
    """
    import numpy as np

    rows, columns = update.shape
    threshold = 2.0 * noise_per_entry * (np.sqrt(rows) + np.sqrt(columns))
    return int((np.linalg.svd(update, compute_uv=False) > threshold).sum())


def _master(store: Store, manifest: Manifest, name: str) -> npt.NDArray[np.float32]:
    from aggregator.groups import read_tensor

    group = next(group for group in manifest.groups if name in group.tensors)
    return read_tensor(store, group.master, name)


def report_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "good": result.good,
        "versions": result.versions,
        "verify": {"ok": result.verify.ok} | asdict(result.verify),
        "rank": asdict(result.rank),
        "update": asdict(result.update),
        "undone": asdict(result.undone),
        "answers": [{"version": v, "question": result.question, "answer": a} for v, a in result.answers.items()],
        "rounds": result.rounds,
        "volunteers": [asdict(stats) for stats in result.volunteers],
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
    }


def print_report(result: DemoResult) -> None:
    """Tables and words for the terminal."""
    from rich.console import Console

    console = Console()
    console.print()
    print_table(
        "Held-out loss (nats per token)",
        ("#version", "#held-out loss", "#contributions", "#size", "manifest"),
        [
            (v.version, human_loss(v.heldout_loss), v.contributions, human_bytes(v.size_bytes), v.manifest[:16])
            for v in result.versions
        ],
    )
    print_table(
        "Volunteers",
        ("name", "#accepted", "#rejected", "#tokens", "#tokens/s", "#downloaded", "#uploaded"),
        [
            (
                s.name,
                s.accepted,
                s.rejected,
                s.tokens,
                f"{s.tokens_per_s:.0f}",
                human_bytes(s.downloaded_bytes),
                human_bytes(s.uploaded_bytes),
            )
            for s in result.volunteers
        ],
    )
    rank = result.rank
    console.print(
        f"Rank      one delta changes {rank.tensor} {rank.shape} by rank {rank.delta_rank}; "
        f"{rank.deltas} of them together by rank [bold]{rank.accumulated_rank}[/bold]"
    )
    verify = result.verify
    words = "[green]bit-identical[/green]" if verify.ok else f"[red]DIFFERS in {len(verify.mismatches)} tensors[/red]"
    console.print(
        f"Verify    replay of version {verify.version} is {words}: {verify.tensors} tensors compared, "
        f"{verify.changed} changed, {verify.contributions} contributions, {verify.seconds:.1f} s"
    )
    update, undone = result.update, result.undone
    console.print(
        f"Update    from version 0 to {verify.version}: {human_bytes(update.fetched_bytes)} fetched, "
        f"{human_bytes(update.full_bytes)} without patches"
    )
    console.print(
        f"Undo      version {undone.version} is without {undone.name}'s contribution to version {undone.of_version}, "
        f"bit-identical to a replay of the {undone.contributions} others",
        markup=False,
    )
    console.print("Time      " + ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()))
    console.print(f"\n[bold]{result.question}[/bold]", highlight=False)
    for version, answer in result.answers.items():
        console.print(f"[dim]version {version}:[/dim] ", end="")
        console.print(answer.strip() or "(nothing)", markup=False, highlight=False)
    if not result.good:
        console.print("\n[red]The demo did not show what it should: see the table above.[/red]")
