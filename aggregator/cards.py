"""The cards of a version, for people and for the hub: README.md, the model card, and OPENNESS.md, the openness card.

The model card has YAML front matter, then where the version comes from, how to load it, what was measured, who
contributed and how to check it. Format: https://huggingface.co/docs/hub/model-cards.

What always holds:
- the model card depends on the manifest (but for its list of files) and on the chapters of earlier versions that are
  given, the openness card on its record, and both on nothing else;
- text from outside (names of contributors and datasets, the base model's name, reasons) cannot add markup, links, table
  cells or YAML keys.

What is open is for `aggregator.openness` to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import yaml

from aggregator.openness import DataSource, OpennessRecord
from rankup.records import Manifest, Revocation, Rollback

MAX_CARD_ROWS: Final = 1000
"""Rows of a table in a card; the manifests have all of them."""
_SHORT: Final = 16
_LISTED_REVOKED: Final = 20
HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
"""ORG/NAME, which is safe in YAML as it is."""
_LICENCE_ID: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


@dataclass(frozen=True)
class Contributor:
    """What one volunteer gave to one version."""

    worker_id: str
    name: str
    contributions: int
    tokens: int


@dataclass(frozen=True)
class Chapter:
    """What a card says of an earlier version."""

    version: int
    made_by: str
    """"base", "round", or the kind of the manifest's change."""
    heldout_loss: float | None
    contributors: tuple[Contributor, ...]
    """Those with a part in its round's sum; sorted by worker."""

    @classmethod
    def of(cls, manifest: Manifest) -> Chapter:
        made_by = "round" if manifest.change is None else manifest.change.kind
        found: dict[str, Contributor] = {}
        for term in manifest.terms:
            if term.coefficient:
                there = found.get(term.worker_id) or Contributor(term.worker_id, term.worker_name, 0, 0)
                found[term.worker_id] = Contributor(
                    term.worker_id, term.worker_name, there.contributions + 1, there.tokens + term.tokens
                )
        return cls(
            version=manifest.version,
            made_by="base" if manifest.parent is None else made_by,
            heldout_loss=None if manifest.evaluation is None else manifest.evaluation.heldout_loss,
            contributors=tuple(found[worker] for worker in sorted(found)),
        )


