"""A new key for the publisher: every model gets a version that names it, signed by the old key's statement.

    the new key is saved beside the old one, as <file>.next
    every model gets a version with change "key-rotation", sealed by the new key; all that follow must be, too
    the old key is kept as <file>.old-<first digits of its public half>, and the new one takes its place

What always holds: each step is found done when it is done again, so after a crash the same command goes on with the
same new key; the key file is replaced last, by one rename. In between nobody can publish what readers would refuse: a
round that holds the old key is told to come again (`aggregator.published.require_signer`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aggregator.published import Published, leaves_in
from aggregator.undo import change_draft, publish_change
from rankup.durable import sync_folder, write_file
from rankup.errors import InputError, SetupError, StateError
from rankup.keychain import make_key_change
from rankup.records import KeyRotation, Manifest
from rankup.signing import (
    Ed25519PrivateKey,
    generate_private_key,
    load_private_key,
    parse_private_key,
    public_key_hex,
    save_private_key,
)
from rankup.store import Store

MAX_CHANGES = 64
"""Of the key, in a manifest."""


def models_of(store: Store) -> list[str]:
    """Names of the models that have a published version, sorted."""
    parts = (key.split("/") for key in store.list("models/"))
    return sorted({part[1] for part in parts if len(part) == 3 and part[2] == "latest"})


def prepare_key(key_file: Path, given: bytes | None = None) -> Ed25519PrivateKey:
    """The new key, saved beside the old one: `given` (PEM), the one that a rotation before left there, or a fresh one.

    Raises InputError (not a key, or the old one), StateError (another rotation stopped half-way with another key).
    """
    old, following = load_private_key(key_file), _beside(key_file, "next")
    if given is not None and public_key_hex(parse_private_key(given)) == public_key_hex(old):
        raise InputError("the new key is the old one", remedy="Give another key, or none: then one is made.")
    if not following.exists():
        save_private_key(following, given if given is not None else generate_private_key())
        sync_folder(following.parent)
    new = load_private_key(following)
    if given is not None and public_key_hex(parse_private_key(given)) != public_key_hex(new):
        raise StateError(
            f"a rotation to another key stopped half-way: {following}",
            remedy="Run the command without --new-key: it goes on with that key.",
        )
    return new


def rotate_model(
    store: Store,
    old: Ed25519PrivateKey,
    new: Ed25519PrivateKey,
    *,
    model: str,
    reason: str = "",
    now: float,
) -> Manifest:
    """Publish the version of `model` that is the first one signed by `new`; where there is one, return the latest.

    Raises InputError (a key of an earlier time, too many changes), ConflictError, and what the store raises.
    """
    public = public_key_hex(new)

    def draft(latest: Published) -> Manifest | None:
        before = latest.manifest
        if before.keys and before.keys[-1].statement.new == public:
            return None
        if any(public in (change.statement.old, change.statement.new) for change in before.keys):
            raise InputError(f"{model} was signed by this key before: {public[:16]}…", remedy="Make a fresh key.")
        if len(before.keys) >= MAX_CHANGES:
            raise InputError(f"{model} has had {MAX_CHANGES} changes of key, and a manifest names no more")
        version = before.version + 1
        leaves = leaves_in(store, before, publisher_key=public_key_hex(old))
        made = change_draft(store, latest, before, KeyRotation(reason=reason), leaves, now)
        change = make_key_change(old, public, model=model, from_version=version)
        return made.model_copy(update={"keys": (*before.keys, change)})

    return publish_change(store, new, model, draft, known_key=public_key_hex(old))


def rotate_key(
    store: Store,
    key_file: Path,
    *,
    given: bytes | None = None,
    reason: str = "",
    now: float,
    done: Callable[[Manifest], None] | None = None,
) -> tuple[str, list[Manifest]]:
    """Give every model of the store a new key, then put that into `key_file`; the public half and the new versions.

    `done` is called after each model. Raises what `prepare_key` and `rotate_model` raise, and SetupError (the key file
    cannot be replaced).
    """
    new = prepare_key(key_file, given)
    old = load_private_key(key_file)
    rotated: dict[str, Manifest] = {}
    # A model may have been imported meanwhile, with the old key.
    while missing := [model for model in models_of(store) if model not in rotated]:
        for model in missing:
            rotated[model] = rotate_model(store, old, new, model=model, reason=reason, now=now)
            if done is not None:
                done(rotated[model])
    _replace(key_file, public_key_hex(old))
    return public_key_hex(new), [rotated[model] for model in sorted(rotated)]


def _replace(key_file: Path, old: str) -> None:
    try:
        write_file(_beside(key_file, f"old-{old[:16]}"), key_file.read_bytes())
        _beside(key_file, "next").replace(key_file)
        sync_folder(key_file.parent)
    except OSError as exc:
        raise SetupError(
            f"cannot replace {key_file}: {exc.strerror}",
            remedy="Make its folder writable and run the command again: it goes on where it stopped.",
        ) from exc


def _beside(key_file: Path, suffix: str) -> Path:
    return key_file.with_name(f"{key_file.name}.{suffix}")
