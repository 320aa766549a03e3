"""Bundles for the OpenSSF model signing tools, checked by the real tool; skipped where the extra is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from version_folder import ONE_FILE, publish_version, pulled

from rankup.cli import sign
from rankup.errors import InputError, IntegrityError, SetupError, StateError
from rankup.export.modelsigning import sign_folder
from rankup.signing import generate_private_key
from rankup.store import MemoryStore

STORE = MemoryStore()
publish_version(STORE, 0, None, ONE_FILE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pulled(STORE, tmp_path / "model")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """An elliptic-curve key pair in PEM: private, public."""
    private, public = tmp_path / "ec.pem", tmp_path / "ec.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


def verified(folder: Path, bundle: Path, public: Path) -> bool:
    """What the library says, as its tool asks it by default."""
    verifying = pytest.importorskip("model_signing.verifying")
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, bundle)
    except ValueError:
        return False
    return True


def test_the_tool_accepts_the_bundle_and_refuses_every_changed_file(folder: Path, keys: tuple[Path, Path]) -> None:
    pytest.importorskip("model_signing.signing")
    private, public = keys
    bundle, report = sign_folder(folder, private)
    assert (bundle, report.version) == (folder / "model.sig", 0)
    assert verified(folder, bundle, public)
    config = folder / "config.json"
    data = config.read_bytes()
    config.write_bytes(data + b" ")
    assert not verified(folder, bundle, public)
    config.write_bytes(data)
    (folder / "backdoor.py").write_text("")
    assert not verified(folder, bundle, public)
    with pytest.raises(StateError, match=r"backdoor\.py"):
        sign_folder(folder, private, force=True)
    (folder / "backdoor.py").unlink()
    pulled(STORE, folder)
    assert verified(folder, bundle, public), "what a pull keeps in the folder is not part of it"
    with pytest.raises(StateError, match="exists"):
        sign_folder(folder, private)


def test_the_command_writes_a_bundle_beside_the_folder(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("model_signing.signing")
    private, public = keys
    app = typer.Typer()
    sign.register(app)
    bundle = tmp_path / "toy.sig"
    result = CliRunner().invoke(app, [str(folder), "--private-key", str(private), "--to", str(bundle)])
    assert result.exit_code == 0, result.output
    assert "signs toy version 0" in result.stdout
    tool = [sys.executable, "-m", "model_signing", "verify", "key", folder, "--signature", bundle]
    subprocess.run([*tool, "--public_key", public], capture_output=True, check=True)


def test_keys_that_the_format_does_not_take_are_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing.signing")
    path = tmp_path / "key.pem"
    for pem in (generate_private_key(), b"no key"):
        path.write_bytes(pem)
        with pytest.raises(InputError, match="elliptic-curve"):
            sign_folder(folder, path)
    with pytest.raises(SetupError):
        sign_folder(folder, tmp_path / "absent")
    assert not (folder / "model.sig").exists()


def test_nothing_is_signed_that_the_publisher_did_not_sign(folder: Path, keys: tuple[Path, Path]) -> None:
    pytest.importorskip("model_signing.signing")
    (folder / "config.json").write_text("{ }")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        sign_folder(folder, keys[0])
    assert not (folder / "model.sig").exists()


def test_without_the_extra_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(SetupError) as caught:
        sign_folder(folder, folder / "key")
    assert "rankup[model-signing]" in caught.value.remedy
