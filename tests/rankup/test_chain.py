"""The rules of a chain of versions, against a publisher who signs what breaks them."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from changed_history import LAST, MODEL, SUMS, ChangedHistory, canonical, leaves_of, make_changed_history
from hypothesis import given
from hypothesis import strategies as st
from merkle_oracle import mth

from rankup.chain import Chain, GrowingLog
from rankup.chainread import VersionReader, read_chain
from rankup.errors import IntegrityError, NotFoundError
from rankup.keychain import make_key_change
from rankup.lineage import contribution_file, lineages, log_of, replay_plan
from rankup.records import BlobRef, FileEntry, KeyRotation, Leaf, Log, Manifest, Revocation, Rollback
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.sources import Patience, StoreSource
from rankup.versions import manifest_key, seal

HISTORY = make_changed_history()


@pytest.fixture
def history() -> ChangedHistory:
    return HISTORY.copy()


def reader(history: ChangedHistory, key: str | None = None) -> VersionReader:
    return VersionReader(StoreSource(history.store), MODEL, publisher_key=key, patience=Patience(attempts=1))


def read(history: ChangedHistory, version: int | None = None, key: str | None = None) -> Chain:
    one = reader(history, key)
    return read_chain(one, one.latest() if version is None else one.open(version))


# -- honest chains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [*range(LAST + 1), None])
def test_an_honest_chain_is_admitted_from_every_version_down(version: int | None) -> None:
    newest = LAST if version is None else version
    chain = read(HISTORY, version)
    assert chain.digests == [HISTORY.digest(number) for number in range(newest + 1)]
    assert chain.leaves == sum(map(len, SUMS[newest].values()))
    assert not any(one.tensors or one.groups or one.files for one in chain.manifests), "only what lineages need is kept"


def test_lineages_and_plans_are_those_that_were_written_down() -> None:
    found = lineages(HISTORY.manifests)
    assert {version: lineage.rounds for version, lineage in found.items()} == {
        version: tuple(sums) for version, sums in SUMS.items()
    }
    plans = {version: replay_plan(HISTORY.manifests, version) for version in (3, 4, 6, 8, 10, 12)}
    assert {version: (plan.start, plan.rounds) for version, plan in plans.items()} == {
        3: (0, (1, 2)),
        4: (3, ()),
        6: (3, ()),
        8: (6, (7,)),
        10: (0, (1, 2, 5)),
        12: (11, (12,)),
    }


@pytest.mark.parametrize("pinned", [0, 1, 2])
@pytest.mark.parametrize("version", [0, 3, 4, 10, 11, 12])
def test_a_reader_who_pinned_any_of_the_publishers_keys_reads_every_version(pinned: int, version: int) -> None:
    key = public_key_hex(HISTORY.keys[pinned])
    assert reader(HISTORY, key).open(version).digest == HISTORY.digest(version)
    assert read(HISTORY, version, key).digests[-1] == HISTORY.digest(version)


def test_a_stranger_is_not_the_publisher() -> None:
    key = public_key_hex(parse_private_key(generate_private_key()))
    for version in (None, 0, 12):
        with pytest.raises(IntegrityError, match="publisher's key"):
            read(HISTORY, version, key)


LEAF_LISTS = st.lists(
    st.builds(
        Leaf,
        contribution=st.integers(0, 2**256 - 1).map("{:064x}".format),
        version=st.integers(1, 10**6),
        coefficient=st.integers(1, 2**31),
        denominator_log2=st.integers(0, 30),
    ),
    max_size=12,
)


@given(LEAF_LISTS)
def test_a_growing_log_is_the_log_and_the_list_of_all_its_leaves(leaves: list[Leaf]) -> None:
    growing = GrowingLog(MODEL)
    for count, leaf in enumerate([None, *leaves]):
        growing.extend([] if leaf is None else [leaf])
        data = contribution_file(MODEL, leaves[:count])
        assert growing.log() == log_of(leaves[:count])
        assert growing.file().size_bytes == len(data)
        assert growing.file() == BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


# -- dishonest ones ----------------------------------------------------------------------------------------------------


def other_key(history: ChangedHistory) -> None:
    stranger = parse_private_key(generate_private_key())
    history.store.put(manifest_key(MODEL, 3), seal(history.manifests[3], stranger))


def old_key_again(history: ChangedHistory) -> None:
    history.store.put(
        manifest_key(MODEL, 6), seal(history.manifests[6].model_copy(update={"keys": ()}), history.keys[0])
    )


def new_key_early(history: ChangedHistory) -> None:
    history.store.put(manifest_key(MODEL, 2), seal(history.manifests[2], history.keys[2]))


def swapped_manifest(history: ChangedHistory) -> None:
    history.store.put(manifest_key(MODEL, 3), seal(history.manifests[5], history.keys[1]))


def rewritten(history: ChangedHistory) -> None:
    history.store.put(
        manifest_key(MODEL, 2), seal(history.manifests[2].model_copy(update={"licence": "MIT"}), history.keys[0])
    )


def missing(history: ChangedHistory) -> None:
    history.store.delete(manifest_key(MODEL, 2))


def forgotten_key(history: ChangedHistory) -> None:
    """A version that drops the changes before it, signed by the key of its time."""
    history.manifests[5] = history.manifests[5].model_copy(update={"keys": ()})
    history.reseal(5)


def rotation_by_nobody(history: ChangedHistory) -> None:
    """A key change that begins with a key which has signed nothing."""
    stranger = parse_private_key(generate_private_key())
    change = make_key_change(stranger, public_key_hex(history.keys[1]), model=MODEL, from_version=4)
    later = (change, *history.manifests[11].keys[1:])
    for number in range(4, LAST + 1):
        keys = later[: len(history.manifests[number].keys)]
        history.manifests[number] = history.manifests[number].model_copy(update={"keys": keys})
    history.reseal(4)


def with_tensor(history: ChangedHistory, version: int, name: str, **fields: Any) -> dict[str, Any]:
    tensors = history.manifests[version].tensors
    return {"tensors": tensors | {name: tensors[name].model_copy(update=fields)}}


def with_log_of(history: ChangedHistory, leaves: list[dict[str, object]]) -> dict[str, Any]:
    return {"log": Log(size=len(leaves), root=mth([canonical(leaf) for leaf in leaves]).hex())}


def reshaped(history: ChangedHistory) -> None:
    history.reseal(2, **with_tensor(history, 2, "norm", shape=(1, 7)))


def no_round(history: ChangedHistory) -> None:
    history.reseal(12, round_id=None)


def other_tensors_after_a_rollback(history: ChangedHistory) -> None:
    history.reseal(6, **with_tensor(history, 6, "up", master="ab" * 32))


def other_momentum_after_a_rollback(history: ChangedHistory) -> None:
    history.reseal(6, **with_tensor(history, 6, "up", momentum="ab" * 32))


def other_file_after_a_rotation(history: ChangedHistory) -> None:
    first, second = history.manifests[11].groups
    forged = first.model_copy(update={"export": first.export.model_copy(update={"sha256": "ab" * 32})})
    history.reseal(11, groups=(forged, second))


def rolled_back_to_what_was_revoked(history: ChangedHistory) -> None:
    target = history.manifests[2]
    same = {"tensors": target.tensors, "groups": target.groups, "log": target.log, "recipe": target.recipe}
    history.reseal(6, change=Rollback(to=2), **same)


def rolled_back_twice_to_what_was_revoked(history: ChangedHistory) -> None:
    """First to before the contribution, and only then to the version that holds it."""
    for number, to in ((6, 0), (9, 1)):
        target = history.manifests[to]
        same = {"tensors": target.tensors, "groups": target.groups, "log": target.log, "recipe": target.recipe}
        files = tuple(file for file in history.manifests[number].files if file.path != "contributions.json")
        history.manifests[number] = history.manifests[number].model_copy(
            update={"change": Rollback(to=to), "files": files, **same}
        )
    for number in (7, 8):
        leaves = [] if number == 8 else leaves_of(history, 7)[-2:]
        files = tuple(file for file in history.manifests[number].files if file.path != "contributions.json")
        history.manifests[number] = history.manifests[number].model_copy(
            update={"files": files, **with_log_of(history, leaves)}
        )
    history.reseal(6)


def revoked_what_was_not_there(history: ChangedHistory) -> None:
    absent = history.contribution(2, 3)  # it was left out by its round
    history.reseal(3, change=Revocation(contributions=(absent,)))


def revoked_twice(history: ChangedHistory) -> None:
    history.reseal(8, change=Revocation(contributions=(history.contribution(1, 1),)))


def added_what_was_revoked(history: ChangedHistory) -> None:
    terms = (*history.manifests[5].terms, history.rounds[1][1].term)
    history.reseal(5, terms=tuple(sorted(terms, key=lambda term: term.contribution)))


def added_twice(history: ChangedHistory) -> None:
    terms = (*history.manifests[5].terms, history.rounds[1][0].term)
    history.reseal(5, terms=tuple(sorted(terms, key=lambda term: term.contribution)))


def based_on_nothing(history: ChangedHistory) -> None:
    first, *others = history.manifests[2].terms
    history.reseal(2, terms=(first.model_copy(update={"base_manifest": "ab" * 32}), *others))


def log_without_one(history: ChangedHistory) -> None:
    history.reseal(5, **with_log_of(history, leaves_of(history, 5)[1:]))


def log_in_another_order(history: ChangedHistory) -> None:
    history.reseal(5, **with_log_of(history, leaves_of(history, 5)[::-1]))


def log_with_a_revoked_one(history: ChangedHistory) -> None:
    history.reseal(3, **with_log_of(history, leaves_of(history, 2)))


def other_coefficient_in_the_log(history: ChangedHistory) -> None:
    first, *others = leaves_of(history, 5)
    history.reseal(5, **with_log_of(history, [first | {"coefficient": 1}, *others]))


def other_list(history: ChangedHistory) -> None:
    files = history.manifests[5].files
    old = next(file for file in history.manifests[2].files if file.path == "contributions.json")
    history.reseal(5, files=tuple(old if file.path == old.path else file for file in files))


def list_in_version_0(history: ChangedHistory) -> None:
    files = history.manifests[0].files
    history.reseal(0, files=(*files, FileEntry(path="contributions.json", sha256="ab" * 32, size_bytes=3)))


def pointer_to_another_digest(history: ChangedHistory) -> None:
    history.point(LAST, digest="ab" * 32)


BROKEN: list[tuple[Callable[[ChangedHistory], None], str]] = [
    (other_key, "publisher's key"),
    (old_key_again, "publisher's key"),
    (new_key_early, "not the key of its time|does not follow|signed by"),
    (swapped_manifest, "asked for version 3"),
    (rewritten, "does not follow version 2"),
    (missing, "no object|no version|not found|does not exist|there is no"),
    (forgotten_key, "does not repeat"),
    (rotation_by_nobody, "publisher's key|not by the key that signed before"),
    (reshaped, "another shape"),
    (no_round, "by no round"),
    (other_tensors_after_a_rollback, "must have the tensors of version 3"),
    (other_momentum_after_a_rollback, "must have the tensors of version 3"),
    (other_file_after_a_rotation, "must have the files of version 10"),
    (rolled_back_to_what_was_revoked, "which was revoked"),
    (rolled_back_twice_to_what_was_revoked, "which was revoked"),
    (revoked_what_was_not_there, "not in its parent's sum"),
    (revoked_twice, "not in its parent's sum"),
    (added_what_was_revoked, "which was revoked"),
    (added_twice, "in the sum already"),
    (based_on_nothing, "no version before it"),
    (log_without_one, "the log of version 5"),
    (log_in_another_order, "the log of version 5"),
    (log_with_a_revoked_one, "the log of version 3"),
    (other_coefficient_in_the_log, "the log of version 5"),
    (other_list, "does not list"),
    (list_in_version_0, "does not list"),
    (pointer_to_another_digest, "the pointer names"),
]


@pytest.mark.parametrize(("breach", "says"), [pytest.param(b, s, id=b.__name__) for b, s in BROKEN])
def test_a_broken_chain_is_refused(
    history: ChangedHistory, breach: Callable[[ChangedHistory], None], says: str
) -> None:
    breach(history)
    with pytest.raises((IntegrityError, NotFoundError), match=says):
        read(history)


def test_a_pointer_that_went_back_is_noticed(history: ChangedHistory) -> None:
    history.point(9)
    one = reader(history)
    assert one.latest().manifest.version == 9
    with pytest.raises(IntegrityError, match="the pointer went back"):
        one.require_nothing_newer(9)
    # Where the next version is not this publisher's, nothing was taken back.
    history.store.put(manifest_key(MODEL, 10), b"junk")
    one.require_nothing_newer(9)
    history.point(LAST)
    one.require_nothing_newer(LAST)


def test_a_pointer_that_moves_meanwhile_is_nothing_to_worry_about(history: ChangedHistory) -> None:
    history.point(9)
    one = reader(history)
    one.latest()
    history.point(10)
    one.require_nothing_newer(9)


def admit(chain: Chain, number: int, table_of: Callable[[int], Manifest] = HISTORY.manifests.__getitem__) -> None:
    manifest, signer = HISTORY.manifests[number], public_key_hex(HISTORY.signer(number))
    chain.admit(manifest, HISTORY.digest(number), signer, table_of=table_of)


def test_a_rollbacks_target_is_compared_with_what_was_admitted_before() -> None:
    chain = Chain()
    for number in range(6):
        admit(chain, number)
    other = HISTORY.manifests[3].model_copy(update={"licence": "MIT"})
    with pytest.raises(IntegrityError, match="rewritten"):
        admit(chain, 6, lambda version: other)


def test_a_change_of_key_is_by_the_key_that_signed_before() -> None:
    """A good signature by a key that has nothing to do with the versions before."""
    chain = Chain()
    for number in range(4):
        admit(chain, number)
    stranger = parse_private_key(generate_private_key())
    change = make_key_change(stranger, public_key_hex(HISTORY.keys[1]), model=MODEL, from_version=4)
    forged = HISTORY.manifests[4].model_copy(update={"keys": (change,)})
    with pytest.raises(IntegrityError, match="not by the key that signed before"):
        chain.admit(forged, "ab" * 32, public_key_hex(HISTORY.keys[1]), table_of=HISTORY.manifests.__getitem__)


@pytest.mark.parametrize("wrong", [2, 3, 6, 8, LAST])
@pytest.mark.parametrize("place", [0, 1, 5, 7])
def test_only_the_next_version_is_admitted(place: int, wrong: int) -> None:
    chain = Chain()
    for number in range(place):
        admit(chain, number)
    with pytest.raises(IntegrityError):
        admit(chain, wrong)
    admit(chain, place)


def test_every_kind_of_change_is_in_the_history() -> None:
    assert {type(manifest.change) for manifest in HISTORY.manifests} == {Rollback, Revocation, KeyRotation, type(None)}
