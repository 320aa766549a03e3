"""`rankup delta …`: one contribution as a PEFT adapter, and back; what is in a delta file. Needs no server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

app = typer.Typer(help="Delta files: look into one, convert to a PEFT adapter and back.", no_args_is_help=True)

DELTA = typer.Argument(help="A delta file (rankup.delta/1).")
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")


@app.command("to-peft")
def to_peft(
    delta: Path = DELTA,
    to: Path = typer.Option(..., "--to", help="Folder for the adapter; must be empty or not there yet."),
    base: str = typer.Option(
        None, "--base", help="Folder or hub name of the model; a folder tells every layer's kind."
    ),
    base_name: str = typer.Option(
        None, "--base-name", help="What the adapter calls its base; default: --base as you gave it."
    ),
    dtype: str = typer.Option("float32", "--dtype", help="float32, or bfloat16: half the size, rounded."),
    partial: bool = typer.Option(False, "--partial", help="Leave out what LoRA cannot express: vectors, experts …"),
    as_json: bool = JSON,
) -> None:
    """Write a contribution as an adapter that `PeftModel.from_pretrained` loads.

    **Examples**

    - `rankup delta to-peft my.delta --base ./model --to ./my-adapter`
    """
    from aggregator.peftfolder import Values
    from aggregator.peftfolder import to_peft as convert
    from rankup.cli.output import human_bytes, print_json
    from rankup.errors import InputError

    names: dict[str, Values] = {"float32": "F32", "bfloat16": "BF16"}
    if dtype not in names:
        raise InputError(f"there is no type {dtype!r}", remedy="Choose float32 or bfloat16.")
    done = convert(delta, to, base=base, base_name=base_name, values=names[dtype], partial=partial)
    record = done.record
    if as_json:
        print_json(
            {
                "folder": str(to.resolve()),
                "contribution": record.contribution,
                "header": record.header,
                "exact": record.exact,
                "weights": len(record.weights),
                "left_out": record.left_out,
                "size_bytes": done.size_bytes,
            }
        )
        return
    for name, reason in record.left_out.items():
        typer.secho(f"warning: left out {name}: {reason}", fg="yellow", err=True)
    if done.base_manifest not in (None, record.header.base_manifest):
        typer.secho("warning: the delta was trained on another version than --base", fg="yellow", err=True)
    way_back = "exact" if record.exact else "rounded to bfloat16; there is no way back to the delta"
    typer.secho(f"{delta.name} is an adapter in {to} ({human_bytes(done.size_bytes)}, {way_back})", fg="green")
    typer.echo(f"  weights   {len(record.weights)} of {len(record.weights) + len(record.left_out)}")
    typer.echo(f"  load it   PeftModel.from_pretrained(base_model, {str(to)!r})")
    if record.exact and not record.left_out:
        typer.echo(f"  way back  rankup delta from-peft {to} --out {delta.name}")


@app.command("from-peft")
def from_peft(
    folder: Path = typer.Argument(help="Folder of a PEFT LoRA adapter."),
    out: Path = typer.Option(..., "--out", help="The delta file to write."),
    like: Path = typer.Option(
        None, "--like", help="Take header, weights and width from this delta; default: the folder's own rankup.json."
    ),
    as_json: bool = JSON,
) -> None:
    """Write an adapter as a delta: the one that it was converted from, bit for bit, or a new one with --like.

    **Examples**

    - `rankup delta from-peft ./my-adapter --out my.delta`
    - `rankup delta from-peft ./trained-further --like my.delta --out new.delta`
    """
    from aggregator.peftdelta import requantise, restore
    from rankup.cli.output import human_bytes, print_json

    done = restore(folder, out) if like is None else requantise(folder, like, out)
    if as_json:
        print_json(
            {
                "file": str(out.resolve()),
                "contribution": done.ref,
                "header": done.header,
                "identical": done.identical,
                "missing": done.missing,
            }
        )
        return
    found = "the delta that it was converted from, bit for bit" if done.identical else "a new delta"
    typer.secho(f"{out} is {found} ({human_bytes(done.ref.size_bytes)})", fg="green")
    typer.echo(f"  sha256    {done.ref.sha256}")
    if done.missing:
        typer.secho(f"  missing   {len(done.missing)} weights, such as {done.missing[0]}", fg="yellow")


@app.command("show")
def show(
    delta: Path = DELTA,
    weights: bool = typer.Option(False, "--weights", help="List every weight instead of groups of them."),
    as_json: bool = JSON,
) -> None:
    """What a delta says about itself, which weights it changes, and by how much.

    **Examples**

    - `rankup delta show my.delta`
    """
    import math
    from collections import defaultdict

    from aggregator.lowrank import product_norm
    from rankup.cli.output import human_bytes, print_json, print_table
    from rankup.delta import DeltaReader
    from rankup.folder import sha256_of

    with DeltaReader.open(delta) as reader:
        header, layouts, size_bytes = reader.header, reader.layouts, reader.size_bytes
        norms = {
            name: math.hypot(*(product_norm(reader.factors(name, index)) for index in range(layout.slices)))
            for name, layout in layouts.items()
        }
    digest, norm = sha256_of(delta), math.hypot(*norms.values())
    if as_json:
        entries = {
            name: {
                "d_out": layout.d_out,
                "d_in": layout.d_in,
                "slices": layout.slices,
                "rank": layout.rank,
                "bits": layout.bits,
                "norm": norms[name],
            }
            for name, layout in layouts.items()
        }
        print_json(
            {"contribution": digest, "size_bytes": size_bytes, "header": header, "norm": norm, "weights": entries}
        )
        return
    typer.secho(f"{delta.name}: contribution {digest}", fg="green")
    typer.echo(f"  size      {human_bytes(size_bytes)}")
    typer.echo(f"  model     {header.model or 'not said'}")
    typer.echo(f"  round     {header.round_id}, lease {header.lease_id}")
    typer.echo(f"  base      {header.base_manifest}")
    typer.echo(f"  norm      {norm:.6g} over {len(layouts)} weights")
    groups: dict[tuple[str, str, int, Literal[16, 8]], list[str]] = defaultdict(list)
    for name, layout in layouts.items():
        stack = f"{layout.slices} x " if layout.slices > 1 else ""
        label = name if weights else _grouped(name)
        groups[label, f"{stack}{layout.d_out} x {layout.d_in}", layout.rank, layout.bits].append(name)
    print_table(
        "",
        ("weight", "#count", "shape", "#rank", "#bits", "#norm"),
        [
            (label, len(names), shape, rank, bits, f"{math.hypot(*(norms[name] for name in names)):.4g}")
            for (label, shape, rank, bits), names in groups.items()
        ],
    )


def _grouped(name: str) -> str:
    """The same for every layer of a model: model.layers.q_proj for model.layers.7.q_proj.weight."""
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdecimal())
