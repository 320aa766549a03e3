"""The cheapest way to the masters and momenta of a version: rounds made again from an older version that is at hand.

What always holds: as `rankup.routes` says of every plan; and no way leads over a rollback or a revocation, whose
tensors do not follow from their parent by rounds. It plans without any I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankup.lineage import contributions_of
from rankup.records import BlobRef, Group, KeyRotation, Manifest, Retained
from rankup.routes import (
    MAX_HOPS,
    ManifestOf,
    Plan,
    Stock,
    direct,
    is_gone,
    make_plan,
    same_group,
    state_files,
    state_of,
)


def plan_masters(
    manifest: Manifest, stock: Stock, retained: Retained, manifest_of: ManifestOf, *, manifest_bytes: int
) -> Plan:
    """The plan for what the fold goes on from: masters and momenta. `manifest_bytes`: about what an older one costs."""
    routes = tuple(direct(file, stock) for file in state_files(manifest))
    plan = make_plan(manifest, routes, stock)
    found = _by_rounds(manifest, stock, retained, manifest_of, plan.full_bytes, manifest_bytes)
    if found is None:
        return plan
    made = {file.sha256 for group in found.groups for file in state_of(group)}
    routes = tuple(
        replace(route, kind="rounds", fetched=()) if route.kind == "full" and route.file.sha256 in made else route
        for route in routes
    )
    return make_plan(manifest, routes, stock, found.chain, found.deltas)


@dataclass(frozen=True)
class _Rounds:
    chain: tuple[Manifest, ...]
    deltas: tuple[BlobRef, ...]
    groups: tuple[Group, ...]
    """Groups of the target that can be made."""
    saved_bytes: int


def _by_rounds(
    manifest: Manifest,
    stock: Stock,
    retained: Retained,
    manifest_of: ManifestOf,
    full_bytes: int,
    manifest_bytes: int,
) -> _Rounds | None:
    """The start, among the versions before, from which making the files again saves most; None where nothing does."""
    chain: tuple[Manifest, ...] = (manifest,)
    deltas: dict[str, BlobRef] = {}
    best: _Rounds | None = None
    while len(chain) <= min(MAX_HOPS, full_bytes // max(1, manifest_bytes)):
        newest = chain[0]
        if newest.version <= stock.floor or not (newest.change is None or isinstance(newest.change, KeyRotation)):
            break
        deltas |= {delta.sha256: delta for delta in contributions_of(newest)}
        spent = sum(stock.cost(delta) for delta in deltas.values())
        if (
            spent >= full_bytes
            or stock.avoid & deltas.keys()
            or (newest.terms and is_gone(retained, newest.version, "contributions"))
        ):
            break
        parent = manifest_of(newest.version - 1)
        if parent is None:
            break
        chain = (parent, *chain)
        groups = tuple(group for group in manifest.groups if _can_start(group, chain, stock))
        saved = sum(stock.cost(file) for group in groups for file in state_of(group)) - spent
        if saved > (0 if best is None else best.saved_bytes):
            best = _Rounds(chain, tuple(deltas.values()), groups, saved)
    return best


def _can_start(group: Group, chain: Sequence[Manifest], stock: Stock) -> bool:
    """The first version of the chain has all of the group's state, at hand, and the same group is in every version."""
    if any(file.sha256 in stock.whole for file in state_of(group)) or all(
        file.sha256 in stock.held for file in state_of(group)
    ):
        return False
    before = [same_group(group, manifest) for manifest in chain]
    first = before[0]
    return None not in before and first is not None and all(file.sha256 in stock.held for file in state_of(first))
