"""Watching a round: what is shown is true, a campaign is followed to its end, a server that is away ends nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from rankup.cli import round_watch
from rankup.cli.round_watch import (
    JsonDisplay,
    LineDisplay,
    Seen,
    history_words,
    line_of,
    picture,
    span,
    time_words,
    watch,
)
from rankup.errors import NotFoundError, UnreachableError
from rankup.protocol import LeaseProgress, LeasesAtWork, RoundState, RoundView, VersionView
from rankup.recipe import Recipe

NOW = 1_000_000.0


def round_view(**about: Any) -> RoundView:
    usual: dict[str, Any] = {
        "round_id": "tiny-r0001-abcdef",
        "model": "tiny",
        "dataset": "docs",
        "state": RoundState.OPEN,
        "index": 0,
        "repeat": 2,
        "base_version": 0,
        "base_manifest": "0" * 64,
        "recipe": Recipe(),
        "shards": 8,
        "quorum": 6,
        "min_contributions": 1,
        "deadline_at": NOW + 3600 + 1200,
        "opened_at": NOW - 60,
        "free": 4,
        "leased": 2,
        "accepted": 2,
    }
    return RoundView(**usual | about)


LEASE = LeaseProgress(
    name="a\u202eda",
    shard=4,
    shards=3,
    step=5,
    steps=20,
    loss=2.5,
    tokens_per_s=40.0,
    granted_at=NOW - 30,
    seen_at=NOW - 4,
    done_at=NOW + 95,
)


def version(number: int, loss: float | None) -> VersionView:
    return VersionView(
        model="tiny",
        version=number,
        manifest="0" * 64,
        parent=None,
        round_id=None,
        created_at=NOW,
        contributions=1,
        size_bytes=1,
        heldout_loss=loss,
        latest=False,
    )


def seen(*leases: LeaseProgress, total: int | None = None, **about: Any) -> Seen:
    view = round_view(**about)
    work = LeasesAtWork(round_id=view.round_id, at=NOW, total=len(leases) if total is None else total, leases=leases)
    return Seen(view, work, (version(0, 3.46), version(1, 3.1)))


def drawn(what: Seen) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(picture(what))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_picture_has_the_round_its_shards_its_people_and_its_history() -> None:
    text = drawn(seen(LEASE, reason="deadline moved"))
    for words in (
        "tiny-r0001-abcdef  open  round 1 of 2",
        "tiny from version 0, on docs; closes in 1 h 20 min at the latest",
        "■ accepted 2  ■ submitted 0  ■ training 2  ■ free 4",
        "closes with 6 of 8 shards; contributions: 0",
        "deadline moved",
        "0: 3.4600 → 1: 3.1000",
        "4-6",
        "5/20",
        "2.500",
        "1 min 35 s",
        "4 s ago",
    ):
        assert words in text
    assert "\nada " in text  # Without the character that turns the direction.
    assert text.count("█") == round_watch.BAR_CELLS


def test_a_long_list_is_cut_and_says_so() -> None:
    text = drawn(seen(*[LEASE] * 100, total=4321))
    assert text.count("5/20") == round_watch.ROWS_SHOWN
    assert f"and {4321 - round_watch.ROWS_SHOWN} more" in text


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({}, "closes in 1 h 20 min at the latest"),
        ({"deadline_at": NOW - 1}, "deadline reached"),
        ({"paused": True}, "paused: the deadline waits"),
        ({"state": RoundState.CLOSING, "closed_at": NOW - 90}, "closed 1 min 30 s ago"),
        ({"state": RoundState.PUBLISHED, "closed_at": NOW}, "closed after 1 min"),
    ],
)
def test_time_goes_by_the_servers_clock(about: dict[str, Any], words: str) -> None:
    assert time_words(round_view(**about), NOW) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (3_661, "1 h 1 min"), (90_000, "1 d 1 h")]
)
def test_lengths_of_time_in_two_units(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_one_line_tells_an_ended_round() -> None:
    ended = seen(state=RoundState.PUBLISHED, published_version=1, heldout_loss=3.1, parent_heldout_loss=3.46)
    assert "published" in line_of(ended)
    assert "version 1, held-out loss 3.4600 → 3.1000" in line_of(ended)
    assert history_words((version(0, None),)) == "0: -"


def test_json_has_one_line_a_change_and_nothing_for_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonDisplay()
    first = seen(LEASE)
    later = Seen(first.view, first.work.model_copy(update={"at": NOW + 1}), first.history)
    for what in (first, later, seen(LEASE, accepted=3), seen(LEASE, accepted=3)):
        display(what)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["round"]["accepted"] for line in lines] == [2, 3]
    assert lines[0]["leases"]["leases"][0]["step"] == 5
    assert lines[0]["versions"] == [{"version": 0, "heldout_loss": 3.46}, {"version": 1, "heldout_loss": 3.1}]


def test_plain_output_has_one_line_a_change() -> None:
    console = Console(file=io.StringIO(), width=40)
    display = LineDisplay(console)
    for what in (seen(), seen(), seen(accepted=3)):
        display(what)
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 2


# -- following ---------------------------------------------------------------------------------------------------------


class Server:
    """Answers of a server, which change at each look; an exception in place of a view is a server that is away."""

    def __init__(self, **rounds: list[RoundView | BaseException]) -> None:
        self.rounds = {name.replace("_", "-"): views for name, views in rounds.items()}
        self.known: list[RoundView] = []

    def call(self, method: str, url: str, path: str, **_: Any) -> Any:
        assert method == "GET"
        if path == "/v1/rounds":
            return {"rounds": [view.model_dump(mode="json") for view in self.known]}
        if path.endswith("/leases"):
            return LeasesAtWork(round_id="r", at=NOW, total=0, leases=()).model_dump(mode="json")
        if path.startswith("/v1/models/"):
            return {"versions": [version(1, 3.1).model_dump(mode="json"), version(0, 3.46).model_dump(mode="json")]}
        views = self.rounds[path.rpartition("/")[2]]
        view = views.pop(0) if len(views) > 1 else views[0]
        if isinstance(view, BaseException):
            raise view
        self.known = [view, *(other for other in self.known if other.round_id != view.round_id)]
        return view.model_dump(mode="json")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], Server]:
    def install(server: Server) -> Server:
        monkeypatch.setattr(round_watch, "call", server.call)
        return server

    return install


def watched(first: str, *, follow: bool = True, most: int = 200) -> list[Seen]:
    looks: list[Seen] = []
    for what in watch("http://x", first, every_s=1.0, follow=follow, sleep=lambda _: None):
        looks.append(what)
        assert len(looks) < most
    return looks


def test_the_next_round_of_the_campaign_is_followed_to_its_end(serve: Callable[[Server], Server]) -> None:
    ended, second = "tiny-r0001-abcdef", "tiny-r0002-abcdef"
    other = round_view(round_id="tiny-r0002-ffffff", index=1)
    server = serve(
        Server(
            tiny_r0001_abcdef=[round_view(), round_view(state=RoundState.PUBLISHED, published_version=1)],
            tiny_r0002_abcdef=[
                round_view(round_id=second, index=1),
                round_view(round_id=second, index=1, state=RoundState.REJECTED),
            ],
        )
    )
    server.known = [other]
    names = []
    for look, what in enumerate(watch("http://x", ended, every_s=1.0, follow=True, sleep=lambda _: None)):
        names.append((what.view.round_id, what.view.state.value))
        if look == 4:  # The keeper takes a moment.
            server.known.append(round_view(round_id=second, index=1))
        assert look < 50
    assert dict.fromkeys(names) == dict.fromkeys(
        [(ended, "open"), (ended, "published"), (second, "open"), (second, "rejected")]
    )


@pytest.mark.parametrize(
    ("last", "follow"),
    [
        (round_view(state=RoundState.CANCELLED), True),
        (round_view(state=RoundState.PUBLISHED, repeat=1), True),
        (round_view(state=RoundState.PUBLISHED), False),
    ],
    ids=["cancelled", "the last one", "not wanted"],
)
def test_what_has_no_next_round_ends_the_watching(
    serve: Callable[[Server], Server], last: RoundView, follow: bool
) -> None:
    serve(Server(tiny_r0001_abcdef=[round_view(), last]))
    assert [what.view.state.value for what in watched("tiny-r0001-abcdef", follow=follow)] == ["open", last.state.value]


def test_a_next_round_that_never_comes_is_not_waited_for_for_ever(serve: Callable[[Server], Server]) -> None:
    serve(Server(tiny_r0001_abcdef=[round_view(state=RoundState.PUBLISHED)]))
    assert round_watch.NEXT_ROUND_S < len(watched("tiny-r0001-abcdef")) < round_watch.NEXT_ROUND_S + 5


def test_a_server_that_is_away_is_waited_for_and_shown(serve: Callable[[Server], Server]) -> None:
    away = UnreachableError("http://x does not answer")
    serve(Server(tiny_r0001_abcdef=[round_view(), away, away, round_view(state=RoundState.CANCELLED)]))
    looks = watched("tiny-r0001-abcdef")
    assert [bool(what.away) for what in looks] == [False, True, True, False]
    assert "No answer at the moment" in drawn(looks[1])
    assert "no answer at the moment" in line_of(looks[1])


def test_the_first_call_tells_what_is_wrong(serve: Callable[[Server], Server]) -> None:
    serve(Server(tiny_r0001_abcdef=[UnreachableError("away")]))
    with pytest.raises(UnreachableError):
        watched("tiny-r0001-abcdef")


def test_without_a_name_the_newest_round_that_goes_on_is_watched(serve: Callable[[Server], Server]) -> None:
    server = serve(Server())
    with pytest.raises(NotFoundError, match="no round yet"):
        round_watch.newest_round("http://x")
    server.known = [
        round_view(round_id="c", state=RoundState.PUBLISHED),
        round_view(round_id="b"),
        round_view(round_id="a"),
    ]
    assert round_watch.newest_round("http://x").round_id == "b"
    server.known = server.known[:1]
    assert round_watch.newest_round("http://x").round_id == "c"


def test_ctrl_c_ends_quietly(serve: Callable[[Server], Server]) -> None:
    serve(Server(tiny_r0001_abcdef=[round_view(), KeyboardInterrupt()]))
    round_watch.show("http://x", "tiny-r0001-abcdef", every_s=0.2, follow=True, as_json=False)
