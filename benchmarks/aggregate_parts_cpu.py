"""Parts 1 and 4 of benchmarks/aggregate.py: CPU time of the sum, and of the robust rules.

A part is a function (scale, peers, say) -> `Part`. `say` shows progress; `peers` is the Python that has peft, mergekit
and flwr. Whatever cannot run for want of a package is a row that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from aggregate_part import Part, Say, Scale
from aggregate_run import MODELS, MissingError, child

PEFT: Final = "peft"
ARITHMETIC_WAYS: Final = {
    "exact-int16": "exact sum, int16 deltas, weights by tokens",
    "fold-int16": "the same in a fold: with hashes and the bfloat16 export",
    "exact-int8-equal": "exact sum, int8 deltas, equal weights",
    "exact-int8": "exact sum, int8 deltas, weights by tokens",
    "exact-int8-torch": "exact sum, int8 deltas, equal weights, torch's int8 kernel",
    PEFT: "peft: LoraLayer.merge of one adapter after the other, float32",
    "concatenated": "one float32 product of the concatenated factors",
    "dgemm": "bare float64 product of ready operands",
}


def arithmetic(scale: Scale, peers: Path, say: Say) -> Part:
    part = Part(f"{scale.contributions} contributions of rank {scale.rank}: CPU time of the sum")
    for name, passes in scale.arithmetic.items():
        answers, peaks = _arithmetic_runs(part, scale, name, passes, peers, say)
        layers = MODELS[name].layers
        seconds = {way: layers * min(_passes(runs)) for way, runs in answers.items() if runs}
        typical = {way: layers * median(_passes(runs)) for way, runs in answers.items() if runs}
        part.raw[name] = {"cpu_s": seconds, "median_cpu_s": typical, "runs": answers, "passes": passes}
        gflop = 2e-9 * MODELS[name].entries * scale.contributions * scale.rank
        for way, what in ARITHMETIC_WAYS.items():
            label = f"{name}: {what}"
            if way not in seconds:
                part.row(label, remarks="missing: not installed")
                continue
            against = ""
            if PEFT in seconds and way != PEFT:
                against = f"peft takes {seconds[PEFT] / seconds[way]:.1f} ×"
            remarks = [f"{gflop / seconds[way]:.0f} GFLOP/s", *_quality(answers[way][0])]
            part.row(label, cpu_s=seconds[way], peak_bytes=peaks[way], against=against, remarks=", ".join(remarks))
        _arithmetic_goals(part, name, seconds, answers)
    shown = ", ".join(f"{name}: {passes} passes over one layer" for name, passes in scale.arithmetic.items())
    part.notes += [
        "CPU s is the fastest pass over the seven weights of one layer, times the number of layers, of "
        f"{scale.repeat} processes a way ({shown}). All ways take the same random values, one thread, and end with new "
        "float32 masters (the bare product excepted). The peak is that of a process with the data of one layer.",
        "error: |found − true| / |true| of what was added to one k_proj, against the float64 sum of the float32 "
        "factors; the float32 master's own rounding is part of it.",
    ]
    return part


def _arithmetic_runs(
    part: Part, scale: Scale, model: str, passes: int, peers: Path, say: Say
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The answers by way, and the largest peak; the ways take turns."""
    answers: dict[str, list[dict[str, Any]]] = {way: [] for way in ARITHMETIC_WAYS}
    peaks: dict[str, int] = {}
    for number in range(scale.repeat):
        for way in ARITHMETIC_WAYS:
            say(f"{model}: {way}, run {number + 1} of {scale.repeat}")
            arguments = {
                "model": model,
                "way": way,
                "contributions": scale.contributions,
                "rank": scale.rank,
                "passes": passes,
            }
            try:
                if way == PEFT:
                    ran = child("aggregate_peers.py", arguments | {"way": "peft_sequential"}, python=peers)
                else:
                    ran = child("aggregate_arithmetic.py", arguments)
            except MissingError:
                continue
            if way.endswith("-torch") and "int8" not in ran.answer["paths"]:
                part.notes.append(f"{model}: torch's int8 kernel is not exact here, or torch is missing.")
            answers[way].append(ran.answer)
            peaks[way] = max(peaks.get(way, 0), ran.peak_bytes)
            part.versions |= ran.answer["versions"]
    return answers, peaks


