"""A small signed history in which versions were taken back, made with whole arrays and by hand.

    0    genesis
    1    round, momentum
    2    round, momentum; one delta of an older base, one left out
    3    revocation of a contribution of round 1
    4    key rotation
    5    round, no momentum
    6    rollback to 3
    7    round, momentum, from the momenta of version 3
    8    revocation of all of round 7
    9    rollback to 5
    10   revocation of a contribution of round 2 and one of round 5
    11   key rotation
    12   round, momentum

What every version is the sum of stands in `SUMS`, written down and not computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from history import History
from merkle_oracle import mth

from rankup.bfloat16 import to_bfloat16
from rankup.delta import DeltaHeader, write_delta
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.keychain import make_key_change
from rankup.outer import outer_step
from rankup.recipe import PLAIN_SUM, Aggregation, OuterStep, Recipe
from rankup.records import (
    Change,
    FileEntry,
    Group,
    KeyRotation,
    Log,
    Manifest,
    Revocation,
    Rollback,
    TensorEntry,
    Term,
)
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, put_blob
from rankup.targets import Role
from rankup.tensorfile import write_tensor_file
from rankup.versions import manifest_digest, manifest_key, seal

MODEL = "toy"
RANK = 3
DENOMINATOR_LOG2 = 16
SHAPES: Mapping[str, tuple[int, ...]] = {"bias": (6,), "down": (8, 12), "experts": (2, 5, 4), "up": (12, 8)}
ROLES: Mapping[str, Role] = {"bias": "vector", "down": "linear", "experts": "experts", "up": "linear"}
GROUPS = (("down", "up"), ("steps", "bias", "experts", "norm"))
MOMENTUM = OuterStep(learning_rate=0.75, momentum=0.875)
ROUNDS: Mapping[int, OuterStep] = {1: MOMENTUM, 2: MOMENTUM, 5: PLAIN_SUM, 7: MOMENTUM, 12: MOMENTUM}
LAST = 12
LEFT_OUT = (2, 3)

SUMS: Mapping[int, Mapping[int, tuple[int, ...]]] = {
    0: {},
    1: {1: (0, 1, 2)},
    2: {1: (0, 1, 2), 2: (0, 1, 2)},
    3: {1: (0, 2), 2: (0, 1, 2)},
    4: {1: (0, 2), 2: (0, 1, 2)},
    5: {1: (0, 2), 2: (0, 1, 2), 5: (0, 1)},
    6: {1: (0, 2), 2: (0, 1, 2)},
    7: {1: (0, 2), 2: (0, 1, 2), 7: (0, 1)},
    8: {1: (0, 2), 2: (0, 1, 2), 7: ()},
    9: {1: (0, 2), 2: (0, 1, 2), 5: (0, 1)},
    10: {1: (0, 2), 2: (0, 1), 5: (1,)},
    11: {1: (0, 2), 2: (0, 1), 5: (1,)},
    12: {1: (0, 2), 2: (0, 1), 5: (1,), 12: (0, 1)},
}
"""Version -> round -> those of its contributions, by number, that are in the sum."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Contribution:
    """A delta with its factors, tensor by tensor and slice by slice."""

    term: Term
    changes: Mapping[str, list[Factors]]


@dataclass
class ChangedHistory(History):
    """`keys[n]` signs from the n-th key rotation on; `rounds[v]` are the contributions of version v by number."""

    keys: list[Ed25519PrivateKey] = field(default_factory=list)
    rounds: dict[int, list[Contribution]] = field(default_factory=dict)
    genesis: Arrays = field(default_factory=dict)

    def digest(self, version: int) -> str:
        return manifest_digest(self.manifests[version])

    def contribution(self, version: int, number: int) -> str:
        return self.rounds[version][number].term.contribution

    def signer(self, version: int) -> Ed25519PrivateKey:
        """The key of the version's time."""
        return self.keys[sum(isinstance(m.change, KeyRotation) for m in self.manifests[: version + 1])]

    def copy(self) -> ChangedHistory:
        """One that may be changed without this one."""
        store = MemoryStore()
        for key in self.store.list(""):
            store.put(key, self.store.get(key, max_bytes=2**20))
        return replace(self, store=store, manifests=list(self.manifests))

    def reseal(self, version: int, **fields: Any) -> None:
        """What a dishonest publisher can do: sign a version anew, and all that follow with their new parents."""
        for number in range(version, len(self.manifests)):
            update = fields if number == version else {"parent": self.digest(number - 1)}
            self.manifests[number] = self.manifests[number].model_copy(update=update)
            self.store.put(manifest_key(MODEL, number), seal(self.manifests[number], self.signer(number)))
        self.point(len(self.manifests) - 1)


