"""llama.cpp's programs as child processes: found, called, watched, ended. Scripts stand in for them."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path

import gguf
import pytest
from tinymodel import make_model, pull_model

from rankup.download import PullProgress
from rankup.errors import InputError, IntegrityError, NotFoundError, SetupError, StateError
from rankup.export.childprocess import run_child
from rankup.export.ggufconverter import convert_gguf, find_converter
from rankup.export.ggufexport import export_gguf
from rankup.export.ggufsource import open_folder
from rankup.export.quantize import QUANTISATIONS, find_quantiser, quantise, require_kind

QUANTISER = """
import sys, shutil
source, target, kind, threads = sys.argv[1:]
for step in range(1, 5):
    print(f"[{step:4d}/   4] blk.{step}.ffn_up.weight - [ 32, 48], type = bf16, quantizing to", kind, flush=True)
shutil.copy(source, target)
open(target, "ab").write(kind.encode())
"""
CONVERTER = """
import argparse, json, pathlib, gguf
parser = argparse.ArgumentParser()
parser.add_argument("model"); parser.add_argument("--outfile"); parser.add_argument("--outtype")
parser.add_argument("--metadata")
options = parser.parse_args()
metadata = json.loads(pathlib.Path(options.metadata).read_text()) if options.metadata else {}
import numpy as np
writer = gguf.GGUFWriter(options.outfile, "phi3")
writer.add_name(metadata.get("general.name", "none"))
writer.add_description(metadata.get("general.description", options.outtype))
writer.add_file_type(32)
writer.add_tensor("output.weight", np.ones((2, 4), dtype=np.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def quantiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANKUP_LLAMA_CPP", "RANKUP_LLAMA_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return script(tmp_path / "bin" / "llama-quantize", QUANTISER)


def test_a_quantised_file_comes_from_the_one_that_keeps_every_bit(tmp_path: Path, quantiser: Path) -> None:
    make_model(tmp_path / "model")
    seen: list[PullProgress] = []
    model = open_folder(tmp_path / "model")
    [plain] = export_gguf(model, tmp_path / "plain.gguf")
    [made] = export_gguf(model, tmp_path / "out" / "small.gguf", kinds=["q4_k_m"], progress=seen.append)
    assert (tmp_path / "out" / "small.gguf").read_bytes() == plain.path.read_bytes() + b"Q4_K_M"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.gguf"]
    assert (made.out, made.tensors) == ("q4_k_m", plain.tensors)
    assert {state.stage for state in seen} == {"writing", "q4_k_m"}


def test_several_quantisations_get_a_file_each(tmp_path: Path, quantiser: Path) -> None:
    make_model(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    made = export_gguf(model, tmp_path / "out" / "m.gguf", kinds=["q8_0", "q4_0"])
    assert [file.path.name for file in made] == ["m-q8_0.gguf", "m-q4_0.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["m-q4_0.gguf", "m-q8_0.gguf"]


def test_what_exists_is_told_before_the_work_begins(tmp_path: Path, quantiser: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "m-q4_0.gguf").write_text("mine")
    model = open_folder(tmp_path / "model")
    with pytest.raises(StateError, match=r"m-q4_0\.gguf exists"):
        export_gguf(model, tmp_path / "m.gguf", kinds=["q8_0", "q4_0"])
    assert not (tmp_path / "m-q8_0.gguf").exists()


def test_a_failing_program_is_quoted_and_leaves_nothing(tmp_path: Path, quantiser: Path) -> None:
    script(quantiser, "import sys; open(sys.argv[2], 'w').write('half'); print('bad tensor'); sys.exit(3)")
    make_model(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    with pytest.raises(InputError, match="exit code 3: bad tensor"):
        export_gguf(model, tmp_path / "out" / "m.gguf", kinds=["q8_0"])
    assert not list((tmp_path / "out").iterdir())


def test_a_program_that_writes_nothing_has_failed(tmp_path: Path, quantiser: Path) -> None:
    script(quantiser, "")
    make_model(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    with pytest.raises(InputError, match="wrote nothing"):
        export_gguf(model, tmp_path / "out" / "m.gguf", kinds=["q8_0"])
    assert not list((tmp_path / "out").iterdir())


def test_llama_cpp_is_looked_for_where_the_user_said_first(
    tmp_path: Path, quantiser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_quantiser().command == (str(quantiser),)
    built = script(tmp_path / "llama.cpp" / "build" / "bin" / "llama-quantize", QUANTISER)
    monkeypatch.setenv("RANKUP_LLAMA_CPP", str(tmp_path / "llama.cpp"))
    assert find_quantiser().command == (str(built),)
    monkeypatch.delenv("RANKUP_LLAMA_CPP")
    quantiser.unlink()
    monkeypatch.setenv("RANKUP_LLAMA_PYTHON", "/opt/llama/python")
    found = find_quantiser()
    assert found.command[0] == "/opt/llama/python"
    assert found.arguments(Path("a"), Path("b"), "q4_k_m", 2)[-4:] == ["a", "b", "15", "2"]


def test_without_llama_cpp_the_remedy_says_how_to_get_it(quantiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser.unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(SetupError, match=r"needs llama\.cpp") as caught:
        find_quantiser()
    assert "rankup[llama]" in caught.value.remedy


def test_the_numbers_of_the_types_are_those_of_the_package_gguf() -> None:
    assert {name: int(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]) for name in QUANTISATIONS} == QUANTISATIONS
    assert require_kind("Q4_K_M") == "q4_k_m"
    with pytest.raises(InputError, match="'q4'"):
        require_kind("q4")


def test_the_child_speaks_to_llama_cpp_and_to_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `llama_cpp` of the test's own stands in: the calls are those of its C interface."""
    script(
        tmp_path / "site" / "llama_cpp.py",
        "import shutil, types\n"
        "def llama_log_callback(function): return function\n"
        "def llama_log_set(function, data): function(2, b'[   1/   1] quantizing\\n', None)\n"
        "def llama_model_quantize_default_params(): return types.SimpleNamespace()\n"
        "def llama_model_quantize(source, target, params):\n"
        "    shutil.copy(source, target)\n"
        "    open(target, 'ab').write(f'{params.ftype} {params.nthread}'.encode())\n"
        "    return 0\n",
    )
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("RANKUP_LLAMA_CPP", raising=False)
    monkeypatch.setenv("RANKUP_LLAMA_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    make_model(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    [plain] = export_gguf(model, tmp_path / "plain.gguf")
    quantise(plain, tmp_path / "small.gguf", "q8_0", find_quantiser(), threads=3)
    assert (tmp_path / "small.gguf").read_bytes() == plain.path.read_bytes() + b"7 3"


def test_a_child_ends_with_the_interruption_of_its_parent(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    endless = script(
        tmp_path / "endless",
        f"import time\nwhile True:\n    open({str(alive)!r}, 'w').write(str(time.time()))\n    time.sleep(0.02)\n",
    )

    def stop(_said: str) -> None:
        if alive.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child([str(endless)], "endless", remedy="", watch=stop)
    last = alive.read_text()
    time.sleep(0.15)
    assert alive.read_text() == last


def test_only_the_end_of_a_long_output_is_kept() -> None:
    said = run_child([sys.executable, "-c", "print('x' * 10**6); print('the end')"], "talker", remedy="")
    assert said.endswith("the end\n")
    assert len(said) < 20_000


# -- llama.cpp's converter ---------------------------------------------------------------------------------------------


def test_the_converter_writes_what_is_unknown_here(tmp_path: Path) -> None:
    converter = script(tmp_path / "convert_hf_to_gguf.py", CONVERTER)
    make_model(tmp_path / "model", config={"architectures": ["Phi3ForCausalLM"]})
    pull_model(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    made = convert_gguf(model, tmp_path / "out" / "model.gguf", converter)
    assert model.provenance is not None
    digest = model.provenance.digest
    assert (made.architecture, made.tensors, made.parameters, made.out) == ("phi3", 1, 8, "bf16")
    description = gguf.GGUFReader(made.path).get_field("general.description")
    assert description is not None
    assert description.contents() == f"tiny version 7, manifest sha256:{digest}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_the_converter_gets_no_changed_version(tmp_path: Path) -> None:
    converter = script(tmp_path / "convert_hf_to_gguf.py", CONVERTER)
    make_model(tmp_path / "model")
    pull_model(tmp_path / "model")
    path = tmp_path / "model" / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = open_folder(tmp_path / "model")
    with pytest.raises(IntegrityError, match="00002-of-00002"):
        convert_gguf(model, tmp_path / "out" / "model.gguf", converter)
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails_is_quoted(tmp_path: Path) -> None:
    converter = script(tmp_path / "convert_hf_to_gguf.py", "raise SystemExit('Model Foo is not supported')")
    make_model(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    with pytest.raises(InputError, match="Foo is not supported"):
        convert_gguf(model, tmp_path / "out" / "model.gguf", converter)
    assert not list((tmp_path / "out").iterdir())


def test_a_converter_is_taken_from_where_the_user_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKUP_LLAMA_CPP", raising=False)
    assert find_converter(None) is None
    path = script(tmp_path / "convert_hf_to_gguf.py", CONVERTER)
    assert find_converter(path) == find_converter(tmp_path) == path
    monkeypatch.setenv("RANKUP_LLAMA_CPP", str(tmp_path))
    assert find_converter(None) == path
    path.unlink()
    with pytest.raises(NotFoundError, match="convert_hf_to_gguf"):
        find_converter(None)
