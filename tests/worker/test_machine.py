"""What the worker knows about its machine: device, identity, cache of base versions."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rankup.errors import IntegrityError, SetupError
from rankup.protocol import Enrolled
from worker import cache, device, identity
from worker.cards import TorchBuild

SMI = """#!/bin/sh
case "$1" in *memory.free*) echo 11000; echo 8000; exit;; esac
echo "NVIDIA GeForce RTX 3060, 12288"
echo "NVIDIA GeForce GTX 1080, 8192"
"""


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("", []),
        ("NVIDIA H100, 80GB HBM3, 81559\n", [("NVIDIA H100, 80GB HBM3", 81559 * 1024**2)]),
        ("Unable to determine the device handle\n", []),
        ("A, 10\nB, [N/A]\n", [("A", 10 * 1024**2)]),
    ],
)
def test_nvidia_smi_is_read(text: str, gpus: list[tuple[str, int]]) -> None:
    assert device.parse_nvidia_smi(text) == gpus


@pytest.mark.parametrize(
    ("asked", "kind", "name"),
    [
        ("auto", "cuda", "NVIDIA GeForce RTX 3060"),
        ("cuda:1", "cuda", "NVIDIA GeForce GTX 1080"),
        ("cuda:2", "cpu", None),
        ("cpu", "cpu", None),
    ],
)
def test_the_asked_device_is_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, kind: str, name: str | None
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(device, "torch_build", lambda: TorchBuild("2.13.0+cu130", (13, 0)))
    found = device.profile(asked, threads=3)
    assert (found.kind, found.threads) == (kind, 3)
    assert found.memory_bytes > 0
    assert name is None or found.name == name


@pytest.mark.parametrize(
    ("asked", "free"), [("auto", 11000), ("cuda", 11000), ("cuda:1", 8000), ("cuda:2", None), ("xpu", None)]
)
def test_free_memory_is_that_of_the_card_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, free: int | None
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(device, "torch_build", lambda: TorchBuild("2.13.0+cu130", (13, 0)))
    assert device.free_memory(asked) == (None if free is None else free * 1024**2)
    processor = device.free_memory("cpu")
    assert processor is not None
    assert 0 < processor <= device.total_memory()


def test_a_torch_without_cuda_means_the_processor_unless_the_card_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(device, "torch_build", lambda: TorchBuild("2.13.0+cpu"))
    assert [device.profile(asked).kind for asked in ("auto", "cuda")] == ["cpu", "cuda"]
    assert device.free_memory("auto") != device.free_memory("cuda")


@pytest.mark.parametrize("text", ["", "[N/A]\n9\n", "Unable to determine the device handle\n"])
def test_a_card_that_does_not_tell_its_free_memory_is_not_guessed_at(text: str) -> None:
    assert device.parse_free_memory(text) == []


@pytest.mark.parametrize("module", ["worker.agent", "worker.display", "worker.doctor", "worker.trainer"])
def test_nothing_heavy_is_imported_outside_the_child(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "sys.exit(' '.join({'torch', 'transformers', 'peft', 'trl', 'datasets', 'ray', 'boto3'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stderr.strip() == ""


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("host:8420", "http://host:8420"),
        (" https://host/ ", "https://host"),
        ("https://host/rankup/", "https://host/rankup"),
    ],
)
def test_addresses_are_normalised(given: str, url: str) -> None:
    assert identity.normalise_url(given) == url


@pytest.mark.parametrize("given", ["", "ftp://host", "http://", "file:///etc/passwd", "two words"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(SetupError):
        identity.normalise_url(given)


def test_an_identity_survives_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    folder = identity.open_folder(tmp_path, "http://host")
    assert identity.load_identity(folder) is None
    answer = Enrolled(worker_id="w-1", token="t", publisher_key="0" * 64)
    saved = identity.save_identity(folder, "http://host", "ada", answer)
    assert identity.load_identity(folder) == saved
    assert stat.S_IMODE(folder.identity_file.stat().st_mode) == 0o600
    identity.check_publisher(saved, "0" * 64)
    with pytest.raises(IntegrityError):
        identity.check_publisher(saved, "1" * 64)
    folder.identity_file.write_text("{")
    with pytest.raises(IntegrityError, match="cannot be read") as caught:
        identity.load_identity(folder)
    assert "identity.json" in caught.value.remedy


def test_servers_have_folders_of_their_own(tmp_path: Path) -> None:
    urls = ["http://host:1", "http://host:2", "https://host:1", "http://host/a/b", "http://host/a-b"]
    assert len({identity.open_folder(tmp_path, url).root for url in urls}) == len(urls)


@pytest.mark.parametrize(
    ("limit_bytes", "kept"),
    [(300, {"a", "b", "c"}), (299, {"b", "c"}), (100, {"c"}), (0, {"c"})],
)
def test_the_least_recently_used_version_goes_first_and_the_one_in_use_stays(
    tmp_path: Path, limit_bytes: int, kept: set[str]
) -> None:
    for age, name in enumerate(["c", "b", "a"]):
        folder = cache.version_folder(tmp_path, name)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
        os.utime(folder, (1000.0 - age, 1000.0 - age))
    cache.make_room(tmp_path, limit_bytes, keep=[tmp_path / "c"])
    assert {path.name for path in tmp_path.iterdir()} == kept
    cache.mark_used(tmp_path / "c")
    assert (tmp_path / "c").stat().st_mtime > 1000.0
