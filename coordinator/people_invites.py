"""Invites in the ledger: made by the organiser, counted down as they are used, over at their time.

What always holds: a code is `<invite id>-<secret>`, and only its sha256 is stored; an invite lets in at most as many
workers as it has uses, however many ask at the same time, and one worker uses it once, however often it asks.

Every method raises what `coordinator.valkey` raises.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final

from coordinator import people_keys as keys
from coordinator.ledger_keys import PREFIX
from coordinator.valkey import Valkey
from rankup.errors import DeniedError, NotFoundError
from rankup.membership import Invite, InviteRequest, NewInvite

_CODE: Final = re.compile(r"(i-[0-9a-f]{8})-[0-9a-f]{20}")
_REMEDY: Final = "Ask the organiser for a new invite, and give it whole: `--invite i-…`."


class Invites:
    """The invites of one ledger, beside the one that stands in the server's settings."""

    def __init__(self, valkey: Valkey) -> None:
        self._valkey = valkey

    async def make(self, request: InviteRequest, now: float) -> NewInvite:
        """A new invite. Its team, if it names one, takes in nobody any more who has no invite to it."""
        invite_id = f"i-{secrets.token_hex(4)}"
        code = f"{invite_id}-{secrets.token_hex(10)}"
        invite = Invite(
            invite_id=invite_id,
            sha256=hashlib.sha256(code.encode()).hexdigest(),
            uses=request.uses,
            left=request.uses,
            team=request.team,
            note=request.note,
            made_at=now,
            expires_at=now + request.for_s,
        )
        await self.restore(invite)
        return NewInvite(code=code, invite=invite)

    async def restore(self, invite: Invite) -> None:
        """Store an invite as it is."""
        writes = [
            ["HSET", keys.INVITES, invite.invite_id, invite.model_dump_json()],
            ["HSET", keys.INVITES_LEFT, invite.invite_id, str(invite.left)],
        ]
        if invite.team:
            writes.append(["SADD", keys.CLOSED_TEAMS, invite.team])
        await self._valkey.commit([], writes, durable=True)

    async def all(self) -> list[Invite]:
        """Every invite that was not withdrawn, newest first, used up and expired ones included."""
        docs, left = await self._valkey.read(["HVALS", keys.INVITES], ["HGETALL", keys.INVITES_LEFT])
        found = [Invite.model_validate_json(doc) for doc in docs]
        counted = [one.model_copy(update={"left": int(left.get(one.invite_id, 0))}) for one in found]
        return sorted(counted, key=lambda one: (-one.made_at, one.invite_id))

    async def withdraw(self, invite_id: str) -> None:
        """Nobody joins with it any more; who did stays. Raises NotFoundError."""
        gone = [["HDEL", keys.INVITES, invite_id], ["HDEL", keys.INVITES_LEFT, invite_id]]
        gone.append(["DEL", keys.invite_users_key(invite_id)])
        if not await self._valkey.commit([["HEXISTS", keys.INVITES, invite_id, "1"]], gone, durable=True):
            raise NotFoundError(f"There is no invite {invite_id}.", remedy="`rankup people invites` lists them.")

    async def use(self, code: str, worker_id: str, now: float) -> Invite:
        """The invite of this code, used up by one for this worker.

        Raises:
            DeniedError: no such invite, or withdrawn, over or used up.
        """
        named = _CODE.fullmatch(code)
        doc = await self._valkey.call("HGET", keys.INVITES, named[1]) if named else None
        digest = hashlib.sha256(code.encode("utf-8", "replace")).hexdigest()
        invite = Invite.model_validate_json(doc) if doc is not None else None
        if invite is None or not hmac.compare_digest(digest, invite.sha256):
            raise DeniedError("The invite is not one of this server.", remedy=_REMEDY)
        if now >= invite.expires_at:
            raise DeniedError("The invite is over.", remedy=_REMEDY)
        if not await self._valkey.run(keys.USE_INVITE_LUA, PREFIX, invite.invite_id, worker_id):
            raise DeniedError("The invite is used up.", remedy=_REMEDY)
        return invite

    async def close_team(self, team: str) -> None:
        """From now on nobody joins this team without an invite to it."""
        await self._valkey.call("SADD", keys.CLOSED_TEAMS, team)

    async def is_closed(self, team: str) -> bool:
        """Whether nobody joins this team without an invite to it."""
        return bool(await self._valkey.call("SISMEMBER", keys.CLOSED_TEAMS, team))
