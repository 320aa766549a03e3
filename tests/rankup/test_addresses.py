"""Addresses of a server, as this machine and as others call it."""

from __future__ import annotations

import socket

import pytest

from rankup.cli import addresses
from rankup.cli.addresses import is_loopback, local_url, shared_url


@pytest.mark.parametrize(
    ("host", "loopback", "local"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:8420"),
        ("localhost", True, "http://localhost:8420"),
        ("::1", True, "http://[::1]:8420"),
        ("0.0.0.0", False, "http://127.0.0.1:8420"),  # noqa: S104
        ("::", False, "http://[::1]:8420"),
        ("10.1.2.3", False, "http://10.1.2.3:8420"),
        ("rankup.example.org", False, "http://rankup.example.org:8420"),
    ],
)
def test_commands_on_this_machine_get_an_address_that_the_server_listens_on(
    host: str, loopback: bool, local: str
) -> None:
    assert is_loopback(host) is loopback
    assert local_url(host, 8420) == local


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104
def test_others_get_an_address_that_is_not_loopback_even_without_a_network(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_route(*_: object) -> None:
        raise OSError("Network is unreachable")

    assert not is_loopback(shared_url(host, 80).removeprefix("http://").rpartition(":")[0].strip("[]"))
    monkeypatch.setattr(addresses.socket, "socket", no_route)
    assert shared_url(host, 80) == f"http://{socket.gethostname()}:80"


def test_a_host_that_was_named_stays() -> None:
    assert shared_url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert shared_url("fd00::2", 80) == "http://[fd00::2]:80"
