"""Whether a publisher's new key is vouched for by the one that was pinned, as far as the server's versions show it.

What always holds: nothing but a manifest that the new key signed, and that repeats signed changes of key leading from
the pinned one to it (`rankup.keychain`), makes the new key trusted; what cannot be read proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rankup.errors import RankupError
from rankup.sources import Patience, Source, patiently
from rankup.versions import open_envelope

_PATIENCE = Patience(attempts=4)


def key_follows(source: Source, models: Sequence[str], *, pinned: str, shown: str) -> bool:
    """Whether the latest version of one of `models` leads from the key `pinned` to `shown` (both hex)."""
    return any(_leads(source, model, pinned, shown) for model in models)


def _leads(source: Source, model: str, pinned: str, shown: str) -> bool:
    try:
        pointer = patiently(lambda: source.latest(model), _PATIENCE)
        envelope = patiently(lambda: source.envelope(model, pointer.version), _PATIENCE)
        return open_envelope(envelope, publisher_key=pinned)[2] == shown
    except RankupError:
        return False
