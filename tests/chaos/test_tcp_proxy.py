"""The proxy that stands for a bad network: each fault as a client sees it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tcp_proxy import TcpProxy


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(link: socket.socket) -> None:
        with link:
            try:
                while data := link.recv(65536):
                    link.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(link,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()
    listener.close()


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[TcpProxy]:
    made = TcpProxy(lambda: echo, seed=3)
    yield made
    made.close()


def ask(proxy: TcpProxy, data: bytes, *, link: socket.socket | None = None, timeout_s: float = 5.0) -> bytes:
    """Send, and read as much again."""
    link = link or socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)
    link.settimeout(timeout_s)
    link.sendall(data)
    found = b""
    while len(found) < len(data) and (more := link.recv(65536)):
        found += more
    return found


def test_bytes_pass_unchanged_and_both_ways(proxy: TcpProxy) -> None:
    data = bytes(range(256)) * 2000
    assert ask(proxy, data) == data


def test_a_cut_refuses_and_ends_what_is_open_and_heals_on_the_same_port(proxy: TcpProxy) -> None:
    link = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    assert ask(proxy, b"a", link=link) == b"a"
    port = proxy.port
    proxy.cut()
    with pytest.raises(ConnectionError):
        ask(proxy, b"b", link=link)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    proxy.heal()
    assert proxy.port == port
    assert ask(proxy, b"c") == b"c"


def test_a_reset_comes_in_the_middle_of_an_answer(proxy: TcpProxy) -> None:
    proxy.reset(1.0)
    try:
        found = ask(proxy, b"x" * 1000)
    except ConnectionResetError:
        found = b""
    assert len(found) < 1000
    assert proxy.resets == 1


def test_a_slow_link_takes_its_time(proxy: TcpProxy) -> None:
    proxy.slow(20_000)
    began = time.monotonic()
    assert ask(proxy, b"x" * 4000) == b"x" * 4000
    assert time.monotonic() - began >= 2 * 4000 / 20_000 * 0.9


def test_a_silent_connection_stays_silent_after_it_healed_and_a_new_one_works(proxy: TcpProxy) -> None:
    link = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    assert ask(proxy, b"a", link=link) == b"a"
    proxy.silence()
    with pytest.raises(TimeoutError):
        ask(proxy, b"b", link=link, timeout_s=0.3)
    proxy.heal()
    with pytest.raises(TimeoutError):
        ask(proxy, b"c", link=link, timeout_s=0.3)
    assert ask(proxy, b"d") == b"d"
