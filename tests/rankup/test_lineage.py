"""Lineage: what a version is the sum of, the shortest way to it, and what no publisher may do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.errors import InputError, IntegrityError
from rankup.lineage import (
    Plan,
    change_in_words,
    contribution_file,
    kept_terms,
    leaf_hashes,
    leaves_of,
    leaves_of_round,
    lineages,
    log_of,
    replay_plan,
    require_possible,
    ways,
    without,
)
from rankup.merkle import inclusion_proof, root_of_proof
from rankup.records import (
    EMPTY_TREE,
    Change,
    ContributionList,
    KeyRotation,
    Log,
    Manifest,
    Revocation,
    Rollback,
    Term,
)

State = tuple[tuple[int, frozenset[str]], ...]
"""What stands for a version's tensors: each round in the sum, with the contributions that it summed."""


def contribution(version: int, place: int) -> str:
    return f"{version:032x}{place:032x}"


def manifest(version: int, *, change: Change | None = None, terms: Sequence[str] = ()) -> Manifest:
    return Manifest(
        model="toy",
        version=version,
        parent=f"{version - 1:064x}" if version else None,
        round_id=f"round-{version}" if version and change is None else None,
        recipe=None,
        terms=tuple(
            Term(
                contribution=one,
                size_bytes=1,
                worker_id="w-1",
                worker_name="Ada",
                shard=0,
                tokens=1,
                coefficient=int(one, 16) % 2**32 + 1,
            )
            for one in sorted(terms)
        ),
        tensors={},
        groups=(),
        files=(),
        change=change,
        base_model="toy",
        licence="Apache-2.0",
        created_at=1.0,
    )


def grow(chain: list[Manifest], step: str | tuple[str, ...] | int) -> None:
    """Add a version: "round", "key", a rollback to a number, a revocation of contributions."""
    number = len(chain)
    if step == "round":
        chain.append(manifest(number, terms=[contribution(number, place) for place in range(3)]))
    elif step == "key":
        chain.append(manifest(number, change=KeyRotation()))
    elif isinstance(step, int):
        chain.append(manifest(number, change=Rollback(to=step)))
    else:
        chain.append(manifest(number, change=Revocation(contributions=tuple(sorted(step)))))


def chain_of(*steps: str | tuple[str, ...] | int) -> list[Manifest]:
    chain = [manifest(0)]
    for step in steps:
        grow(chain, step)
    return chain


A1, B1, A2, A3, A4, A5 = (contribution(v, p) for v, p in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (5, 0)))
R1 = (A1, B1, contribution(1, 2))


# -- the way to a version ----------------------------------------------------------------------------------------------

PLANS = {
    "version 0": ([], Plan(0, (), frozenset())),
    "a round": (["round", "round"], Plan(1, (2,), frozenset())),
    "a rollback": (["round", "round", 1], Plan(1, (), frozenset())),
    "a key rotation": (["round", "key"], Plan(1, (), frozenset())),
    "of the first round": (["round", "round", (A1,)], Plan(0, (1, 2), frozenset({A1}))),
    "of the last round": (["round", "round", (A2,)], Plan(1, (2,), frozenset({A2}))),
    "of two rounds": (["round", "round", "round", (A2, A3)], Plan(1, (2, 3), frozenset({A2, A3}))),
    "after a key rotation": (["round", "key", "round", (A3,)], Plan(2, (3,), frozenset({A3}))),
    "after a rollback, of what was before it": (
        ["round", "round", 1, "round", (A1,)],
        Plan(0, (1, 4), frozenset({A1})),
    ),
    "after a rollback, of what came after it": (["round", "round", 1, "round", (A4,)], Plan(3, (4,), frozenset({A4}))),
    "twice, the later round first": (
        ["round", "round", "round", (A3,), (A2,)],
        Plan(1, (2, 3), frozenset({A2, A3})),
    ),
    "twice, the earlier round first: begins where the first one is out already": (
        ["round", "round", (A1,), "round", (A4,)],
        Plan(3, (4,), frozenset({A1, A4})),
    ),
    "a round between: the first is not gone over again": (
        ["round", (A1,), "round", "key", "round", (A5,)],
        Plan(4, (5,), frozenset({A1, A5})),
    ),
}


@pytest.mark.parametrize(("steps", "plan"), PLANS.values(), ids=PLANS)
def test_the_shortest_way_to_a_version(steps: list[str | tuple[str, ...] | int], plan: Plan) -> None:
    chain = chain_of(*steps)
    assert replay_plan(chain, len(chain) - 1) == plan


