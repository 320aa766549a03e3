"""Messages about people: invites, standings, who is enrolled, what the organiser did.

What always holds: an invite's secret is told once, in the answer that made it; what is stored of it is its sha256. An
`Action` and an `Enrolment` are what object storage keeps, as canonical JSON: with all of them, every standing and every
invite can be made again (`coordinator.actions`). Nothing here does I/O.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, StringConstraints

from rankup.message import Answer, Digest, DisplayName, Finite, Identifier, Message, PublicKey, TeamName
from rankup.protocol import ContributorRow, DeviceProfile, Standing

MAX_NAMED = 1_000
"""Workers that one call may name."""
Note = Annotated[str, StringConstraints(strip_whitespace=True, max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]

# -- invites -----------------------------------------------------------------------------------------------------------


class InviteRequest(Message):
    """A new invite."""

    uses: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """New workers that may join with it; one that is known needs none."""
    for_s: Annotated[Finite, Field(ge=60, le=31_536_000)] = 604_800.0
    team: TeamName | Literal[""] = ""
    """Who joins with it is in this team, and from now on nobody joins the team without such an invite."""
    note: Note = ""


class Invite(Answer):
    """An invite as the organiser sees it."""

    invite_id: Identifier
    sha256: Digest
    """Of the whole code."""
    uses: int
    left: int
    team: str = ""
    note: str = ""
    made_at: float
    expires_at: float


class NewInvite(Answer):
    """An invite with its code, which nobody is told again."""

    code: str
    invite: Invite


class Invites(Answer):
    invites: tuple[Invite, ...]


# -- workers -----------------------------------------------------------------------------------------------------------


class ApproveRequest(Message):
    """Who may begin; `everybody` is all who wait."""

    workers: Annotated[tuple[Identifier, ...], Field(max_length=MAX_NAMED)] = ()
    everybody: bool = False


class Approved(Answer):
    """Those who waited and do so no more."""

    workers: tuple[Identifier, ...]


class BanRequest(Message):
    reason: Annotated[Note, Field(min_length=1)]
    """The worker is told."""


class Person(ContributorRow):
    """A worker as the organiser sees it."""

    standing: Standing
    note: str = ""
    """Why it is banned."""
    device: DeviceProfile
    enrolled_at: float
    seen_at: float | None = None
    """Last call with its token, give or take five minutes."""
    unpublished: int = 0
    """Accepted tokens of rounds that ended without a version."""
    valid_in_a_row: int = 0
    """Accepted contributions since the last one that was refused."""


class PeoplePage(Answer):
    people: tuple[Person, ...]


class NewToken(Answer):
    """The worker's token from now on; the old one is worth nothing."""

    token: str
    expires_at: float


class TeamRow(Answer):
    team: str
    members: int
    credit: float
    """Earned by workers while they were in it."""


class Leaderboard(Answer):
    """By credit, then by accepted tokens; `teams` where teams were asked for, else `rows`."""

    rows: tuple[ContributorRow, ...] = ()
    teams: tuple[TeamRow, ...] = ()


# -- what object storage keeps -----------------------------------------------------------------------------------------


class Enrolment(Message):
    """A worker as it joined, or as it called itself the last time."""

    format: Literal["rankup.enrolment/1"] = "rankup.enrolment/1"
    worker_id: Identifier
    public_key: PublicKey
    name: DisplayName
    team: TeamName | Literal[""] = ""
    device: DeviceProfile = DeviceProfile()
    standing: Standing
    """At the time of joining; what the organiser decided later stands in the actions."""
    invite_id: Identifier | None = None
    """The named invite that it used up."""
    enrolled_at: Finite


class Action(Message):
    """One call or command of the organiser that changed something."""

    format: Literal["rankup.action/1"] = "rankup.action/1"
    what: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    by: Annotated[str, StringConstraints(max_length=64)]
    """First 16 hex digits of the sha256 of the token, or "command" for one on the server's machine."""
    address: Annotated[str, StringConstraints(max_length=64)] = ""
    request_id: Annotated[str, StringConstraints(max_length=64)] = ""
    subject: dict[str, str] = Field(default_factory=dict)
    """What the address of the call names."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """What the call's body says, without secrets."""
    outcome: dict[str, JsonValue] = Field(default_factory=dict)
    """What came of it that only the ledger holds."""
    at: Finite


class ActionLog(Answer):
    """Newest first."""

    actions: tuple[Action, ...]
