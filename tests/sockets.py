"""No test reaches the network: every connection is refused, but to this machine in a test marked `loopback`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any


class SocketForbidden(RuntimeError):
    """A test reached for the network. Not an OSError, so that no fall-back hides it."""


_loopback_allowed = False


@contextmanager
def loopback(allowed: bool) -> Iterator[None]:
    """Let connections to this machine through, or not, until the block ends."""
    global _loopback_allowed
    before, _loopback_allowed = _loopback_allowed, allowed
    try:
        yield
    finally:
        _loopback_allowed = before


def forbid() -> None:
    """Refuse every connection and look-up that Python makes in this process, from now on."""
    sys.addaudithook(_refuse)  # an audit hook sees them all, whoever holds the socket class


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if not isinstance(address, tuple):  # AF_UNIX has a path for an address: data loaders' workers use it
            return
        host = address[0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if _loopback_allowed and _is_loopback(host):
        return
    raise SocketForbidden(f"{event} to {host!r}: no test may open a socket (mark it `loopback` to reach this machine)")


def _is_loopback(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in ("localhost", "", None):
        return True
    try:
        return ip_address(str(name)).is_loopback
    except ValueError:
        return False
