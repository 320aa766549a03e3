"""`rankup verify`: for whoever does not trust the publisher. What was proved is said in words, and what was not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rankup.checkfiles import Level, Report

TARGET = typer.Argument(
    help="A pulled folder, or where versions come from: https://…, s3://bucket, a folder made by `rankup mirror`."
)
NAME = typer.Argument(None, help="MODEL, MODEL@VERSION or @VERSION; default: the only model there, latest version.")
LEVEL = typer.Option(
    None,
    "--level",
    help="files (a pulled folder; its default), chain (signatures and logs back to version 0), round (the version made "
    "again from its parent; default elsewhere), all (every version made again from version 0).",
)
CONTRIBUTION = typer.Option(
    None, "--contribution", help="A delta file or its sha256: prove, offline, that it is in the pulled version's sum."
)
PROOF = typer.Option(
    None, "--proof", help="With --contribution: check this proof; TARGET may be the sealed manifest alone."
)
WRITE_PROOF = typer.Option(None, "--write-proof", help="With --contribution: write a proof for --proof.")
KEY = typer.Option(
    None, "--key", help="Publisher's public key (hex); default: the folder's, or at first use the one found."
)
CACHE = typer.Option(None, "--cache", help="Folder that keeps downloads for the next verify; default: none is kept.")
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")

_LEVELS: tuple[Level, ...] = ("files", "chain", "round", "all")


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    target: str = TARGET,
    name: str = NAME,
    level: str = LEVEL,
    contribution: str = CONTRIBUTION,
    proof: Path = PROOF,
    write_proof: Path = WRITE_PROOF,
    key: str = KEY,
    cache: Path = CACHE,
    as_json: bool = JSON,
) -> None:
    """Prove what a version is, without trusting its publisher. Says what was proved and what was not.

    **Examples**

    - `rankup verify ./model` hashes every file of a pulled folder, without a network
    - `rankup verify ./from-a-hub --key HEX` does so for one that came from a hub
    - `rankup verify https://rankup.example.org smollm2@3` makes version 3 again from version 2 and its contributions
    - `rankup verify https://rankup.example.org smollm2 --level all` makes every version again
    - `rankup verify ./model --contribution my.delta --write-proof my.proof`
    - `rankup verify .rankup.manifest.json --contribution my.delta --proof my.proof`
    """
    from rankup.errors import InputError
    from rankup.folder import ENVELOPE_NAME, STATE_NAME

    if contribution is not None:
        _prove(target, contribution, proof, write_proof, key, as_json=as_json)
        return
    if proof is not None or write_proof is not None:
        raise InputError("a proof is of a contribution", remedy="Name it with --contribution FILE.")
    pulled = any((Path(target) / name).is_file() for name in (STATE_NAME, ENVELOPE_NAME))
    wanted = next((one for one in _LEVELS if one == (level or ("files" if pulled else "round"))), None)
    if wanted is None:
        raise InputError(f"{level!r} is no level", remedy=f"Choose one of: {', '.join(_LEVELS)}.")
    if wanted != "files":
        if pulled:
            raise InputError(
                f"{target} is a pulled folder: it holds one version and not what that was made of",
                remedy=f"Name the server or bucket that it came from: rankup verify URL --level {wanted}",
            )
        report = _verify_source(target, name, wanted, key, cache, quiet=as_json)
    else:
        if name is not None:
            raise InputError("a pulled folder holds one version", remedy=f"Write: rankup verify {target}")
        report = _verify_folder(Path(target), key, quiet=as_json)
    _show(report, as_json=as_json)


def _verify_folder(folder: Path, key: str | None, *, quiet: bool) -> Report:
    from rankup.checkfiles import verify_files
    from rankup.cli.transfer import transfer_bar

    with transfer_bar(f"verify {folder}", quiet=quiet) as progress:
        return verify_files(folder, publisher_key=key, progress=progress)


def _verify_source(
    url: str, name: str | None, level: Level, key: str | None, cache: Path | None, *, quiet: bool
) -> Report:
    import tempfile

    from rankup.cli.interrupt import interruptible
    from rankup.cli.source import open_model
    from rankup.cli.transfer import transfer_bar
    from rankup.replay import verify_version

    source, model, version = open_model(url, name)
    with (
        interruptible(),
        tempfile.TemporaryDirectory(prefix="rankup-verify-") as scratch,
        transfer_bar(f"verify {model}", quiet=quiet) as progress,
    ):
        return verify_version(
            source,
            model,
            version,
            cache=cache or Path(scratch),
            level=level,
            publisher_key=key,
            keep=cache is not None,
            progress=progress,
        )


def _show(report: Report, *, as_json: bool) -> None:
    import dataclasses

    from rankup.cli.output import human_bytes, print_json
    from rankup.errors import IntegrityError

    what = f"{report.model} version {report.version}"
    if as_json:
        print_json({"ok": report.ok} | dataclasses.asdict(report))
    elif report.ok:
        typer.secho(f"{what}: {report.note}", fg="green")
        for sentence in report.proved:
            typer.echo(f"  proved         {sentence}")
        for sentence in report.unproved:
            typer.echo(f"  not proved     {sentence}")
        typer.echo(f"  signed by      {report.publisher_key}")
        typer.echo(f"  manifest       {report.manifest}")
        typer.echo(f"  contributions  {report.contributions}")
        typer.echo(f"  tensors        {report.tensors} compared, {report.changed} of them changed")
        typer.echo(f"  looked at      {human_bytes(report.bytes)} in {report.seconds:.1f} s")
    if not report.ok:
        made = "its manifest" if report.level == "files" else "its replay"
        more = len(report.mismatches) - 8
        raise IntegrityError(
            f"{what} differs from {made} in: {', '.join(report.mismatches[:8])}{f' and {more} more' * (more > 0)}",
            remedy="Pull it again." if report.level == "files" else "Do not use this version, and tell the publisher.",
        )


def _prove(
    target: str, contribution: str, proof: Path | None, write_proof: Path | None, key: str | None, *, as_json: bool
) -> None:
    from rankup.cli.output import print_json
    from rankup.durable import write_file
    from rankup.errors import InputError
    from rankup.folder import disk_errors
    from rankup.message import canonical_json
    from rankup.proofs import check_proof, contribution_digest, prove_contribution, read_proof

    digest = contribution_digest(contribution)
    place = Path(target)
    if proof is not None:
        if write_proof is not None:
            raise InputError("a proof is checked or written", remedy="Give --proof or --write-proof, not both.")
        found = read_proof(proof)
        signer = check_proof(found, digest, place, publisher_key=key)
    else:
        if not place.is_dir():
            raise InputError(f"{target} is not a pulled folder", remedy="Pull the version first, or give --proof.")
        found, signer = prove_contribution(place, digest, publisher_key=key)
    if write_proof is not None:
        with disk_errors(write_proof):
            write_file(write_proof, canonical_json(found), mode=0o644)
    pinned = key is not None or place.is_dir()
    if as_json:
        print_json({"in_sum": True, "publisher_key": signer, "pinned": pinned} | found.model_dump(mode="json"))
        return
    leaf = found.leaf
    typer.secho(f"{digest[:16]}… is in the sum of {found.model} version {found.version}", fg="green")
    typer.echo(f"  round          that of version {leaf.version}")
    typer.echo(f"  coefficient    {leaf.coefficient} / 2^{leaf.denominator_log2}")
    typer.echo(f"  proved         leaf {found.index} of {found.size} leads to the log in the signed manifest")
    typer.echo("  not proved     that the tensors are the sum that the log lists: rankup verify URL --level all")
    typer.echo(f"  signed by      {signer}")
    typer.echo(f"  manifest       {found.manifest}")
    if write_proof is not None:
        typer.echo(f"  proof          {write_proof}")
    if not pinned:
        typer.secho("  Compare the key above with the publisher's, or name it with --key.", fg="yellow")
