"""A publisher's key that was changed, as a volunteer sees it who has pinned the old one."""

from __future__ import annotations

import sys
from pathlib import Path

from rankup.protocol import Enrolled
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.sources import StoreSource
from worker import identity
from worker.publisher import key_follows

sys.path.insert(0, str(Path(__file__).parents[1] / "rankup"))
from history import MODEL, make_history

HISTORY = make_history(versions=2, contributions=1)
OLD = HISTORY.publisher_key
BETWEEN, NEW = (parse_private_key(generate_private_key()) for _ in range(2))
for key in (BETWEEN, NEW):
    HISTORY.rotate(key)
HISTORY.point(len(HISTORY.manifests) - 1)
SOURCE = StoreSource(HISTORY.store)
STRANGER = public_key_hex(parse_private_key(generate_private_key()))


def test_signed_changes_of_key_are_followed_and_nothing_else() -> None:
    new, between = public_key_hex(NEW), public_key_hex(BETWEEN)
    assert key_follows(SOURCE, [MODEL], pinned=OLD, shown=new)
    assert key_follows(SOURCE, [MODEL], pinned=between, shown=new)
    assert key_follows(SOURCE, ["absent", MODEL], pinned=OLD, shown=new)
    for pinned, shown in ((OLD, between), (OLD, STRANGER), (STRANGER, new), (new, OLD)):
        assert not key_follows(SOURCE, [MODEL], pinned=pinned, shown=shown)
    assert not key_follows(SOURCE, [], pinned=OLD, shown=new)
    assert not key_follows(SOURCE, ["absent"], pinned=OLD, shown=new)


def test_a_followed_key_is_pinned_for_the_next_start(tmp_path: Path) -> None:
    folder = identity.open_folder(tmp_path, "http://server")
    answer = Enrolled(worker_id="w-1", token="t", publisher_key=OLD)
    known = identity.save_identity(folder, "http://server", "ada", answer)
    identity.pin(folder, known, STRANGER)
    found = identity.load_identity(folder)
    assert found is not None
    assert (found.publisher_key, found.token, found.name) == (STRANGER, "t", "ada")
    assert folder.identity_file.stat().st_mode & 0o777 == 0o600
