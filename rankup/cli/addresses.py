"""Addresses of a server: what this machine calls it, and what other machines can call it.

No packet is sent and no name is looked up, so it works without a network; where the machine has no way out, its host
name must do.
"""

from __future__ import annotations

import ipaddress
import socket

_ANYWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses that exist in documents only (RFC 5737, RFC 3849)."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    address = _parsed(host)
    return address.is_loopback if address is not None else host == "localhost"


def local_url(host: str, port: int) -> str:
    """The address for commands on this machine."""
    address = _parsed(host)
    if address is not None and address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return _url(host, port)


def shared_url(host: str, port: int) -> str:
    """The address for other machines, as far as this machine can know it."""
    address = _parsed(host)
    if address is not None and address.is_unspecified:
        host = _outgoing(either=address.version == 6) or socket.gethostname()
    return _url(host, port)


def _outgoing(*, either: bool) -> str | None:
    """The address that this machine's packets carry on their way out."""
    for family, target in _ANYWHERE if either else _ANYWHERE[:1]:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))  # A datagram socket only looks up the route.
                found = str(probe.getsockname()[0])
        except OSError:
            continue
        if not is_loopback(found):
            return found
    return None


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
