"""The report of the robustness benchmark: tables for the terminal, and docs/results/poison.md with its heat map.

What always holds: every number comes from the runs that are handed in, and a run that is missing leaves a gap, not a
guess. It runs nothing.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from poison_picture import picture

Record = dict[str, Any]
Number = float | None

GOALS: Final = {0.3: 0.95, 0.4: 0.85}
"""Share of attackers -> least share of the clean gain."""
HONEST_REJECTS: Final = 0.02
CHAINS: Final = ("chain, loss only", "chain")


# -- numbers -----------------------------------------------------------------------------------------------------------


class Results:
    """The runs, by defence, attack, share and seed."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = [record for record in records if not record["defence"].startswith("outer")]
        self.outer = [record for record in records if record["defence"].startswith("outer")]
        self.clean = {
            record["seed"]: record
            for record in self.records
            if record["attack"] == "none" and record["defence"] == "mean"
        }
        self.defences = list(dict.fromkeys(record["defence"] for record in self.records))
        self.attacks = list(
            dict.fromkeys(r["attack"] for r in self.records if r["attack"] not in ("none", "malformed"))
        )
        self.shares = sorted({record["share"] for record in self.records if record["attack"] != "none"})

    def of(self, defence: str, attack: str, share: float | None = None) -> list[Record]:
        return [
            record
            for record in self.records
            if record["defence"] == defence and record["attack"] == attack and share in (None, record["share"])
        ]

    def fractions(self, records: Iterable[Record]) -> list[float]:
        """Share of the clean gain of the same seed that each run keeps; -inf where the model gives no number."""
        found = []
        for record in records:
            clean = self.clean.get(record["seed"])
            if clean is None:
                continue
            before, after = loss(record, 0), final(record)
            best = final(clean)
            found.append(
                -math.inf if after is None or best is None or before is None else (before - after) / (before - best)
            )
        return found

    def fraction(self, defence: str, attack: str, share: float | None = None) -> Number:
        return mean(self.fractions(self.of(defence, attack, share)))


def loss(record: Record, rounds: int) -> Number:
    value = {int(number): value for number, value in record["losses"].items()}[rounds]
    return None if value is None else float(value)


def final(record: Record) -> Number:
    return loss(record, max(map(int, record["losses"])))


def mean(values: Iterable[Number]) -> Number:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def rate(records: Iterable[Record], part: str, whole: str) -> Number:
    records = list(records)
    total = sum(record[whole] for record in records)
    return sum(record[part] for record in records) / total if total else None


def per_cent(value: Number, digits: int = 0) -> str:
    if value is None:
        return ""
    return "< −100 %" if value < -1 else f"{value * 100:.{digits}f} %".replace("-", "−")


