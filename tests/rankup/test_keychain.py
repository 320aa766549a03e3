"""Changes of a publisher's key: who may sign what, for readers who pinned a key at any time."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.errors import InputError, IntegrityError
from rankup.keychain import make_key_change, require_chain, require_trusted
from rankup.records import KeyChange
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex, sign

PRIVATE = [parse_private_key(generate_private_key()) for _ in range(5)]
KEYS = [public_key_hex(private) for private in PRIVATE]
STRANGER = parse_private_key(generate_private_key())
AT = (3, 7, 8, 20)
"""The n-th change brings key n + 1 from this version on."""
CHAIN = tuple(
    make_key_change(PRIVATE[n], KEYS[n + 1], model="toy", from_version=version) for n, version in enumerate(AT)
)


def key_of(version: int) -> int:
    """The number of the key of a version's time."""
    return sum(version >= start for start in AT)


def change(old: Ed25519PrivateKey, new: str, from_version: int, **fields: Any) -> KeyChange:
    return make_key_change(old, new, **({"model": "toy", "from_version": from_version} | fields))


def trusted(pinned: str, signer: str, changes: Any, known: Any, version: int) -> bool:
    """What `open_envelope` does with the keys of one manifest."""
    try:
        require_chain(changes, model="toy", version=version, signer=signer)
        require_trusted(pinned, signer, changes, known, version=version)
    except IntegrityError:
        return False
    return True


@given(version=st.integers(0, 25), pinned=st.integers(0, 4))
@settings(max_examples=60)
def test_whoever_pinned_any_key_up_to_a_versions_time_trusts_that_version(version: int, pinned: int) -> None:
    signer = key_of(version)
    changes = CHAIN[:signer]
    assert trusted(KEYS[pinned], KEYS[signer], changes, (), version) == (pinned <= signer)
    # With what a newer version says, a reader whose key is younger trusts it too.
    assert trusted(KEYS[pinned], KEYS[signer], changes, CHAIN, version)


@given(version=st.integers(0, 25), pinned=st.integers(0, 4), signer=st.integers(0, 4))
@settings(max_examples=120)
def test_with_the_whole_chain_known_only_the_key_of_its_time_or_ones_own_signs_a_version(
    version: int, pinned: int, signer: int
) -> None:
    """A manifest that repeats no changes, as a thief of one key would make it."""
    mine = pinned == signer
    of_its_time = signer == key_of(version) and signer < pinned
    assert trusted(KEYS[pinned], KEYS[signer], (), CHAIN, version) == (mine or of_its_time)


def test_a_thief_of_a_replaced_key_can_sign_nothing_for_who_has_the_new_one() -> None:
    stolen, other = PRIVATE[0], public_key_hex(STRANGER)
    forged = change(stolen, other, 3)
    for version in (0, 2, 3, 5, 30):
        assert not trusted(KEYS[1], other, [forged] if version >= 3 else [], CHAIN, version)
        assert not trusted(KEYS[1], other, [forged] if version >= 3 else [], (forged,), version)
    for version in (3, 5, 30):
        assert not trusted(KEYS[1], KEYS[0], (), CHAIN, version)
    # It cannot hang itself behind the genuine chain either: nobody but key 1 can name its successor.
    statement = CHAIN[1].statement.model_copy(update={"new": other})
    behind = KeyChange(statement=statement, signature=sign(stolen, "key-change", statement))
    assert not trusted(KEYS[0], other, (CHAIN[0], behind), CHAIN, 10)


def test_a_thief_of_the_present_key_can_name_a_successor() -> None:
    """Nothing can tell the thief from the owner: the remedy is another key, pinned by hand."""
    forged = change(PRIVATE[4], public_key_hex(STRANGER), 21)
    assert trusted(KEYS[4], public_key_hex(STRANGER), (*CHAIN, forged), (), 21)
    assert not trusted(public_key_hex(parse_private_key(generate_private_key())), KEYS[4], CHAIN, CHAIN, 21)


def resigned(one: KeyChange, by: Ed25519PrivateKey, **fields: Any) -> KeyChange:
    statement = one.statement.model_copy(update=fields)
    return KeyChange(statement=statement, signature=sign(by, "key-change", statement))


