"""Real rounds of SmolLM2-135M-Instruct for benchmarks of what is published: patches, pulls, corruption.

    python benchmarks/rounds.py --to .rounds                     # two models and three rounds, about ten minutes
    python benchmarks/rounds.py --to .rounds --only lr2e-4

Each case is a model of its own: version 0 is the base, the next ones are what `worker.trainer` learnt from the
docstrings of the standard library, folded by `aggregator.fold` as a plain sum and published by `aggregator.publish`.
Models share their version 0, blob by blob. `DIR/store` is object storage as a folder, one file an object under its key,
so it is a static web server's root too; `DIR/rounds.json` says what the first round of each case changed,
`DIR/<case>/0`, `DIR/<case>/1` … are the folders of its versions.

What always holds: versions are the bytes that the product writes; a version that is published already is used again; no
goal is looked for here, a case has the learning rate that it says.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from aggregate_run import QUIET, THREADS
from rounds_store import FolderStore

from aggregator.bases import fetch_base
from aggregator.fold import fold_group, next_tensors
from aggregator.genesis import make_version_zero
from aggregator.publish import carried_files, publish_manifest, version_files
from coordinator import pydocs
from rankup.bfloat16 import from_bfloat16
from rankup.errors import NotFoundError
from rankup.lineage import leaves_of, log_of
from rankup.recipe import PLAIN_SUM, Aggregation, Recipe
from rankup.records import BlobRef, ContributionList, Manifest, Term
from rankup.settings import CoordinatorSettings
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex
from rankup.store import blob_key, put_blob_file
from rankup.targets import select_targets
from rankup.tensorfile import TensorFile
from rankup.versions import MAX_ENVELOPE_BYTES, manifest_digest, manifest_key, open_envelope
from worker.job import Finished, Job, StepDone, parse_line

DENOMINATOR_LOG2: Final = 16
KEY_NAME: Final = "publisher.key"


@dataclass(frozen=True)
class Case:
    """A model. Each contribution of its rounds is trained on `rows` docstrings, no two of them the same."""

    name: str
    learning_rate: float
    steps: int
    rounds: int = 1
    contributions: int = 1
    rows: int = 256

    @property
    def model(self) -> str:
        return f"smollm2-{self.name}"

    @property
    def recipe(self) -> Recipe:
        """Rank 8 on all linear layers, batches of 4 x 128 tokens, plain sum."""
        return Recipe(
            learning_rate=self.learning_rate,
            steps=self.steps,
            aggregation=Aggregation(outer=PLAIN_SUM, max_loss_mads=None, min_descent=None),
        )


CASES: Final = (Case("lr2e-4", 2e-4, 25, rounds=2), Case("lr1e-3", 1e-3, 40))


def publisher(folder: Path) -> Ed25519PrivateKey:
    """The key of all models in `folder`; it signs nothing that anybody else reads."""
    path = folder / KEY_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generate_private_key())
    return parse_private_key(path.read_bytes())


def make(case: Case, folder: Path, *, threads: int = 1, say: Any = print) -> list[Manifest]:
    """The case's versions; what lies in `folder` already is not made again."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    store: Any = FolderStore(folder / "store")
    key = publisher(folder)
    chain: list[Manifest] = []
    for version in range(case.rounds + 1):
        manifest = _published(store, key, case.model, version)
        if manifest is None and version == 0:
            base = fetch_base("smollm2", folder / "base")
            group_bytes = CoordinatorSettings().fold_group_bytes
            manifest = make_version_zero(store, key, model=case.model, base=base, group_bytes=group_bytes, now=0.0)
        elif manifest is None:
            terms = _train(case, folder / case.name, store, chain[-1], threads, say)
            manifest = next_version(store, key, chain, terms, case.recipe, round_id=f"{case.name}-{version}")
        chain.append(manifest)
        _write_folder(store, manifest, folder / case.name / str(version))
    return chain


def _published(store: Any, key: Ed25519PrivateKey, model: str, version: int) -> Manifest | None:
    try:
        data = store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)
    except NotFoundError:
        return None
    return open_envelope(data, publisher_key=public_key_hex(key))[0]


def _write_folder(store: FolderStore, manifest: Manifest, to: Path) -> None:
    """The version as `from_pretrained` reads it, linked from the store."""
    to.mkdir(parents=True, exist_ok=True)
    for file in manifest.export_files():
        place = to / file.path
        if not place.exists():
            os.link(store.path(blob_key(file.sha256)), place)


# -- training ----------------------------------------------------------------------------------------------------------


