"""Verifying a published version without trusting the organiser: its chain of manifests, its tensors, or all versions'.

    chain   every manifest down to version 0, by the rules of `rankup.versions` and `rankup.chain`
    round   the version's tensors, made again from published masters by `rankup.lineage.replay_plan`: a round from its
            parent, a revocation from before the first sum that it changes; a rollback or a key rotation has the tensors
            of another version
    all     the chain, and every version's tensors in turn, from the masters of version 0 and the contributions alone

Every master, export and momentum that was made again must have the manifest's hash. Version 0 has no round: there every
export must be what its master gives.

What always holds:
- a report that is `ok` means what its `proved` says and no more; a broken signature, chain, blob or delta raises;
- memory is that of one round (`rankup.replayround`) and of one chain (`rankup.chain`). On disk lie downloads, the
  masters and momenta that a later version begins with, and those that are being made.

It proves that a version is the stated sum, not that the contributions are good. It needs neither ray nor torch.
`rankup.checkfiles` verifies a pulled folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rankup.chain import Chain, require_equal_tables
from rankup.chainread import VersionReader
from rankup.checkfiles import Level, Report, Tally, check_group
from rankup.download import OnProgress, fetch
from rankup.errors import InputError
from rankup.folder import folder_lock
from rankup.lineage import Plan, replay_plan
from rankup.records import BlobRef, KeyRotation
from rankup.replayround import Round, State, published_state, state_refs
from rankup.replaywork import Work
from rankup.sources import Patience, Source

_GENESIS = "every export of version 0 is its master, rounded"
_ORIGIN = "that version 0 is the model that it is named after"


def verify_version(
    source: Source,
    model: str,
    version: int | None,
    *,
    cache: Path,
    level: Level = "round",
    publisher_key: str | None = None,
    keep: bool = True,
    progress: OnProgress | None = None,
    parallel: int = 4,
    patience: Patience | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Verify a version (None: the latest) at a level other than "files", which is for pulled folders.

    Downloads lie in `cache` as `<sha256>`; without `keep` contributions go when their round is done. With
    `publisher_key` None the key that signed the version is taken, and stands in the report; the versions before it must
    be signed by that key or by one that led to it.

    Raises:
        IntegrityError: a signature, the chain, a blob or a delta is not what the manifest says.
        NotFoundError, DiskFullError, StateError, RetryableError: as `rankup.pull.pull`.
        InputError: the level is "files".
    """
    if level == "files":
        raise InputError("the level 'files' is for a pulled folder", remedy="Name the folder, or another level.")
    patience = patience or Patience()

    def have(refs: Iterable[BlobRef], folder: Path) -> None:
        fetch(source, refs, folder, parallel=parallel, patience=patience, progress=progress)

    tally = Tally(clock, progress, "checking", 0)
    reader = VersionReader(source, model, publisher_key=publisher_key, patience=patience)
    top = reader.latest() if version is None else reader.open(version)
    if version is None:
        reader.require_nothing_newer(top.manifest.version)
    work = Work(reader, top, cache, keep, tally, have)
    if level == "chain":
        return _prove_chain(work)
    with folder_lock(cache):
        if level == "all":
            return _prove_all(work)
        return _prove_version(work) if top.manifest.version else _prove_genesis(work)


def _prove_chain(work: Work) -> Report:
    chain = work.chain()
    return work.report(
        "chain",
        chain.leaves,
        "manifests were checked; no tensor was",
        _of_chain(chain),
        ("that the tensors of any version are the sum that its manifest states: --level round or all",),
    )


def _prove_genesis(work: Work) -> Report:
    manifest = work.top.manifest
    exports = [group.export for group in manifest.groups]
    work.have("version 0", [*state_refs(manifest, momenta=False), *exports])
    work.start("checking", sum(group.master.size_bytes for group in manifest.groups))
    for group in manifest.groups:
        check_group(work.tally, manifest, group, "export", work.cache / group.export.sha256)
    work.check_genesis(manifest)
    note = "version 0 has no round to replay: its masters and exports were hashed and agree with each other"
    return work.report("files", 0, note, (f"the manifest is signed by {work.top.key[:16]}…", _GENESIS), (_ORIGIN,))


