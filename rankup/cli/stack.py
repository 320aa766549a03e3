"""Where the process is assembled: embedded services, Ray, gateway and keeper of one server, up and down together.

`Stack.start` brings everything up in order of dependence and takes down what it had started when a step fails;
`Stack.stop` is idempotent and leaves no process behind. This is the only place that knows coordinator and aggregator at
once: the keeper gets its aggregator from here.

The state folder (mode 700) keeps what outlives a run: credentials, the publisher's key, the data of the embedded
servers, and `server.json` (mode 600), by which the organiser's commands on this machine find the running server.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankup.cli.addresses import is_loopback, local_url, shared_url
from rankup.durable import write_file
from rankup.errors import SetupError
from rankup.settings import CoordinatorSettings, LedgerSettings, StoreSettings, state_home

if TYPE_CHECKING:
    from rankup.local import LocalServices

SERVER_FILE = "server.json"


def server_home() -> Path:
    """State folder of the server on this machine."""
    return state_home() / "server"


@dataclass(frozen=True)
class ServerAccess:
    """What an organiser's command needs of the server on this machine."""

    url: str
    organiser_token: str
    store: StoreSettings
    ledger: LedgerSettings
    ray_address: str
    ray_token_file: Path
    publisher_key_file: Path

    @classmethod
    def of_this_machine(cls) -> ServerAccess:
        """Read `server.json` of the running server. Raises SetupError when none was started here."""
        path = server_home() / SERVER_FILE
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            raise SetupError(
                f"no server runs on this machine (no {path})",
                remedy="Start one with `rankup up`, or set RANKUP_HOME to the folder that it uses.",
            ) from None
        return cls(
            url=found["url"],
            organiser_token=found["organiser_token"],
            store=StoreSettings.from_wire(found["store"]),
            ledger=LedgerSettings.from_wire(found["ledger"]),
            ray_address=found["ray_address"],
            ray_token_file=Path(found["ray_token_file"]),
            publisher_key_file=Path(found["publisher_key_file"]),
        )


@dataclass(frozen=True)
class Services:
    """Where a server keeps what it has, whether it runs or not."""

    store: StoreSettings
    ledger: LedgerSettings
    publisher_key_file: Path


@contextmanager
def services_at_hand() -> Iterator[Services]:
    """Those of the server that runs on this machine, else those that the settings name, else the embedded ones, which
    run within the block. Raises SetupError where only one of the two is named."""
    home = server_home()
    if _is_running(home):
        access = ServerAccess.of_this_machine()
        yield Services(access.store, access.ledger, access.publisher_key_file)
        return
    key_file = home / CoordinatorSettings().publisher_key_file  # An absolute path stays as it is.
    if (external := _external_services()) is not None:
        yield Services(*external, key_file)
        return

    from rankup.local import LocalServices

    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    with LocalServices(home / "services") as services:
        yield Services(services.store_settings, services.ledger_settings, key_file)


