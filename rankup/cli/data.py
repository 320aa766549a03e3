"""`rankup model …` and `rankup dataset …`: what rounds are made of. Run beside `rankup up`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from rankup.cli.action_log import record_command

models_app = typer.Typer(help="Bring a base model in as version 0.", no_args_is_help=True)
datasets_app = typer.Typer(help="Build and list datasets.", no_args_is_help=True)
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")


@models_app.command("import")
def import_model(
    base: str = typer.Argument(help="Hub id, local folder, GGUF file, `smollm2` or `tiny`."),
    name: str = typer.Option(..., "--name", help="Name of the model on this server."),
    licence: str = typer.Option(None, help="SPDX id; default: what the base's model card says."),
    chat_template: Path = typer.Option(
        None, help="File with a chat template instead of the base's own: with a place for tools, for instance."
    ),
    stack_experts: bool = typer.Option(
        False, help="Store a layer's experts as one tensor, so that they can be trained; needs transformers 5 to load."
    ),
    as_json: bool = JSON,
) -> None:
    """Publish version 0 of a model: the base, as float32 master and bfloat16 export, signed.

    **Examples**

    - `rankup model import HuggingFaceTB/SmolLM2-135M-Instruct --name smollm2`
    - `rankup model import ./my-model --name mine`
    - `rankup model import model.Q4_1.gguf --name mine`
    - `rankup model import ./my-model --name calling --chat-template tools.jinja`
    """
    import tempfile
    import time

    from aggregator.chattemplate import with_chat_template
    from aggregator.genesis import fetch_base, make_version_zero
    from rankup.cli.output import human_bytes, print_json
    from rankup.cli.stack import ServerAccess
    from rankup.cli.transfer import storing_bar
    from rankup.settings import CoordinatorSettings
    from rankup.signing import load_private_key
    from rankup.store import open_store

    access = ServerAccess.of_this_machine()
    with (
        tempfile.TemporaryDirectory(prefix="rankup-base-") as folder,
        storing_bar(f"{name} version 0", quiet=as_json) as progress,
    ):
        found = fetch_base(base, Path(folder))
        if chat_template is not None:
            found = with_chat_template(found, chat_template)
        manifest = make_version_zero(
            open_store(access.store),
            load_private_key(access.publisher_key_file),
            model=name,
            base=found,
            group_bytes=CoordinatorSettings().fold_group_bytes,
            now=time.time(),
            licence=licence,
            stack_experts=stack_experts,
            progress=progress,
        )
    record_command(open_store(access.store), "import_model", {"model": name, "base": base})
    if as_json:
        print_json({"model": name, "version": manifest.version, "tensors": len(manifest.tensors)})
        return
    size = human_bytes(sum(file.size_bytes for file in manifest.export_files()))
    typer.secho(f"{name} version 0 is published", fg="green")
    typer.echo(f"  base     {manifest.base_model} ({manifest.licence})")
    typer.echo(
        f"  export   {size} in {len(manifest.export_files())} files, {len(manifest.targets())} weights can be trained"
    )


@datasets_app.command("build")
def build(
    name: str = typer.Argument(help="Name of the dataset on this server."),
    files: list[Path] = typer.Argument(
        None,
        help="JSON lines, JSON or Parquet files with rows of a shape that TRL takes, images beside them or in them.",
    ),
    pydocs: bool = typer.Option(
        False, "--pydocs", help="The docstrings of Python's standard library, instead of files."
    ),
    licence: str = typer.Option(None, help="SPDX id of the data's licence."),
    shard_rows: int = typer.Option(100, min=1, help="Rows of one shard: what one lease trains on."),
    heldout_rows: int = typer.Option(64, min=1, help="Rows kept back to measure every version with."),
    seed: int = typer.Option(0, help="Of the shuffle."),
    as_json: bool = JSON,
) -> None:
    """Clean, deduplicate, split, shard and store a dataset.

    **Examples**

    - `rankup dataset build pydocs --pydocs`
    - `rankup dataset build forum answers.jsonl more.jsonl --licence CC-BY-4.0`
    """
    import os
    import time

    from coordinator.cluster import start_cluster, stop_cluster
    from coordinator.dataset import build_dataset
    from rankup.cli.output import print_json, print_table
    from rankup.cli.stack import ServerAccess, server_home
    from rankup.errors import InputError
    from rankup.store import open_store

    if pydocs == bool(files):
        raise InputError("give either files or --pydocs", remedy="See: rankup dataset build --help")
    access = ServerAccess.of_this_machine()
    rows: Any = files
    source = ", ".join(path.name for path in files or ())
    if pydocs:
        from coordinator import pydocs as docs

        rows, source, licence = docs.rows(), docs.source(), licence or docs.LICENCE
    else:
        if licence is None:
            raise InputError(
                "the data's licence is not stated", remedy="Add --licence with an SPDX id, such as CC-BY-4.0."
            )
    # Ray reads the token's place from the environment, before it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(access.ray_token_file)}
    start_cluster(server_home() / "client", address=access.ray_address)
    try:
        card = build_dataset(
            open_store(access.store),
            dataset=name,
            rows=rows,
            source=source,
            licence=licence,
            shard_rows=shard_rows,
            heldout_rows=heldout_rows,
            seed=seed,
            now=time.time(),
        )
    finally:
        stop_cluster()
    record_command(open_store(access.store), "build_dataset", {"dataset": name, "source": source})
    if as_json:
        print_json(card)
        return
    typer.secho(
        f"dataset {card.dataset}: {card.rows} rows in {len(card.shards)} shards, {card.heldout_rows} held out",
        fg="green",
    )
    steps = [(step.name, step.rows_in, step.rows_out, step.detail) for step in card.pipeline]
    print_table("", ("step", "#rows in", "#rows out", "what it does"), steps)


@datasets_app.command("list")
def list_datasets(
    server: str = typer.Option(None, "--server", help="URL of the server; default: the one on this machine."),
    as_json: bool = JSON,
) -> None:
    """Datasets that rounds can use."""
    from rankup.cli.http import call, server_url
    from rankup.cli.output import print_json, print_table
    from rankup.records import DatasetCard

    cards = [DatasetCard.model_validate(row) for row in call("GET", server_url(server), "/v1/datasets")["datasets"]]
    if as_json:
        print_json(cards)
        return
    rows = [(c.dataset, c.rows, len(c.shards), c.heldout_rows, c.licence, c.source) for c in cards]
    print_table("", ("dataset", "#rows", "#shards", "#held out", "licence", "source"), rows)