def _passes(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [seconds for run in runs for seconds in run["cpu_s"]]


def _quality(answer: Mapping[str, Any]) -> Iterator[str]:
    if "order_free" in answer:
        yield "same bits in any order" if answer["order_free"] else "bits depend on the order"
    if "error" in answer:
        yield f"error {answer['error']:.0e}"
    if "system_share" in answer:
        yield f"{answer['system_share']:.0%} of the time in the operating system: fresh memory for every product"
    if "paths" in answer:
        yield f"kernel {'+'.join(answer['paths'])}, {answer['product_share']:.0%} of the time in its product"


def _arithmetic_goals(
    part: Part, name: str, seconds: Mapping[str, float], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    exact, small, bare, wide = (seconds[way] for way in ("exact-int16", "exact-int8-equal", "dgemm", "concatenated"))
    if PEFT in seconds:
        peft = seconds[PEFT]
        part.goal(
            f"{name}: int16 deltas at least 8 × less CPU than peft's sequential merge",
            f"{peft / exact:.1f} ×",
            met=peft >= 8 * exact,
            why=f"the bare float64 product alone is only {peft / bare:.1f} × below peft with this processor and these "
            f"shapes; the rest of the exact sum adds {exact / bare - 1:.0%} to it",
        )
        share = answers["exact-int8-equal"][0]["product_share"]
        part.goal(
            f"{name}: int8 deltas at least 18 × less CPU than peft's sequential merge",
            f"{peft / small:.1f} × in float32; {peft / seconds['exact-int8-torch']:.1f} × with torch's int8 kernel",
            met=peft >= 18 * small,
            why=f"{share:.0%} of the time is the float32 product itself, so with a sum that cost nothing else it would "
            f"be {peft / small / share:.1f} ×",
        )
    part.goal(
        f"{name}: int16 deltas at most 2.5 × the concatenated float32 product",
        f"{exact / wide:.2f} ×",
        met=exact <= 2.5 * wide,
        why=f"the float64 product alone takes {bare / wide:.2f} ×",
    )
    part.goal(
        f"{name}: at least 70 % of the bare float64 product",
        f"{bare / exact:.0%}",
        met=bare >= 0.7 * exact,
        why="conversion of the mantissas, rounding and the addition to the master take the rest",
    )


# -- robust rules ------------------------------------------------------------------------------------------------------


def krum(scale: Scale, peers: Path, say: Say) -> Part:
    name, count = scale.krum, scale.contributions
    model = MODELS[name]
    part = Part(f"Multi-Krum on {count} contributions of rank {scale.rank} at {name}'s shapes")
    edges = model.layers * sum(sum(shape) for shape in model.linear.values())
    operations, low_rank = 2 * count**2 * model.entries, edges * (count * scale.rank) ** 2
    say("Gram matrix and multi-Krum")
    arguments = {"model": name, "contributions": count, "rank": scale.rank, "passes": 3}
    runs = [child("aggregate_krum.py", arguments) for _ in range(scale.repeat)]
    gram_s = model.layers * min(second for ran in runs for second in ran.answer["gram_s"])
    ours = gram_s + min(ran.answer["rule_s"] for ran in runs)
    part.versions |= runs[0].answer["versions"]
    part.raw |= {"gram_s": gram_s, "cpu_s": ours, "runs": [ran.answer for ran in runs]}
    part.row(
        "Gram matrix from the factors, and multi-Krum",
        cpu_s=ours,
        peak_bytes=max(ran.peak_bytes for ran in runs),
        remarks=f"one layer measured, times {model.layers}; within {runs[0].answer['off']:.0e} of the dense one",
    )
    flower = {
        "flower_pairwise": ("Flower: flwr.server … aggregate_krum, dense arrays", scale.flower_contributions),
        "flower_product": ("Flower: flwr.serverapp … select_multikrum, dense arrays", count),
    }
    for way, (what, measured) in flower.items():
        say(what)
        asked = {"way": way, "model": name, "contributions": measured}
        try:
            peers_ran = [child("aggregate_peers.py", asked, python=peers) for _ in range(scale.repeat)]
        except MissingError as exc:
            part.row(what, remarks=f"missing: {exc} is not installed")
            continue
        best = min(peers_ran, key=lambda ran: float(ran.answer["cpu_s"])).answer
        part.versions |= best["versions"]
        pairs, share = (count / measured) ** 2, model.entries / best["entries"]
        seconds = best["cpu_s"] * pairs * share
        part.raw[way] = {"cpu_s": seconds, "measured": best}
        part.row(
            what,
            cpu_s=seconds,
            against=f"{seconds / ours:.0f} × the time of the first row",
            remarks=f"extrapolated from {best['cpu_s']:.2f} s for {measured} contributions and "
            f"{best['entries'] / 1e6:.1f} M of {model.entries / 1e6:.0f} M entries: × {pairs:.0f} for the pairs, "
            f"× {share:.0f} for the entries",
        )
        reason = ""
        if way == "flower_product":
            reason = (
                "it takes all distances from one float32 matrix product, which runs at the processor's full rate; that "
                f"product has only {operations / low_rank:.0f} × the operations of the Gram matrix from factors"
            )
        part.goal(
            f"at least 300 × less CPU than {what.split(' … ')[1].split(',')[0]} of Flower",
            f"{seconds / ours:.0f} ×",
            met=seconds >= 300 * ours,
            why=reason,
        )
    part.notes.append(
        f"{count} dense float32 contributions at these shapes are {4e-9 * count * model.entries:.0f} GB, their int16 "
        f"factors {2e-9 * count * scale.rank * edges:.1f} GB. Forming the dense arrays is not counted."
    )
    return part
