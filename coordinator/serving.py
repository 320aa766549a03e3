"""The gateway as a Ray Serve application: one actor per replica, each with its own application and its own connections.

What always holds:
- only settings travel to a replica, as JSON; the application, the ledger's client and the S3 client are made there,
  on the replica's own event loop;
- the publisher's private key stays where it is: replicas get the public half.

Serve itself (address, port, proxies) is started by `coordinator.cluster`.
"""

from __future__ import annotations

import time
from typing import Any

from ray import serve

from coordinator.gateway import GatewayDeps, create_app
from coordinator.ledger import Ledger
from rankup.logs import configure_server
from rankup.settings import CoordinatorSettings, LedgerSettings, StoreSettings
from rankup.signing import load_private_key, public_key_hex
from rankup.store import open_store

APPLICATION = "rankup-gateway"
MAX_ONGOING_REQUESTS = 200
"""Per replica: requests wait for Valkey and S3, not for the processor."""
MAX_QUEUED_REQUESTS = 2_000
"""Above this Serve answers 503 at once; clients come back with jitter."""
HEALTH_PERIOD_S = 1.0
"""How often Serve looks whether a replica lives; a dead one is replaced."""
GRACE_S = 10.0


def replica_app(store_wire: str, ledger_wire: str, settings_wire: str, publisher_key: str) -> Any:
    """The application of one replica, from settings as `to_wire` writes them."""
    ledger_settings = LedgerSettings.from_wire(ledger_wire)

    async def connect_ledger() -> Ledger:
        return await Ledger.connect(ledger_settings)

    return create_app(
        GatewayDeps(
            connect_ledger=connect_ledger,
            store=open_store(StoreSettings.from_wire(store_wire)),
            settings=CoordinatorSettings.from_wire(settings_wire),
            publisher_key=publisher_key,
            clock=time.time,
        )
    )


def gateway_application(
    store: StoreSettings,
    ledger: LedgerSettings,
    settings: CoordinatorSettings,
    *,
    replicas: int = 1,
    num_cpus: float = 0.0,
) -> Any:
    """The Serve application, not yet running. `num_cpus` is what Ray's scheduler sets aside for each replica.

    Raises:
        SetupError: the publisher's key cannot be read.
    """
    publisher_key = public_key_hex(load_private_key(settings.publisher_key_file))
    wires = (store.to_wire(), ledger.to_wire(), settings.to_wire(), publisher_key)

    def build() -> Any:
        configure_server("gateway")
        return replica_app(*wires)

    deployment = serve.deployment(
        name="gateway",
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=GRACE_S,
        ray_actor_options={"num_cpus": num_cpus},
    )(serve.ingress(build)())
    return deployment.bind()


def deploy_gateway(
    store: StoreSettings,
    ledger: LedgerSettings,
    settings: CoordinatorSettings,
    *,
    replicas: int = 1,
    num_cpus: float = 0.0,
) -> None:
    """Run the gateway on the Serve instance of this cluster and wait until its replicas take requests.

    Deploying again replaces the replicas one by one. Raises SetupError where the publisher's key cannot be read.
    """
    application = gateway_application(store, ledger, settings, replicas=replicas, num_cpus=num_cpus)
    serve.run(application, name=APPLICATION, route_prefix="/")


def remove_gateway() -> None:
    """Drain and stop the gateway; Serve goes on. Nothing happens where there is none.

    From the call on nobody is let in: `/v1/ready` and everything else answers 404 without a problem document, which
    clients take for a gateway that is restarting. Requests under way have `GRACE_S` to finish.
    """
    serve.delete(APPLICATION)