@st.composite
def histories(draw: st.DrawFn) -> list[Manifest]:
    """Any history that a publisher may make."""
    chain = [manifest(0)]
    for _ in range(draw(st.integers(1, 12))):
        present = [leaf.contribution for leaf in leaves_of(chain, len(chain) - 1)]
        possible = [number for number in range(len(chain) - 1) if can_roll_back(chain, number)]
        kinds = [
            "round",
            "round",
            "round",
            "key",
            *(["revoke"] * 3 if present else []),
            *(["back"] if possible else []),
        ]
        kind = draw(st.sampled_from(kinds))
        if kind == "revoke":
            grow(chain, tuple(draw(st.sets(st.sampled_from(present), min_size=1, max_size=3))))
        else:
            grow(chain, draw(st.sampled_from(possible)) if kind == "back" else kind)
    return chain


def can_roll_back(chain: Sequence[Manifest], to: int) -> bool:
    try:
        require_possible(chain, to)
    except InputError:
        return False
    return True


def stated(chain: Sequence[Manifest], version: int) -> State:
    """What the version's lineage says."""
    lineage = lineages(chain)[version]
    return tuple(
        (number, frozenset(term.contribution for term in kept_terms(chain[number], lineage.revoked)))
        for number in lineage.rounds
    )


@settings(max_examples=50, deadline=None)
@given(histories())
def test_every_plan_makes_its_version_out_of_an_earlier_one(chain: list[Manifest]) -> None:
    made: dict[int, State] = {0: ()}
    for version in range(1, len(chain)):
        plan = replay_plan(chain, version)
        assert plan.start < version
        made[version] = made[plan.start] + tuple(
            (number, frozenset(term.contribution for term in kept_terms(chain[number], plan.revoked)))
            for number in plan.rounds
        )
        assert made[version] == stated(chain, version)
        for way in ways(chain, version):
            made_so = made[way.start] + tuple(
                (number, frozenset(term.contribution for term in kept_terms(chain[number], way.revoked)))
                for number in way.rounds
            )
            assert made_so == made[version]
        assert ways(chain, version)[0] == Plan(version, (), lineages(chain)[version].revoked)
        assert ways(chain, version)[-1].start == 0
        in_sum = [one for _, kept in made[version] for one in sorted(kept)]
        assert [leaf.contribution for leaf in leaves_of(chain, version)] == in_sum
        if isinstance(chain[version].change, Revocation):
            begins = [
                number
                for number in range(version)
                if made[number] == made[version][: len(made[number])] and len(made[number]) > len(made[plan.start])
            ]
            assert not begins, "there is a shorter way"


@settings(max_examples=50, deadline=None)
@given(histories())
def test_what_was_revoked_is_in_no_later_sum_and_nothing_is_in_a_sum_twice(chain: list[Manifest]) -> None:
    gone: set[str] = set()
    for version, one in enumerate(chain):
        if isinstance(one.change, Revocation):
            gone |= set(one.change.contributions)
        summed = [leaf.contribution for leaf in leaves_of(chain, version)]
        assert not gone & set(summed)
        assert len(set(summed)) == len(summed)


@settings(max_examples=30, deadline=None)
@given(histories())
def test_the_log_grows_by_a_round_and_shrinks_by_a_revocation(chain: list[Manifest]) -> None:
    for version in range(1, len(chain)):
        before, now, change = leaves_of(chain, version - 1), leaves_of(chain, version), chain[version].change
        if change is None:
            assert now == (*before, *leaves_of_round(chain[version]))
        elif isinstance(change, Revocation):
            assert now == without(before, change.contributions)
        else:
            assert now == (before if isinstance(change, KeyRotation) else leaves_of(chain, change.to))


# -- what is refused ---------------------------------------------------------------------------------------------------


def with_terms(*contributions: str) -> Callable[[list[Manifest]], None]:
    return lambda chain: chain.append(manifest(len(chain), terms=contributions))


DISHONEST: dict[str, tuple[list[str | tuple[str, ...] | int], str]] = {
    "revokes what never was": (["round", ("f" * 64,)], "not in the sum"),
    "revokes twice": (["round", (A1,), (A1,)], "not in the sum"),
    "revokes what was rolled back": (["round", "round", 1, (A2,)], "not in the sum"),
    "rolls back to what was revoked": (["round", (A1,), "round", 1], "was revoked"),
    "rolls back to what was revoked, by way of version 0": (["round", (A1,), 0, 1], "was revoked"),
}