def make_changed_history(last: int = LAST) -> ChangedHistory:
    """Versions 0 to `last`, the last one `latest`."""
    rng = np.random.default_rng(4)
    keys = [parse_private_key(generate_private_key()) for _ in range(3)]
    history = ChangedHistory(MemoryStore(), keys[0], keys=keys)
    history.genesis = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    history.genesis |= {"norm": rng.standard_normal(7).astype(np.float32), "steps": np.arange(3, dtype=np.int64)}
    for version in range(last + 1):
        if version in ROUNDS:
            count = 4 if version == LEFT_OUT[0] else 3 if version == 1 else 2
            history.rounds[version] = [_contribute(history, rng, version, number) for number in range(count)]
        _publish(history, version)
    history.key = history.signer(last)
    history.point(last)
    return history


def state_of(history: ChangedHistory, sums: Mapping[int, tuple[int, ...]]) -> tuple[Arrays, Arrays]:
    """Masters and momenta of a history that had only ever had these sums: the rounds in order, from version 0."""
    masters, momenta = dict(history.genesis), {}
    for version, numbers in sums.items():
        outer = ROUNDS[version]
        for name in SHAPES:
            terms = [history.rounds[version][number] for number in numbers]
            pairs = [(one.term.coefficient, one.changes[name]) for one in terms if name in one.changes]
            if pairs or (outer.keeps_state and name in momenta):
                masters[name], momentum = _step(masters[name], momenta.get(name), pairs, outer)
                if momentum is not None:
                    momenta[name] = momentum
        if not outer.keeps_state:
            momenta = {}
    return masters, momenta


def _step(
    master: np.ndarray, momentum: np.ndarray | None, pairs: list[tuple[int, list[Factors]]], outer: OuterStep
) -> tuple[np.ndarray, np.ndarray | None]:
    shape = master.shape if master.ndim == 3 else (1, len(master), master.size // len(master))
    slices = []
    for number, matrix in enumerate(master.reshape(shape)):
        change = fold_tensor(np.zeros_like(matrix), [(c, factors[number]) for c, factors in pairs], DENOMINATOR_LOG2)
        state = None if momentum is None else momentum.reshape(shape)[number]
        slices.append(outer_step(matrix, change, state, outer))
    masters = np.stack([one for one, _ in slices]).reshape(master.shape)
    momenta = [one for _, one in slices if one is not None]
    return masters, np.stack(momenta).reshape(master.shape) if momenta else None


def _recipe(version: int) -> Recipe:
    return Recipe(
        rank=RANK,
        target_parameters=("experts",),
        train_vectors=True,
        partial=True,
        aggregation=Aggregation(outer=ROUNDS[version], max_staleness=1),
    )


def _contribute(history: ChangedHistory, rng: np.random.Generator, version: int, number: int) -> Contribution:
    """The number-th contribution leaves the number-th weight alone, those of round 2 the bias too, which moves by its
    momentum. Number 2 of round 2 is of the version before the parent."""
    changes: dict[str, list[Factors]] = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        if place == number or (version, name) == (2, "bias"):
            continue
        slices, d_out, d_in = shape if len(shape) == 3 else (1, shape[0], shape[1] if len(shape) == 2 else 1)
        rank = RANK if len(shape) > 1 else 1
        changes[name] = [
            quantise(0.1 * rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in)), bits=16)
            for _ in range(slices)
        ]
    stale = version == 2 and number == 2
    base = history.digest(version - 2 if stale else version - 1)
    header = DeltaHeader(model=MODEL, round_id=f"round-{version}", lease_id=f"l{number}", base_manifest=base)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        ref = write_delta(path, header, {name: one if len(one) > 1 else one[0] for name, one in changes.items()})
        history.deltas[ref.sha256] = path.read_bytes()
    left_out = (version, number) == LEFT_OUT
    if not left_out:
        put_blob(history.store, history.deltas[ref.sha256])
    term = Term(
        contribution=ref.sha256,
        size_bytes=ref.size_bytes,
        worker_id=f"w-{number}",
        worker_name=f"worker {number}",
        shard=number,
        tokens=1000,
        coefficient=0 if left_out else 20000 + number,
        base_manifest=base if stale else None,
    )
    return Contribution(term, changes)


