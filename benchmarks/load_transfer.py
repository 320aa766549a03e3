"""Part "transfer" of benchmarks/load.py: bytes through the gateway (`transfer` is "proxied") beside presigned URLs.

One large blob is read and one large delta is written, by one client and by four at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable

import aiohttp
from load_part import Scale, megabytes
from load_processes import Watch
from load_server import Server, whole_server
from results import Part, Say

from coordinator.tickets import Ticket, TicketSigner
from rankup.settings import StoreSettings
from rankup.store import Store, blob_key, open_store, put_blob
from rankup.versions import upload_key

TIMES = 4
"""What each client reads or writes, one after the other."""
PIECE = 2**20


def transfer(scale: Scale, say: Say) -> Part:
    part = Part("Bytes through the gateway")
    table = part.table(
        f"{scale.transfer_bytes / 2**20:.0f} MiB at a time",
        *("way", "clients", "MB/s", "gateway CPU s/GB", "proxy CPU s/GB", "SeaweedFS CPU s/GB", "gateway peak RSS MB"),
    )
    with whole_server(scale.scratch / "transfer", {"RANKUP_COORDINATOR_TRANSFER": "proxied"}) as server:
        store = open_store(StoreSettings.from_wire(server.access["store"]))
        data = secrets.token_bytes(scale.transfer_bytes)
        bench = _Bench(server, store, data)
        for way, act in (
            ("read, presigned", bench.read_straight),
            ("read, through the gateway", bench.read_proxied),
            ("write, presigned", bench.write_straight),
            ("write, through the gateway", bench.write_proxied),
        ):
            for clients in (1, 4):
                say(f"{way}, {clients} clients")
                with Watch(server.pid) as watch:
                    seconds = asyncio.run(bench.all_at(act, clients))
                moved = clients * TIMES * len(data)
                cpu = {role: use.cpu_s * 1e9 / moved for role, use in watch.uses.items()}
                proxy = cpu.get("Serve proxy", 0.0) + cpu.get("HAProxy", 0.0)
                replica = watch.uses["gateway replica"]
                table.row(
                    way,
                    str(clients),
                    megabytes(moved / seconds),
                    f"{cpu['gateway replica']:.2f}",
                    f"{proxy:.2f}",
                    f"{cpu['SeaweedFS']:.2f}",
                    megabytes(replica.peak_bytes),
                )
    part.notes.append(
        "The clients are one Python process on the same machine, which hashes nothing and keeps nothing. Object "
        "storage writes to a disk; through the gateway a delta is spooled to a file and hashed first."
    )
    return part


class _Bench:
    def __init__(self, server: Server, store: Store, data: bytes) -> None:
        self._server = server
        self._store = store
        self._data = data
        self._sha256 = hashlib.sha256(data).hexdigest()
        self._signer = TicketSigner(server.access["organiser_token"])
        put_blob(store, data)

    async def all_at(self, act: Callable[[aiohttp.ClientSession], Awaitable[None]], clients: int) -> float:
        start = time.perf_counter()

        async def client() -> None:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
                for _ in range(TIMES):
                    await act(http)

        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - start

    async def read_straight(self, http: aiohttp.ClientSession) -> None:
        await self._read(http, self._store.presign_get(blob_key(self._sha256)))

    async def read_proxied(self, http: aiohttp.ClientSession) -> None:
        await self._read(http, f"{self._server.url}/v1/blobs/{self._sha256}")

    async def write_straight(self, http: aiohttp.ClientSession) -> None:
        key = upload_key(f"l-{secrets.token_hex(8)}", self._sha256)
        put = self._store.presign_put(key, size_bytes=len(self._data), sha256=self._sha256)
        await self._write(http, put.url, put.headers)

    async def write_proxied(self, http: aiohttp.ClientSession) -> None:
        expires = int(time.time()) + 3600
        ticket = Ticket(f"l-{secrets.token_hex(8)}", self._sha256, len(self._data), expires)
        await self._write(http, f"{self._server.url}/{self._signer.address(ticket)}", {})

    async def _read(self, http: aiohttp.ClientSession, url: str) -> None:
        got = 0
        async with http.get(url) as answer:
            answer.raise_for_status()
            async for piece in answer.content.iter_chunked(PIECE):
                got += len(piece)
        assert got == len(self._data), "the blob came short"

    async def _write(self, http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> None:
        async with http.put(url, data=self._data, headers=headers) as answer:
            answer.raise_for_status()
