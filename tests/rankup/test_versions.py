"""Sealing manifests and the rules of trust, in their order."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from history import MODEL, make_history
from hypothesis import given
from hypothesis import strategies as st

from rankup import versions
from rankup.errors import InputError, IntegrityError, RankupError, TooLargeError
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.records import Manifest
from rankup.signing import generate_private_key, parse_private_key, public_key_hex, sign_bytes

HISTORY = make_history()
KEY = HISTORY.publisher_key
STRANGER = parse_private_key(generate_private_key())
D = "ab" * 32


def envelope_of(payload: bytes, *, key: Any = HISTORY.key, kind: str = "manifest", keyid: str | None = None) -> bytes:
    """An envelope around any payload, with a good signature."""
    signature = base64.b64encode(bytes.fromhex(sign_bytes(key, kind, payload))).decode()
    return json.dumps(
        {
            "payloadType": f"application/vnd.rankup.{kind}.v1+json",
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": keyid or public_key_hex(key), "sig": signature}],
        }
    ).encode()


def test_keys_have_the_documented_layout() -> None:
    assert versions.pointer_key("m") == "models/m/latest"
    assert versions.manifest_key("m", 7) == "models/m/versions/000007.json"
    assert versions.round_key("r") == "rounds/r/round.json"
    assert versions.draft_key("r") == "rounds/r/folded.json"
    assert versions.receipt_key("r", D) == f"rounds/r/receipts/{D}.json"
    assert versions.dataset_key("d") == "datasets/d/card.json"
    assert versions.heldout_key("d", D) == f"datasets/d/heldout/{D}.jsonl"
    assert versions.upload_key("l", D) == f"uploads/l/{D}.delta"


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a\n", ".hidden", "a" * 65])
def test_no_name_from_outside_leaves_its_place_in_the_layout(name: str) -> None:
    with pytest.raises(InputError):
        versions.pointer_key(name)


@given(st.integers(0, 10**9))
def test_the_version_can_be_read_from_its_key(version: int) -> None:
    assert versions.version_of_key(versions.manifest_key("m", version)) == version


@pytest.mark.parametrize(
    "key", ["models/m/latest", "models/m/versions/x.json", "models/m/versions/", "versions/1.json"]
)
def test_other_keys_name_no_version(key: str) -> None:
    assert versions.version_of_key(key) is None


@pytest.mark.parametrize("publisher_key", [KEY, None], ids=["pinned", "first contact"])
def test_what_was_sealed_opens_to_the_same_manifest(publisher_key: str | None) -> None:
    for manifest in HISTORY.manifests:
        data = versions.seal(manifest, HISTORY.key)
        opened, digest, key = versions.open_envelope(data, publisher_key=publisher_key)
        assert opened == manifest
        assert digest == versions.manifest_digest(manifest) == hashlib.sha256(canonical_json(manifest)).hexdigest()
        assert key == KEY
        assert data == versions.seal(manifest, HISTORY.key)


def test_the_manifest_of_the_first_release_opens_for_ever() -> None:
    data = (Path(__file__).parent / "golden" / "small.manifest.json").read_bytes()
    publisher_key = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"  # RFC 8032, 7.1, test 1
    manifest, digest, _ = versions.open_envelope(data, publisher_key=publisher_key)
    assert digest == "b27619480391680ecdfb1572174953fa37c71b50f72eeb1fc588ab795d9f2f69"
    assert (manifest.model, manifest.version, manifest.terms[0].worker_name) == ("toy", 1, "Zoë")


@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_an_envelope_is_noticed(position: int, bit: int) -> None:
    data = bytearray(versions.seal(HISTORY.manifests[2], HISTORY.key))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(IntegrityError):
        versions.open_envelope(bytes(data), publisher_key=KEY)


@given(st.binary(max_size=200))
def test_any_bytes_give_one_of_our_errors(data: bytes) -> None:
    with pytest.raises(RankupError):
        versions.open_envelope(data, publisher_key=None)
    with pytest.raises(RankupError):
        versions.parse_pointer(data, model="m")


def test_an_envelope_above_the_limit_is_not_parsed() -> None:
    with pytest.raises(TooLargeError):
        versions.open_envelope(b"[" * (versions.MAX_ENVELOPE_BYTES + 1), publisher_key=None)
    with pytest.raises(TooLargeError):
        versions.parse_pointer(b"[" * (versions.MAX_POINTER_BYTES + 1), model="m")


PAYLOAD = canonical_json(HISTORY.manifests[1])
GOOD = json.loads(envelope_of(PAYLOAD))

BAD_ENVELOPES: list[tuple[str, bytes, str]] = [
    ("signed by somebody else", envelope_of(PAYLOAD, key=STRANGER), "publisher's key"),
    ("names our key, signed by another", envelope_of(PAYLOAD, key=STRANGER, keyid=KEY), "not signed"),
    ("a signature for another kind", envelope_of(PAYLOAD, kind="receipt"), "not a manifest"),
    ("kind renamed after signing", envelope_of(PAYLOAD, kind="receipt").replace(b"receipt", b"manifest"), "not signed"),
    ("no signature", json.dumps({**GOOD, "signatures": []}).encode(), "0 signatures"),
    ("two signatures", json.dumps({**GOOD, "signatures": GOOD["signatures"] * 2}).encode(), "2 signatures"),
    ("a field that nobody knows", json.dumps({**GOOD, "x": 1}).encode(), "not an envelope"),
    ("payload is not base64", json.dumps({**GOOD, "payload": "!!"}).encode(), "base64"),
    ("key is not hex", json.dumps(GOOD).replace(KEY, "z" * 64).encode(), "malformed"),
    ("deeply nested", b"[" * 100_000, "not an envelope"),
    ("signed spaces", envelope_of(PAYLOAD + b" "), "canonical"),
    ("signed duplicate field", envelope_of(PAYLOAD[:-1] + b',"version":1}'), "manifest|canonical"),
    (
        "signed other spelling of a number",
        envelope_of(PAYLOAD.replace(b'"created_at":1.0', b'"created_at":1')),
        "canon",
    ),
    ("signed nonsense", envelope_of(b"{}"), "can read"),
    ("signed not a number", envelope_of(PAYLOAD.replace(b'"created_at":1.0', b'"created_at":NaN')), "can read"),
    ("signed lone surrogate", envelope_of(PAYLOAD.replace(b'"licence":"A', b'"licence":"\\ud800')), "can read"),
    ("signed unsafe file name", envelope_of(PAYLOAD.replace(b'"README.md"', b'"../README.md"')), "can read"),
]


@pytest.mark.parametrize(("data", "says"), [pytest.param(d, s, id=i) for i, d, s in BAD_ENVELOPES])
def test_an_envelope_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(IntegrityError, match=says):
        versions.open_envelope(data, publisher_key=KEY)


def changed(**fields: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: manifest.model_copy(update=fields)


def with_group(**fields: Any) -> Callable[[Manifest], Manifest]:
    return lambda m: m.model_copy(update={"groups": (m.groups[0].model_copy(update=fields), *m.groups[1:])})


def with_tensor(name: str, **fields: Any) -> Callable[[Manifest], Manifest]:
    return lambda m: m.model_copy(update={"tensors": {**m.tensors, name: m.tensors[name].model_copy(update=fields)}})


def renamed_export(path: str) -> Callable[[Manifest], Manifest]:
    return lambda m: with_group(export=m.groups[0].export.model_copy(update={"path": path}))(m)


INCONSISTENT: list[tuple[str, Callable[[Manifest], Manifest], str]] = [
    (
        "a tensor in two groups",
        with_group(tensors=("layers.0.down.weight", "layers.0.up.weight", "steps")),
        "more than",
    ),
    ("a tensor twice in its group", with_group(tensors=("layers.0.up.weight", "layers.0.up.weight")), "more than one"),
    ("a tensor in no group", with_group(tensors=("layers.0.down.weight",)), "not in both"),
    ("a group with an unknown tensor", with_group(tensors=("layers.0.down.weight", "layers.0.up.weight", "x")), "both"),
    ("two files of one name", renamed_export("README.md"), "name"),
    ("two names that differ in case", renamed_export("readme.MD"), "name"),
    ("a negative shape", with_tensor("steps", shape=(-5,)), "shape"),
    ("a delta for a vector", with_tensor("steps", role="linear"), "cannot be what it is called"),
    ("a momentum without its file", with_tensor("layers.0.up.weight", momentum="ab" * 32), "without its file"),
    (
        "a momentum that the recipe does not keep",
        lambda m: with_group(momentum=m.groups[0].master)(with_tensor(m.groups[0].tensors[0], momentum="ab" * 32)(m)),
        "keeps none",
    ),
    ("terms in another order", lambda m: changed(terms=m.terms[::-1])(m), "sorted"),
    ("a term twice", lambda m: changed(terms=(m.terms[0], *m.terms))(m), "sorted"),
    ("no parent", changed(parent=None), "parent"),
    ("version 0 with a parent", changed(version=0), "parent"),
    ("version 0 with terms", changed(version=0, parent=None), "terms"),
    (
        "one digest with two sizes",
        lambda m: with_group(master=m.groups[0].master.model_copy(update={"sha256": m.groups[0].export.sha256}))(m),
        "two sizes",
    ),
]


@pytest.mark.parametrize(("change", "says"), [pytest.param(c, s, id=i) for i, c, s in INCONSISTENT])
def test_an_inconsistent_manifest_is_neither_sealed_nor_opened(
    change: Callable[[Manifest], Manifest], says: str
) -> None:
    manifest = change(HISTORY.manifests[1])
    with pytest.raises(IntegrityError, match=says):
        versions.seal(manifest, HISTORY.key)
    with pytest.raises(IntegrityError, match=says):
        versions.open_envelope(envelope_of(canonical_json(manifest)), publisher_key=KEY)


def test_another_model_version_or_digest_than_asked_for_is_refused() -> None:
    manifest, digest = HISTORY.manifests[1], versions.manifest_digest(HISTORY.manifests[1])
    versions.require_asked(manifest, digest, model=MODEL, version=1, pointed=digest)
    for model, version in (("other", 1), (MODEL, 2)):
        with pytest.raises(IntegrityError):
            versions.require_asked(manifest, digest, model=model, version=version)
    with pytest.raises(IntegrityError, match="pointer"):
        versions.require_asked(manifest, digest, model=MODEL, version=1, pointed=D)


def pointer(version: int, manifest: str = D) -> Pointer:
    return Pointer(model=MODEL, version=version, manifest=manifest, updated_at=0.0)


def admit_all(history: versions.History, *numbers: int) -> versions.History:
    for number in numbers:
        manifest = HISTORY.manifests[number]
        history = history.admit(manifest, versions.manifest_digest(manifest), as_latest=True)
    return history


@given(st.lists(st.integers(0, 2), max_size=6).map(sorted))
def test_admitting_versions_again_changes_nothing(numbers: list[int]) -> None:
    once = admit_all(versions.History(), *numbers)
    assert admit_all(once, *numbers[-1:]) == once
    assert once.latest == (numbers[-1] if numbers else None)


def test_latest_never_goes_back_but_an_older_number_may_be_asked_for() -> None:
    history = admit_all(versions.History(), 2)
    with pytest.raises(IntegrityError, match="was 2") as caught:
        history.require_pointer(pointer(1))
    assert "--version 1" in caught.value.remedy
    with pytest.raises(IntegrityError):
        admit_all(history, 1)
    manifest = HISTORY.manifests[1]
    assert history.admit(manifest, versions.manifest_digest(manifest), as_latest=False).latest == 2


def test_a_version_keeps_its_digest_for_ever() -> None:
    history = admit_all(versions.History(), 1)
    with pytest.raises(IntegrityError, match="rewritten"):
        history.require_pointer(pointer(1))
    other = HISTORY.manifests[1].model_copy(update={"licence": "MIT"})
    with pytest.raises(IntegrityError, match="rewritten"):
        history.admit(other, versions.manifest_digest(other), as_latest=True)


def test_the_parent_of_a_version_is_the_one_before_it() -> None:
    orphan = HISTORY.manifests[2].model_copy(update={"parent": D})
    with pytest.raises(IntegrityError, match="rewritten"):
        admit_all(versions.History(), 1).admit(orphan, versions.manifest_digest(orphan), as_latest=True)
    # Seen the other way round: version 2 tells which version 1 is the right one.
    other = HISTORY.manifests[1].model_copy(update={"licence": "MIT"})
    with pytest.raises(IntegrityError, match="rewritten"):
        admit_all(versions.History(), 2).admit(other, versions.manifest_digest(other), as_latest=False)


def test_a_pointer_of_another_model_is_refused() -> None:
    data = canonical_json(pointer(1))
    assert versions.parse_pointer(data, model=MODEL).version == 1
    with pytest.raises(IntegrityError):
        versions.parse_pointer(data, model="other")


def test_a_round_changes_values_only() -> None:
    parent, child = HISTORY.manifests[:2]
    versions.require_same_tensors(child, parent)
    fewer = {name: entry for name, entry in child.tensors.items() if name != "steps"}
    for tensors in (fewer, with_tensor("steps", shape=(6,))(child).tensors):
        with pytest.raises(IntegrityError, match="steps"):
            versions.require_same_tensors(child.model_copy(update={"tensors": tensors}), parent)