BAD: list[tuple[str, tuple[KeyChange, ...], int, str]] = [
    ("a link skipped", (CHAIN[0], CHAIN[2]), 9, "do not follow"),
    ("two links exchanged", (CHAIN[1], CHAIN[0]), 9, "do not follow"),
    ("a link twice", (CHAIN[0], CHAIN[0]), 9, "do not follow"),
    ("of another model", (change(PRIVATE[0], KEYS[1], 3, model="other"),), 9, "another model"),
    ("one of another model among them", (CHAIN[0], change(PRIVATE[1], KEYS[2], 7, model="other")), 9, "another model"),
    ("from a later version", CHAIN[:2], 6, "from version 7"),
    ("two from one version", (CHAIN[0], change(PRIVATE[1], KEYS[2], 3)), 9, "order"),
    ("back in time", (CHAIN[0], change(PRIVATE[1], KEYS[2], 2)), 9, "order"),
    ("signed by another", (resigned(CHAIN[0], STRANGER),), 9, "not signed by the old"),
    ("signed by the new key", (resigned(CHAIN[0], PRIVATE[1]),), 9, "not signed by the old"),
    ("signed for another version", (CHAIN[0].model_copy(update={"statement": CHAIN[1].statement}),), 9, "not signed"),
    (
        "signed as something else",
        (CHAIN[0].model_copy(update={"signature": sign(PRIVATE[0], "manifest", CHAIN[0].statement)}),),
        9,
        "not signed by the old",
    ),
    ("to itself", (resigned(CHAIN[0], PRIVATE[0], new=KEYS[0]),), 9, "replaced"),
    ("back to a replaced key", (*CHAIN[:2], change(PRIVATE[2], KEYS[0], 8)), 9, "replaced"),
    ("back to its own old key", (CHAIN[0], change(PRIVATE[1], KEYS[0], 7)), 9, "replaced"),
]


@pytest.mark.parametrize(("changes", "version", "says"), [pytest.param(c, v, s, id=i) for i, c, v, s in BAD])
def test_changes_are_refused(changes: tuple[KeyChange, ...], version: int, says: str) -> None:
    with pytest.raises(IntegrityError, match=says):
        require_chain(changes, model="toy", version=version, signer=changes[-1].statement.new)


def test_a_manifest_is_signed_by_the_last_of_its_keys() -> None:
    require_chain(CHAIN, model="toy", version=20, signer=KEYS[4])
    for signer in (*KEYS[:4], public_key_hex(STRANGER)):
        with pytest.raises(IntegrityError, match="replaced"):
            require_chain(CHAIN, model="toy", version=20, signer=signer)


def test_known_changes_that_are_forged_lead_nowhere() -> None:
    other = public_key_hex(STRANGER)
    forged = resigned(CHAIN[0], STRANGER, old=other)
    assert trusted(KEYS[1], KEYS[0], (), CHAIN, 2)
    assert not trusted(KEYS[1], other, (), (resigned(CHAIN[0], PRIVATE[0], old=other),), 2)
    assert not trusted(KEYS[2], other, (), (forged, resigned(CHAIN[1], STRANGER, old=KEYS[1])), 2)


@given(position=st.integers(0, 63), link=st.integers(0, 3))
@settings(max_examples=30)
def test_one_digit_of_any_signature_makes_the_chain_worthless(position: int, link: int) -> None:
    signature = CHAIN[link].signature
    digit = "0" if signature[position] != "0" else "1"
    damaged = CHAIN[link].model_copy(update={"signature": signature[:position] + digit + signature[position + 1 :]})
    changes = (*CHAIN[:link], damaged, *CHAIN[link + 1 :])
    with pytest.raises(IntegrityError, match="not signed by the old"):
        require_chain(changes, model="toy", version=20, signer=KEYS[4])


def test_a_key_cannot_follow_itself() -> None:
    with pytest.raises(InputError, match="old one"):
        make_key_change(PRIVATE[0], KEYS[0], model="toy", from_version=1)