def _is_running(home: Path) -> bool:
    """Whether the server of this state folder runs; one that was killed leaves its `server.json` behind."""
    try:
        os.kill(int(json.loads((home / SERVER_FILE).read_bytes())["pid"]), 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # It runs, as somebody else's.
    return True


def _external_services() -> tuple[StoreSettings, LedgerSettings] | None:
    """Object storage and ledger that the settings name; None where they name neither."""
    store, ledger = StoreSettings(), LedgerSettings()
    external_store = bool(store.endpoint_url or store.access_key)
    external_ledger = bool(ledger.url.get_secret_value())
    if external_store != external_ledger:
        missing = "RANKUP_LEDGER_URL" if external_store else "RANKUP_STORE_ENDPOINT_URL"
        raise SetupError(
            f"only one of object storage and ledger is set; {missing} is missing",
            remedy=f"Set {missing} too, or neither: then both are embedded.",
        )
    return (store, ledger) if external_store else None


class Stack:
    """One server: `start()` … `stop()`, or a context manager."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        home: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.home = home or server_home()
        self.settings = settings
        self.url = shared_url(settings.host, settings.port)
        """As other machines reach it, where they do."""
        self._say = say or (lambda _line: None)
        self._undo: list[Callable[[], None]] = []
        self._services: LocalServices | None = None

    @property
    def invite(self) -> str:
        return self.settings.invite.get_secret_value()

    def join_line(self) -> str:
        """What a volunteer types."""
        invite = f" --invite {self.invite}" if self.settings.enrolment == "invite" else ""
        return f"rankup worker join {self.url}{invite}"

    def start(self) -> Stack:
        """Bring everything up; on a failure take down what was started, then raise."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        from rankup.store import open_store

        self.home.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)
        self.settings = self._with_secrets(self.settings)
        store, ledger = self._services_for()
        self._say(f"object storage  {store.endpoint_url or 'AWS S3'}, bucket {store.bucket}")
        self._say("ledger          Valkey, append-only file on")
        open_store(store).ensure_bucket()
        self._prepare_ledger(store, ledger)

        from coordinator.cluster import lost_daemon, start_cluster, start_serve, stop_cluster, token_file

        self._undo.append(stop_cluster)
        cluster = start_cluster(self.home)
        self._say("ray             started, token authentication")
        start_serve(self.settings.host, self.settings.port)

        from aggregator.pipeline import Pipeline
        from coordinator.keeper import start_keeper, stop_keeper
        from coordinator.serving import deploy_gateway, remove_gateway
        from rankup.cli.retrain import retrain

        deploy_gateway(store, ledger, self.settings, replicas=self.settings.replicas)
        # Of a dead cluster there is nobody to ask: `stop_cluster` ends its processes.
        self._undo.append(lambda: None if lost_daemon() else stop_keeper())
        pipeline = Pipeline(store, self.settings.publisher_key_file, self.settings, retrain)
        start_keeper(store, ledger, self.settings, pipeline)
        # Stopped before the keeper: nobody is let in any more while the rest goes down.
        self._undo.append(lambda: None if lost_daemon() else remove_gateway())
        self._say(f"gateway         {self.url}")

        self._undo.append(lambda: (self.home / SERVER_FILE).unlink(missing_ok=True))
        access = {
            "url": local_url(self.settings.host, self.settings.port),
            "organiser_token": self.settings.organiser_token.get_secret_value(),
            "store": store.to_wire(),
            "ledger": ledger.to_wire(),
            "ray_address": cluster.address,
            "ray_token_file": str(token_file(self.home)),
            "publisher_key_file": str(self.settings.publisher_key_file),
            "pid": os.getpid(),
        }
        write_file(self.home / SERVER_FILE, json.dumps(access).encode())

    def _services_for(self) -> tuple[StoreSettings, LedgerSettings]:
        """External services where the settings name them, embedded ones otherwise."""
        if (external := _external_services()) is not None:
            return external

        from rankup.local import LocalServices

        services = LocalServices(self.home / "services")
        self._undo.append(services.stop)
        services.start()
        self._services = services
        if not is_loopback(self.settings.host):
            self._proxy_transfers()
        return services.store_settings, services.ledger_settings

    def _prepare_ledger(self, store: StoreSettings, settings: LedgerSettings) -> None:
        """What an older release wrote is migrated, and what was lost restored, before anybody relies on it."""
        from coordinator.ledger import Ledger
        from coordinator.rebuild import rebuild_if_lost
        from coordinator.schema import CURRENT, bring_up_to_date
        from rankup.signing import load_private_key, public_key_hex
        from rankup.store import open_store

        key = public_key_hex(load_private_key(self.settings.publisher_key_file))

        def say(line: str) -> None:
            self._say(f"ledger          {line}")

        async def prepare() -> None:
            ledger = await Ledger.connect(settings)
            try:
                found = await bring_up_to_date(ledger)
                if 0 < found < CURRENT:
                    say(f"layout {found} brought up to {CURRENT}")
                done = await rebuild_if_lost(ledger, open_store(store), key, time.time(), say=say)
                if done is not None:
                    rounds, verdicts = sum(done.rounds.values()), done.accepted + done.rejected
                    say(f"restored: {rounds} rounds, {verdicts} verdicts, {done.queued} deltas to be judged")
            finally:
                await ledger.close()

        asyncio.run(prepare())

    def _proxy_transfers(self) -> None:
        """Volunteers do not reach the embedded object storage, which listens on loopback only: the gateway must."""
        spool = self.home / "spool"
        shutil.rmtree(spool, ignore_errors=True)  # What a killed server left behind.
        self.settings = self.settings.model_copy(update={"transfer": "proxied", "spool_dir": spool})
        self._say("transfer        through the gateway: the embedded object storage listens on loopback only")

    def _with_secrets(self, settings: CoordinatorSettings) -> CoordinatorSettings:
        """Fill in what the settings leave open: invite, organiser's token, publisher's key; made once, then kept."""
        from rankup.signing import generate_private_key, save_private_key

        path = self.home / "secrets.json"
        if not path.exists():
            # Hex: a person types the invite, and one that began with "-" would be taken for an option.
            fresh = {"invite": secrets.token_hex(8), "organiser_token": secrets.token_urlsafe(32)}
            write_file(path, json.dumps(fresh).encode())
        kept = json.loads(path.read_text())
        key_file = settings.publisher_key_file
        if not key_file.is_absolute():
            key_file = self.home / key_file
        if not key_file.exists():
            save_private_key(key_file, generate_private_key())
        wire = json.loads(settings.to_wire())
        wire["publisher_key_file"] = str(key_file)
        for name in ("invite", "organiser_token"):
            wire[name] = wire[name] or kept[name]
        return CoordinatorSettings(**wire)

    def watch(self, stopped: threading.Event) -> None:
        """Look after it until `stopped` is set. Raises HeadLostError when Ray's head has died."""
        from coordinator.cluster import lost_daemon
        from rankup.cli.watch import Watch

        def restore() -> None:
            if (services := self._services) is not None:
                self._prepare_ledger(services.store_settings, services.ledger_settings)

        Watch(self._services, lost_daemon, restore, self._say, time.monotonic).run(stopped)

    def stop(self) -> None:
        """Take everything down, last started first. Errors do not keep the rest from stopping; the first is raised."""
        failures: list[Exception] = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as exc:  # noqa: BLE001 - whatever it is, the remaining parts must still be stopped
                failures.append(exc)
        if failures:
            raise failures[0]

    def __enter__(self) -> Stack:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()
