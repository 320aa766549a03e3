"""A merged folder: killed and resumed, refused where it holds something else, compared, and made in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_world import (
    SMALL,
    TWO,
    Q,
    hashes,
    make_base,
    one_layer,
    write_adapter,
    write_base,
)
from transformers import LlamaConfig

from aggregator.merge import Blend
from aggregator.mergecheck import compare_folder
from aggregator.mergedfolder import merge_folder
from aggregator.mergerecord import JOURNAL, RECORD
from rankup.errors import DiskFullError, InputError, StateError
from rankup.tensorfile import TensorFile

# -- interruptions -----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from aggregator.merge import Blend
from aggregator.mergedfolder import merge_folder
base, out, limit, *adapters = sys.argv[1:]

def progress(done, total):
    if done > int(limit):
        os.kill(os.getpid(), signal.SIGKILL)

merge_folder(Path(base), list(map(Path, adapters)), Path(out), Blend(), tile_bytes=256, progress=progress)
"""


def test_a_merge_that_is_killed_goes_on_with_its_finished_files_and_gives_the_same_bytes(
    llamas: Any, tmp_path: Path
) -> None:
    base, adapters = llamas[torch.float32]
    out = tmp_path / "out"
    merge_folder(base, adapters, tmp_path / "whole", Blend())
    total = sum(path.stat().st_size for path in base.glob("model*.safetensors"))
    call = [sys.executable, "-c", KILLED, base, out, str(total // 2), *adapters]
    assert subprocess.run(call, check=False, env=os.environ | {"PYTHONPATH": str(Path.cwd())}).returncode == -9
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("model*.safetensors")}
    assert finished
    assert len(finished) < len(list(base.glob("model*.safetensors")))
    assert len(list(out.glob(".*.partial"))) == 1
    with pytest.raises(StateError, match="no finished merge"):
        compare_folder(base, adapters, out, Blend())
    result = merge_folder(base, adapters, out, Blend())
    assert result.bytes_written < total
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert not list(out.glob(".*.partial"))
    assert hashes(out) == hashes(tmp_path / "whole")
    assert merge_folder(base, adapters, out, Blend()).bytes_written == 0


def test_an_interrupted_merge_leaves_no_half_file(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float32]

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folder(base, adapters, tmp_path, Blend(), tile_bytes=256, progress=interrupt)
    left = {path.name for path in tmp_path.iterdir()}
    assert JOURNAL in left
    assert not [name for name in left if name.endswith(".partial")]
    assert RECORD not in left


def test_a_finished_file_that_has_vanished_is_written_again(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float32]
    merge_folder(base, adapters, tmp_path, Blend())
    before = hashes(tmp_path)
    lost = next(tmp_path.glob("model*.safetensors"))
    size = lost.stat().st_size
    lost.unlink()
    assert merge_folder(base, adapters, tmp_path, Blend()).bytes_written == size
    assert hashes(tmp_path) == before


FULL = """
import resource, sys
from pathlib import Path
from aggregator.merge import Blend
from aggregator.mergedfolder import merge_folder
base, out, *adapters = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try:
    merge_folder(Path(base), list(map(Path, adapters)), Path(out), Blend())
except Exception as exc:
    print(type(exc).__name__)
"""


def test_a_disk_that_fills_up_is_said_so_and_leaves_no_half_file(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float32]
    call = [sys.executable, "-c", FULL, base, tmp_path / "out", *adapters]
    done = subprocess.run(
        call, check=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "DiskFullError"
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_a_base_that_is_larger_than_the_disk_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {})
    huge, small = 2**43, 8
    header = json.dumps(
        {
            "model.huge.weight": {"dtype": "F32", "shape": [huge // 4], "data_offsets": [0, huge]},
            "model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [huge, huge + small]},
        }
    ).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + huge + small)  # sparse: it takes no room
        except OSError:
            pytest.skip("this file system has no files of 8 TB")
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": np.ones(2)})
    with pytest.raises(DiskFullError, match="are needed"):
        merge_folder(base, [adapter], tmp_path / "out", Blend())
    assert not list((tmp_path / "out").glob("*model*"))


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_left_alone(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float32]
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(StateError, match="not empty"):
        merge_folder(base, adapters, tmp_path, Blend())
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


OTHERS = {
    "another weight": lambda base, adapters: (base, adapters, TWO),
    "another rule": lambda base, adapters: (base, adapters, Blend("mean")),
    "fewer adapters": lambda base, adapters: (base, adapters[:1], Blend()),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_merge_of_other_inputs_is_left_alone(llamas: Any, case: str, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float32]
    merge_folder(base, adapters, tmp_path, Blend())
    before = hashes(tmp_path)
    other_base, other_adapters, blend = OTHERS[case](base, adapters)
    with pytest.raises(StateError, match="other inputs"):
        merge_folder(other_base, other_adapters, tmp_path, blend)
    assert hashes(tmp_path) == before


def test_the_result_cannot_lie_in_the_base_or_around_an_adapter(llamas: Any) -> None:
    base, adapters = llamas[torch.float32]
    for out in (base, base / "merged", adapters[0], adapters[0].parent):
        with pytest.raises(InputError, match="lie in each other"):
            merge_folder(base, adapters, out, Blend())


def test_code_is_not_copied_and_said_so(tmp_path: Path) -> None:
    folder, adapters = one_layer(tmp_path, np.zeros((2, 2)), (np.ones((2, 1)), np.ones((1, 2))))
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_evil.Evil"}}')
    result = merge_folder(folder, adapters, tmp_path / "out", Blend())
    assert set(hashes(tmp_path / "out")) == {"config.json", "tokenizer.json", "model.safetensors", RECORD}
    assert "code of its own" in result.warnings[0]


def test_a_file_that_no_adapter_touches_is_the_bases_and_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache is a folder of links."""
    files = {
        "model-1.safetensors": {f"{Q}.weight": np.zeros((2, 2))},
        "model-2.safetensors": {"model.other.weight": np.random.default_rng(0).normal(size=(500, 300))},
    }
    store = write_base(tmp_path / "store", files)
    base = tmp_path / "base"
    base.mkdir()
    for path in store.iterdir():
        (base / path.name).symlink_to(path)
    halves = {f"{Q}.lora_A.weight": np.ones((2, 2)), f"{Q}.lora_B.weight": np.ones((2, 2))}
    record = merge_folder(base, [write_adapter(tmp_path / "a", halves)], tmp_path / "out", Blend()).record
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "model-2.safetensors").read_bytes() == (store / "model-2.safetensors").read_bytes()
    file = next(file for file in record.files if file.name == "model-2.safetensors")
    assert file.sha256 == file.base_sha256
    assert file.tensors_changed == 0


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_a_merge_is_bit_identical_to_itself_and_its_record_has_the_hashes_of_its_files(
    llamas: Any, tmp_path: Path
) -> None:
    base, adapters = llamas[torch.bfloat16]
    for name, blend in {"sum": TWO, "median": Blend("geometric_median"), "clip": Blend(clip=0.5)}.items():
        record = merge_folder(base, adapters, tmp_path / name, blend).record
        for file in record.files:
            assert hashlib.sha256((tmp_path / name / file.name).read_bytes()).hexdigest() == file.sha256
            assert hashlib.sha256((base / file.name).read_bytes()).hexdigest() == file.base_sha256
        before = hashes(tmp_path / name)
        flipped = Blend(blend.rule, blend.weights and blend.weights[::-1], blend.clip)
        assert compare_folder(base, adapters[::-1], tmp_path / name, flipped).ok
        assert hashes(tmp_path / name) == before


def test_one_wrong_bit_is_found_and_its_tensor_is_named(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.bfloat16]
    merge_folder(base, adapters, tmp_path, Blend())
    for path in sorted(tmp_path.glob("model*.safetensors")):
        with TensorFile.open(path) as file:
            name, extent = next(iter(file.entries.items()))
        data = bytearray(path.read_bytes())
        data[extent.stop - 1] ^= 1
        path.write_bytes(data)
        assert compare_folder(base, adapters, tmp_path, Blend()).mismatches == [name]
        data[extent.stop - 1] ^= 1
        path.write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"more")
    assert compare_folder(base, adapters, tmp_path, Blend()).mismatches == ["model.safetensors", "config.json"]


def test_other_inputs_are_named_in_a_comparison(llamas: Any, tmp_path: Path) -> None:
    base, adapters = llamas[torch.float32]
    merge_folder(base, adapters, tmp_path / "out", Blend())
    assert compare_folder(base, adapters, tmp_path / "out", TWO).mismatches == ["weights"]
    assert compare_folder(base, adapters, tmp_path / "out", Blend("mean")).mismatches == ["rule"]
    assert "number of adapters" in compare_folder(base, adapters[:1], tmp_path / "out", Blend()).mismatches
    other = make_base(tmp_path / "other", LlamaConfig(**SMALL, tie_word_embeddings=False), seed=9, max_shard_size="8KB")
    found = compare_folder(other, adapters, tmp_path / "out", Blend()).mismatches
    assert any(name.endswith("(base)") for name in found)


# -- resources ---------------------------------------------------------------------------------------------------------

MEASURED = """
import json, sys
from pathlib import Path
from aggregator.merge import Blend
from aggregator.mergedfolder import merge_folder

def rss():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}

base, out, *adapters = map(Path, sys.argv[1:])
before = rss()["VmRSS"]
merge_folder(base, adapters, out, Blend())
loaded = [name for name in ("torch", "ray", "transformers", "peft", "safetensors") if name in sys.modules]
print(json.dumps({"grown": rss()["VmHWM"] - before, "loaded": loaded}))
"""


def test_memory_stays_below_the_largest_tensor_and_no_heavy_library_is_imported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, columns = 8192, 8192
    base = write_base(
        tmp_path / "base", {"model.safetensors": {f"{Q}.weight": np.zeros((rows, columns), dtype=np.float32)}}
    )
    tensor_bytes = (base / "model.safetensors").stat().st_size
    adapters = [
        write_adapter(
            tmp_path / f"a{i}",
            {f"{Q}.lora_B.weight": rng.normal(size=(rows, 2)), f"{Q}.lora_A.weight": rng.normal(size=(2, columns))},
        )
        for i in range(2)
    ]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    call = [sys.executable, "-c", MEASURED, base, tmp_path / "out", *adapters]
    found = json.loads(subprocess.run(call, check=True, env=environment, capture_output=True).stdout)
    assert found["loaded"] == []
    assert found["grown"] < tensor_bytes, f"{found['grown']} bytes for a tensor of {tensor_bytes}"
