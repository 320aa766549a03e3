"""Keys and signatures."""

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup import signing
from rankup.errors import InputError, IntegrityError, SetupError, StateError
from rankup.protocol import DeviceProfile

MESSAGE = DeviceProfile(name="a machine")
# RFC 8032, 7.1, test 1: the public key that belongs to this seed.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def test_the_public_key_is_the_one_of_rfc_8032() -> None:
    assert signing.public_key_hex(signing.Ed25519PrivateKey.from_private_bytes(SEED)) == PUBLIC


def test_the_signature_covers_the_dsse_encoding_and_is_deterministic() -> None:
    key = signing.Ed25519PrivateKey.from_private_bytes(SEED)
    expected = key.sign(b"DSSEv1 36 application/vnd.rankup.enrol.v1+json 5 hello").hex()
    assert len("application/vnd.rankup.enrol.v1+json") == 36
    assert signing.sign_bytes(key, "enrol", b"hello") == expected == signing.sign_bytes(key, "enrol", b"hello")


def test_a_signature_holds_for_its_key_kind_and_message_only() -> None:
    key = signing.parse_private_key(signing.generate_private_key())
    public = signing.public_key_hex(key)
    signature = signing.sign(key, "submit", MESSAGE)
    signing.verify(public, "submit", MESSAGE, signature)
    other = signing.public_key_hex(signing.parse_private_key(signing.generate_private_key()))
    for wrong in ((other, "submit", MESSAGE), (public, "enrol", MESSAGE), (public, "submit", DeviceProfile(name="b"))):
        with pytest.raises(IntegrityError):
            signing.verify(*wrong, signature)


@given(position=st.integers(0, 511))
def test_no_bit_of_a_signature_may_change(position: int) -> None:
    key = signing.Ed25519PrivateKey.from_private_bytes(SEED)
    signature = int(signing.sign(key, "submit", MESSAGE), 16) ^ (1 << position)
    with pytest.raises(IntegrityError):
        signing.verify(PUBLIC, "submit", MESSAGE, f"{signature:0128x}")


@pytest.mark.parametrize(
    ("key", "signature"),
    [
        pytest.param("zz" * 32, "00" * 64, id="key is not hex"),
        pytest.param(PUBLIC[:-2], "00" * 64, id="key is too short"),
        pytest.param(PUBLIC.upper(), "00" * 64, id="key in upper case"),
        pytest.param(PUBLIC, "00" * 63, id="signature is too short"),
        pytest.param(PUBLIC, "0 " * 64, id="signature with spaces"),
    ],
)
def test_malformed_keys_and_signatures_are_bad_input(key: str, signature: str) -> None:
    with pytest.raises(InputError):
        signing.verify(key, "submit", MESSAGE, signature)


def test_a_saved_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "new" / "publisher.key"
    pem = signing.generate_private_key()
    signing.save_private_key(path, pem)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signing.public_key_hex(signing.load_private_key(path)) == signing.public_key_hex(
        signing.parse_private_key(pem)
    )
    with pytest.raises(StateError):
        signing.save_private_key(path, signing.generate_private_key())
    assert path.read_bytes() == pem


def test_what_is_no_private_key_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="absent"):
        signing.load_private_key(tmp_path / "absent.key")
    large = tmp_path / "large.key"
    large.write_bytes(b"-" * 100_000)
    with pytest.raises(InputError, match="above"):
        signing.load_private_key(large)
    with pytest.raises(InputError):
        signing.parse_private_key(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")


def test_a_key_of_another_kind_is_refused() -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    pem = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(InputError, match="another kind"):
        signing.parse_private_key(pem)


def test_a_worker_is_named_after_its_key() -> None:
    import hashlib

    assert signing.worker_id_of(PUBLIC) == "w-" + hashlib.sha256(bytes.fromhex(PUBLIC)).hexdigest()[:16]
