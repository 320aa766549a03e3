"""The gateway without Ray, for benchmarks/load.py: on one uvicorn process, over the ledger and store of a server.

Standard input is JSON: `what` is "gateway" (the whole application), or "beat" (one route that runs the ledger's
heartbeat script and nothing else: no layers, no logs, no metrics), `port` where to listen, `access` the server's
server.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from coordinator.access import token_hash
from coordinator.ledger import Ledger
from coordinator.serving import replica_app
from rankup.logs import configure_server
from rankup.protocol import Heartbeat, HeartbeatAnswer
from rankup.settings import CoordinatorSettings, LedgerSettings
from rankup.signing import load_private_key, public_key_hex


def gateway(access: dict[str, Any]) -> Any:
    key_file = Path(access["publisher_key_file"])
    settings = CoordinatorSettings(organiser_token=access["organiser_token"], publisher_key_file=key_file)
    key = public_key_hex(load_private_key(key_file))
    configure_server("gateway")
    return replica_app(access["store"], access["ledger"], settings.to_wire(), key)


def beat(access: dict[str, Any]) -> Any:
    ledgers: list[Ledger] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ledgers.append(await Ledger.connect(LedgerSettings.from_wire(access["ledger"])))
        yield
        await ledgers.pop().close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/v1/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/leases/{lease_id}/heartbeat")
    async def heartbeat(lease_id: str, body: Heartbeat, request: Request) -> HeartbeatAnswer:
        token = request.headers["authorization"].removeprefix("Bearer ")
        taken = await ledgers[0].take_beat(token_hash(token), lease_id, body, time.time())
        assert taken is not None, "the lease is not well under way"
        return HeartbeatAnswer(go_on=True, heartbeat_s=60.0, expires_at=taken.expires_at)

    return app


def main() -> None:
    given = json.loads(sys.stdin.read())
    app = {"gateway": gateway, "beat": beat}[given["what"]](given["access"])
    uvicorn.run(app, host="127.0.0.1", port=given["port"], log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
