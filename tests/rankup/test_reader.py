"""What a reader pins, follows and refuses, over several pulls into one folder."""

from pathlib import Path
from typing import Any

import pytest
from history import MODEL, History, make_history

from rankup import folder
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.pull import Pulled, StoreSource, pull
from rankup.reader import Reader
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex
from rankup.sources import Patience
from rankup.versions import manifest_digest

QUICK = Patience(attempts=2, first_pause_s=0.01, longest_pause_s=0.02)


def new_key() -> Ed25519PrivateKey:
    return parse_private_key(generate_private_key())


@pytest.fixture
def history() -> History:
    """Versions 0 to 2 by the first key, 3 by the second."""
    made = make_history(contributions=1)
    made.rotate(new_key())
    return made


def fetch(history: History, to: Path, version: int | str | None = None, **options: Any) -> Pulled:
    return pull(StoreSource(history.store), MODEL, version, to, patience=QUICK, **options)


def state_of(to: Path) -> folder.FolderState:
    state = folder.read_folder_state(to)
    assert state is not None
    return state


def first_key(history: History) -> str:
    return history.manifests[-1].keys[0].statement.old


def test_the_pin_follows_the_publisher_to_a_new_key(history: History, tmp_path: Path) -> None:
    assert fetch(history, tmp_path, 2).publisher_key == first_key(history)
    assert state_of(tmp_path).publisher_key == first_key(history)
    assert fetch(history, tmp_path).publisher_key == history.publisher_key
    state = state_of(tmp_path)
    assert (state.publisher_key, state.keys, state.latest) == (history.publisher_key, history.manifests[3].keys, 3)


def test_an_old_version_opens_with_its_old_key_and_does_not_move_the_pin_back(history: History, tmp_path: Path) -> None:
    fetch(history, tmp_path)
    for _ in range(2):
        assert fetch(history, tmp_path, 1).publisher_key == first_key(history)
        state = state_of(tmp_path)
        assert (state.publisher_key, len(state.keys), state.version) == (history.publisher_key, 1, 1)
    assert fetch(history, tmp_path).manifest.version == 3


def test_a_key_that_was_replaced_signs_nothing_new(history: History, tmp_path: Path) -> None:
    old = make_history(contributions=1)
    stolen, published = old.key, old.manifests[-1]
    old.rotate(new_key())
    fetch(old, tmp_path)
    forged = published.model_copy(update={"version": 4, "parent": manifest_digest(old.manifests[3])})
    old.manifests.append(forged)
    old.publish(forged, key=stolen)
    old.point(4)
    with pytest.raises(IntegrityError, match="publisher's key here"):
        fetch(old, tmp_path)


def test_two_changes_of_key_are_followed_at_once(history: History, tmp_path: Path) -> None:
    fetch(history, tmp_path, 2)
    history.rotate(new_key())
    assert fetch(history, tmp_path).publisher_key == history.publisher_key
    for version, key in ((3, history.manifests[-1].keys[0].statement.new), (2, first_key(history))):
        assert fetch(history, tmp_path, version).publisher_key == key


def test_an_old_key_that_is_named_again_is_still_the_same_publisher(history: History, tmp_path: Path) -> None:
    """A script that always says `--key` with the first key keeps its protection against going back."""
    for _ in range(2):
        fetch(history, tmp_path, publisher_key=first_key(history))
        assert state_of(tmp_path).publisher_key == history.publisher_key
    history.point(2)
    with pytest.raises(IntegrityError, match="was 3"):
        fetch(history, tmp_path, publisher_key=first_key(history))


def test_a_new_key_that_is_named_keeps_what_was_seen_where_the_old_one_vouches_for_it(
    history: History, tmp_path: Path
) -> None:
    fetch(history, tmp_path, 2)
    fetch(history, tmp_path, publisher_key=history.publisher_key)
    assert set(state_of(tmp_path).known) == {1, 2, 3}
    history.publish(history.manifests[1].model_copy(update={"licence": "other"}))
    with pytest.raises(IntegrityError, match="rewritten"):
        fetch(history, tmp_path, 1)


def test_an_old_version_opens_for_who_knows_only_the_new_key(history: History, tmp_path: Path) -> None:
    assert fetch(history, tmp_path, 1, publisher_key=history.publisher_key).manifest.version == 1
    assert state_of(tmp_path).publisher_key == history.publisher_key
    with pytest.raises(IntegrityError, match="publisher's key here"):
        fetch(history, tmp_path / "other", 1, publisher_key=public_key_hex(new_key()))


def test_a_digest_names_a_version(history: History, tmp_path: Path) -> None:
    for version in (0, 2, 3):
        digest = manifest_digest(history.manifests[version])
        assert fetch(history, tmp_path / str(version), digest[:8]).manifest.version == version
        assert fetch(history, tmp_path / "0", digest).digest == digest
    with pytest.raises(NotFoundError, match="begins with"):
        fetch(history, tmp_path / "0", "00" * 32)
    for wrong in ("abc", "x" * 8, "0" * 65):
        with pytest.raises(InputError):
            fetch(history, tmp_path / "0", wrong)


def test_a_reader_that_has_read_nothing_has_nothing_to_remember(history: History) -> None:
    with pytest.raises(InputError):
        Reader(StoreSource(history.store), MODEL).remembered(None)