@pytest.mark.parametrize(("steps", "why"), DISHONEST.values(), ids=DISHONEST)
def test_a_chain_that_takes_out_or_brings_back_what_it_may_not_is_no_history(
    steps: list[str | tuple[str, ...] | int], why: str
) -> None:
    with pytest.raises(IntegrityError, match=why):
        lineages(chain_of(*steps))


@pytest.mark.parametrize(
    ("steps", "added", "why"),
    [
        (["round"], A1, "is in the sum before"),
        (["round", (A1,)], A1, "was revoked"),
        (["round", (A1,), 0], A1, "was revoked"),
    ],
    ids=["twice", "after it was revoked", "after it was revoked and the rest rolled back"],
)
def test_a_round_adds_nothing_that_is_in_the_sum_or_was_taken_out(
    steps: list[str | tuple[str, ...] | int], added: str, why: str
) -> None:
    chain = chain_of(*steps)
    with_terms(added)(chain)
    with pytest.raises(IntegrityError, match=why):
        lineages(chain)


def test_a_round_may_add_again_what_was_rolled_back_but_never_revoked() -> None:
    chain = chain_of("round", "round", 1)
    with_terms(A2)(chain)
    assert lineages(chain)[4].rounds == (1, 4)
    grow(chain, (A2,))
    assert replay_plan(chain, 5) == Plan(3, (4,), frozenset({A2}))
    assert [leaf.version for leaf in leaves_of(chain, 4)] == [1, 1, 1, 4]


def test_a_weightless_contribution_is_in_no_sum() -> None:
    chain = chain_of("round")
    terms = chain[1].terms
    chain[1] = chain[1].model_copy(update={"terms": (terms[0].model_copy(update={"coefficient": 0}), *terms[1:])})
    assert [leaf.contribution for leaf in leaves_of(chain, 1)] == [term.contribution for term in terms[1:]]
    grow(chain, (terms[0].contribution,))
    with pytest.raises(IntegrityError, match="not in the sum"):
        lineages(chain)


@pytest.mark.parametrize(
    ("steps", "to", "why"),
    [
        (["round"], 1, "the latest is 1"),
        (["round"], 7, "the latest is 1"),
        (["round"], -1, "the latest is 1"),
        (["round", (A1,)], 1, "was revoked"),
        (["round", (A1,), 0], 1, "was revoked"),
        (["round", "round", (A1,)], 2, "was revoked"),
    ],
)
def test_a_rollback_that_leads_nowhere_or_brings_back_what_was_revoked_is_refused(
    steps: list[str | tuple[str, ...] | int], to: int, why: str
) -> None:
    with pytest.raises(InputError, match=why) as caught:
        require_possible(chain_of(*steps), to)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("steps", "to"), [(["round", (A1,)], 0), (["round", "round", (A2,)], 1), (["round", "key"], 1)]
)
def test_a_rollback_past_what_was_revoked_is_possible(steps: list[str | tuple[str, ...] | int], to: int) -> None:
    require_possible(chain_of(*steps), to)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_a_log_proves_each_of_its_leaves() -> None:
    leaves = leaves_of(chain_of("round", "round", (A1,)), 3)
    log, hashes = log_of(leaves), leaf_hashes(leaves)
    assert log.size == len(leaves) == 5
    for index, leaf in enumerate(hashes):
        root = root_of_proof(leaf, index, log.size, inclusion_proof(hashes, index))
        assert root is not None
        assert root.hex() == log.root
    assert log_of(leaves[::-1]) != log
    assert log_of(()) == Log(size=0, root=EMPTY_TREE)


def test_the_file_of_contributions_lists_the_leaves() -> None:
    leaves = leaves_of(chain_of("round"), 1)
    assert ContributionList.model_validate_json(contribution_file("toy", leaves)).leaves == leaves


def test_leaves_that_are_not_there_cannot_be_taken_out() -> None:
    leaves = leaves_of(chain_of("round"), 1)
    assert without(leaves, R1) == ()
    with pytest.raises(InputError, match="not in the sum"):
        without(leaves, [A1, A2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Rollback(to=3), "rollback to 3"),
        (Revocation(contributions=(A1,)), "revocation of 1 contribution"),
        (Revocation(contributions=(A1, B1)), "revocation of 2 contributions"),
        (KeyRotation(), "key rotation"),
    ],
)
def test_a_change_in_words(change: Change, words: str) -> None:
    assert change_in_words(change) == words
