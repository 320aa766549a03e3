"""`rankup publish-hub`: a pulled version as a repository on a hub."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command("publish-hub")(publish_hub)


def publish_hub(
    folder: Path = typer.Argument(help="Folder of a pulled version."),
    repo: str = typer.Option(..., "--repo", help="Repository on the hub: NAME or ORG/NAME; made where it is missing."),
    private: bool = typer.Option(False, "--private", help="Make a missing repository private."),
    token: str = typer.Option(
        None, "--token", envvar="HF_TOKEN", help="Better set HF_TOKEN, or `hf auth login`.", show_envvar=False
    ),
    endpoint: str = typer.Option(
        None, "--endpoint", help="Address of the hub; default: HF_ENDPOINT, or the public one."
    ),
    revision: str = typer.Option("main", "--revision", help="Branch; made where it is missing."),
    key: str = typer.Option(None, "--key", help="Publisher's public key (hex); default: the one pinned in the folder."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the folder and list the files; upload nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Upload a pulled version to a hub repository, checked before and after, with a tag such as `v3`.

    Only what the signed manifest names is uploaded, and the sealed manifest. Run it again after an interruption.

    **Examples**

    - `rankup publish-hub ./model --repo my-org/my-model --dry-run`
    - `rankup publish-hub ./model --repo my-org/my-model`
    """
    from rankup.cli.output import human_bytes, print_json, print_table
    from rankup.cli.transfer import transfer_bar
    from rankup.export.hub import plan_upload, publish

    with transfer_bar(f"check {folder.name}", quiet=as_json) as progress:
        plan = plan_upload(folder, publisher_key=key, progress=progress)
    size_bytes = sum(file.size_bytes for file in plan.files)
    told = {
        "model": plan.manifest.model,
        "version": plan.manifest.version,
        "manifest": plan.digest,
        "publisher_key": plan.publisher_key,
        "repo": repo,
        "tag": plan.tag,
        "size_bytes": size_bytes,
        "files": [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in plan.files],
    }
    if dry_run:
        if as_json:
            print_json({**told, "dry_run": True})
            return
        print_table(
            "",
            ("file", "#size", "sha256"),
            [(file.path, human_bytes(file.size_bytes), file.sha256[:16]) for file in plan.files],
        )
        count = f"{len(plan.files)} files, {human_bytes(size_bytes)}"
        typer.echo(f"would go to {repo} as {plan.tag}: {count}; every hash is right")
        return
    _quiet_client(as_json)
    done = publish(plan, repo, private=private, token=token, endpoint=endpoint, revision=revision)
    if as_json:
        print_json(
            {
                **told,
                "dry_run": False,
                "repo": done.repo,
                "url": done.url,
                "revision": done.revision,
                "commit": done.commit,
                "uploaded": done.uploaded,
                "deleted": done.deleted,
            }
        )
        return
    what = f"is {done.tag} of" if done.uploaded else f"is already {done.tag} of"
    typer.secho(f"{plan.manifest.model} version {plan.manifest.version} {what} {done.url}", fg="green")
    typer.echo(f"  files     {len(plan.files)}, {human_bytes(size_bytes)}; the hub names the right hash for each")
    typer.echo(f"  commit    {done.commit}")
    for path in done.deleted:
        typer.echo(f"  removed   {path}, of an earlier version")
    typer.echo(f"  load it   AutoModelForCausalLM.from_pretrained({done.repo!r}, revision={done.tag!r})")


def _quiet_client(as_json: bool) -> None:
    """Standard output is one JSON document, and standard error no bars, where a program reads them."""
    if as_json:
        import os

        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
