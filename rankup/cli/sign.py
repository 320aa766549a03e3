"""`rankup export model-signing`: a pulled version, signed for tools that know no Rankup manifest."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the `rankup export` application."""
    app.command("model-signing")(sign)


def sign(
    folder: Path = typer.Argument(help="Folder of a pulled version."),
    private_key: Path = typer.Option(
        ...,
        "--private-key",
        help="Elliptic-curve private key, PEM (P-256, P-384 or P-521). The format takes no Ed25519 key, so it is not "
        "the publisher's key of Rankup's own manifests.",
    ),
    password: str = typer.Option(
        None, "--password", envvar="RANKUP_SIGNING_PASSWORD", help="Of an encrypted private key."
    ),
    to: Path = typer.Option(None, "--to", help="The bundle to write; default: model.sig in the folder."),
    key: str = typer.Option(
        None, "--key", help="Publisher's public key (hex); default: the one the folder has pinned."
    ),
    force: bool = typer.Option(False, "--force", help="Replace a bundle that is there."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Sign a pulled version for the OpenSSF model signing tools: a Sigstore bundle that `model_signing verify` checks.

    Every file is first compared with the publisher's manifest. Needs `pip install 'rankup[model-signing]'`, and no
    network.

    **Examples**

    - `openssl ecparam -name prime256v1 -genkey -noout -out ec.pem`
    - `rankup export model-signing ./model --private-key ec.pem`
    - then: `model_signing verify key ./model --signature ./model/model.sig --public_key ec.pub`
    """
    from rankup.cli.output import print_json
    from rankup.cli.transfer import transfer_bar
    from rankup.export.modelsigning import sign_folder

    with transfer_bar(f"sign {folder}", quiet=as_json) as progress:
        path, report = sign_folder(
            folder, private_key, password=password, publisher_key=key, to=to, force=force, progress=progress
        )
    if as_json:
        print_json(
            {
                "path": str(path.resolve()),
                "model": report.model,
                "version": report.version,
                "manifest": report.manifest,
                "publisher_key": report.publisher_key,
            }
        )
        return
    typer.secho(f"{path} signs {report.model} version {report.version}", fg="green")
    typer.echo(f"  manifest  {report.manifest}")
    typer.echo(f"  check it  model_signing verify key {folder} --signature {path} --public_key PUBLIC.pem")
