"""What benchmarks/pull.py compares with, run by the Python of .venv-bench: zstd, ZipNN, huggingface_hub.

Nothing of Rankup is imported here, and nothing of the peers is changed: these are the calls that their users make. A
coder has one thread; its time is that of the files of one version, one after the other, from the page cache, without
imports.
"""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from aggregate_run import serve

LEVEL: Final = 3
"""Of zstd."""
ZSTD: Final = ("zstandard",)
ZIPNN: Final = ("zipnn", "torch")


def zstd_encode(child: list[str], base: list[str], out: list[str]) -> dict[str, Any]:
    """zstd of the files as they are."""
    import zstandard

    def encode(new: str, _: str, to: str) -> None:
        with Path(new).open("rb") as source, Path(to).open("wb") as target:
            zstandard.ZstdCompressor(level=LEVEL).copy_stream(source, target, size=Path(new).stat().st_size)

    return _timed(ZSTD, encode, child, base, out)


def zstd_decode(packed: list[str], base: list[str], out: list[str]) -> dict[str, Any]:
    """The files again."""
    import zstandard

    def decode(frame: str, _: str, to: str) -> None:
        with Path(frame).open("rb") as source, Path(to).open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target)

    return _timed(ZSTD, decode, packed, base, out)


def planes_encode(child: list[str], base: list[str], out: list[str]) -> dict[str, Any]:
    """zstd of the low bytes, then of the high bytes, of the int16 difference of each tensor's bit patterns."""
    import numpy as np
    import zstandard

    def encode(new: str, old: str, to: str) -> None:
        head, sizes = _tensors(new)
        with Path(new).open("rb") as after, Path(old).open("rb") as before, Path(to).open("wb") as target:
            after.seek(head)
            before.seek(head)
            for size in sizes:
                difference = np.frombuffer(after.read(size), np.uint16) - np.frombuffer(before.read(size), np.uint16)
                for plane in difference.view(np.uint8).reshape(-1, 2).T:
                    frame = zstandard.ZstdCompressor(level=LEVEL).compress(np.ascontiguousarray(plane).data)
                    target.write(len(frame).to_bytes(4, "little") + frame)

    return _timed(ZSTD, encode, child, base, out)


def planes_decode(packed: list[str], base: list[str], out: list[str]) -> dict[str, Any]:
    """The files again; two versions of a file have one header."""
    import numpy as np
    import zstandard

    def decode(frames: str, old: str, to: str) -> None:
        head, sizes = _tensors(old)
        with Path(old).open("rb") as before, Path(frames).open("rb") as source, Path(to).open("wb") as target:
            target.write(before.read(head))
            for size in sizes:
                bits = np.frombuffer(before.read(size), np.uint16)
                difference = np.empty((bits.size, 2), np.uint8)
                for place in range(2):
                    frame = source.read(int.from_bytes(source.read(4), "little"))
                    difference[:, place] = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
                target.write((bits + difference.view(np.uint16)[:, 0]).data)

    return _timed(ZSTD, decode, packed, base, out)


def _tensors(path: str) -> tuple[int, list[int]]:
    """Bytes ahead of the first tensor of a safetensors file, and bytes of each tensor in the file's order."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    return 8 + length, [stop - start for start, stop in places]


def zipnn_encode(child: list[str], base: list[str], out: list[str], delta: bool) -> dict[str, Any]:
    """Compress each file of `child`; with `delta`, the exclusive or of its bytes and those of its base."""
    import numpy as np
    from zipnn import ZipNN

    def encode(new: str, old: str, to: str) -> None:
        # As an array: ZipNN reorders bits within the buffer that it is given.
        data = bytearray(Path(new).read_bytes())
        if delta:
            view = np.frombuffer(data, np.uint8)
            view ^= np.frombuffer(Path(old).read_bytes(), np.uint8)
        Path(to).write_bytes(ZipNN(threads=1, bytearray_dtype="bfloat16").compress(data))

    return _timed(ZIPNN, encode, child, base, out)


def zipnn_decode(packed: list[str], base: list[str], out: list[str], delta: bool) -> dict[str, Any]:
    """The files again."""
    import numpy as np
    from zipnn import ZipNN

    def decode(source: str, old: str, to: str) -> None:
        data = ZipNN(threads=1, bytearray_dtype="bfloat16").decompress(Path(source).read_bytes())
        if delta:
            view = np.frombuffer(data, np.uint8)
            view ^= np.frombuffer(Path(old).read_bytes(), np.uint8)
        Path(to).write_bytes(data)

    return _timed(ZIPNN, decode, packed, base, out)


def _timed(packages: tuple[str, ...], code: Any, *files: list[str]) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    for one in zip(*files, strict=True):
        code(*one)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "versions": {name: version(name) for name in packages},
    }


def hub_download(endpoint: str, repository: str, revision: str, to: str) -> dict[str, Any]:
    """`snapshot_download` of a revision into a local folder, from a hub at `endpoint`."""
    os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(Path(to).parent / "hub-home")}
    from huggingface_hub import snapshot_download

    snapshot_download(repository, revision=revision, local_dir=to)
    return {"versions": {"huggingface_hub": version("huggingface_hub")}}


WAYS: Final[dict[str, Any]] = {
    way.__name__: way
    for way in (
        zstd_encode,
        zstd_decode,
        planes_encode,
        planes_decode,
        zipnn_encode,
        zipnn_decode,
        hub_download,
    )
}

if __name__ == "__main__":
    serve(lambda way, **arguments: WAYS[way](**arguments))
