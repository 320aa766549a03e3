"""Credit: tokens by the weight that they got, never more than were trained, taken back with what was revoked."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import make_manifest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.credit import Share, credit_by_worker, shares, taken_back
from rankup.records import Manifest, Revocation, Rollback, Term

UNIT = 2**16


def term(number: int, tokens: int, coefficient: int, worker: str | None = None) -> Term:
    return Term(
        contribution=f"{number:064x}",
        size_bytes=10,
        worker_id=worker or f"w-{number}",
        worker_name="Ada",
        shard=number,
        tokens=tokens,
        coefficient=coefficient,
    )


def version(*terms: Term, number: int = 1, **changes: Any) -> Manifest:
    return make_manifest(number, "0" * 64).model_copy(update={"terms": terms, **changes})


CASES = {
    "everybody by tokens: all of them": ([(100, UNIT // 4), (300, 3 * UNIT // 4)], [100, 300]),
    "rounded down by less than a unit: still all": ([(100, 21845), (100, 21845), (100, 21846)], [100, 100, 100]),
    "half of the weight that the tokens stand for": ([(500, UNIT // 4), (500, 3 * UNIT // 4)], [250, 500]),
    "left out": ([(100, 0), (100, UNIT)], [0, 100]),
    "more weight than tokens: no more than the tokens": ([(10, UNIT), (990, 0)], [10, 0]),
    "no contribution": ([], []),
}


@pytest.mark.parametrize("name", CASES)
def test_credit_is_tokens_times_the_weight_they_got_over_the_weight_they_stand_for(name: str) -> None:
    rows, wanted = CASES[name]
    made = version(*(term(number, *row) for number, row in enumerate(rows)))
    found = credit_by_worker(made)
    # A unit of rounding is in the worker's favour.
    for number, credit in enumerate(wanted):
        assert credit <= found[f"w-{number}"] <= min(rows[number][0], credit + 1 + sum(t for t, _ in rows) // UNIT)
    assert len(found) == len(wanted)


def test_several_contributions_of_a_worker_are_added_up() -> None:
    made = version(term(1, 100, UNIT // 2, "w-a"), term(2, 100, 0, "w-a"), term(3, 100, UNIT // 2, "w-b"))
    assert shares(made) == {"w-a": Share(200, 100), "w-b": Share(100, 100)}


weights = st.lists(st.tuples(st.integers(1, 2**30), st.integers(0, 2**17)), max_size=30)


@given(weights)
def test_nobody_gets_more_than_its_tokens_and_nothing_for_nothing(rows: list[tuple[int, int]]) -> None:
    made = version(*(term(number, *row) for number, row in enumerate(rows)))
    for number, (tokens, coefficient) in enumerate(rows):
        credit = credit_by_worker(made)[f"w-{number}"]
        assert 0 <= credit <= tokens
        assert coefficient or credit == 0


@given(weights, st.randoms())
def test_a_revocation_takes_back_exactly_what_was_given_wherever_it_was(
    rows: list[tuple[int, int]], random: Any
) -> None:
    terms = [term(number, *row) for number, row in enumerate(rows)]
    half = len(terms) // 2
    chain = [version(*terms[:half], number=1), version(*terms[half:], number=2)]
    given_to = credit_by_worker(chain[0]) | credit_by_worker(chain[1])
    gone = [one for one in terms if one.coefficient and random.random() < 0.5]
    if not gone:
        return
    change = Revocation(contributions=tuple(sorted(one.contribution for one in gone)))
    lost = taken_back(version(number=3, change=change), reversed(chain))
    assert lost == {one.worker_id: given_to[one.worker_id] for one in gone}


def test_a_rollback_takes_nothing_back() -> None:
    made = version(term(1, 100, UNIT))
    assert taken_back(version(number=2, change=Rollback(to=0)), [made]) == {}
    assert credit_by_worker(version(number=2, change=Rollback(to=0))) == {}
