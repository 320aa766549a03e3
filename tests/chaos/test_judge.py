"""The judgement of a campaign finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from campaign import ROUNDS, SHARDS, Answer, Outcome, judge
from crowd import TOKENS, Event


def _version(number: int) -> Any:
    terms = [
        SimpleNamespace(
            contribution=f"c{number}.{shard}",
            shard=shard,
            coefficient=TOKENS[shard] * 2**16 // sum(TOKENS),
            round_id=None,
        )
        for shard in range(SHARDS)
    ]
    tensor = SimpleNamespace(master=f"m{number}", export=f"e{number}", momentum=None)
    return SimpleNamespace(version=number, terms=terms, tensors={"w": tensor})


def good() -> Outcome:
    manifests = [_version(number) for number in range(1, ROUNDS + 1)]
    events = []
    for manifest in manifests:
        for term in manifest.terms:
            lease_id = f"l-{term.contribution}"
            events += [Event(1.0, "submit", lease_id, term.contribution), Event(2.0, "accepted", lease_id)]
    answers = [Answer(n, n, version) for n, version in enumerate((0, None, *range(ROUNDS + 1)))]
    rounds = [{"state": "published"}] * ROUNDS
    return Outcome("m", 1.0, events, answers, [], manifests, rounds)


def _counted_twice(outcome: Outcome) -> Outcome:
    first, second = outcome.manifests[:2]
    second.terms[0] = SimpleNamespace(**(vars(second.terms[0]) | {"contribution": first.terms[0].contribution}))
    return outcome


def _two_of_a_shard(outcome: Outcome) -> Outcome:
    outcome.manifests[0].terms.append(SimpleNamespace(**(vars(outcome.manifests[0].terms[0]) | {"contribution": "x"})))
    return outcome


def _with(*more: Event) -> Callable[[Outcome], Outcome]:
    return lambda outcome: replace(outcome, events=[*outcome.events, *more])


HARM: dict[str, Callable[[Outcome], Outcome]] = {
    "a contribution in two versions": _counted_twice,
    "two contributions of a shard": _two_of_a_shard,
    "acknowledged and in no version": _with(Event(1.0, "submit", "l-x", "x")),
    "accepted and in no version": _with(Event(1.0, "submit", "l-x", "x"), Event(2.0, "accepted", "l-x")),
    "rejected and in a version": lambda outcome: replace(
        outcome, events=[*outcome.events[:-1], Event(2.0, "rejected", outcome.events[-1].lease_id)]
    ),
    "latest goes back": lambda outcome: replace(outcome, answers=[*outcome.answers, Answer(9, 9, 1), Answer(9, 9, 2)]),
    "a round without a version": lambda outcome: replace(outcome, rounds=[{"state": "rejected"}, *outcome.rounds[1:]]),
}


def test_a_good_campaign_passes_also_with_a_delta_that_somebody_else_was_faster_with() -> None:
    judge(good(), good().bits)
    judge(_with(Event(1.0, "submit", "l-x", "x"), Event(2.0, "rejected", "l-x"))(good()), good().bits)


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_what_must_not_be_is_found(harm: Callable[[Outcome], Outcome]) -> None:
    with pytest.raises(AssertionError):
        judge(harm(good()), good().bits)


def test_other_bits_are_found() -> None:
    with pytest.raises(AssertionError):
        judge(good(), {"w": ("m2", "e2", "n")})
