"""What this machine is to its server: enrolled under its key, with the token that its clients send.

What always holds:
- the key and the publisher's key are those of `worker.identity`; another publisher's key is followed only where the
  pinned one leads to it;
- a token that the server does not know any more (it ended, or the server lost its data) is replaced by enrolling again,
  once for all threads that noticed;
- the heart never waits for that: it tries once, and goes on without.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rankup import signing
from rankup.errors import DeniedError, SetupError, UnauthenticatedError
from rankup.message import DisplayName, PublicKey, TeamName
from rankup.protocol import EnrolRequest, EnrolStatement, Standing
from rankup.settings import WorkerSettings
from rankup.sources import GatewaySource
from worker import device, identity
from worker.client import GatewayClient
from worker.events import Enrolled, WorkerEvent
from worker.publisher import key_follows
from worker.retry import RetryPolicy

T = TypeVar("T")
_FIRST_CONTACT_S = 60.0
"""How long a server is waited for that this machine has never seen."""


class Membership:
    """Of one machine on one server. `patient` rides out outages, `steady` answers or fails at once."""

    def __init__(
        self,
        server: str,
        settings: WorkerSettings,
        folder: identity.ServerFolder,
        *,
        invite: str,
        name: DisplayName | None,
        team: TeamName | None,
        patient: GatewayClient,
        steady: GatewayClient,
        report: Callable[[WorkerEvent], None],
    ) -> None:
        self._server = server
        self._settings = settings
        self._folder = folder
        self._invite = invite
        self._name = name
        self._team = team
        self._patient = patient
        self._steady = steady
        self._report = report
        self._one_enrols = threading.Lock()
        self.key = identity.load_or_create_key(folder)
        self._pinned = identity.load_identity(folder)
        self._use(self._token)

    @property
    def publisher_key(self) -> PublicKey:
        """The one that is pinned. Raises `SetupError` before `join`."""
        if self._pinned is None:
            raise SetupError("the worker has not enrolled")
        return self._pinned.publisher_key

    def join(self) -> None:
        """Enrol where this machine is new, or has another name or team now.

        Raises `DeniedError` (wrong invite, banned), `IntegrityError` (publisher's key), and what the client raises.
        """
        # Whose address was never right is not waited for as long as a server that is known.
        first = RetryPolicy(min(_FIRST_CONTACT_S, self._settings.patience_s))
        info = self._patient.info(policy=first if self._pinned is None else None)
        self._require_publisher(info.publisher_key, info.models)
        known = self._pinned
        renamed = known is not None and (self._name or known.name, self._chosen_team()) != (known.name, known.team)
        if known is None or renamed:
            self._enrol(self._patient)
        else:
            self._report(Enrolled(known.worker_id, known.name, self._server, new=False))

    def with_token(self, call: Callable[[], T]) -> T:
        """The call's result; when the server does not know the token any more, enrol again and repeat once."""
        token = self._token
        try:
            return call()
        except UnauthenticatedError:
            self._renew(token, self._patient)
            return call()

    def with_token_if_possible(self, call: Callable[[], T]) -> T:
        """As `with_token`, without patience; raises `UnauthenticatedError` where enrolling is refused just now."""
        token = self._token
        try:
            return call()
        except UnauthenticatedError as exc:
            try:
                self._renew(token, self._steady)
            except DeniedError:
                raise exc from None
            return call()

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _token(self) -> str:
        return self._pinned.token if self._pinned is not None else ""

    def _use(self, token: str) -> None:
        for client in (self._patient, self._steady):
            client.use_token(token)

    def _renew(self, stale: str, client: GatewayClient) -> None:
        with self._one_enrols:
            if self._token == stale:  # Else another thread was faster.
                self._enrol(client)

    def _require_publisher(self, shown: PublicKey, models: Sequence[str]) -> None:
        """Follow a change of the publisher's key that the pinned one has signed; raise IntegrityError for any other."""
        pinned = self._pinned
        if pinned is not None and pinned.publisher_key != shown:
            with GatewaySource(self._server) as source:
                if key_follows(source, models, pinned=pinned.publisher_key, shown=shown):
                    self._pinned = identity.pin(self._folder, pinned, shown)
        identity.check_publisher(self._pinned, shown)

    def _chosen_team(self) -> str:
        """What the owner says now, else what they said the last time; empty: no team."""
        return self._team if self._team is not None else self._pinned.team if self._pinned else ""

    def _enrol(self, client: GatewayClient) -> None:
        public_key = signing.public_key_hex(self.key)
        name = self._name or (self._pinned.name if self._pinned else f"volunteer-{public_key[:6]}")
        statement = EnrolStatement(
            public_key=public_key,
            name=name,
            invite=self._invite,
            team=self._chosen_team(),
            device=device.profile(self._settings.device, self._settings.threads),
            issued_at=time.time(),
        )
        signature = signing.sign(self.key, "enrol", statement)
        answer = client.enrol(EnrolRequest(statement=statement, signature=signature))
        if answer.standing is Standing.BANNED:
            raise DeniedError(
                f"{self._server} takes no more work of this machine ({answer.worker_id})",
                remedy="Ask the organiser why; `rankup worker logs` shows what was handed in.",
            )
        if self._pinned is not None and self._pinned.publisher_key != answer.publisher_key:
            self._require_publisher(answer.publisher_key, client.info().models)
        self._pinned = identity.save_identity(self._folder, self._server, statement.name, answer, team=statement.team)
        self._use(answer.token)
        waiting = answer.standing is Standing.WAITING
        self._report(Enrolled(answer.worker_id, statement.name, self._server, new=True, waiting=waiting))
