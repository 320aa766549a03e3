"""Ed25519 keys and signatures: the only place that talks to `cryptography`.

What always holds:
- a signature covers the DSSE pre-authentication encoding of a kind and a payload, so a signature made for one kind
  ("enrol", "submit", "manifest", "receipt") is worthless for every other;
- keys and signatures travel as lower-case hex (32 and 64 bytes), private keys only as PEM (PKCS8) in a file of mode
  600;
- Ed25519 (RFC 8032) is deterministic: the same key and the same bytes give the same signature.

It knows nothing of what is signed, keeps no key in memory and encrypts nothing.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel

from rankup.errors import InputError, IntegrityError, SetupError, StateError
from rankup.message import canonical_json
from rankup.protocol import pre_authentication_encoding

MAX_KEY_FILE_BYTES = 16 * 1024

__all__ = [
    "Ed25519PrivateKey",
    "generate_private_key",
    "load_private_key",
    "parse_private_key",
    "public_key_hex",
    "save_private_key",
    "sign",
    "sign_bytes",
    "verify",
    "verify_bytes",
    "worker_id_of",
]


def generate_private_key() -> bytes:
    """A fresh Ed25519 private key from the system's randomness, as unencrypted PEM (PKCS8)."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def parse_private_key(pem: bytes) -> Ed25519PrivateKey:
    """The key in a PEM file.

    Raises:
        InputError: it is not an unencrypted Ed25519 private key.
    """
    remedy = "Give an unencrypted Ed25519 private key in PEM (PKCS8), as `rankup` makes them."
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise InputError(f"not a readable private key: {exc}", remedy=remedy) from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"a private key of another kind: {type(key).__name__}", remedy=remedy)
    return key


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key file.

    Raises:
        SetupError: there is no such file, or it cannot be read.
        InputError: it holds something else than an unencrypted Ed25519 private key.
    """
    try:
        with path.open("rb") as file:
            pem = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as exc:
        raise SetupError(f"cannot read the private key {path}: {exc.strerror}", remedy="Check the path.") from exc
    if len(pem) > MAX_KEY_FILE_BYTES:
        raise InputError(f"{path} is above {MAX_KEY_FILE_BYTES} bytes: not a private key")
    return parse_private_key(pem)


def save_private_key(path: Path, pem: bytes) -> None:
    """Write a new private key file that only its owner can read (mode 600), durably; never over an existing one.

    Raises:
        StateError: the file exists already.
        SetupError: the folder cannot be written.
        InputError: `pem` is not an unencrypted Ed25519 private key.
    """
    parse_private_key(pem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as exc:
        raise StateError(
            f"{path} exists: a key is never overwritten", remedy="Use it, or move it away and keep it safe."
        ) from exc
    except OSError as exc:
        raise SetupError(f"cannot write {path}: {exc.strerror}", remedy="Choose a folder that you may write.") from exc
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())


def public_key_hex(private: Ed25519PrivateKey) -> str:
    """The public half, 32 bytes in hex."""
    return private.public_key().public_bytes_raw().hex()


def worker_id_of(public_hex: str) -> str:
    """The name that a public key gives its worker: `w-` and the first 16 hex digits of the sha256 of its 32 bytes.

    Raises:
        InputError: not 32 bytes in hex.
    """
    return "w-" + hashlib.sha256(_unhex(public_hex, 32, "public key")).hexdigest()[:16]


def sign(private: Ed25519PrivateKey, kind: str, message: BaseModel) -> str:
    """Signature, in hex, of `message` as a `kind`."""
    return sign_bytes(private, kind, canonical_json(message))


def sign_bytes(private: Ed25519PrivateKey, kind: str, payload: bytes) -> str:
    """Signature, in hex, of bytes that are already canonical."""
    return private.sign(pre_authentication_encoding(kind, payload)).hex()


def verify(public_hex: str, kind: str, message: BaseModel, signature_hex: str) -> None:
    """Return if `signature_hex` is the key's signature of `message` as a `kind`.

    Raises:
        IntegrityError: it is not.
        InputError: the key or the signature is not hex of the right length.
    """
    verify_bytes(public_hex, kind, canonical_json(message), signature_hex)


def verify_bytes(public_hex: str, kind: str, payload: bytes, signature_hex: str) -> None:
    """Like `verify`, for bytes that were received as they are."""
    key = _unhex(public_hex, 32, "public key")
    signature = _unhex(signature_hex, 64, "signature")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, pre_authentication_encoding(kind, payload))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as exc:
        raise IntegrityError(f"the {kind} is not signed by the key {public_hex[:16]}…") from exc


def _unhex(text: str, size_bytes: int, what: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError as exc:
        raise InputError(f"the {what} is not hex") from exc
    if len(raw) != size_bytes or raw.hex() != text:
        raise InputError(f"the {what} must be {size_bytes} bytes in lower-case hex")
    return raw
