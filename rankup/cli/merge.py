"""`rankup merge`: LoRA adapters that somebody trained with peft, merged exactly into a model. Needs no server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from aggregator.mergecheck import MergeComparison
    from aggregator.mergedfolder import MergeResult


def register(app: typer.Typer) -> None:
    app.command("merge")(merge)


def merge(
    base: str = typer.Argument(help="The model: a folder with config.json and safetensors, or an id on the hub."),
    adapters: list[Path] = typer.Argument(help="Folders that PeftModel.save_pretrained wrote (LoRA)."),
    out: Path = typer.Option(..., "--out", help="Folder for the merged model; must be empty, or hold this merge."),
    weights: str = typer.Option(None, "--weights", help="One decimal for each adapter: 0.7,0.3. Default: 1 each."),
    rule: str = typer.Option(
        "sum", "--rule", help="sum, mean, or a robust one: multi_krum, geometric_median, centred_clipping."
    ),
    clip: float = typer.Option(
        None, "--clip", help="Scale adapters longer than this many median norms down to that. Default: no clip."
    ),
    verify: bool = typer.Option(
        False, "--verify", help="Write nothing: merge again and compare with --out bit by bit."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Merge LoRA adapters into a model: exact, streamed, bit for bit the same on every machine.

    Memory stays small, whatever the size of the model. After an interruption run it again: it goes on.

    **Examples**

    - `rankup merge ./smollm2 ./my-lora --out ./merged`
    - `rankup merge ./smollm2 ./code ./chat --weights 0.7,0.3 --out ./merged`
    - `rankup merge ./smollm2 ./a ./b ./c ./d --rule geometric_median --clip 2 --out ./merged`
    - `rankup merge ./smollm2 ./my-lora --out ./merged --verify`
    """
    import math
    from typing import cast

    from aggregator.merge import Blend, Rule, parse_weights
    from aggregator.mergecheck import compare_folder
    from aggregator.mergedfolder import merge_folder
    from rankup.cli.interrupt import interruptible

    blend = Blend(
        rule=cast(Rule, rule),
        weights=None if weights is None else parse_weights(weights),
        clip=math.inf if clip is None else clip,
    )
    blend.check(len(adapters))
    folder = _base_folder(base)
    with interruptible(), _progress(out, verify=verify, quiet=as_json) as progress:
        if verify:
            comparison = compare_folder(folder, adapters, out, blend, progress=progress)
        else:
            result = merge_folder(folder, adapters, out, blend, progress=progress)
    if verify:
        _show_comparison(comparison, out, as_json)
    else:
        _show_result(result, out, as_json)


def _base_folder(base: str) -> Path:
    """The folder itself, or the hub's snapshot of an id like org/name where huggingface_hub is installed."""
    path = Path(base).expanduser()
    if path.exists() or base.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return path
    from aggregator.bases import fetch_base
    from rankup.errors import NotFoundError

    try:
        return fetch_base(base, path).folder
    except ModuleNotFoundError as exc:
        raise NotFoundError(
            f"there is no folder {base}", remedy=f"Download it first: hf download {base} --local-dir my-model"
        ) from exc


@contextmanager
def _progress(out: Path, *, verify: bool, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    from rankup.cli.transfer import transfer_bar
    from rankup.download import PullProgress

    with transfer_bar(f"merge {out.name}", quiet=quiet) as draw:
        if draw is None:
            yield None
        else:
            stage = "comparing" if verify else "merging"
            yield lambda done, total: draw(PullProgress(stage, done, total))


def _show_result(result: MergeResult, out: Path, as_json: bool) -> None:
    from rankup.cli.output import human_bytes, print_json

    record = result.record
    if as_json:
        print_json(
            {
                "folder": str(out.resolve()),
                "record": record,
                "warnings": result.warnings,
                "bytes_written": result.bytes_written,
                "seconds": round(result.seconds, 3),
            }
        )
        return
    for warning in result.warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    size = human_bytes(sum(file.size_bytes for file in record.files))
    count = len(record.adapters)
    typer.secho(f"{record.base} with {count} adapter{'s' * (count != 1)} is in {out} ({size})", fg="green")
    for adapter in record.adapters:
        weight = adapter.coefficient / 2**record.denominator_log2
        scalings = ", ".join(f"{scaling:.4g}" for scaling in adapter.scalings) or "none"
        typer.echo(f"  adapter   {adapter.name}: weight {weight:.6g}, scaling {scalings}, sha256 {adapter.sha256[:16]}")
    typer.echo(f"  tensors   {record.tensors_changed} of {record.tensors} changed")
    kept = "" if result.bytes_written else ", all of it was there already"
    typer.echo(f"  written   {human_bytes(result.bytes_written)} in {result.seconds:.1f} s{kept}")
    typer.echo(f"  load it   AutoModelForCausalLM.from_pretrained({str(out)!r})")
    typer.echo("  check it  run the same command with --verify")


def _show_comparison(comparison: MergeComparison, out: Path, as_json: bool) -> None:
    from rankup.cli.output import human_bytes, print_json
    from rankup.errors import IntegrityError

    if as_json:
        print_json(
            {
                "ok": comparison.ok,
                "folder": str(out.resolve()),
                "mismatches": comparison.mismatches,
                "bytes_compared": comparison.bytes_compared,
                "seconds": round(comparison.seconds, 3),
                "record": comparison.record,
            }
        )
    elif comparison.ok:
        typer.secho(f"{out} is bit-identical to the merge done again", fg="green")
        typer.echo(f"  compared  {human_bytes(comparison.bytes_compared)} in {comparison.seconds:.1f} s")
    if not comparison.ok:
        raise IntegrityError(
            f"{out} differs from the merge of these inputs in: {', '.join(comparison.mismatches[:8])}",
            remedy="Check that base, adapters, weights and rule are those of the merge; if they are, merge again.",
        )