def shards(count: int, rows: int) -> list[str]:
    """`count` shards of JSON lines, disjoint, the same on every run of one Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sorted(pydocs.rows(), key=lambda row: json.dumps(row, sort_keys=True))
    random.Random(0).shuffle(found)
    if count * rows > len(found):
        raise SystemExit(f"{count} shards of {rows} rows are asked for, and there are {len(found)} rows")
    parts = (found[number * rows : (number + 1) * rows] for number in range(count))
    return ["".join(json.dumps(row) + "\n" for row in part) for part in parts]


def _train(case: Case, folder: Path, store: Any, parent: Manifest, threads: int, say: Any) -> tuple[Term, ...]:
    terms = []
    first = parent.version * case.contributions
    for number, text in enumerate(shards(case.contributions * case.rounds, case.rows)):
        if not first <= number < first + case.contributions:
            continue
        shard = folder / f"shard-{number}.jsonl"
        shard.write_text(text)
        job = Job(
            round_id=f"{case.name}-{parent.version + 1}",
            lease_id=f"lease-{number}",
            fence=1,
            model=parent.model,
            base_manifest=manifest_digest(parent),
            base_folder=folder / str(parent.version),
            shard_files=(shard,),
            delta_file=folder / f"contribution-{number}.delta",
            recipe=case.recipe,
            seed=number,
            targets=select_targets(parent.targets(), case.recipe),
            device="cpu",
            threads=threads,
        )
        finished = _run_trainer(job, say)
        ref = put_blob_file(store, job.delta_file)
        terms.append(
            Term(
                contribution=ref.sha256,
                size_bytes=ref.size_bytes,
                worker_id=f"worker-{number}",
                worker_name=f"worker {number}",
                shard=number,
                tokens=finished.tokens,
                coefficient=(1 << DENOMINATOR_LOG2) // case.contributions,
            )
        )
    return tuple(sorted(terms, key=lambda term: term.contribution))


def _run_trainer(job: Job, say: Any) -> Finished:
    """The volunteer's child process, as its agent starts it."""
    job_file = job.delta_file.with_suffix(".json")
    job_file.write_text(job.model_dump_json())
    environment = {**os.environ, **QUIET, **THREADS, "OMP_NUM_THREADS": str(job.threads)}
    with job.delta_file.with_suffix(".log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.trainer", str(job_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        assert child.stdout is not None
        line = None
        for text in child.stdout:
            line = parse_line(text)
            if isinstance(line, StepDone):
                say(f"{job.round_id} {job.lease_id}: step {line.step} of {line.steps}, loss {line.loss:.2f}")
        if child.wait() or not isinstance(line, Finished):
            raise SystemExit(f"the trainer ended with {child.returncode}: {line}; see {log.name}")
    return line


# -- the round's sum ---------------------------------------------------------------------------------------------------


def next_version(
    store: Any,
    key: Ed25519PrivateKey,
    chain: Sequence[Manifest],
    terms: tuple[Term, ...],
    recipe: Recipe,
    *,
    round_id: str,
) -> Manifest:
    """Fold and publish the version after `chain`, which begins with version 0; terms stand sorted."""
    parent, outer = chain[-1], recipe.aggregation.outer
    numbers = range(1, len(parent.groups) + 1)
    folded = [fold_group(store, parent, number, terms, DENOMINATOR_LOG2, outer=outer) for number in numbers]
    groups, tensors = next_tensors(folded)
    draft = Manifest(
        model=parent.model,
        version=parent.version + 1,
        parent=manifest_digest(parent),
        round_id=round_id,
        recipe=recipe,
        denominator_log2=DENOMINATOR_LOG2,
        terms=terms,
        tensors=dict(tensors),
        groups=groups,
        files=carried_files(parent.files),
        base_model=parent.base_model,
        licence=parent.licence,
        datasets=("pydocs",),
        created_at=float(parent.version + 1),
    )
    leaves = leaves_of([*chain, draft], draft.version)
    draft = draft.model_copy(update={"log": log_of(leaves)})
    listed = ContributionList(model=parent.model, leaves=leaves)
    child = draft.model_copy(update={"files": version_files(store, draft, draft.files, contributions=listed)})
    publish_manifest(store, key, child)
    return child


def measure(store: FolderStore, parent: Manifest, child: Manifest) -> dict[str, float]:
    """rms(child - parent) / rms(parent) over the bfloat16 weights of linear layers; the shares of bfloat16 weights that
    changed, in linear layers and in all."""
    moved = size = 0.0
    different = counts = total = 0
    for before, after in zip(parent.groups, child.groups, strict=True):
        with _open(store, before.export) as old, _open(store, after.export) as new:
            for name in before.tensors:
                a, b = (np.frombuffer(file.read(name), np.uint16) for file in (old, new))
                total += a.size
                if parent.tensors[name].role == "linear":
                    counts += a.size
                    different += int(np.count_nonzero(a != b))
                    x, y = from_bfloat16(a).astype(np.float64), from_bfloat16(b).astype(np.float64)
                    moved, size = moved + float(np.square(y - x).sum()), size + float(np.square(x).sum())
    return {
        "relative_change": (moved / size) ** 0.5,
        "changed_linear": different / counts,
        "changed_all": different / total,
        "weights": total,
    }


def _open(store: FolderStore, ref: BlobRef) -> TensorFile:
    return TensorFile.open(store.path(blob_key(ref.sha256)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Real rounds of SmolLM2-135M-Instruct.")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where everything is kept (3 GB)")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one case")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the training")
    options = parser.parse_args()
    notes = options.to / "rounds.json"
    for case in CASES:
        if options.only in (None, case.name):
            started = time.monotonic()
            chain = make(case, options.to, threads=options.threads)
            changed = measure(FolderStore(options.to / "store"), *chain[:2])
            known = json.loads(notes.read_text()) if notes.exists() else {}
            known[case.name] = {"learning_rate": case.learning_rate, "steps": case.steps, **changed}
            notes.write_text(json.dumps(known, indent=1) + "\n")
            print(f"{case.name}: {known[case.name]}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