def _change(history: ChangedHistory, version: int) -> Change | None:
    def revoke(*which: tuple[int, int]) -> Revocation:
        digests = sorted(history.contribution(*one) for one in which)
        return Revocation(contributions=tuple(digests), reason="poisoned")

    match version:
        case 3:
            return revoke((1, 1))
        case 4 | 11:
            return KeyRotation()
        case 6:
            return Rollback(to=3, reason="worse")
        case 8:
            return revoke((7, 0), (7, 1))
        case 9:
            return Rollback(to=5)
        case 10:
            return revoke((2, 2), (5, 0))
    return None


def leaves_of(history: ChangedHistory, version: int) -> list[dict[str, object]]:
    """The log's leaves, as they stand in `contributions.json`."""
    return [
        {"contribution": digest, "version": of, "coefficient": coefficient, "denominator_log2": DENOMINATOR_LOG2}
        for of, numbers in SUMS[version].items()
        for digest, coefficient in sorted(
            (history.rounds[of][number].term.contribution, history.rounds[of][number].term.coefficient)
            for number in numbers
        )
    ]


def canonical(value: object) -> bytes:
    """JSON in the one spelling that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _publish(history: ChangedHistory, version: int) -> None:
    masters, momenta = state_of(history, SUMS[version])
    entries: dict[str, TensorEntry] = {}
    groups = []
    for names in GROUPS:
        files: dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]] = {"master": {}, "model": {}, "momentum": {}}
        for name in names:
            array = masters[name]
            floating = array.dtype == np.float32
            master = ("F32" if floating else "I64", array.shape, array.tobytes())
            export = ("BF16", array.shape, to_bfloat16(array).tobytes()) if floating else master
            files["master"][name], files["model"][name] = master, export
            if name in momenta:
                files["momentum"][name] = ("F32", array.shape, momenta[name].tobytes())
            entries[name] = TensorEntry(
                shape=array.shape,
                export_dtype="BF16" if floating else "I64",
                master=hashlib.sha256(master[2]).hexdigest(),
                export=hashlib.sha256(export[2]).hexdigest(),
                role=ROLES.get(name),
                momentum=hashlib.sha256(momenta[name].tobytes()).hexdigest() if name in momenta else None,
            )
        stored = {}
        for kind, tensors in files.items():
            buffer = BytesIO()
            write_tensor_file(buffer, tensors, {"format": "pt"})
            path = f"{kind}-{len(groups) + 1:05d}-of-00002.safetensors"
            if tensors:
                stored[kind] = FileEntry(path=path, **put_blob(history.store, buffer.getvalue()).model_dump())
        groups.append(
            Group(tensors=names, master=stored["master"], export=stored["model"], momentum=stored.get("momentum"))
        )
    change = _change(history, version)
    before = history.manifests[-1] if version else None
    keys = before.keys if before else ()
    if isinstance(change, KeyRotation):
        old, new = history.keys[len(keys) : len(keys) + 2]
        keys = (*keys, make_key_change(old, public_key_hex(new), model=MODEL, from_version=version))
    leaves = leaves_of(history, version)
    others = {"config.json": b'{"model_type":"toy"}', "README.md": b"# toy, version %d\n" % version}
    if version:
        others["contributions.json"] = canonical({"format": "rankup.contributions/1", "model": MODEL, "leaves": leaves})
    terms = [one.term for one in history.rounds.get(version, ())]
    manifest = Manifest(
        model=MODEL,
        version=version,
        parent=history.digest(version - 1) if version else None,
        round_id=f"round-{version}" if version in ROUNDS else None,
        recipe=_recipe(max(SUMS[version])) if version else None,
        denominator_log2=DENOMINATOR_LOG2,
        terms=tuple(sorted(terms, key=lambda term: term.contribution)),
        tensors=entries,
        groups=tuple(groups),
        files=tuple(
            FileEntry(path=path, **put_blob(history.store, data).model_dump()) for path, data in sorted(others.items())
        ),
        change=change,
        keys=keys,
        log=Log(size=len(leaves), root=mth([canonical(leaf) for leaf in leaves]).hex()),
        base_model="toy",
        licence="Apache-2.0",
        created_at=float(version),
    )
    history.manifests.append(manifest)
    history.publish(manifest, key=history.signer(version))
