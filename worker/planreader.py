"""What `worker.plan` needs to know, read from the server: open rounds, who is at work, what a base would cost here.

What always holds: nothing is downloaded but lists and manifests, nothing is written, no lease is claimed; manifests are
checked with the publisher's key before a number is taken from them; what cannot be read is left out of the plan, or is
the reason why there is none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from rankup.errors import IntegrityError, RankupError
from rankup.protocol import DeviceKind, RoundView, VersionRef, tier_of
from rankup.records import Manifest
from rankup.targets import select_targets, targets_at_tier
from worker import cache, precision
from worker.client import GatewayClient
from worker.plan import Base, Memory, Plan, Resources, plan_task, sort_rounds

NO_ROUND = "no round is open: the worker waits and asks again, as often as the server says"
NONE_FITS = "no open round fits this machine: the worker asks again, as often as the server says"


def read_plan(
    client: GatewayClient,
    has: Resources,
    hardware: precision.Hardware,
    read_base: Callable[[VersionRef], tuple[Base, Manifest]],
    now: float,
) -> Plan:
    """The plan for what the server has open at `now` (Unix time of the server). Raises no RankupError."""
    try:
        rounds = client.rounds().rounds
    except RankupError as exc:
        return Plan(None, waits=f"the open rounds cannot be read ({exc.cause}): the worker asks for work all the same")
    fitting, refused = sort_rounds(rounds, has)
    if not fitting:
        return Plan(None, waits=NONE_FITS if refused else NO_ROUND, refused=tuple(refused))
    view = fitting[0]
    try:
        work = client.leases_at_work(view.round_id)
    except RankupError:
        work = None  # it would only have told how long others take
    base, memory = _needs(view, has, hardware, read_base)
    others = tuple(f"{other.round_id} ({other.model})" for other in fitting[1:])
    task = plan_task(view, has, base, memory, now, earlier=rounds, work=work)
    return Plan(task, others=others, refused=tuple(refused))


def base_reader(server: str, store: Path, publisher_key: str) -> Callable[[VersionRef], tuple[Base, Manifest]]:
    """Reads what a version would cost, with what lies in `store`, the cache of base versions."""

    def read(wanted: VersionRef) -> tuple[Base, Manifest]:
        from rankup.pull import plan_pull
        from rankup.sources import GatewaySource, Patience

        nowhere = store / f".{wanted.manifest}"  # never made, so nothing in it is hashed
        with GatewaySource(server) as source:
            planned = plan_pull(
                source,
                wanted.model,
                wanted.version,
                nowhere,
                publisher_key=publisher_key,
                bases=cache.nearest_version(store, wanted.model, wanted.version, without=nowhere),
                patience=Patience(attempts=1),
            )
        if planned.digest != wanted.manifest:
            raise IntegrityError(f"version {wanted.version} of {wanted.model} is not the one that the round names")
        full_bytes = sum(file.size_bytes for file in planned.manifest.export_files())
        return Base(planned.plan.fetch_bytes, full_bytes), planned.manifest

    return read


def hardware_of(kind: DeviceKind, free_bytes: int | None, capability: tuple[int, int] | None) -> precision.Hardware:
    """What trains, without asking torch. Cards compute in bfloat16 from capability 8.0 on."""
    return precision.Hardware(
        kind=kind,
        free_bytes=free_bytes,
        bfloat16=kind != "cuda" or capability is None or capability >= (8, 0),
        four_bit=importlib.util.find_spec("bitsandbytes") is not None,
    )


def _needs(
    view: RoundView,
    has: Resources,
    hardware: precision.Hardware,
    read_base: Callable[[VersionRef], tuple[Base, Manifest]],
) -> tuple[Base | None, Memory]:
    """What the round's versions cost, and what its training takes; None where they cannot be read."""
    try:
        base, manifest = read_base(VersionRef(model=view.model, version=view.base_version, manifest=view.base_manifest))
        if view.teacher is not None:
            teacher, _ = read_base(view.teacher)
            base = Base(base.fetch_bytes + teacher.fetch_bytes, base.full_bytes + teacher.full_bytes)
    except RankupError as exc:
        return None, Memory(trouble=f"what the base costs is not known: {exc.cause}")
    return base, fit_memory(view, has, manifest, hardware)


def fit_memory(view: RoundView, has: Resources, manifest: Manifest, hardware: precision.Hardware) -> Memory:
    """What a training of the round takes of the memory, by the arithmetic of `worker.precision`."""
    tier = tier_of(view.tiers, has.memory_bytes)
    rank = tier.rank if tier is not None else None
    shape = precision.BaseShape.of({name: entry.shape for name, entry in manifest.tensors.items()})
    try:
        targets = targets_at_tier(select_targets(manifest.targets(), view.recipe), view.recipe, rank)
        task = precision.Task.of(view.recipe.at_tier(rank), targets)
        fit = precision.choose(shape, task, hardware, wanted=has.precision)
    except RankupError as exc:
        return Memory(trouble=f"{exc.cause}. {exc.remedy}")
    return Memory(fit.needs_bytes, fit.precision, fit.micro_batch)
