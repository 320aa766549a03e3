"""The patch file: round trips, chains, and everything that can be wrong with one.

`PYTHONPATH=. python tests/rankup/test_patch.py` writes the golden file again.
"""

import resource
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weightfiles import Tensor, apply, nudged, ref_of, save, weights

from rankup.errors import DiskFullError, InputError, IntegrityError, NotFoundError, SetupError
from rankup.patch import apply_patches, write_patch
from rankup.patchfile import PatchWriter
from rankup.records import BlobRef
from rankup.tensorfile import DTYPE_BYTES, TensorFile, TensorFileWriter

GOLDEN = Path(__file__).parent / "golden" / "small.patch"
GOLDEN_REF = BlobRef(sha256="b5e956bb31ff2e86a34102d0a85c1a88f5e1f3856f4128c5e025c875ae8860c2", size_bytes=884)


@pytest.fixture
def versions(tmp_path: Path) -> list[Path]:
    """Four versions of a small file, one after the other."""
    files = []
    proj, norm = weights(48, 32, 0), np.ones(8, np.float32)
    for number in range(4):
        table: dict[str, Tensor] = {
            "embed": ("BF16", (8, 8), weights(8, 8, 9).tobytes()),
            "proj": ("BF16", (48, 32), proj.tobytes()),
            "norm": ("F32", (8,), norm.tobytes()),
            "steps": ("I64", (1,), number.to_bytes(8, "little")),
        }
        files.append(save(tmp_path / f"v{number}", table))
        proj, norm = nudged(proj, number), norm * np.float32(1.001)
    return files


@pytest.fixture
def patches(versions: list[Path], tmp_path: Path) -> list[Path]:
    for number, (old, new) in enumerate(pairwise(versions)):
        write_patch(old, new, tmp_path / f"p{number}")
    return [tmp_path / f"p{number}" for number in range(3)]


# -- round trips -------------------------------------------------------------------------------------------------------

tables = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 30), max_size=3).map(tuple)),
    max_size=5,
)


def changed(content: bytes, how: str, rng: np.random.Generator) -> bytes:
    if how == "all":
        return rng.bytes(len(content))
    if how == "little" and content:
        place = int(rng.integers(len(content)))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    return content


@settings(max_examples=60)
@given(tables, st.integers(0, 2**32), st.data())
def test_a_patch_gives_the_child_back_whatever_the_tensors(
    tmp_path_factory: pytest.TempPathFactory,
    table: dict[str, tuple[str, tuple[int, ...]]],
    seed: int,
    data: st.DataObject,
) -> None:
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("patch")
    old = {n: (d, s, rng.bytes(int(np.prod(s, dtype=int)) * DTYPE_BYTES[d])) for n, (d, s) in table.items()}
    hows = {name: data.draw(st.sampled_from(["none", "little", "all"])) for name in table}
    new = {name: (d, s, changed(raw, hows[name], rng)) for name, (d, s, raw) in old.items()}
    base, child = save(folder / "base", old), save(folder / "child", new)
    ref = write_patch(base, child, folder / "patch")
    assert ref == ref_of(folder / "patch")
    assert ref.size_bytes <= 152 + base.stat().st_size + 13 * len(table)
    apply(base, [folder / "patch"], folder / "out", child)
    assert (folder / "out").read_bytes() == child.read_bytes()


def test_tensors_of_many_blocks_go_through_a_chain(tmp_path: Path) -> None:
    wide, long = weights(1500, 999, 1), weights(1, 2**20 + 5, 2)
    files = []
    for number in range(3):
        table: dict[str, Tensor] = {
            "wide": ("BF16", wide.shape, wide.tobytes()),
            "long": ("BF16", long.shape, long.tobytes()),
        }
        files.append(save(tmp_path / f"v{number}", table))
        wide = nudged(wide, number)
        long = long.copy()
        long[0, -1] += 1
    refs = [write_patch(files[i], files[i + 1], tmp_path / f"p{i}") for i in range(2)]
    assert all(ref.size_bytes * 6 < files[0].stat().st_size for ref in refs)
    written: list[int] = []
    apply(files[0], [tmp_path / "p0", tmp_path / "p1"], tmp_path / "out", files[2], progress=written.append)
    assert (tmp_path / "out").read_bytes() == files[2].read_bytes()
    assert sum(written) == files[2].stat().st_size
    assert max(written) <= 2**21


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rows = weights(1024, 1024, 5)
    for name, block in (("base", rows), ("child", nudged(rows, 6))):
        with (tmp_path / name).open("wb") as file:
            writer = TensorFileWriter(file, {"w": ("BF16", (24 * 1024, 1024))})
            for _ in range(24):
                writer.append("w", block.tobytes())
            writer.finish()
    base, child = tmp_path / "base", tmp_path / "child"
    refs = ref_of(base), ref_of(child)
    tracemalloc.start()
    try:
        write_patch(base, child, tmp_path / "patch")
        apply_patches(base, [tmp_path / "patch"], tmp_path / "out", base_sha256=refs[0].sha256, expected=refs[1])
        assert tracemalloc.get_traced_memory()[1] < 36 * 2**20 < refs[0].size_bytes
    finally:
        tracemalloc.stop()


