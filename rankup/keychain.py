"""Changes of a publisher's key: each signed by the key before it, all of them repeated in every manifest that follows.

Rules, in the order in which they are checked; the first that fails raises IntegrityError:

 1. The changes in a manifest are of its model, each begins with the key that the one before ended with, at a higher
    version, none later than the manifest's own; no key comes a second time; every change is signed by its old key.
 2. The manifest is signed by the last new key of its changes.
 3. The reader's key is the signer; or one of the changes in the manifest begins with it (the publisher has a new key,
    and the reader's own vouches for it); or changes that the reader knows lead from the signer to the reader's key and
    the version lies before the first of them and not before the change that brought the signer (an old version, signed
    by the key of its time).

So a key that was replaced can sign nothing new, and one that was never named can sign nothing at all. A stolen key can
name a successor: whoever learns of that pins another key by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rankup.errors import InputError, IntegrityError
from rankup.records import KeyChange, KeyStatement
from rankup.signing import Ed25519PrivateKey, public_key_hex, sign, verify

KIND = "key-change"


def make_key_change(old: Ed25519PrivateKey, new: str, *, model: str, from_version: int) -> KeyChange:
    """The statement that `new` (public key, hex) signs from `from_version` on, signed by the private key `old`.

    Raises InputError when both are one key.
    """
    if public_key_hex(old) == new:
        raise InputError("the new key is the old one", remedy="Make another key, or leave the old one in place.")
    statement = KeyStatement(model=model, old=public_key_hex(old), new=new, from_version=from_version)
    return KeyChange(statement=statement, signature=sign(old, KIND, statement))


def require_chain(changes: Sequence[KeyChange], *, model: str, version: int, signer: str) -> None:
    """Rules 1 and 2, for the changes in the manifest of `version` that `signer` (hex) signed."""
    statements = [change.statement for change in changes]
    if any(statement.model != model for statement in statements):
        raise IntegrityError(f"the manifest of {model} repeats a change of key of another model")
    if any(first.new != second.old for first, second in itertools.pairwise(statements)):
        raise IntegrityError("the changes of the publisher's key do not follow each other")
    keys = [*(statement.old for statement in statements), *(statement.new for statement in statements[-1:])]
    if len(set(keys)) != len(keys):
        raise IntegrityError("the changes of the publisher's key come back to a key that was replaced")
    if any(first.from_version >= second.from_version for first, second in itertools.pairwise(statements)):
        raise IntegrityError("the changes of the publisher's key are not in the order of their versions")
    if statements and statements[-1].from_version > version:
        raise IntegrityError(f"version {version} repeats a change of key from version {statements[-1].from_version}")
    for change in changes:
        _require_signed(change)
    if statements and statements[-1].new != signer:
        raise IntegrityError(f"version {version} is signed by {signer[:16]}…, which its changes of key replaced")


def require_trusted(
    pinned: str, signer: str, changes: Sequence[KeyChange], known: Sequence[KeyChange], *, version: int
) -> None:
    """Rule 3, for a reader who has pinned `pinned` (hex) and knows the changes `known` from a newer version."""
    if pinned == signer or any(change.statement.old == pinned for change in changes):
        return
    path = [change.statement for change in known]
    for start, statement in enumerate(path):
        begins = path[start - 1].from_version if start else 0
        ends = [place for place in range(start, len(path)) if path[place].new == pinned]
        if statement.old == signer and begins <= version < statement.from_version and ends:
            last = path[ends[0]]
            require_chain(known[start : ends[0] + 1], model=statement.model, version=last.from_version, signer=pinned)
            return
    raise IntegrityError(
        f"the manifest is signed by {signer[:16]}…, but the publisher's key here is {pinned[:16]}…",
        remedy="If the publisher announced a new key, name it with --key; otherwise do not use this version.",
    )


def _require_signed(change: KeyChange) -> None:
    try:
        verify(change.statement.old, KIND, change.statement, change.signature)
    except IntegrityError as exc:
        raise IntegrityError(
            f"a change of the publisher's key is not signed by the old key {change.statement.old[:16]}…"
        ) from exc