def _prove_version(work: Work) -> Report:
    """The top version, from published masters."""
    top, parent = work.top.manifest, work.parent()
    chain: Chain | None = None
    if top.change is None or isinstance(top.change, KeyRotation):
        work.tally.versions = 2
        plan = Plan(top.version - 1, (top.version,) if top.change is None else (), frozenset())
        signed = f"the manifests of versions {top.version - 1} and {top.version} are signed and follow from each other"
    else:
        # What a version before held, and what was taken out of it, only the whole chain tells.
        chain = work.chain()
        plan = replay_plan(chain.manifests, top.version)
        signed = f"the manifests of versions 0 to {top.version} are signed and follow from each other"
    begin = work.version(plan.start, chain)
    unproved = (f"that version {plan.start} is made of what it says: --level all",)
    if not plan.rounds:
        require_equal_tables(top, begin.manifest, begin.digest)
        work.tally.compare("", begin.manifest.tensors, top, parent.manifest)
        same = f"every tensor and every file of version {top.version} is that of version {plan.start}"
        return work.report("round", top.log.size, f"version {plan.start} again", (same, signed), unproved)
    manifests = {top.version: top} if chain is None else dict(enumerate(chain.manifests))
    rounds = [Round(manifests[number], work.cache, without=plan.revoked) for number in plan.rounds]
    work.have(f"version {plan.start}", state_refs(begin.manifest, momenta=rounds[0].keeps_state))
    masters = sum(group.master.size_bytes for group in begin.manifest.groups)
    work.start("replaying", sum(masters + one.delta_bytes for one in rounds))
    with work.scratch() as scratch:
        before = published_state(begin.manifest, work.cache)
        state = work.replay(plan, chain, before, scratch, last=None, consume=False)
    work.tally.compare("", state.tensors, top, parent.manifest)
    terms = sum(len(one.deltas) for one in rounds)
    note = f"replayed from version {plan.start} and {terms} contributions"
    if top.change is not None:
        note += f" of {len(rounds)} rounds, without those that were revoked"
    made = f"every master, export and momentum of version {top.version} has the bits of its replay from version "
    return work.report("round", terms, note, (f"{made}{plan.start}", signed), unproved)


def _prove_all(work: Work) -> Report:
    """Every version up to the top, each made once."""
    chain = work.chain()
    newest = work.top.manifest.version
    plans = [replay_plan(chain.manifests, number) for number in range(newest + 1)]
    home, needed = _homes(plans)
    parent = genesis = work.version(0, chain).manifest
    work.have("version 0", state_refs(genesis, momenta=False))
    masters = sum(group.master.size_bytes for group in genesis.groups)
    replayed = sum(
        masters + Round(chain.manifests[number], work.cache, without=plan.revoked).delta_bytes
        for plan in plans
        for number in plan.rounds
    )
    work.start("replaying", masters + replayed)
    work.check_genesis(genesis)
    work.tally.tensors += len(genesis.tensors)
    states: dict[int, State] = {0: published_state(genesis, work.cache)}
    with work.scratch() as scratch:
        for number, plan in enumerate(plans[1:], start=1):
            if work.tally.mismatches:
                break
            manifest = work.version(number, chain).manifest
            if not plan.rounds:
                # The chain has compared its table with that of the version whose tensors it has.
                work.tally.compare("", manifest.tensors, manifest, parent)
                parent = manifest
                continue
            begin = home[plan.start]
            done = needed[begin] == number
            last = scratch / f"version-{number}" if number in needed else None
            state = work.replay(plan, chain, states[begin], scratch, last=last, consume=done)
            work.tally.compare(f"version {number}: ", state.tensors, manifest, parent)
            if done:
                states.pop(begin).remove()
            if last is not None:
                states[number] = state
            parent = manifest
    note = f"versions 1 to {newest} were made again, one after the other"
    made = f"every master, export and momentum of versions 1 to {newest} has the bits that follow from the masters of "
    proved = (f"{made}version 0 and the contributions alone", _GENESIS, *_of_chain(chain))
    return work.report("all", chain.leaves, note, proved, (_ORIGIN,))


def _homes(plans: list[Plan]) -> tuple[list[int], dict[int, int]]:
    """Version -> the version whose state it shares; such a version -> the last version that begins with its state."""
    home = list(range(len(plans)))
    needed: dict[int, int] = {}
    for number, plan in enumerate(plans[1:], start=1):
        if plan.rounds:
            needed[home[plan.start]] = number
        else:
            home[number] = home[plan.start]
    return home, needed


def _of_chain(chain: Chain) -> tuple[str, ...]:
    newest = len(chain.manifests) - 1
    return (
        f"the manifests of versions 0 to {newest} are signed by the key of their time, each names the one before it, "
        "and each change of key is signed by the key before it",
        f"the log of version {newest} holds the {chain.leaves} contributions in its sum and no other; what was revoked "
        "never came back",
    )