def model_card(manifest: Manifest, history: Sequence[Chapter] = (), *, sees: bool = False) -> str:
    """README.md of a version. `history`: chapters of the versions before it, oldest first; gaps are allowed. `sees`:
    it is a vision-language model."""
    chapters = (*history, Chapter.of(manifest))
    blocks = [
        _front_matter(manifest, sees),
        f"# {manifest.model}, version {manifest.version}",
        _origin(manifest),
        *_so_far(history, chapters),
        _how_to_load(manifest, sees),
        *_measured(manifest, chapters),
        *_contributions(manifest),
        *_contributors(history, chapters),
        _how_to_check(manifest),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(manifest: Manifest, sees: bool) -> str:
    licence = manifest.licence.lower()
    known = _LICENCE_ID.fullmatch(licence) is not None
    task = "image-text-to-text" if sees else "text-generation"
    fields: dict[str, object] = {"library_name": "transformers", "pipeline_tag": task}
    fields["license"] = licence if known else "other"
    if not known:
        fields["license_name"] = plain(manifest.licence)
    # The hub refuses a card whose base_model is not a name on the hub, such as a folder or a file.
    if HUB_NAME.fullmatch(manifest.base_model):
        fields["base_model"] = manifest.base_model
        if manifest.parent is not None:
            fields["base_model_relation"] = "finetune"
    if manifest.datasets:
        fields["datasets"] = list(manifest.datasets)
    fields["tags"] = ["rankup", "lora", "community-trained"]
    return "---\n" + yaml.safe_dump(fields, sort_keys=True, width=10_000) + "---"


# -- where it comes from -----------------------------------------------------------------------------------------------


def _origin(manifest: Manifest) -> str:
    base = f"Base model: {code(manifest.base_model)}. Licence: {code(manifest.licence)}."
    if manifest.parent is None:
        return f"The base model as it is, before the first round.\n\n{base}"
    datasets = ", ".join(code(name) for name in manifest.datasets) or "none"
    made = _undone(manifest) or (
        f"Made in round {code(manifest.round_id or '')} from version {manifest.version - 1} by "
        f"{_count(len(manifest.terms), 'contribution')}: volunteers trained low-rank deltas B·A, and their exact "
        "weighted sum was added to the full weights."
    )
    return f"{made}\n\n{base} Datasets: {datasets}.\n\nParent manifest: {code(manifest.parent)}"


def _undone(manifest: Manifest) -> str:
    """What a version that no round made does to the versions before it, and why; empty for every other version."""
    change = manifest.change
    if change is None:
        return ""
    parent = manifest.version - 1
    if isinstance(change, Rollback):
        first = change.to + 1
        taken = f"version {first}" if first == parent else f"versions {first} to {parent}"
        what = f"This version takes back {taken}: its tensors are those of version {change.to}."
        if first > parent:
            what = f"The tensors of this version are those of version {change.to}, its parent: nothing is taken back."
    elif isinstance(change, Revocation):
        count = len(change.contributions)
        names = ", ".join(code(digest[:_SHORT]) for digest in change.contributions[:_LISTED_REVOKED])
        more = f" and {count - _LISTED_REVOKED} more" if count > _LISTED_REVOKED else ""
        some = "one contribution" if count == 1 else f"{count} contributions"
        what = (
            f"This version takes back {some}: {names}{more}. Its tensors are those of a history in which they had "
            "never been in the sums."
        )
    else:
        new = manifest.keys[-1].statement.new if manifest.keys else ""
        what = (
            f"This version has the tensors of version {parent}. From it on the publisher signs with the key "
            f"{code(new)}, which the old key has named."
        )
    return f"{what}\n\nReason: {code(change.reason)}" if change.reason else what


def _so_far(history: Sequence[Chapter], chapters: Sequence[Chapter]) -> list[str]:
    if not history:
        return []
    rounds = sum(chapter.made_by == "round" for chapter in chapters)
    people = {person.worker_id for chapter in chapters for person in chapter.contributors}
    contributions = sum(person.contributions for chapter in chapters for person in chapter.contributors)
    since = "So far" if history[0].version == 0 else f"Since version {history[0].version}"
    counts = (_count(contributions, "contribution"), _count(len(people), "contributor"), _count(rounds, "round"))
    undone = any(chapter.made_by in ("rollback", "revocation") for chapter in chapters)
    note = " What was taken back later is counted too." if undone else ""
    return ["{}: {} by {} in {}.".format(since, *counts) + note]


# -- what was measured -------------------------------------------------------------------------------------------------


def _measured(manifest: Manifest, chapters: Sequence[Chapter]) -> list[str]:
    losses = {chapter.version: chapter.heldout_loss for chapter in chapters if chapter.heldout_loss is not None}
    made_by = {chapter.version: chapter.made_by for chapter in chapters}
    evaluation = manifest.evaluation
    if evaluation is not None and evaluation.parent_heldout_loss is not None:
        # Measured with this version's, on the same rows: what an earlier round measured may be on others.
        losses[manifest.version - 1] = evaluation.parent_heldout_loss
    if not losses:
        return []
    shown = sorted(losses)[-MAX_CARD_ROWS:]
    rows = ["| version | made by | held-out loss |", "|---|---|---|"]
    rows += [f"| {version} | {made_by.get(version, '')} | {losses[version]:.4f} |" for version in shown]
    notes = []
    if evaluation is not None:
        size = f"{evaluation.examples} examples ({evaluation.tokens} tokens)"
        notes.append(f"Version {manifest.version} was measured on {size} that no volunteer can fetch.")
    if len(shown) > 2:
        notes.append(
            "Losses of different datasets cannot be compared: each round is measured on its own held-out rows."
        )
    return ["## Held-out loss", "\n".join(rows), *([" ".join(notes)] if notes else [])]


# -- who contributed ---------------------------------------------------------------------------------------------------


def _contributions(manifest: Manifest) -> list[str]:
    if not manifest.terms:
        return []
    denominator = 2**manifest.denominator_log2
    rows = ["| contributor | shard | tokens | weight | contribution |", "|---|---|---|---|---|"]
    for term in manifest.terms[:MAX_CARD_ROWS]:
        weight = f"{term.coefficient}/{denominator}"
        shard = str(term.shard) if term.shards == 1 else f"{term.shard}-{term.shard + term.shards - 1}"
        if term.round_id is not None:
            shard += f" of {code(term.round_id)}"
        cells = (code(term.worker_name), shard, f"{term.tokens:,}", weight, code(term.contribution[:_SHORT]))
        rows.append(f"| {' | '.join(cells)} |")
    more = len(manifest.terms) - MAX_CARD_ROWS
    rest = [f"And {more} more, listed in the manifest."] if more > 0 else []
    return ["## Contributions to this version", "\n".join(rows), *rest]


def _contributors(history: Sequence[Chapter], chapters: Sequence[Chapter]) -> list[str]:
    """Everybody, under the name that they chose last; those who gave most first."""
    if not history:
        return []
    totals: dict[str, Contributor] = {}
    for chapter in chapters:
        for person in chapter.contributors:
            there = totals.get(person.worker_id) or Contributor(person.worker_id, person.name, 0, 0)
            totals[person.worker_id] = Contributor(
                person.worker_id,
                person.name,
                there.contributions + person.contributions,
                there.tokens + person.tokens,
            )
    if not totals:
        return []
    ranked = sorted(totals.values(), key=lambda person: (-person.tokens, person.worker_id))
    rows = ["| contributor | contributions | tokens |", "|---|---|---|"]
    rows += [f"| {code(p.name)} | {p.contributions} | {p.tokens:,} |" for p in ranked[:MAX_CARD_ROWS]]
    more = len(ranked) - MAX_CARD_ROWS
    rest = [f"And {more} more, listed in the manifests."] if more > 0 else []
    return ["## Contributors so far", "\n".join(rows), *rest]


# -- what to do with it ------------------------------------------------------------------------------------------------


def _how_to_load(manifest: Manifest, sees: bool) -> str:
    maker, reads, name = "CausalLM", "AutoTokenizer", "tokenizer"
    if sees:
        maker, reads, name = "ImageTextToText", "AutoProcessor", "processor"
    return (
        "## Load\n\n"
        "```python\n"
        f"from transformers import AutoModelFor{maker}, {reads}\n\n"
        f'folder = "{manifest.model}"  # this folder, or its name on a hub\n'
        f"{name} = {reads}.from_pretrained(folder)\n"
        f"model = AutoModelFor{maker}.from_pretrained(folder)\n"
        "```"
    )


def _how_to_check(manifest: Manifest) -> str:
    name = f"{manifest.model}@{manifest.version}"
    return (
        "## Pull and verify\n\n"
        "With the address of the server that published this version as `URL`:\n\n"
        "```sh\n"
        f"rankup pull URL {name} --to {manifest.model}\n"
        f"rankup verify {manifest.model}\n"
        f"rankup verify URL {name}\n"
        "```\n\n"
        "`pull` checks the publisher's signature and every hash. `verify` of the folder does so again, without a "
        "network; `verify` of the server makes the version again and compares every tensor, bit for bit. "
        "[OPENNESS.md](OPENNESS.md) says what is open, where it is and how to check that."
    )


# -- what is open ------------------------------------------------------------------------------------------------------


def openness_card(record: OpennessRecord) -> str:
    """OPENNESS.md."""
    rows = ["| part | state | what there is | where | how to check |", "|---|---|---|---|---|"]
    for part in record.components:
        details = "".join(f"; {code(text)}" for text in part.details)
        rows.append(f"| {part.name} | **{part.state}** | {part.what}{details} | {part.where} | {part.check} |")
    counts = {state: sum(part.state == state for part in record.components) for state in ("open", "partly", "closed")}
    blocks = [
        f"# What is open in {record.model}, version {record.version}",
        f"{counts['open']} parts are open, {counts['partly']} partly, {counts['closed']} closed. Open means: there for "
        "everybody, under a licence to use, change and pass on where there is one to state. All of it is computed from "
        "the signed manifest and the cards of the datasets; what these do not show is called closed. "
        "`openness.json` has the same for programs. The parts follow the Model Openness Framework (arXiv:2403.13784).",
        "\n".join(rows),
        *(block for source in record.datasets for block in _dataset(source)),
    ]
    return "\n\n".join(blocks) + "\n"


def _dataset(source: DataSource) -> list[str]:
    facts = [
        f"- Source: {code(source.source)}",
        f"- Licence: {code(source.licence)}",
        f"- Rows: {source.rows:,} for training, in {source.shard_count:,} shards; {source.heldout_rows:,} secret",
        f"- Shards: {code(source.shards_sha256)} is the sha256 of their digests, one on each line",
        f"- Held-out rows: {code(source.heldout_sha256)}",
    ]
    blocks = [f"## Dataset {code(source.dataset)}", "\n".join(facts)]
    if source.pipeline:
        rows = ["| step | rows in | rows out | detail |", "|---|---|---|---|"]
        for step in source.pipeline:
            rows.append(f"| {code(step.name)} | {step.rows_in:,} | {step.rows_out:,} | {code(step.detail)} |")
        blocks.append("\n".join(rows))
    return blocks


# -- text from outside -------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """One line: characters that do not print, among them line breaks and bidirectional marks, are replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def code(text: str) -> str:
    """Text from outside as a code span, in which neither markdown nor HTML nor links mean anything.

    Only a backtick could end the span and only a pipe the table's cell: both are replaced by their look-alikes.
    """
    return "`" + plain(text).replace("`", "'").replace("|", "¦") + "`"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
