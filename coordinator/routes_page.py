"""The status page at `/`, and the same board as JSON for its refresh.

What always holds: one rendering, by an autoescaping template, for the first load and for every refresh; the page loads
nothing from anywhere else, and its policy allows one script and one style, each named by a nonce. It needs no token and
shows nothing that `/v1` does not show to everybody. A server behind the gateway that is away costs a notice, not the
page.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import rankup
from coordinator import board
from coordinator.access import Desk, DeskOf
from rankup.errors import NotFoundError, RankupError
from rankup.membership import TeamRow
from rankup.message import Answer
from rankup.protocol import ContributorRow, RoundView

WEB = Path(__file__).parent / "web"
MODELS_SHOWN = 8
ROUNDS_SHOWN = 12
CURRENT_SHOWN = 6
CONTRIBUTORS_SHOWN = 50
TEAMS_SHOWN = 10
REFRESH_MS = 3000
_HOST = re.compile(r"[A-Za-z0-9.\-]{1,253}(:[0-9]{1,5})?|\[[0-9a-fA-F:.]{2,45}\](:[0-9]{1,5})?")

log = structlog.get_logger(__name__)
router = APIRouter(include_in_schema=False)


class BoardUpdate(Answer):
    revision: str
    """Changes when the board does."""
    html: str


@functools.cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@functools.cache
def _asset(name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    return Markup((WEB / name).read_text(encoding="utf-8"))  # noqa: S704 - part of this package, nobody's input


@router.get("/")
async def page(request: Request, desk: DeskOf) -> HTMLResponse:
    """The status page."""
    update = await _render_board(desk, _server_url(request, desk))
    nonce = secrets.token_urlsafe(16)
    html = (
        _templates()
        .get_template("page.html.j2")
        .render(
            board=Markup(update.html),  # noqa: S704 - made by the autoescaping template above
            revision=update.revision,
            refresh_ms=REFRESH_MS,
            nonce=nonce,
            style=_asset("style.css"),
            script=_asset("refresh.js"),
        )
    )
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@router.get("/board.json")
async def board_update(request: Request, desk: DeskOf) -> BoardUpdate:
    """The board as the page's script fetches it."""
    return await _render_board(desk, _server_url(request, desk))


def _server_url(request: Request, desk: Desk) -> str:
    """The address that the reader used, if it is one, else the one in the settings."""
    host = request.headers.get("host", "")
    if _HOST.fullmatch(host):
        return f"{request.url.scheme}://{host}"
    return f"http://{desk.settings.host}:{desk.settings.port}"


async def _render_board(desk: Desk, url: str) -> BoardUpdate:
    now, missing = desk.clock(), []
    models: Sequence[board.ModelBoard] = ()
    rounds: Sequence[RoundView] = ()
    current: list[board.RoundBoard] = []
    contributors: Sequence[ContributorRow] = ()
    teams: Sequence[TeamRow] = ()
    try:
        models = await desk.in_thread(_models, desk, now)
    except RankupError as error:
        log.warning("page_incomplete", part="models", code=error.code, cause=error.cause)
        missing.append("models")
    try:
        ledger = await desk.ledger()
        rounds = [status.view() for status in await ledger.rounds(ROUNDS_SHOWN)]
        live = [status.view() for status in await ledger.unfinished() if not status.facts.state.ended]
        for view in (live[::-1] or rounds[:1])[:CURRENT_SHOWN]:
            current.append(board.round_board(view, now, await desk.watched.leases(view.round_id)))
        contributors = await ledger.people.scores.leaderboard(CONTRIBUTORS_SHOWN)
        teams = (await ledger.people.scores.teams())[:TEAMS_SHOWN]
    except RankupError as error:
        log.warning("page_incomplete", part="rounds", code=error.code, cause=error.cause)
        missing.append("rounds and contributors")
    html = (
        _templates()
        .get_template("board.html.j2")
        .render(
            models=models,
            current=current,
            rounds=[board.round_board(view, now) for view in rounds],
            contributors=[board.contributor(row) for row in contributors],
            teams=[board.team(row) for row in teams],
            missing=" and ".join(missing),
            join=f"rankup worker join {url}",
            invite_needed=desk.settings.enrolment == "invite",
            server_version=rankup.__version__,
            publisher_key=desk.publisher_key,
            chart_width=board.CHART_WIDTH,
            chart_height=board.CHART_HEIGHT,
            chart_left=board.LEFT,
            chart_right=board.CHART_WIDTH - board.RIGHT,
            chart_bottom=board.CHART_HEIGHT - board.BOTTOM,
            shown=board.shown,
            short=board.short,
        )
    )
    return BoardUpdate(revision=hashlib.sha256(html.encode()).hexdigest()[:16], html=html)


def _models(desk: Desk, now: float) -> list[board.ModelBoard]:
    found = []
    for name in desk.catalogue.models()[:MODELS_SHOWN]:
        try:
            found.append(board.model_board(name, desk.catalogue.versions(name, limit=board.MAX_POINTS), now))
        except NotFoundError:
            continue  # Removed between the two looks.
    return found
