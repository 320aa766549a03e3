"""What may be forgotten: laws over made-up histories, and a table of what stays and why other things go."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.keeprules import MAX_CHAIN, ModelHistory, Rules
from aggregator.retention import Draft, Inventory, Plan, RoundTrace, plan_retention
from rankup.errors import InputError
from rankup.records import BlobRef, FileEntry, Group, Manifest, Patch, Revocation, Rollback, Term
from rankup.retained import lacking
from rankup.store import StoredObject, blob_key

DAY = 86_400.0
NOW = 1000 * DAY
OLD = NOW - 30 * DAY
MODEL = "toy"
FULL_BYTES = 1000


def digest(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()


def entry(name: str, *words: object, size_bytes: int = FULL_BYTES) -> FileEntry:
    return FileEntry(path=f"{name}.safetensors", sha256=digest(name, *words), size_bytes=size_bytes)


def term(version: int, number: int = 0, coefficient: int = 1) -> Term:
    return Term(
        contribution=digest("delta", version, number),
        size_bytes=10,
        worker_id="w",
        worker_name="w",
        shard=0,
        tokens=1,
        coefficient=coefficient,
    )


def manifest(version: int, groups: Sequence[Group], **fields: object) -> Manifest:
    return Manifest.model_validate(
        {
            "model": MODEL,
            "version": version,
            "parent": digest("manifest", version - 1) if version else None,
            "round_id": f"r{version}" if version else None,
            "recipe": None,
            "terms": (term(version), term(version, 1, coefficient=0)) if version else (),
            "tensors": {},
            "groups": tuple(groups),
            "files": (entry("README", version),),
            "base_model": "b",
            "licence": "l",
            "created_at": OLD,
            **fields,
        }
    )


def group(version: int, number: int, before: Group | None, patch_bytes: int | None) -> Group:
    """A group that this version changed."""
    patch = None
    if before is not None and patch_bytes is not None:
        ref = entry("patch", version, number, size_bytes=patch_bytes)
        patch = Patch(base=before.export.sha256, sha256=ref.sha256, size_bytes=ref.size_bytes)
    return Group(
        tensors=("w",),
        master=entry("master", version, number),
        export=entry("model", version, number),
        momentum=entry("momentum", version, number) if version else None,
        patch=patch,
    )


def chain_of(steps: Sequence[Sequence[int | str | None]]) -> list[Manifest]:
    """Version 0 and one more for each step. A step says of each group: bytes of its patch, None where there is none,
    "same" where the group stays."""
    width = len(steps[0]) if steps else 1
    chain = [manifest(0, [group(0, number, None, None) for number in range(width)])]
    for version, step in enumerate(steps, start=1):
        before = chain[-1].groups
        groups = [
            old.model_copy(update={"patch": None})
            if change == "same"
            else group(version, number, old, change if isinstance(change, int) else None)
            for number, (old, change) in enumerate(zip(before, step, strict=True))
        ]
        chain.append(manifest(version, groups))
    return chain


def refs_of(each: Manifest) -> list[BlobRef]:
    parts = [ref for g in each.groups for ref in (g.master, g.export, g.momentum, g.patch) if ref is not None]
    return [*each.files, *parts, *(BlobRef(sha256=t.contribution, size_bytes=t.size_bytes) for t in each.terms)]


def blob(ref: BlobRef | str, modified_at: float = OLD) -> StoredObject:
    sha256, size_bytes = (ref, 7) if isinstance(ref, str) else (ref.sha256, ref.size_bytes)
    return StoredObject(blob_key(sha256), size_bytes, modified_at)


@dataclass
class Bucket:
    """What there is, to be changed by tests."""

    chain: list[Manifest]
    blobs: dict[str, StoredObject] = field(default_factory=dict)
    rounds: dict[str, RoundTrace] = field(default_factory=dict)
    shards: frozenset[str] = frozenset()
    named: frozenset[str] = frozenset()
    judged: tuple[StoredObject, ...] = ()
    latest: int | None = None

    def __post_init__(self) -> None:
        self.blobs = {ref.sha256: blob(ref) for each in self.chain for ref in refs_of(each)} | self.blobs

    def inventory(self) -> Inventory:
        digests = tuple(digest("manifest", each.version) for each in self.chain)
        latest = len(self.chain) - 1 if self.latest is None else self.latest
        models = {MODEL: ModelHistory(tuple(self.chain), digests, latest)}
        return Inventory(self.blobs, models, self.rounds, self.shards, self.named, self.judged)

    def plan(self, **rules: object) -> Plan:
        return plan_retention(self.inventory(), Rules(**rules), now=NOW)  # type: ignore[arg-type]

    def why(self, sha256: str, **rules: object) -> str | None:
        """Why a blob goes; None where it stays."""
        return next((one.why for one in self.plan(**rules).removals if one.key == blob_key(sha256)), None)

    def trace(self, base: int, **fields: object) -> RoundTrace:
        about = RoundTrace(MODEL, frozenset({digest("manifest", base)}), base, frozenset(), frozenset())
        return replace(about, **fields)  # type: ignore[arg-type]


# -- the law of reachability -------------------------------------------------------------------------------------------


def cheapest_chain(chain: Sequence[Manifest], version: int, present: Mapping[str, object]) -> int | None:
    """Bytes of patches from the nearest version whose files are all there; None where no chain leads here."""
    total = 0
    for number in range(version, max(-1, version - MAX_CHAIN - 1), -1):
        if all(g.export.sha256 in present for g in chain[number].groups):
            return total
        if number == 0:
            return None
        before = {g.export.sha256 for g in chain[number - 1].groups}
        for g in chain[number].groups:
            if g.export.sha256 in before:
                continue
            if g.patch is None or g.patch.base not in before or g.patch.sha256 not in present:
                return None
            total += g.patch.size_bytes
    return None


changes = st.sampled_from(["same", None, 50, 150, 150, 300, 300, 700, FULL_BYTES])
rules_of = st.builds(
    Rules,
    keep_exports=st.integers(1, 5),
    keep_masters=st.integers(1, 4),
    checkpoint_every=st.integers(1, 9),
    keep_contributions=st.one_of(st.none(), st.integers(1, 5)),
)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(changes, changes), min_size=1, max_size=20),
    runs=st.lists(st.tuples(rules_of, st.floats(0, 1), st.randoms(use_true_random=False)), min_size=1, max_size=4),
    rollback=st.booleans(),
)
def test_whatever_is_collected_in_whatever_order_every_version_stays_within_reach(steps, runs, rollback) -> None:  # type: ignore[no-untyped-def]
    """Runs with changing rules, each killed somewhere: deletions happen in any order up to there."""
    chain = chain_of(steps)
    if rollback:
        target = chain[len(chain) // 2]
        groups = [g.model_copy(update={"patch": None}) for g in target.groups]
        about = {"round_id": None, "terms": (), "change": Rollback(to=target.version)}
        chain.append(manifest(len(chain), groups, **about))
    bucket = Bucket(chain)
    for rules, share, random in runs:
        plan = plan_retention(bucket.inventory(), rules, now=NOW)
        going = [one.key for one in plan.removals]
        random.shuffle(going)
        done = set(going[: round(len(going) * share)])
        bucket.blobs = {sha256: each for sha256, each in bucket.blobs.items() if each.key not in done}
        for each in chain:
            cost = cheapest_chain(chain, each.version, bucket.blobs)
            assert cost is not None, each.version
            assert cost <= sum(g.export.size_bytes for g in each.groups)
            assert {file.sha256 for file in each.files} <= bucket.blobs.keys()
        newest = chain[-1]
        assert {ref.sha256 for ref in refs_of(newest)} <= bucket.blobs.keys()
        # What is said to be gone covers what is missing, at any moment of this run.
        for each in chain:
            missing = lacking(each, lambda ref: ref.sha256 in bucket.blobs)
            assert set(missing) <= set(plan.retained[MODEL].gone.get(each.version, ()))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(changes), min_size=1, max_size=20), rules=rules_of)
def test_after_a_whole_run_the_same_rules_find_nothing(steps, rules) -> None:  # type: ignore[no-untyped-def]
    bucket = Bucket(chain_of(steps))
    first = plan_retention(bucket.inventory(), rules, now=NOW)
    going = {one.key for one in first.removals}
    bucket.blobs = {sha256: each for sha256, each in bucket.blobs.items() if each.key not in going}
    again = plan_retention(bucket.inventory(), rules, now=NOW)
    assert again.removals == ()
    assert again.retained == first.retained
    assert (again.kept_blobs, again.kept_bytes) == (first.kept_blobs, first.kept_bytes)


def test_exports_go_between_checkpoints_and_what_is_gone_is_said() -> None:
    bucket = Bucket(chain_of([(10,)] * 12))
    plan = bucket.plan(keep_exports=2, keep_masters=1, checkpoint_every=4)
    exports = {v: bucket.why(digest("model", v, 0), keep_exports=2, checkpoint_every=4) for v in range(13)}
    assert [v for v, why in exports.items() if why is None] == [0, 4, 8, 11, 12]
    assert set(exports.values()) == {None, "export of an older version"}
    gone = plan.retained[MODEL].gone
    assert [v for v, parts in gone.items() if "export" in parts] == [1, 2, 3, 5, 6, 7, 9, 10]
    assert [v for v, parts in gone.items() if "master" in parts] == list(range(1, 11))
    assert 0 not in gone
    assert not [parts for parts in gone.values() if "patch" in parts or "contributions" in parts]


@pytest.mark.parametrize(
    ("patch_bytes", "kept"), [(100, [0, 8, 9]), (300, [0, 4, 8, 9]), (600, [0, 2, 4, 6, 8, 9]), (999, list(range(10)))]
)
def test_a_chain_never_costs_more_than_the_full_files(patch_bytes: int, kept: list[int]) -> None:
    # 1000 bytes are full: 300 go three times into it, 600 once.
    steps = [(patch_bytes,)] * 9
    if patch_bytes == 999:
        steps = [(None,)] * 9
    bucket = Bucket(chain_of(steps))
    gone = bucket.plan(keep_exports=1, checkpoint_every=8).retained[MODEL].gone
    assert [v for v in range(10) if "export" not in gone.get(v, ())] == kept


@pytest.mark.parametrize("first", [2, 4, 8])
@pytest.mark.parametrize("second", [3, 8, 16, 32])
def test_other_checkpoints_later_do_not_strand_what_went_before(first: int, second: int) -> None:
    bucket = Bucket(chain_of([(200,)] * 20))
    for every in (first, second):
        going = {one.key for one in bucket.plan(keep_exports=1, checkpoint_every=every).removals}
        bucket.blobs = {sha256: each for sha256, each in bucket.blobs.items() if each.key not in going}
    costs = [cheapest_chain(bucket.chain, each.version, bucket.blobs) for each in bucket.chain]
    assert all(cost is not None and cost <= FULL_BYTES for cost in costs), costs


def test_where_a_chain_is_broken_full_files_stay() -> None:
    lost = Bucket(chain_of([(10,)] * 7))
    del lost.blobs[digest("patch", 3, 0)]
    foreign = Bucket(chain_of([(10,)] * 7))
    [third] = foreign.chain[3].groups
    assert third.patch is not None
    other = third.model_copy(update={"patch": third.patch.model_copy(update={"base": digest("model", 1, 0)})})
    foreign.chain[3] = foreign.chain[3].model_copy(update={"groups": (other,)})
    halved = Bucket(chain_of([(10, 10)] * 7))
    del halved.blobs[digest("model", 2, 1)]
    for bucket, kept in ((lost, [0, 3, 7]), (foreign, [0, 3, 7]), (halved, [0, 7])):
        stays = [v for v in range(8) if bucket.why(digest("model", v, 0), keep_exports=1, checkpoint_every=7) is None]
        assert stays == kept
    # What has lost one of its files carries no others: the checkpoint moves to the next that is whole.
    moved = [v for v in range(8) if halved.why(digest("model", v, 0), keep_exports=1, checkpoint_every=2) is None]
    assert moved == [0, 3, 4, 6, 7]


# -- what stays, and why the rest goes ---------------------------------------------------------------------------------


def steady(**fields: object) -> Bucket:
    """Ten versions with small patches."""
    return Bucket(chain_of([(10,)] * 9), **fields)  # type: ignore[arg-type]


def test_masters_stay_of_the_newest_versions_of_their_replays_and_of_version_zero() -> None:
    bucket = steady()
    kept = [v for v in range(10) if bucket.why(digest("master", v, 0), keep_masters=3) is None]
    assert kept == [0, 6, 7, 8, 9]  # 7 is made from 6 again
    assert bucket.why(digest("master", 5, 0)) == "master of an older version"
    assert bucket.why(digest("momentum", 5, 0)) == "momentum of an older version"


def test_a_revocation_keeps_what_its_replay_begins_with() -> None:
    bucket = steady()
    change = Revocation(contributions=(digest("delta", 4, 0),))
    bucket.chain.append(
        manifest(10, [group(10, 0, bucket.chain[9].groups[0], 10)], round_id=None, terms=(), change=change)
    )
    bucket.__post_init__()
    kept = [v for v in range(11) if bucket.why(digest("master", v, 0), keep_masters=1) is None]
    assert kept == [0, 3, 10]


def test_contributions_stay_unless_the_organiser_gives_them_up() -> None:
    bucket = steady()
    assert [bucket.why(digest("delta", v, n)) for v in range(1, 10) for n in range(2)] == [None] * 18
    given_up = {v: bucket.why(digest("delta", v, 0), keep_masters=1, keep_contributions=2) for v in range(1, 10)}
    assert [v for v, why in given_up.items() if why is None] == [8, 9]
    assert given_up[1] == "contribution beyond the promise"
    masters = [v for v in range(10) if bucket.why(digest("master", v, 0), keep_masters=1, keep_contributions=2) is None]
    assert masters == [7, 8, 9]
    assert bucket.why(digest("master", 0, 0), keep_contributions=2) == "master of an older version"
    gone = bucket.plan(keep_masters=1, keep_contributions=2).retained[MODEL].gone
    assert [v for v, parts in gone.items() if "contributions" in parts] == list(range(1, 8))


def test_an_open_round_keeps_its_bases_shards_contributions_and_drafts() -> None:
    shard, delta, draft = digest("shard"), digest("open delta"), digest("drafted")
    named = Draft(StoredObject("rounds/r10/folded.json", 5, OLD), frozenset({draft}))
    extra = {sha256: blob(sha256) for sha256 in (shard, delta, draft)}
    bucket = steady(blobs=extra)
    trace = bucket.trace(9, shards=frozenset({shard}), contributions=frozenset({delta}), drafts=(named,))
    bucket.rounds["r10"] = replace(trace, bases=frozenset({digest("manifest", 9), digest("manifest", 3)}))
    rules = {"keep_exports": 1, "keep_masters": 1, "keep_contributions": 1}
    assert [bucket.why(sha256, **rules) for sha256 in extra] == [None] * 3
    assert [v for v in range(10) if bucket.why(digest("model", v, 0), **rules) is None] == [0, 3, 8, 9]
    assert bucket.why(digest("master", 3, 0), **rules) is None
    assert not [one for one in bucket.plan(**rules).removals if one.why == "draft of a round that has ended"]


@pytest.mark.parametrize("ending", ["it made a version", "another round was faster", "it was rejected or cancelled"])
def test_a_round_that_has_ended_lets_its_drafts_go_but_not_what_was_promised(ending: str) -> None:
    name = "r4" if ending == "it made a version" else "slow"
    ended = ending == "it was rejected or cancelled"
    shard, delta, drafted, lately = (digest(word) for word in ("shard", "late delta", "drafted", "lately"))
    old = Draft(StoredObject(f"rounds/{name}/folded.json", 5, OLD), frozenset({drafted}))
    young = Draft(StoredObject(f"rounds/{name}/fold/x/00001.json", 5, NOW - 60), frozenset({lately}))
    bucket = steady(blobs={sha256: blob(sha256) for sha256 in (shard, delta, drafted, lately)})
    fields = {"shards": frozenset({shard}), "contributions": frozenset({delta}), "drafts": (old, young)}
    bucket.rounds[name] = bucket.trace(9 if ended else 3, **fields, ended=ended)
    plan = bucket.plan()
    assert [one.key for one in plan.removals if one.why == "draft of a round that has ended"] == [old.stored.key]
    assert plan.removals[0].key == old.stored.key  # before the blobs that it names
    assert bucket.why(drafted) == "named by no record"
    assert bucket.why(lately) is None
    assert bucket.why(shard) == "shard of a dataset that was replaced"
    assert bucket.why(delta) is None
    assert ended or bucket.why(delta, keep_contributions=3) == "contribution beyond the promise"


def test_a_round_whose_pointer_has_not_moved_yet_is_not_over() -> None:
    drafted = digest("drafted")
    draft = Draft(StoredObject("rounds/r9/folded.json", 5, OLD), frozenset({drafted}))
    bucket = steady(blobs={drafted: blob(drafted)}, latest=8)
    bucket.rounds["r9"] = bucket.trace(8, drafts=(draft,))
    assert bucket.why(drafted) is None
    bucket.latest = 9
    assert bucket.why(drafted) == "named by no record"


STAYS = {
    "of a dataset": lambda bucket, sha256: replace(bucket.inventory(), shards=frozenset({sha256})),
    "named by something unknown": lambda bucket, sha256: replace(bucket.inventory(), named=frozenset({sha256})),
    "of a round of no known model": lambda bucket, sha256: replace(
        bucket.inventory(), rounds={"x": replace(bucket.trace(0), model="other", contributions=frozenset({sha256}))}
    ),
}


@pytest.mark.parametrize("reason", STAYS)
def test_what_anything_names_stays(reason: str) -> None:
    sha256 = digest("extra")
    bucket = steady(blobs={sha256: blob(sha256)})
    assert bucket.why(sha256) == "named by no record"
    plan = plan_retention(STAYS[reason](bucket, sha256), Rules(keep_contributions=1), now=NOW)
    assert blob_key(sha256) not in {one.key for one in plan.removals}


def test_nothing_younger_than_the_grace_period_goes() -> None:
    ages = {"older": 2 * DAY + 1, "younger": 2 * DAY - 1, "from a clock that is ahead": -DAY}
    extra = {digest(name): blob(digest(name), NOW - age) for name, age in ages.items()}
    uploads = tuple(StoredObject(f"uploads/{name}", 5, NOW - age) for name, age in ages.items())
    bucket = steady(blobs=extra, judged=uploads)
    assert [name for name in ages if bucket.why(digest(name))] == ["older"]
    going = [one for one in bucket.plan().removals if one.why == "upload that was judged"]
    assert [one.key for one in going] == ["uploads/older"]


@pytest.mark.parametrize(
    "rules",
    [
        {"keep_exports": 0},
        {"keep_masters": 0},
        {"checkpoint_every": 0},
        {"checkpoint_every": MAX_CHAIN + 1},
        {"keep_contributions": 0},
        {"grace_s": 60.0},
    ],
)
def test_rules_that_keep_too_little_are_refused(rules: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Rules(**rules)  # type: ignore[arg-type]