def plain(value: Number, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# -- tables ------------------------------------------------------------------------------------------------------------

Table = tuple[str, list[str], list[list[str]]]
"""Title, headings, rows."""


def goal_rows(results: Results) -> Table:
    rows = []
    for chain in CHAINS:
        if chain not in results.defences:
            continue
        for share, least in GOALS.items():
            short = []
            for attack in results.attacks:
                kept = results.fraction(chain, attack, share)
                if kept is not None and kept < least:
                    runs = results.of(chain, attack, share)
                    weight = mean(record["bad_weight"] for record in runs)
                    short.append(f"{attack} {per_cent(kept, 1)} (attackers have {per_cent(weight)} of the weight)")
            found = [results.fraction(chain, attack, share) for attack in results.attacks]
            worst = min((value for value in found if value is not None), default=None)
            goal = f"at {share * 100:.0f} % attackers, ≥ {least * 100:.0f} % of the clean gain"
            if worst is not None:
                verdict = "met" if not short else "missed: " + "; ".join(short)
                rows.append([chain, goal, per_cent(worst, 1), verdict])
        for goal, runs in (
            ("honest refused without attack ≤ 2 %", results.of(chain, "none")),
            ("honest refused under attack ≤ 2 %", [r for attack in results.attacks for r in results.of(chain, attack)]),
        ):
            refused = rate(runs, "honest_rejected", "honest")
            if refused is not None:
                verdict = "met" if refused <= HONEST_REJECTS else "missed"
                rows.append([chain, goal, per_cent(refused, 1), verdict])
    malformed = [record for record in results.records if record["attack"] == "malformed"]
    accepted, sent = sum(r["bad_accepted"] for r in malformed), sum(r["bad"] for r in malformed)
    if sent:
        rows.append(["format", "NaN accepted: never", f"{accepted} of {sent}", "met" if not accepted else "missed"])
    return "Goals", ["defence", "goal", "measured, worst attack", "verdict"], rows


def worst_rows(results: Results) -> Table:
    rows = []
    for defence in results.defences:
        row = [defence]
        for share in results.shares:
            found = {attack: results.fraction(defence, attack, share) for attack in results.attacks}
            known = {attack: value for attack, value in found.items() if value is not None}
            attack = min(known, key=lambda name: known[name]) if known else ""
            row.append(f"{per_cent(known[attack], 1)} ({attack})" if known else "")
        rows.append(row)
    headings = ["defence", *(f"{share * 100:.0f} % attackers" for share in results.shares)]
    return "The worst attack for each defence: share of the clean gain that is kept", headings, rows


def fraction_rows(results: Results) -> Table:
    rows = [["none", ""] + [cell(results, defence, "none", None) for defence in results.defences]]
    rows += [
        [attack, f"{share * 100:.0f} %"] + [cell(results, defence, attack, share) for defence in results.defences]
        for attack in results.attacks
        for share in results.shares
    ]
    return (
        "Share of the clean gain that is kept (mean over seeds, ± half the range)",
        ["attack", "share", *results.defences],
        rows,
    )


def cell(results: Results, defence: str, attack: str, share: float | None) -> str:
    found = results.fractions(results.of(defence, attack, share))
    if not found:
        return ""
    average = mean(found)
    spread = (max(found) - min(found)) / 2
    if average is None or average < -1 or not math.isfinite(spread):
        return per_cent(average)
    return f"{average * 100:.1f} ±{spread * 100:.1f}".replace("-", "−")


def screening_rows(results: Results) -> Table:
    rows = []
    for chain in (chain for chain in CHAINS if chain in results.defences):
        for attack in ("none", *results.attacks, "malformed"):
            for share in (0.0,) if attack == "none" else results.shares:
                runs = results.of(chain, attack, share)
                if runs:
                    why: dict[str, int] = {}
                    for record in runs:
                        for reason, count in record["refusals"].items():
                            why[reason] = why.get(reason, 0) + count
                    rows.append(
                        [
                            chain,
                            attack,
                            f"{share * 100:.0f} %" if share else "",
                            per_cent(rate(runs, "honest_rejected", "honest"), 1),
                            per_cent(rate(runs, "bad_accepted", "bad")),
                            per_cent(mean(record["bad_weight"] for record in runs)),
                            ", ".join(f"{reason} {count}" for reason, count in sorted(why.items())),
                        ]
                    )
    headings = ["defence", "attack", "share", "honest refused", "bad accepted", "weight of bad", "refusals"]
    return "What the chains refuse", headings, rows


def backdoor_rows(results: Results) -> Table:
    if "backdoor" not in results.attacks:
        return "", [], []
    clean = [mean(r["secret_nats"] for r in results.of(defence, "none")) for defence in results.defences]
    rows = [["none", *(plain(value) for value in clean)]]
    for share in results.shares:
        row = [f"{share * 100:.0f} %"]
        for defence in results.defences:
            runs = results.of(defence, "backdoor", share)
            nats, greedy = mean(r["secret_nats"] for r in runs), mean(r["secret_greedy"] for r in runs)
            row.append("" if nats is None else f"{nats:.2f} (p {math.exp(-nats):.2f}, {per_cent(greedy)})")
        rows.append(row)
    title = (
        "Backdoor: nats per byte of the attackers' text after its trigger (probability per byte, whole text by greedy)"
    )
    return title, ["share", *results.defences], rows


def outer_rows(results: Results) -> Table:
    rows = []
    for label in dict.fromkeys(record["defence"] for record in results.outer):
        runs = [record for record in results.outer if record["defence"] == label]
        row = [label]
        for rounds in sorted(map(int, runs[0]["losses"])):
            found = [value for record in runs if (value := loss(record, rounds)) is not None]
            spread = f" ±{(max(found) - min(found)) / 2:.4f}" if len(found) > 1 else ""
            row.append(f"{mean(found):.4f}{spread}" if found else "")
        rows.append(row)
    headings = (
        ["outer step", *(f"after {n} rounds" for n in sorted(map(int, results.outer[0]["losses"])))] if rows else []
    )
    return "Outer step, no attack: held-out nats per byte", headings, rows


def disguise_note(results: Results) -> str:
    """How far the disguised attack's losses are from those of the same attack in the open."""
    if "disguise" not in results.attacks:
        return ""
    worst = 0.0
    for defence in results.defences:
        for share in results.shares:
            open_ = {r["seed"]: final(r) for r in results.of(defence, "sign_flip", share)}
            for record in results.of(defence, "disguise", share):
                one, other = final(record), open_.get(record["seed"])
                if one is not None and other is not None:
                    worst = max(worst, abs(one - other))
    return f"The disguised sign flip, B R and R^-1 A, ends at most {worst:.4f} nats from the open one of the same seed."


def likeness_note(results: Results) -> str:
    runs = [record for defence in CHAINS for record in results.of(defence, "backdoor")]
    bad = mean(record["likeness"].get("bad") for record in runs)
    honest = mean(record["likeness"].get("honest") for record in runs)
    if bad is None or honest is None:
        return ""
    return (
        f"The colluders are more alike than honest volunteers: median cosine {bad:.3f} against {honest:.3f}.\n"
        "Rules that look for the densest group therefore give them more weight than their number."
        if bad > honest
        else f"The colluders are no more alike than honest volunteers: median cosine {bad:.3f} against {honest:.3f}."
    )


TABLES: Final[tuple[Callable[[Results], Table], ...]] = (
    goal_rows,
    worst_rows,
    fraction_rows,
    screening_rows,
    backdoor_rows,
    outer_rows,
)


def show(records: list[Record], facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if os.isatty(1) else 150)
    if not records:
        console.print("no runs yet")
        return
    results = Results(records)
    for build in TABLES:
        title, headings, rows = build(results)
        if rows:
            table = RichTable(*headings, title=title)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    console.print(f"{len(records)} of {facts['all']} runs", highlight=False)


def markdown(records: list[Record], facts: dict[str, Any]) -> str:
    results = Results(records)
    recipe, seeds = facts["recipe"], len(results.clean)
    clean = [f"{loss(r, 0):.3f} → {final(r):.3f}" for _, r in sorted(results.clean.items())]
    seconds = [record["cpu_s"] for record in records]
    lines = [
        "# What attackers leave of the gain",
        "",
        "    python benchmarks/poison.py --out FOLDER",
        "    python benchmarks/poison.py --out FOLDER --report docs/results",
        "",
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}. {machine()}; Python {platform.python_version()}, torch "
        f"{version('torch')}, numpy {version('numpy')}.",
        f"{len(records)} of {facts['all']} runs, {seeds} seed(s), {sum(seconds) / 3600:.1f} hours of CPU, median "
        f"{statistics.median(seconds):.1f} s a run, one thread each; load {os.getloadavg()[0]:.0f} when this was "
        "written.",
        "",
        "A byte-level transformer of 0.25 M parameters, trained on the code of the standard library without",
        "docstrings, learns docstrings over 8 rounds from 20 volunteers. Each has a fresh shard in every round,",
        f"trains rank-4 LoRA on all linear layers for {recipe['steps']} steps of {recipe['batch']} × 64 bytes (Adam, "
        f"{recipe['learning_rate']:g}),",
        "and hands in int16 factors. Held-out loss without attack, plain mean, one pair a seed:",
        f" {', '.join(clean)} nats per byte. 100 % is that gain, seed by seed; 0 % is the base;",
        "a negative share is a model that became worse than the base.",
        "",
        *(
            [f"{facts['missing']} runs are missing: their rows are means over fewer seeds, or empty.", ""]
            if facts["missing"]
            else []
        ),
        "![Share of the clean gain by attack, share of attackers and defence](poison.svg)",
        "",
    ]
    for build in TABLES:
        title, headings, rows = build(results)
        if not rows:
            continue
        lines += [f"## {title}", "", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
        if build is backdoor_rows:
            lines += [likeness_note(results), ""] if likeness_note(results) else []
        if build is fraction_rows:
            lines += [disguise_note(results), ""] if disguise_note(results) else []
    lines += ["## The defences", ""]
    for label, defence in facts["defences"].items():
        unscreened = ("rule", "clip_norm_ratio", "byzantine_share")
        shown = {name: value for name, value in defence.items() if defence["screened"] or name in unscreened}
        settings = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
        lines.append(f"- **{label}**: {settings}")
    lines += [
        "",
        "The first five have no screening: whatever the product's number format can hold counts. `chain` is the",
        "default of the product: admission's limits of norm and cancellation, near-duplicates by cosine, held-out loss",
        "of base + delta against the cohort's median and MAD, slope of the held-out loss along each delta against the",
        "cohort's median slope, clip, mean. `chain, loss only` is the same without slopes. One backward pass over the",
        "text gives the slopes of the whole cohort, so six times the text costs a fraction of one forward pass for",
        "each contribution.",
        "",
        "## How far to trust it",
        "",
        "- One small model, one pair of texts. A shard here is 1 KiB, far less than a real one: honest deltas are",
        "  noisier, late rounds hardly improve on the base, and both make attackers harder to tell from honest",
        "  volunteers by their loss.",
        "- Attackers know the rule and each other, but not the screening text, drawn anew in every round.",
        "- ± is half the range over the seeds, not a confidence interval.",
        "- The defences are compared on plain sums; the outer step, which is Nesterov by default, is measured apart.",
        "- At x % of attackers only 100 − x % of the data is left, and this loss counts against every defence.",
        "",
    ]
    return "\n".join(lines)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} virtual cores, {memory:.0f} GiB"


def write(records: list[Record], facts: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(records)
    (folder / "poison.md").write_text(markdown(records, facts))
    (folder / "poison.svg").write_text(picture(results.defences, results.attacks, results.shares, results.fraction))
