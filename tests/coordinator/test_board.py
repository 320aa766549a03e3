"""The status page's numbers: the chart stays in its box, the bar adds up, words are right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.board import (
    CHART_HEIGHT,
    CHART_WIDTH,
    MAX_POINTS,
    WORKERS_SHOWN,
    ago,
    brief_span,
    loss_chart,
    round_board,
    short,
    shown,
    span,
)
from rankup.protocol import LeaseProgress, LeasesAtWork, RoundState, RoundView, VersionView
from rankup.recipe import Recipe


def version(number: int, loss: float | None) -> VersionView:
    return VersionView(
        model="tiny",
        version=number,
        manifest="0" * 64,
        parent=None,
        round_id=None,
        created_at=0.0,
        contributions=0,
        size_bytes=0,
        heldout_loss=loss,
        latest=False,
    )


@given(st.lists(st.none() | st.floats(0, 1e6), max_size=2 * MAX_POINTS))
def test_every_point_of_the_chart_lies_in_its_box(losses: list[float | None]) -> None:
    chart = loss_chart([version(number, loss) for number, loss in enumerate(losses)])
    measured = sum(loss is not None for loss in losses)
    if chart is None:
        assert measured < 2
        return
    assert len(chart.dots) == min(measured, MAX_POINTS)
    assert all(0 <= dot.x <= CHART_WIDTH and 0 <= dot.y <= CHART_HEIGHT for dot in chart.dots)
    assert [dot.x for dot in chart.dots] == sorted(dot.x for dot in chart.dots)


def test_a_lower_loss_lies_lower_and_newest_first_is_fine() -> None:
    chart = loss_chart([version(1, 2.0), version(0, 3.0)])
    assert chart is not None
    assert chart.dots[0].y < chart.dots[1].y


def round_view(**about: Any) -> RoundView:
    usual: dict[str, Any] = {
        "round_id": "r",
        "model": "tiny",
        "dataset": "d",
        "state": RoundState.OPEN,
        "index": 0,
        "repeat": 1,
        "base_version": 0,
        "base_manifest": "0" * 64,
        "recipe": Recipe(),
        "shards": 8,
        "quorum": 8,
        "min_contributions": 1,
        "deadline_at": 100.0,
        "opened_at": 0.0,
    }
    return RoundView(**usual | about)


@given(st.integers(1, 1000), *[st.integers(0, 1000)] * 4)
def test_the_bar_is_full_and_its_pieces_follow(
    shards: int, free: int, leased: int, submitted: int, accepted: int
) -> None:
    view = round_view(shards=shards, free=free, leased=leased, submitted=submitted, accepted=accepted)
    parts = round_board(view, 10.0).parts
    for left, right in itertools.pairwise(parts):
        assert right.start == pytest.approx(left.start + left.width, abs=0.01)
    assert sum(part.count for part in parts) == shards
    assert all(part.count >= 0 for part in parts)


def test_shards_in_somebodys_hands_are_split_by_deltas_and_leases() -> None:
    view = round_view(shards=10, accepted=2, free=2, leased=2, submitted=1)
    assert view.whereabouts() == {"accepted": 2, "submitted": 2, "training": 4, "free": 2}
    late = round_view(shards=10, accepted=2, free=8, submitted=1)  # A late delta covers no shard of this round.
    assert late.whereabouts() == {"accepted": 2, "submitted": 0, "training": 0, "free": 8}


def test_a_paused_round_says_so_until_it_has_ended() -> None:
    paused = round_board(round_view(paused=True), 10.0)
    assert paused.state == "paused"
    assert "the deadline waits" in paused.when
    assert round_board(round_view(paused=True, state=RoundState.PUBLISHED), 10.0).state == "published"


def test_of_many_who_are_training_some_are_listed_and_the_others_counted() -> None:
    lease = LeaseProgress(
        name="\u202eada", shard=4, shards=3, step=5, steps=20, loss=2.5, granted_at=0.0, seen_at=10.0, done_at=130.0
    )
    work = LeasesAtWork(round_id="r", at=10.0, total=150, leases=(lease,) * 100)
    board = round_board(round_view(), 10.0, work)
    assert (len(board.work), board.more_work) == (WORKERS_SHOWN, 150 - WORKERS_SHOWN)
    row = board.work[0]
    assert (row.name, row.shards, row.done, row.steps, row.loss, row.left) == (
        "ada", "4–6", 25.0, "5/20", "2.500", "2 min"
    )  # fmt: skip
    assert round_board(round_view(state=RoundState.PUBLISHED), 10.0, work).work == ()


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (short(999), "999"),
        (short(1_234_567), "1.2 M"),
        (span(59), "less than a minute"),
        (span(60), "1 minute"),
        (span(7_300), "2 hours"),
        (span(200_000), "2 days"),
        (brief_span(59), "< 1 min"),
        (brief_span(7_300), "2 h"),
        (ago(-5), "just now"),
        (ago(61), "1 minute ago"),
        (shown("\u202eevil\u200b"), "evil"),
        (shown("\u2066"), "(no name)"),
        (shown("村上 春樹"), "村上 春樹"),
    ],
)
def test_words_for_numbers_times_and_names(made: str, wanted: str) -> None:
    assert made == wanted
