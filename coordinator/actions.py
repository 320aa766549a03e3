"""What the organiser did: a record of each action, written once to object storage, never changed; and what follows.

    organiser/actions/<Unix ms, 15 digits>-<random>.json    an Action; names sort by time
    organiser/workers/<worker id>.json                      an Enrolment: a worker as it calls itself

    write, read, keep_enrolment, read_enrolments      object storage
    replay(actions, enrolments)                       what the ledger alone holds otherwise: standings, teams, invites

What always holds:
- a call of the organiser that changed something is answered only after its record was written (`coordinator.audited`),
  and a command before it says that it is done; a record never holds a secret;
- replaying is pure and depends on the records alone, so an empty ledger gets the same standings and invites again.

Tokens are not kept: after a replay every worker enrols again by itself, with the key that it has.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import JsonValue, ValidationError

from coordinator.ledger_types import Worker
from rankup.errors import IntegrityError, NotFoundError
from rankup.membership import Action, Enrolment, Invite
from rankup.message import canonical_json
from rankup.protocol import Standing
from rankup.store import Store

ACTIONS: Final = "organiser/actions/"
WORKERS: Final = "organiser/workers/"
MAX_ACTION_BYTES: Final = 256 * 1024
MAX_ENROLMENT_BYTES: Final = 16 * 1024
COMMAND: Final = "command"
"""`Action.by` of a command on the server's machine, which needs no token."""
_SECRET: Final = frozenset({"token", "secret", "password", "invite", "code"})
_HIDDEN: Final = "(not recorded)"


def action_key(at: float, mark: str) -> str:
    """Where an action of this Unix time lies; `mark` tells those of one millisecond apart."""
    return f"{ACTIONS}{max(0, int(at * 1000)):015d}-{mark}.json"


def enrolment_key(worker_id: str) -> str:
    return f"{WORKERS}{worker_id}.json"


def without_secrets(value: JsonValue) -> JsonValue:
    """The value without what stands under a name such as `token`, at any depth."""
    if isinstance(value, dict):
        return {name: _HIDDEN if name in _SECRET else without_secrets(inner) for name, inner in value.items()}
    return [without_secrets(inner) for inner in value] if isinstance(value, list) else value


def write(store: Store, action: Action) -> None:
    """Write the record of an action. Raises what the store raises; the caller must not answer then."""
    store.put(
        action_key(action.at, secrets.token_hex(4)),
        canonical_json(action),
        if_absent=True,
        content_type="application/json",
    )


def write_command(store: Store, what: str, arguments: Mapping[str, Any], now: float) -> None:
    """Write the record of a command that was run on the server's machine."""
    write(store, Action(what=what, by=COMMAND, arguments=dict(arguments), at=now))


def read(store: Store, limit: int | None = None) -> Iterator[Action]:
    """Actions, oldest first; with a limit the newest ones. Raises IntegrityError for one that cannot be read."""
    names = list(store.list(ACTIONS))
    for key in names if limit is None else names[max(0, len(names) - limit) :]:
        try:
            yield Action.model_validate_json(store.get(key, max_bytes=MAX_ACTION_BYTES))
        except ValidationError as exc:
            raise IntegrityError(f"the action under {key} cannot be read") from exc


def keep_enrolment(store: Store, enrolment: Enrolment) -> None:
    """Write who a worker is; when and with which invite it joined stays, and a member never becomes one who waits."""
    try:
        first = _parse_enrolment(store, enrolment_key(enrolment.worker_id))
    except NotFoundError:
        pass
    else:
        waits = first.standing is enrolment.standing is Standing.WAITING
        kept = {"enrolled_at": first.enrolled_at, "invite_id": first.invite_id or enrolment.invite_id}
        kept["standing"] = Standing.WAITING if waits else Standing.MEMBER
        enrolment = enrolment.model_copy(update=kept)
    store.put(enrolment_key(enrolment.worker_id), canonical_json(enrolment), content_type="application/json")


def _parse_enrolment(store: Store, key: str) -> Enrolment:
    try:
        return Enrolment.model_validate_json(store.get(key, max_bytes=MAX_ENROLMENT_BYTES))
    except ValidationError as exc:
        raise IntegrityError(f"the enrolment under {key} cannot be read") from exc


def read_enrolments(store: Store) -> Iterator[Enrolment]:
    """Every worker that ever joined. Raises IntegrityError for one that cannot be read."""
    for key in store.list(WORKERS):
        yield _parse_enrolment(store, key)


# -- what follows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Membership:
    """What `replay` finds."""

    workers: dict[str, Worker]
    invites: dict[str, Invite]
    """Those that were not withdrawn, with the uses that are left."""
    closed_teams: frozenset[str]
    """Teams that an invite was ever made for."""


def replay(actions: Iterable[Action], enrolments: Iterable[Enrolment]) -> Membership:
    """Standings and invites after these actions, oldest first. Actions about anything else are passed over.

    Raises IntegrityError for an invite that cannot be read.
    """
    joined = list(enrolments)
    workers = {one.worker_id: _worker(one) for one in joined}
    used = Counter(one.invite_id for one in joined)
    invites: dict[str, Invite] = {}
    closed: set[str] = set()
    for action in actions:
        match action.what:
            case "make_invite":
                made = _invite(action)
                closed |= {made.team} - {""}
                invites[made.invite_id] = made.model_copy(update={"left": max(0, made.uses - used[made.invite_id])})
            case "withdraw_invite":
                invites.pop(action.subject.get("invite_id", ""), None)
            case "approve":
                for worker_id in _names(action.outcome.get("workers")):
                    _set(workers, worker_id, Standing.MEMBER)
            case "ban":
                reason = str(action.arguments.get("reason", ""))
                _set(workers, action.subject.get("worker_id", ""), Standing.BANNED, reason)
            case "unban":
                _set(workers, action.subject.get("worker_id", ""), Standing.MEMBER)
    return Membership(workers, invites, frozenset(closed))


def _worker(one: Enrolment) -> Worker:
    return Worker(
        worker_id=one.worker_id,
        name=one.name,
        public_key=one.public_key,
        device=one.device,
        enrolled_at=one.enrolled_at,
        standing=one.standing,
        team=one.team,
    )


def _invite(action: Action) -> Invite:
    try:
        return Invite.model_validate(action.outcome)
    except ValidationError as exc:
        raise IntegrityError("the record of an invite cannot be read") from exc


def _names(value: JsonValue) -> Iterable[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _set(workers: dict[str, Worker], worker_id: str, standing: Standing, note: str = "") -> None:
    if worker_id in workers:
        workers[worker_id] = replace(workers[worker_id], standing=standing, note=note)
