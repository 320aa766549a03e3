"""A TCP proxy in a thread of this process that does to connections what networks do: resets, delays, cuts, silence.

What always holds: bytes that pass are passed unchanged and in order; a fault holds from the call on until `heal`, for
new connections and for those under way. `silence` also stays with a connection that it met: its two ends stay open and
nothing passes any more, as behind a router that has forgotten them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any

CHUNK_BYTES = 16 * 1024


class TcpProxy:
    """Listens on 127.0.0.1; `target` says where to connect to, anew for every connection."""

    def __init__(self, target: Callable[[], tuple[str, int]], *, seed: int = 0) -> None:
        self._target = target
        self._rng = random.Random(seed)
        self._reset_share = 0.0
        self._bytes_per_s: float | None = None
        self._silent = False
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.resets = 0
        """Connections that were reset."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._thread.start()
        self.port = 0
        self._do(self._listen())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- faults --------------------------------------------------------------------------------------------------------

    def reset(self, share: float) -> None:
        """Reset a connection in the middle of this share of all reads."""
        self._reset_share = share

    def slow(self, bytes_per_s: float) -> None:
        """Pass at most this much, in each direction of each connection."""
        self._bytes_per_s = bytes_per_s

    def cut(self) -> None:
        """Reset everything that is open, and refuse to connect."""
        self._do(self._stop_listening())

    def silence(self) -> None:
        """Let every connection, also a new one, stay open without a byte passing."""
        self._silent = True

    def heal(self) -> None:
        """Pass everything again."""
        self._reset_share, self._bytes_per_s, self._silent = 0.0, None, False
        self._do(self._listen())

    def close(self) -> None:
        """End it, with everything that is open."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            _reset(writer)

    async def _end(self) -> None:
        await self._stop_listening()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = [writer]
        self._open.add(writer)
        try:
            onward, back = await asyncio.open_connection(*self._target())
            pair.append(back)
            self._open.add(back)
            await asyncio.gather(self._pump(reader, back, pair), self._pump(onward, writer, pair))
        except (OSError, asyncio.CancelledError):
            _reset(writer)
        finally:
            for each in pair:
                self._open.discard(each)
                each.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, pair: list[asyncio.StreamWriter]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                if self._silent:
                    await asyncio.Event().wait()  # Until the proxy ends.
                if self._rng.random() < self._reset_share:
                    sink.write(data[: len(data) // 2])
                    self.resets += 1
                    for each in pair:
                        _reset(each)
                    return
                if self._bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self._bytes_per_s)
                sink.write(data)
                await sink.drain()
            sink.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: what a crashed or impatient network does."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
