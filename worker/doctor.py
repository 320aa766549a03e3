"""`rankup worker doctor`, and what `join` looks at first: can this machine work, and what will it do.

What always holds: every finding that is not ok carries a remedy; nothing is written but the measured links and the
count of their bytes. The machine alone takes about a second; a server two or three more, and its links up to five.

The checks are those of `worker.machine_probe` and `worker.server_probe`; the plan is `worker.plan`'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from rankup.errors import DeniedError, FatalError, RankupError, SetupError, UnreachableError
from rankup.finding import Finding, Grade, fail
from rankup.settings import WorkerSettings
from worker import identity, machine_probe, server_probe
from worker.links import Links
from worker.machine_probe import Allowance, Hands
from worker.plan import Plan, Resources
from worker.planreader import base_reader, hardware_of, read_plan
from worker.readings import Sense
from worker.server_probe import Guest

_ERRORS: Final[dict[str, type[RankupError]]] = {"server": UnreachableError, "member": DeniedError}
"""Check -> what its failure is; every other one is something that this machine lacks."""


@dataclass(frozen=True)
class Examination:
    """What was found, and what the worker will do; no plan where no server was asked, or it does not answer."""

    findings: tuple[Finding, ...]
    plan: Plan | None = None

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What keeps the worker from working."""
        return tuple(finding for finding in self.findings if finding.grade is Grade.FAIL)

    def require_fit(self) -> None:
        """Raise the first failure, with its remedy: `UnreachableError` for the server, `DeniedError` for one that does
        not want this machine, else `SetupError`."""
        for finding in self.failed:
            raise _ERRORS.get(finding.check, SetupError)(f"{finding.check}: {finding.found}", remedy=finding.remedy)


def examine(
    settings: WorkerSettings,
    url: str | None = None,
    *,
    invite: str = "",
    joining: bool = False,
    sense: Sense | None = None,
) -> Examination:
    """All checks of this machine, and of the server at `url` when there is one, with the plan for its open rounds.

    `joining`: a server that does not answer is waited for by a machine that has joined it before, so that is a warning;
    and links that were measured within a day are not measured again.
    """
    hands = Hands.find(settings)
    try:
        server = identity.normalise_url(url) if url else None
        allowed = Allowance.read(settings, server, hands.kind, sense)
        guest = Guest.of(settings, server, invite=invite, joining=joining) if server else None
    except FatalError as exc:
        return Examination((fail("settings", exc.cause, exc.remedy),))
    findings = machine_probe.look(settings, hands, allowed)
    if guest is None:
        return Examination(tuple(findings))
    with server_probe.open_client(settings, guest, allowed) as client:
        finding, info = server_probe.ask_server(client, guest, settings.patience_s)
        findings.append(finding)
        if info is None:
            return Examination(tuple(findings))
        findings.append(server_probe.ask_standing(client, guest, info))
        changed = server_probe.check_publisher(guest, info)
        findings += [changed] if changed is not None else []
        try:
            offset_s = client.server_clock_offset_s()
        except RankupError:
            offset_s = None
        findings.append(server_probe.clock_finding(offset_s))
        finding, links = server_probe.find_links(client, guest, allowed, now=time.time())
        findings.append(finding)
        plan = read_plan(
            client,
            resources(settings, hands, allowed, links),
            hardware_of(hands.kind, hands.free_bytes, hands.card.capability if hands.card is not None else None),
            base_reader(guest.server, settings.home / "cache", info.publisher_key),
            time.time() + (offset_s or 0.0),
        )
    return Examination(tuple(findings), plan)


def resources(settings: WorkerSettings, hands: Hands, allowed: Allowance, links: Links) -> Resources:
    """What this machine has for the work, as the plan wants it."""
    limits = allowed.limits
    return Resources(
        memory_bytes=hands.memory_bytes,
        disk_free_bytes=machine_probe.free_disk(settings.home)[0],
        quota_bytes=machine_probe.quota_bytes(settings, limits),
        up=links.up,
        down=links.down,
        daily_bytes=limits.daily_xfer_limit_mb * 1e6 or None,
        models=settings.models,
        precision=settings.precision,
    )
