"""`rankup admin rollback`, `revoke`, `contributions` and `rotate-key`: each publishes a version, none deletes one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rankup.cli.action_log import record_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aggregator.revoke import Chosen
    from rankup.download import OnProgress
    from rankup.records import Manifest

MODEL = typer.Argument(help="Name of the model on this server.")
REASON = typer.Option("", "--reason", help="Why; everybody can read it in the version's manifest.")
YES = typer.Option(False, "--yes", "-y", help="Do it without asking.")
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")
MAX_KEY_FILE_BYTES = 16 * 1024
SHOWN = 20
"""Contributions that are listed before the question."""


def register(app: typer.Typer) -> None:
    app.command("rollback")(roll_back_command)
    app.command("revoke")(revoke_command)
    app.command("contributions")(contributions_command)
    app.command("rotate-key")(rotate_key_command)


def roll_back_command(
    model: str = MODEL,
    version: int = typer.Argument(help="The version to go back to."),
    reason: str = REASON,
    yes: bool = YES,
    as_json: bool = JSON,
) -> None:
    """Publish an old version's tensors as the next version. History stays; rounds go on from there.

    **Examples**

    - `rankup admin rollback smollm2 5`
    - `rankup admin rollback smollm2 5 --reason "version 6 repeats itself" --yes`
    """
    import time

    from aggregator.published import latest_version, outline
    from aggregator.undo import roll_back
    from rankup.cli.stack import ServerAccess
    from rankup.cli.transfer import transfer_bar
    from rankup.lineage import require_possible
    from rankup.signing import load_private_key, public_key_hex
    from rankup.store import open_store

    access = ServerAccess.of_this_machine()
    store, key = open_store(access.store), load_private_key(access.publisher_key_file)
    latest = latest_version(store, model, publisher_key=public_key_hex(key)).manifest
    require_possible(outline(store, latest, publisher_key=public_key_hex(key)), version)
    number = latest.version
    _ask(f"{model}: version {number} is the latest. Publish version {version} again, as {number + 1}?", yes)
    with transfer_bar(f"{model} version {number + 1}", quiet=as_json) as draw:
        made = roll_back(store, key, model=model, to=version, reason=reason, now=time.time(), progress=_summing(draw))
    record_command(store, "roll_back", {"model": model, "to": version, "reason": reason, "version": made.version})
    _say_published([made], as_json, f"has the tensors of version {version}")


def revoke_command(
    model: str = MODEL,
    names: list[str] = typer.Argument(
        help="Contributions (sha256, or its first 12 digits or more), worker ids, or exact display names."
    ),
    reason: str = REASON,
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be done, and do nothing."),
    yes: bool = YES,
    as_json: bool = JSON,
) -> None:
    """Publish the latest version without some contributions, as if they had never been in it, to the bit.

    The rounds since then are summed again with everybody else's coefficients as they were, and the result is replayed
    as `rankup verify` does before it is published. A contributor stands for all contributions that are in the sum.
    After an interruption run the same command again: it goes on.

    **Examples**

    - `rankup admin revoke smollm2 3f5a9c0d1e2b --reason "copied from a test set"`
    - `rankup admin revoke smollm2 w-0123456789abcdef --dry-run`
    - `rankup admin revoke smollm2 "Eve" --yes`
    """
    import tempfile
    import time

    from aggregator.published import latest_version
    from aggregator.rehearsal import rehearsal
    from aggregator.revoke import find, plan, revoke
    from rankup.cli.output import human_bytes, print_json
    from rankup.cli.stack import ServerAccess
    from rankup.cli.transfer import transfer_bar
    from rankup.records import Revocation
    from rankup.signing import load_private_key, public_key_hex
    from rankup.store import open_store

    access = ServerAccess.of_this_machine()
    store, key = open_store(access.store), load_private_key(access.publisher_key_file)
    chosen = find(store, model, names, publisher_key=public_key_hex(key))
    contributions = sorted(one.term.contribution for one in chosen)
    latest = latest_version(store, model, publisher_key=public_key_hex(key))
    change = latest.manifest.change
    if isinstance(change, Revocation) and list(change.contributions) == contributions:
        _say_published([latest.manifest], as_json, "is without them already")
        return
    work = plan(store, latest, contributions, publisher_key=public_key_hex(key))
    if dry_run and as_json:
        about = {"contributions": contributions, "from_version": work.start.version}
        again = [step.version for step in work.steps]
        print_json({"model": model} | about | {"rounds_of_versions": again, "masters_bytes": work.total_bytes})
        return
    if not as_json:
        _show(chosen, limit=SHOWN)
        summed = ", ".join(str(step.version) for step in work.steps) or "none"
        typer.echo(f"  begins with    version {work.start.version}")
        typer.echo(f"  summed again   the rounds of versions {summed} ({human_bytes(work.total_bytes)} of masters)")
    if dry_run:
        return
    number = latest.manifest.version
    _ask(f"Publish version {number} of {model} without {_count(chosen)}, as {number + 1}?", yes)
    with (
        tempfile.TemporaryDirectory(prefix="rankup-revoke-") as cache,
        transfer_bar(f"{model} version {number + 1}", quiet=as_json) as draw,
    ):
        made = revoke(
            store,
            key,
            model=model,
            contributions=contributions,
            reason=reason,
            now=time.time(),
            check=rehearsal(store, key, Path(cache), draw),
            progress=_summing(draw),
        )
    told = {"model": model, "contributions": contributions, "reason": reason, "version": made.version}
    record_command(store, "revoke_contributions", told)
    _say_published([made], as_json, f"is without {_count(chosen)}, bit-identical to its replay")


def contributions_command(
    name: str = typer.Argument(help="MODEL, or MODEL@VERSION; default: the latest version."),
    as_json: bool = JSON,
) -> None:
    """List every contribution in the sum of a version, with who made it.

    **Examples**

    - `rankup admin contributions smollm2`
    - `rankup admin contributions smollm2@3 --json`
    """
    from aggregator.revoke import contributions_of
    from rankup.cli.output import print_json
    from rankup.cli.stack import ServerAccess
    from rankup.errors import InputError
    from rankup.signing import load_private_key, public_key_hex
    from rankup.store import open_store

    model, _, version = name.partition("@")
    if version and not version.isdecimal():
        raise InputError(f"{version!r} is no version number", remedy="Write MODEL@3, or leave @… out for the latest.")
    access = ServerAccess.of_this_machine()
    key = public_key_hex(load_private_key(access.publisher_key_file))
    found = contributions_of(open_store(access.store), model, int(version) if version else None, publisher_key=key)
    if as_json:
        print_json([{"version": one.version} | one.term.model_dump(mode="json") for one in found])
        return
    _show(found)


def rotate_key_command(
    new_key: Path = typer.Option(None, "--new-key", help="Private key (PEM) to sign with; default: a fresh one."),
    reason: str = REASON,
    yes: bool = YES,
    as_json: bool = JSON,
) -> None:
    """Sign with a new key from now on. The old one vouches for it in a new version of every model.

    Readers who have pinned the old key follow by themselves. The old key file is kept beside the new one. After an
    interruption run the same command again: it goes on with the same new key.

    **Examples**

    - `rankup admin rotate-key`
    - `rankup admin rotate-key --new-key /media/stick/publisher.pem --reason "yearly" --yes`
    """
    import time

    from aggregator.rotate import models_of, rotate_key
    from rankup.cli.output import print_json
    from rankup.cli.stack import ServerAccess
    from rankup.errors import InputError, SetupError
    from rankup.signing import load_private_key, public_key_hex
    from rankup.store import open_store

    given = None
    if new_key is not None:
        try:
            with new_key.open("rb") as file:
                given = file.read(MAX_KEY_FILE_BYTES + 1)
        except OSError as exc:
            raise SetupError(f"cannot read {new_key}: {exc.strerror}", remedy="Check the path.") from exc
        if len(given) > MAX_KEY_FILE_BYTES:
            raise InputError(f"{new_key} is above {MAX_KEY_FILE_BYTES} bytes: not a private key")
    access = ServerAccess.of_this_machine()
    store, key_file = open_store(access.store), access.publisher_key_file
    models = models_of(store)
    old = public_key_hex(load_private_key(key_file))
    _ask(f"Replace the key {old[:16]}… and publish a version of {', '.join(models) or 'no model'} that says so?", yes)
    public, made = rotate_key(store, key_file, given=given, reason=reason, now=time.time())
    versions = {one.model: one.version for one in made}
    record_command(store, "rotate_key", {"old": old, "new": public, "reason": reason, "versions": versions})
    if as_json:
        print_json({"publisher_key": public, "versions": {one.model: one.version for one in made}})
        return
    _say_published(made, as_json, "names the new key")
    typer.echo(f"  publisher key  {public}")
    typer.echo(f"  old key        {key_file}.old-{old[:16]}: keep it safe, or destroy it if it was stolen")


def _ask(question: str, yes: bool) -> None:
    from rankup.errors import InputError

    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError("nobody is there to be asked", remedy="Add --yes to do it without being asked.")
    typer.confirm(question, abort=True, err=True)


def _summing(draw: OnProgress | None) -> Callable[[int, int], None] | None:
    from rankup.download import PullProgress

    return None if draw is None else lambda done, total: draw(PullProgress("summing", done, total))


def _count(chosen: Sequence[Chosen]) -> str:
    return f"{len(chosen)} contribution{'' if len(chosen) == 1 else 's'}"


def _show(chosen: Sequence[Chosen], limit: int | None = None) -> None:
    from rankup.cli.output import print_table

    rows = [
        (one.version, one.term.contribution[:16], one.term.worker_id, one.term.worker_name, f"{one.term.tokens:,}")
        for one in chosen[:limit]
    ]
    print_table("", ("#version", "contribution", "worker", "name", "#tokens"), rows)
    if limit is not None and len(chosen) > limit:
        typer.echo(f"  and {len(chosen) - limit} more")


def _say_published(made: Sequence[Manifest], as_json: bool, what: str) -> None:
    from rankup.cli.output import print_json
    from rankup.versions import manifest_digest

    if as_json:
        [one] = made
        print_json({"model": one.model, "version": one.version, "manifest": manifest_digest(one), "change": one.change})
        return
    for one in made:
        typer.secho(f"{one.model} version {one.version} is published: it {what}", fg="green")
