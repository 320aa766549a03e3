"""Deltas that nobody should accept: good ones with seeded damage, and crafted ones by name; and what a delta is, said
once more without the product's code, as the oracle of the damaged ones.

What always holds: the same seed gives the same damage; nothing here is larger than 8 MiB.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

HEADER_LIMIT: Final = 2**20
MANTISSA_LIMIT: Final = 32767
EXPONENTS: Final = range(-200, 101)
BAIT: Final = Path(tempfile.gettempdir()) / "rankup-ran-a-pickle"
"""Exists once somebody has run what a pickle asks for."""


@dataclass(frozen=True)
class Wanted:
    """What a lease asks for: the identity that its delta must state, and weight -> (d_out, d_in, highest rank)."""

    model: str
    round_id: str
    lease_id: str
    base_manifest: str
    weights: Mapping[str, tuple[int, int, int]]

    def identity(self, **changes: object) -> str:
        """The metadata entry, as canonical JSON."""
        said = {
            "format": "rankup.delta/1",
            "model": self.model,
            "round_id": self.round_id,
            "lease_id": self.lease_id,
            "base_manifest": self.base_manifest,
        } | changes
        return json.dumps(said, sort_keys=True, separators=(",", ":"))

    @property
    def ranks(self) -> dict[str, int]:
        return {name: rank for name, (_, _, rank) in self.weights.items()}

    def entries(self, ranks: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The tensors of a delta with these ranks (the highest, if none are given), in the order of the file."""
        entries: dict[str, Any] = {}
        offset = 0
        for name, rank in sorted((ranks if ranks is not None else self.ranks).items()):
            d_out, d_in, _ = self.weights[name]
            for suffix, shape in (("A", [rank, d_in]), ("B", [d_out, rank]), ("scales", [4, rank])):
                end = offset + 2 * shape[0] * shape[1]
                entries[f"{name}.lora_{suffix}"] = {"dtype": "I16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
        return entries


# -- a good one, and what makes it one ---------------------------------------------------------------------------------


def container(header: bytes | Mapping[str, Any], data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file; `length` is what it claims for its header, if that is not the truth."""
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def good_data(wanted: Wanted, seed: int = 0, ranks: Mapping[str, int] | None = None) -> bytes:
    rng = np.random.default_rng(seed)
    pieces = []
    for name, rank in sorted((ranks if ranks is not None else wanted.ranks).items()):
        d_out, d_in, _ = wanted.weights[name]
        a = rng.integers(-30_000, 30_000, (rank, d_in), dtype=np.int16)
        b = rng.integers(-30_000, 30_000, (d_out, rank), dtype=np.int16)
        scales = np.stack(
            [np.full(rank, -22, np.int16), np.full(rank, -15, np.int16), np.abs(b).max(axis=0), np.abs(a).max(axis=1)]
        )
        pieces += [a.tobytes(), b.tobytes(), scales.astype("<i2").tobytes()]
    return b"".join(pieces)


def good_delta(wanted: Wanted, seed: int = 0, ranks: Mapping[str, int] | None = None) -> bytes:
    return container(
        {"__metadata__": {"rankup": wanted.identity()}} | wanted.entries(ranks), good_data(wanted, seed, ranks)
    )


def is_delta(data: bytes, wanted: Wanted) -> bool:
    """Whether these bytes are a delta for this lease, by the page of the format: the one header that its ranks have,
    and maxima and exponents that its mantissas allow."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        shapes = {name: entry["shape"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        ranks = {name: shapes[f"{name}.lora_A"][0] for name in wanted.weights}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return False
    if any(type(rank) is not int or not 1 <= rank <= wanted.ranks[name] for name, rank in ranks.items()):
        return False
    values = data[8 + length :]
    expected = container({"__metadata__": {"rankup": wanted.identity()}} | wanted.entries(ranks), b"")
    if data[: 8 + length] != expected or len(values) != sum(_value_bytes(wanted, name, ranks[name]) for name in ranks):
        return False
    changes = False
    for name, rank in sorted(ranks.items()):
        d_out, d_in, _ = wanted.weights[name]
        size = _value_bytes(wanted, name, rank)
        numbers, values = np.frombuffer(values[:size], "<i2").astype(np.int64), values[size:]
        a, b, scales = np.split(numbers, [rank * d_in, rank * (d_in + d_out)])
        a, b, scales = np.abs(a.reshape(rank, d_in)), np.abs(b.reshape(d_out, rank)), scales.reshape(4, rank)
        if max(a.max(), b.max()) > MANTISSA_LIMIT or any(int(e) not in EXPONENTS for e in scales[:2].ravel()):
            return False
        if (scales[2] != b.max(axis=0)).any() or (scales[3] != a.max(axis=1)).any():
            return False
        changes |= bool(((scales[2] > 0) & (scales[3] > 0)).any())
    return changes


def _value_bytes(wanted: Wanted, name: str, rank: int) -> int:
    d_out, d_in, _ = wanted.weights[name]
    return 2 * rank * (d_out + d_in + 4)


# -- damage ------------------------------------------------------------------------------------------------------------


def _flip(rng: random.Random, data: bytes, start: int, end: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        out[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _flip_header(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return _flip(rng, data, 0, _header_end(data))


def _flip_values(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return _flip(rng, data, _header_end(data), len(data))


def _truncate(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _insert(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 4096))) + data[at:]


def _delete(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data) - 1)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64)) :]


def _length(rng: random.Random, data: bytes, _: bytes) -> bytes:
    true = int.from_bytes(data[:8], "little")
    near = true + rng.choice((-8, -1, 1, 8, 16))
    return struct.pack("<Q", rng.choice((near, near, rng.randrange(2**64), len(data), 2**63, 0))) + data[8:]


def _number(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """Another number somewhere in the header, with the length made to fit."""
    end = _header_end(data)
    text = data[8:end].decode()
    at = rng.choice([place for place in range(len(text)) if text[place].isdigit()])
    other = rng.choice(("0", "1", "-1", "9", "1e9", "1.0", "99999999999", "true", "null", '"8"', "NaN", "00", "[1]"))
    header = (text[:at] + other + text[at + 1 :]).encode()
    return struct.pack("<Q", len(header)) + header + data[end:]


def _text(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """Header text doubled, dropped or moved, with the length made to fit."""
    end = _header_end(data)
    header = data[8:end]
    first, second = sorted(rng.sample(range(len(header)), 2))
    piece = header[first:second]
    changed = rng.choice(
        (
            header[:second] + piece + header[second:],
            header[:first] + header[second:],
            header[:first] + piece[::-1] + header[second:],
            header[:first] + b"\\u00%02x" % header[first] + header[first + 1 :],
            header[:first] + b" " + header[first:],
        )
    )
    return struct.pack("<Q", len(changed)) + changed + data[end:]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.choice((_header_end(data), rng.randrange(1, len(data))))
    return data[:at] + other[min(at, len(other) - 1) :]


def _swap(rng: random.Random, data: bytes, _: bytes) -> bytes:
    size = rng.choice((2, 8, 64))
    first, second = sorted(rng.sample(range(0, len(data) - size, size), 2))
    out = bytearray(data)
    out[first : first + size], out[second : second + size] = data[second : second + size], data[first : first + size]
    return bytes(out)


def _fill(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 16, 512))
    return data[:at] + bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * min(size, len(data) - at) + data[at + size :]


def _extreme(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """One int16 of the values becomes as large, as small or as wrong as it can be."""
    end = _header_end(data)
    at = end + 2 * rng.randrange((len(data) - end) // 2)
    value = rng.choice((-32768, 32767, -1, 0, 101, -201, 100, -200))
    return data[:at] + struct.pack("<h", value) + data[at + 2 :]


DAMAGE: Final[Mapping[str, Callable[[random.Random, bytes, bytes], bytes]]] = {
    "bits of the header": _flip_header,
    "bits of the values": _flip_values,
    "truncation": _truncate,
    "insertion": _insert,
    "deletion": _delete,
    "length of the header": _length,
    "a number of the header": _number,
    "text of the header": _text,
    "splice of two deltas": _splice,
    "two blocks swapped": _swap,
    "a block filled": _fill,
    "an extreme value": _extreme,
}


def damaged(number: int, wanted: Wanted, seed: int) -> tuple[str, bytes, bytes]:
    """Kind of damage, damaged bytes, and the good ones that they come from; each kind comes equally often."""
    rng = random.Random(seed * 1_000_003 + number)
    lower = dict.fromkeys(wanted.weights, 1)
    stock = [good_delta(wanted, 1), good_delta(wanted, 2), good_delta(wanted, 3, lower)]
    kind = list(DAMAGE)[number % len(DAMAGE)]
    data, other = rng.sample(stock, 2)
    return kind, DAMAGE[kind](rng, data, other), data


# -- crafted -----------------------------------------------------------------------------------------------------------


def _with(wanted: Wanted, change: Callable[[dict[str, Any]], Any], data: bytes | None = None) -> bytes:
    """A good delta whose header went through `change` (in place, or to what it returns)."""
    entries: dict[str, Any] = {"__metadata__": {"rankup": wanted.identity()}} | wanted.entries()
    changed = change(entries)
    return container(entries if changed is None else changed, good_data(wanted) if data is None else data)


def _first(wanted: Wanted) -> str:
    return next(iter(wanted.entries()))


def _edit(wanted: Wanted, **fields: Any) -> bytes:
    """The first tensor's entry, with other fields."""
    return _with(wanted, lambda entries: entries[_first(wanted)].update(fields))


def _rename(wanted: Wanted, name: str) -> bytes:
    """A fresh weight of this name, in its right place and with values, beside those that are wanted."""
    weights = dict(wanted.weights) | {name: (8, 8, 1)}
    other = Wanted(wanted.model, wanted.round_id, wanted.lease_id, wanted.base_manifest, weights)
    return good_delta(other)


def _replace(wanted: Wanted, old: bytes, new: bytes) -> bytes:
    """Another spelling of the header."""
    data = good_delta(wanted)
    header = data[8 : _header_end(data)]
    if old not in header:
        raise ValueError(f"the header has no {old!r}")
    return container(header.replace(old, new, 1), good_data(wanted))


def _claims(wanted: Wanted, **fields: object) -> bytes:
    return _with(wanted, lambda entries: {**entries, "__metadata__": {"rankup": wanted.identity(**fields)}})


def _metadata(wanted: Wanted, metadata: object) -> bytes:
    return _with(wanted, lambda entries: {**entries, "__metadata__": metadata})


def _tiny_tensors(count: int) -> bytes:
    entry = '"w%d":{"dtype":"I16","shape":[1,1],"data_offsets":[%d,%d]}'
    header = ",".join(entry % (number, 2 * number, 2 * number + 2) for number in range(count))
    return container(f"{{{header}}}".encode(), bytes(2 * count))


def _tiny_weights(wanted: Wanted, count: int) -> bytes:
    """As many weights as fit into a header, each of them right in itself."""
    weights = {f"w{number:05}": (1, 1, 1) for number in range(count)}
    other = Wanted(wanted.model, wanted.round_id, wanted.lease_id, wanted.base_manifest, weights)
    return good_delta(other)


def _value(wanted: Wanted, index: int, value: int) -> bytes:
    """A good delta with one int16 changed; `index` counts from the end."""
    data = bytearray(good_delta(wanted))
    struct.pack_into("<h", data, len(data) - 2 * index, value)
    return bytes(data)


def _zip(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def _tar(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _numpy(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class _Runs:
    """A pickle of this would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {BAIT}",)


def _overlap(wanted: Wanted) -> bytes:
    names = list(wanted.entries())

    def change(entries: dict[str, Any]) -> None:
        entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]

    return _with(wanted, change)


def _all_offsets(wanted: Wanted, shift: int) -> bytes:
    def change(entries: dict[str, Any]) -> None:
        for name in wanted.entries():
            entries[name]["data_offsets"] = [edge + shift for edge in entries[name]["data_offsets"]]

    return _with(wanted, change)


def _drop(wanted: Wanted, names: Sequence[str]) -> bytes:
    def change(entries: dict[str, Any]) -> None:
        for name in names:
            del entries[name]

    return _with(wanted, change)


def _lower_rank_for_one(wanted: Wanted) -> bytes:
    """A and B of one weight with different ranks, every extent right in itself."""
    name = _first(wanted)
    entries = wanted.entries()
    entries[name]["shape"][0] -= 1
    offset = 0
    for entry in entries.values():
        end = offset + 2 * entry["shape"][0] * entry["shape"][1]
        entry["data_offsets"] = [offset, end]
        offset = end
    return container({"__metadata__": {"rankup": wanted.identity()}} | entries, bytes(offset))


def _above_rank(wanted: Wanted) -> bytes:
    return good_delta(wanted, ranks={name: rank + 1 for name, rank in wanted.ranks.items()})


def _stack(wanted: Wanted, slices: int) -> bytes:
    """Every tensor with a first dimension more."""
    entries = wanted.entries()
    offset = 0
    for entry in entries.values():
        end = offset + slices * 2 * entry["shape"][0] * entry["shape"][1]
        entry["shape"] = [slices, *entry["shape"]]
        entry["data_offsets"] = [offset, end]
        offset = end
    return container({"__metadata__": {"rankup": wanted.identity()}} | entries, good_data(wanted) * slices)


CRAFTED: Final[Mapping[str, tuple[Callable[[Wanted], bytes], str]]] = {
    # name: (bytes, a word of the reason, or the status of what gets no ticket)
    "no byte": (lambda w: b"", "422"),
    "one byte": (lambda w: b"\x00", "no delta"),
    "seven bytes": (lambda w: b"\xff" * 7, "no delta"),
    "no header": (lambda w: bytes(8), "JSON"),
    "a header of 2^63 bytes": (lambda w: container(b"{}", b"", length=2**63), "limit"),
    "a header of 2^64 - 1 bytes": (lambda w: container(b"{}", b"", length=2**64 - 1), "limit"),
    "a header of one byte too many": (lambda w: container(b" " * (HEADER_LIMIT + 1), b""), "limit"),
    "a header that ends behind the file": (lambda w: container(b"{}", b"", length=100), "claims"),
    "a header of spaces": (lambda w: container(b" " * HEADER_LIMIT, b""), "JSON"),
    "a header of zeros": (lambda w: container(bytes(4096), b""), "JSON"),
    "brackets without end": (lambda w: container(b"[" * HEADER_LIMIT, b""), "JSON"),
    "objects without end": (lambda w: container(b'{"a":' * 200_000, b""), "JSON"),
    "a deep entry": (lambda w: container(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}", b""), "JSON"),
    "a deep entry that can be parsed": (
        lambda w: _with(w, lambda e: e.update(x=json.loads("[" * 300 + "]" * 300))),
        "matrix",
    ),
    "deep metadata": (lambda w: _metadata(w, {"rankup": "[" * 100_000 + "]" * 100_000}), "metadata"),
    "JSON null": (lambda w: container(b"null    ", b""), "object"),
    "a JSON array": (lambda w: container(b"[]      ", b""), "object"),
    "a JSON number of a million digits": (lambda w: container(b'{"a":' + b"9" * 1_000_000 + b"}", b""), "JSON"),
    "an empty object": (lambda w: container(b"{}      ", b""), "metadata"),
    "a byte order mark": (lambda w: _replace(w, b"{", b"\xef\xbb\xbf{"), "JSON"),
    "UTF-16": (lambda w: container('{"a":1}'.encode("utf-16"), b""), "JSON"),
    "broken UTF-8": (lambda w: _replace(w, b"lora_A", b"lora_\xff\xfe"), "JSON"),
    "half a surrogate": (lambda w: _replace(w, b"lora_A", b"\\ud800.lora_A"), "name"),
    "a name twice": (lambda w: _replace(w, b"lora_B", b"lora_A"), "twice"),
    "a field twice": (lambda w: _replace(w, b'"dtype":"I16"', b'"dtype":"I16","dtype":"I16"'), "twice"),
    "metadata twice": (lambda w: _replace(w, b'{"__metadata__"', b'{"__metadata__":{},"__metadata__"'), "twice"),
    "an identity with a field twice": (
        lambda w: _replace(w, b'{\\"base', b'{\\"round_id\\":\\"x\\",\\"base'),
        "canonical",
    ),
    "an identity with a field more": (lambda w: _claims(w, admin=True), "metadata"),
    "an identity of another format": (lambda w: _claims(w, format="rankup.delta/2"), "metadata"),
    "an identity of another lease": (lambda w: _claims(w, lease_id="l-0000000000000000"), "lease_id"),
    "an identity of another round": (lambda w: _claims(w, round_id="tiny-r9999-000000"), "round_id"),
    "an identity of another base": (lambda w: _claims(w, base_manifest="0" * 64), "base_manifest"),
    "an identity of another model": (lambda w: _claims(w, model="other"), "model"),
    "metadata that is a number": (lambda w: _metadata(w, 7), "metadata"),
    "metadata of metadata": (lambda w: _metadata(w, {"rankup": {"format": "rankup.delta/1"}}), "string"),
    "metadata with a stowaway": (lambda w: _metadata(w, {"rankup": w.identity(), "pt": "x" * 1000}), "nothing else"),
    "no metadata": (lambda w: _drop(w, ["__metadata__"]), "metadata"),
    "spaces in the header": (lambda w: _replace(w, b'":{', b'": {'), "canonical"),
    "an escape for a letter": (lambda w: _replace(w, b"lora_A", b"\\u006cora_A"), "canonical"),
    "no rows": (lambda w: _edit(w, shape=[0, 8], data_offsets=[0, 0]), "shape"),
    "a shape of 0 times 10^12": (lambda w: _edit(w, shape=[0, 10**12], data_offsets=[0, 0]), "shape"),
    "a shape of 2^24 times 2^24": (lambda w: _edit(w, shape=[2**24, 2**24], data_offsets=[0, 2**49]), "rank"),
    "a shape of 2^64": (lambda w: _edit(w, shape=[2**64, 1]), "shape"),
    "a negative shape": (lambda w: _edit(w, shape=[-3, -16]), "shape"),
    "a shape of nothing": (lambda w: _edit(w, shape=[]), "shape"),
    "a shape of nine dimensions": (lambda w: _edit(w, shape=[1] * 9), "shape"),
    "a shape of texts": (lambda w: _edit(w, shape=["3", "16"]), "shape"),
    "a shape of truths": (lambda w: _edit(w, shape=[True, True]), "shape"),
    "a shape with NaN": (lambda w: _edit(w, shape=[float("nan"), 16]), "shape"),
    "an offset at infinity": (lambda w: _edit(w, data_offsets=[0, float("inf")]), "data_offsets"),
    "an offset of 2^70": (lambda w: _edit(w, data_offsets=[0, 2**70]), "data_offsets"),
    "negative offsets": (lambda w: _edit(w, data_offsets=[-96, 0]), "data_offsets"),
    "offsets the wrong way round": (lambda w: _edit(w, data_offsets=[96, 0]), "data_offsets"),
    "offsets of floats": (lambda w: _edit(w, data_offsets=[0.0, 96.0]), "data_offsets"),
    "three offsets": (lambda w: _edit(w, data_offsets=[0, 96, 96]), "data_offsets"),
    "two tensors in one place": (_overlap, "data_offsets"),
    "a gap before the tensors": (lambda w: _all_offsets(w, 8), "data_offsets"),
    "values behind the tensors": (lambda w: good_delta(w) + bytes(64), "end at"),
    "values that are missing": (lambda w: good_delta(w)[:-2], "end at"),
    "an extra field": (lambda w: _edit(w, strides=[1, 1]), "strides"),
    "float32": (lambda w: _edit(w, dtype="F32"), "dtype"),
    "bfloat16": (lambda w: _edit(w, dtype="BF16"), "dtype"),
    "bool": (lambda w: _edit(w, dtype="BOOL"), "dtype"),
    "int64": (lambda w: _edit(w, dtype="I64"), "dtype"),
    "a dtype of a thousand letters": (lambda w: _edit(w, dtype="I16" * 1000), "dtype"),
    "a dtype that is a list": (lambda w: _edit(w, dtype=["I16"]), "dtype"),
    "int8 in one factor": (lambda w: _edit(w, dtype="I8"), "one type"),
    "200,000 tiny tensors": (lambda w: _tiny_tensors(200_000), "413"),
    "as many tiny tensors as fit": (lambda w: _tiny_tensors(15_000), "metadata"),
    "as many weights as fit": (lambda w: _tiny_weights(w, 4_000), "missing"),
    "a name with a path": (lambda w: _rename(w, "../../etc/passwd"), "name"),
    "a name with a backslash": (lambda w: _rename(w, "a\\b"), "name"),
    "a name with a zero": (lambda w: _rename(w, "a\0b"), "name"),
    "a name from another alphabet": (lambda w: _rename(w, "lаyers.0"), "name"),
    "a name of a thousand letters": (lambda w: _rename(w, "a" * 1000), "name"),
    "a name without letters": (lambda w: _rename(w, ""), "name"),
    "a name with a suffix too many": (lambda w: _rename(w, "a.lora_A"), "lora_"),
    "a weight that nobody trains": (lambda w: _rename(w, "norm.weight"), "norm.weight"),
    "a tensor with no suffix": (lambda w: _replace(w, b".lora_A", b""), "lora_"),
    "one weight left out": (lambda w: good_delta(w, ranks=dict(list(w.ranks.items())[:1])), "missing"),
    "no scales": (lambda w: _drop(w, [list(w.entries())[2]]), "missing"),
    "A and B of different ranks": (_lower_rank_for_one, "rank"),
    "a rank above the round's": (_above_rank, "rank"),
    "a stack of one": (lambda w: _stack(w, 1), "slices"),
    "a stack where there is none": (lambda w: _stack(w, 4), "shape"),
    "an exponent of 32767": (lambda w: _value(w, 10, 32767), "exponent"),
    "an exponent of -32768": (lambda w: _value(w, 10, -32768), "exponent"),
    "a negative maximum": (lambda w: _value(w, 1, -1), "maxima"),
    "a maximum that is too small": (lambda w: _value(w, 1, 1), "maxima"),
    "the mantissa -32768": (lambda w: _value(w, 20, -32768), "mantissa"),
    "only zeros": (
        lambda w: container(good_delta(w)[8 : _header_end(good_delta(w))], bytes(len(good_data(w)))),
        "zero",
    ),
    "a pickle": (lambda w: pickle.dumps({"weights": [0.0] * 100}), "malformed"),
    "a pickle that runs a command": (lambda w: pickle.dumps(_Runs()), "malformed"),
    "a torch archive": (
        lambda w: _zip({"archive/data.pkl": pickle.dumps(_Runs()), "archive/data/0": bytes(64)}),
        "malformed",
    ),
    "a zip bomb": (lambda w: _zip({"0": bytes(8 * 2**20)}), "malformed"),
    "a zip with a path out of it": (lambda w: _zip({"../../delta": good_delta(w)}), "malformed"),
    "a tar with a path out of it": (lambda w: _tar("/etc/passwd", good_delta(w)), "malformed"),
    "a delta in gzip": (lambda w: gzip.compress(good_delta(w)), "malformed"),
    "a gzip bomb": (lambda w: gzip.compress(bytes(8 * 2**20)), "malformed"),
    "arrays of numpy": (lambda w: _numpy(a=np.zeros(8)), "malformed"),
    "objects of numpy": (lambda w: _numpy(a=np.array([{}], dtype=object)), "malformed"),
    "a GGUF file": (lambda w: b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "malformed"),
    "a program": (lambda w: b"\x7fELF\x02\x01\x01" + bytes(200), "malformed"),
    "a page": (lambda w: b"<!doctype html><script>alert(1)</script>", "malformed"),
    "random bytes": (lambda w: random.Random(0).randbytes(4096), "malformed"),
}
"""Crafted deltas: at most 8 MiB each, and none of them is a delta of the lease."""