def test_chains_of_every_length_give_the_version_at_their_end(
    versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    for start in range(3):
        for end in range(start + 1, 4):
            apply(versions[start], patches[start:end], tmp_path / "out", versions[end])
            assert (tmp_path / "out").read_bytes() == versions[end].read_bytes()


def test_an_unchanged_file_costs_next_to_nothing(versions: list[Path], tmp_path: Path) -> None:
    assert write_patch(versions[0], versions[0], tmp_path / "patch").size_bytes == 152
    apply(versions[0], [tmp_path / "patch"], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == versions[0].read_bytes()


def test_a_patch_may_be_written_over_an_older_one_and_is_the_same_each_time(
    versions: list[Path], tmp_path: Path
) -> None:
    first = write_patch(versions[0], versions[1], tmp_path / "patch")
    assert write_patch(versions[0], versions[1], tmp_path / "patch") == first == ref_of(tmp_path / "patch")


def test_files_with_different_tensors_have_no_patch(versions: list[Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", {"embed": ("BF16", (8, 9), bytes(144))})
    with pytest.raises(InputError, match="same tensors"):
        write_patch(versions[0], other, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def assert_refused(base: Path, chain: list[Path], expected: Path, match: str = "") -> None:
    out = base.parent / "out"
    with pytest.raises(IntegrityError, match=match):
        apply(base, chain, out, expected)
    assert not out.exists()


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, child and patch, as short as they can be with a coded block, a raw one and an unchanged tensor."""
    bits = weights(10, 16, 0)
    tensors: list[dict[str, Tensor]] = [
        {"a": ("BF16", (10, 16), raw.tobytes()), "b": ("U8", (5,), end), "c": ("U8", (5,), b"12345")}
        for raw, end in ((bits, b"12345"), (bits + np.uint16(1), b"12346"))
    ]
    base, child = (save(tmp_path / f"tiny{number}", table) for number, table in enumerate(tensors))
    assert write_patch(base, child, tmp_path / "tiny.patch").size_bytes < 300
    return base, child, tmp_path / "tiny.patch"


def test_every_flipped_byte_is_found(tiny: tuple[Path, Path, Path]) -> None:
    base, child, patch = tiny
    data = patch.read_bytes()
    for place in range(len(data)):
        patch.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        assert_refused(base, [patch], child, match=patch.name)


def test_a_patch_that_ends_early_or_late_is_found_at_every_place(tiny: tuple[Path, Path, Path]) -> None:
    base, child, patch = tiny
    data = patch.read_bytes()
    for changed_data in [*(data[:end] for end in range(len(data))), data + b"\0", data + data]:
        patch.write_bytes(changed_data)
        assert_refused(base, [patch], child, match=patch.name)


def test_every_flipped_byte_of_the_base_is_found_or_replaced_by_the_patch(
    tiny: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, child, patch = tiny
    data, digest, expected = base.read_bytes(), ref_of(base).sha256, ref_of(child)
    replaced = 0
    for place in range(len(data)):
        base.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            apply_patches(base, [patch], tmp_path / "out", base_sha256=digest, expected=expected)
        except IntegrityError:
            assert not (tmp_path / "out").exists()
        else:
            assert ref_of(tmp_path / "out") == expected
            (tmp_path / "out").unlink()
            replaced += 1
    assert replaced == 5


def test_a_base_that_has_changed_is_blamed_and_not_its_patches(
    versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    digest = ref_of(versions[0]).sha256
    with versions[0].open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")
    with pytest.raises(IntegrityError, match="v0 is not the file that its patches are made for"):
        apply_patches(versions[0], patches, tmp_path / "out", base_sha256=digest, expected=ref_of(versions[3]))
    assert not (tmp_path / "out").exists()


def test_a_chain_that_does_not_fit_together_is_refused(
    versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    v, p = versions, patches
    other = save(tmp_path / "other", {"embed": ("BF16", (1000, 999), bytes(1_998_000))})
    cases = {
        "p1 is made for another file": (v[0], [p[1]], v[2]),
        "p2 is made for another file": (v[0], [p[0], p[2]], v[3]),
        "p0 is made for another file": (v[1], [p[0], p[1]], v[2]),
        "p1 leads to another file": (v[0], [p[0], p[1]], v[1]),
        "p0.* made for another file": (other, [p[0]], v[1]),
    }
    for match, (base, chain, expected) in cases.items():
        assert_refused(base, chain, expected, match)


def promise(base: Path, child: Path, patch: Path, base_sha256: str, result_sha256: str) -> None:
    """A patch with all its checksums right, whatever it claims to be for."""
    with TensorFile.open(base) as old, TensorFile.open(child) as new, patch.open("wb") as file:
        writer = PatchWriter(file, {name: (e.dtype, e.shape) for name, e in old.entries.items()})
        for name in old:
            writer.append(name, old.read(name), new.read(name))
        writer.finish(base_sha256, result_sha256)


def test_the_first_patch_that_breaks_its_promise_is_named(
    versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    digests = [ref_of(version).sha256 for version in versions]
    promise(versions[1], versions[3], patches[1], digests[1], digests[2])
    assert_refused(versions[0], patches, versions[3], match="p1 does not give the file that it promises")


def test_a_good_patch_after_a_wrong_one_is_not_blamed_when_it_cannot_be_decoded(
    versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    digests = [ref_of(version).sha256 for version in versions]
    with TensorFile.open(versions[1]) as file:
        table = {name: (e.dtype, e.shape, b"\x11" * (e.stop - e.start)) for name, e in file.entries.items()}
    promise(versions[1], save(tmp_path / "wrong", table), patches[1], digests[1], digests[2])
    assert_refused(versions[0], patches, versions[3], match="p1 does not give the file that it promises")


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_or_written_are_named(
    versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="none"):
        apply(versions[0], [tmp_path / "none"], tmp_path / "out", versions[1])
    with pytest.raises(SetupError, match="missing"):
        apply(versions[0], patches[:1], tmp_path / "missing" / "out", versions[1])
    with pytest.raises(SetupError):
        apply(versions[0], patches[:1], tmp_path, versions[1])
    with pytest.raises(InputError, match="cannot read"):
        apply(versions[0], [tmp_path], tmp_path / "out", versions[1])
    with pytest.raises(InputError, match="no patch"):
        apply(versions[0], [], tmp_path / "out")


@pytest.mark.parametrize("victim", ["v0", "p0"])
def test_nothing_that_is_read_is_overwritten(
    victim: str, versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    data = (tmp_path / victim).read_bytes()
    with pytest.raises(InputError, match="at once"):
        apply(versions[0], patches[:1], tmp_path / victim, versions[1])
    assert (tmp_path / victim).read_bytes() == data


def test_an_interrupt_leaves_nothing(versions: list[Path], patches: list[Path], tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(versions[0], patches[:1], tmp_path / "out", versions[1], progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_to_be_one_and_nothing_is_left(
    versions: list[Path], patches: list[Path], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskFullError):
            apply(versions[0], patches[:1], tmp_path / "out", versions[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


# -- the golden file ---------------------------------------------------------------------------------------------------


def golden_versions(folder: Path) -> tuple[Path, Path]:
    """The files between which the golden patch stands, from integers alone."""
    noise = np.cumsum(np.arange(20_000, dtype=np.uint64) * np.uint64(2654435761)) >> np.uint64(13)
    size = 96 * 64
    bits = ((noise % 5 + 118) << np.uint64(7) | (noise >> np.uint64(5)) % 128).astype(np.uint16)[:size]
    steps = ((noise >> np.uint64(20)) % 8 == 0).astype(np.uint16)[:size]
    wide = bits[:2048].astype(np.uint32) << np.uint32(16)
    half = (bits[:512] & np.uint16(0x3FFF)) | np.uint16(0x8000)
    parts: list[dict[str, Tensor]] = []
    for more in (0, 1):
        parts.append(
            {
                "bf16": ("BF16", (96, 64), (bits + steps * np.uint16(more)).tobytes()),
                "f16": ("F16", (512,), (half + np.uint16(more)).tobytes()),
                "f32": ("F32", (4, 8, 64), (wide + np.uint32(900 * more)).tobytes()),
                "none": ("BF16", (0, 7), b""),
                "same": ("BF16", (32,), bits[:32].tobytes()),
                "steps": ("I64", (), (25 * more).to_bytes(8, "little")),
            }
        )
    return save(folder / "base", parts[0]), save(folder / "child", parts[1])


def test_the_golden_file_still_gives_its_child(tmp_path: Path) -> None:
    assert ref_of(GOLDEN) == GOLDEN_REF
    base, child = golden_versions(tmp_path)
    apply(base, [GOLDEN], tmp_path / "out", child)
    assert (tmp_path / "out").read_bytes() == child.read_bytes()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_patch(*golden_versions(Path(folder)), GOLDEN)
    print(repr(ref_of(GOLDEN)))  # noqa: T201
