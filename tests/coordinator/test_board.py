"""The status page's numbers: the chart stays in its box, the bar adds up, words are right."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.board import CHART_HEIGHT, CHART_WIDTH, MAX_POINTS, ago, loss_chart, round_board, short, shown, span
from rankup.protocol import RoundState, RoundView, VersionView
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


@given(*[st.integers(0, 1000)] * 4)
def test_the_bar_is_full_and_its_pieces_follow(free: int, leased: int, submitted: int, accepted: int) -> None:
    view = RoundView(
        round_id="r",
        model="tiny",
        dataset="d",
        state=RoundState.OPEN,
        index=0,
        repeat=1,
        base_version=0,
        base_manifest="0" * 64,
        recipe=Recipe(),
        shards=1,
        quorum=1,
        min_contributions=1,
        deadline_at=100.0,
        opened_at=0.0,
        free=free,
        leased=leased,
        submitted=submitted,
        accepted=accepted,
    )
    parts = round_board(view, 10.0).parts
    for left, right in itertools.pairwise(parts):
        assert right.start == pytest.approx(left.start + left.width, abs=0.01)
    if free + leased + submitted + accepted:
        assert sum(part.width for part in parts) == pytest.approx(100, abs=0.01)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (short(999), "999"),
        (short(1_234_567), "1.2 M"),
        (span(59), "less than a minute"),
        (span(60), "1 minute"),
        (span(7_300), "2 hours"),
        (span(200_000), "2 days"),
        (ago(-5), "just now"),
        (ago(61), "1 minute ago"),
        (shown("\u202eevil\u200b"), "evil"),
        (shown("\u2066"), "(no name)"),
        (shown("村上 春樹"), "村上 春樹"),
    ],
)
def test_words_for_numbers_times_and_names(made: str, wanted: str) -> None:
    assert made == wanted
