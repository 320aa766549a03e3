"""A pulled version signed once more, for the OpenSSF model signing tools: a Sigstore bundle over the folder.

For whoever checks models with `model_signing verify` (github.com/sigstore/model-transparency) and knows no Rankup
manifest. The bundle names every file of the version with its sha256, and is signed with an elliptic-curve key: that is
what the format takes from a file, so it cannot be the publisher's Ed25519 key.

What always holds: before anything is signed, every file was found to have the bytes that the publisher's manifest
names, and the folder to hold nothing else; what Rankup itself keeps in the folder is left out, and the bundle says so.
The bundle appears under its name when it is complete.

It needs the extra `model-signing`, and no network.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Final

from rankup.checkfiles import Report, verify_files
from rankup.download import OnProgress
from rankup.errors import InputError, IntegrityError, SetupError, StateError
from rankup.export.newfile import new_file, require_absent
from rankup.folder import ENVELOPE_NAME, LOCK_NAME, PARTIAL_NAME, STATE_NAME, read_folder_state

SIGNATURE_NAME: Final = "model.sig"
OWN_NAMES: Final = (ENVELOPE_NAME, LOCK_NAME, PARTIAL_NAME, STATE_NAME)
"""What Rankup keeps in a pulled folder besides the version's files."""


def sign_folder(
    folder: Path,
    private_key: Path,
    *,
    password: str | None = None,
    publisher_key: str | None = None,
    to: Path | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> tuple[Path, Report]:
    """Write the bundle to `to` (default: `model.sig` in the folder); returns its path and what was checked before.

    private_key: PEM of an elliptic-curve key (P-256, P-384 or P-521), with `password` where it is encrypted.
    publisher_key: whose manifest is trusted (hex); default: the key that the folder has pinned.

    Raises:
        SetupError: the extra is not installed, or the key cannot be read.
        InputError: the key is of another kind or encrypted otherwise.
        IntegrityError: the folder is not what the publisher signed.
        StateError: the folder holds files that are not part of the version, or `to` exists.
    """
    hashing, signing = _library()
    to = to or folder / SIGNATURE_NAME
    require_absent(to, force=force)
    report = verify_files(folder, publisher_key=publisher_key, progress=progress)
    if not report.ok:
        raise IntegrityError(
            f"{folder} differs from its manifest in: {', '.join(report.mismatches[:8])}",
            remedy="Pull the version again; nothing was signed.",
        )
    inside = to.resolve().parent == folder.resolve()
    ignored = sorted({*OWN_NAMES, *((to.name,) if inside else ())})
    _require_nothing_else(folder, ignored)
    with new_file(to, force=force) as fresh:
        # The fresh file is not there while the folder is hashed: the library hashes first and writes at its end.
        config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=ignored))
        try:
            config.use_elliptic_key_signer(private_key=private_key, password=password)
        except OSError as exc:
            raise SetupError(f"cannot read the private key {private_key}: {exc.strerror}", remedy="Check it.") from exc
        except (ValueError, TypeError, AttributeError) as exc:
            raise InputError(
                f"{private_key} is not an elliptic-curve private key that can be used: {exc}",
                remedy="Make one: openssl ecparam -name prime256v1 -genkey -noout -out ec.pem",
            ) from exc
        config.sign(folder, fresh)
    return to, report


def _require_nothing_else(folder: Path, ignored: list[str]) -> None:
    """Whoever signs a folder vouches for all that lies in it."""
    state = read_folder_state(folder)
    known = {file.path for file in state.files} if state is not None else set()
    odd = sorted(path.name for path in folder.iterdir() if path.name not in known and path.name not in ignored)
    if odd:
        raise StateError(
            f"{folder} holds {odd[0]!r}, which is not part of the version",
            remedy="Move it out of the folder: a signature over the folder would vouch for it too.",
        )


def _library() -> tuple[ModuleType, ModuleType]:
    """`model_signing.hashing` and `model_signing.signing`."""
    try:
        from model_signing import hashing, signing
    except ModuleNotFoundError as exc:
        raise SetupError(
            f"this command needs the Python package {exc.name!r}, which is not installed",
            remedy="Run: pip install 'rankup[model-signing]'",
        ) from exc
    return hashing, signing
