"""Sockets on which other nodes reach node 0, restricted to their addresses where these are known."""

from __future__ import annotations

import errno
import socket
from typing import Any

from distbench.errors import InvalidCase
from distbench.launcher.job import NodeLayout
from distbench.launcher.nodes.interfaces import is_loopback, source_address

_WAITING = 1024
_TAKEN = (errno.EADDRINUSE, errno.EACCES)
# An address family that this node lacks, or an address without a route.
_NOT_HERE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH)


def listen(layout: NodeLayout, port: int | None = None) -> list[socket.socket]:
    """Listen on the addresses of the endpoint's host; port 0 takes a free one, None the endpoint's.

    Where such an address is not this node's own, as behind NAT, the socket listens on the source address towards it. A
    name that resolves to loopback here, as Debian sets it up, does not show where peers come from: then it listens on
    all addresses.

    Raises:
        InvalidCase: the host has no address here, or the port is taken.

    """
    port = layout.port if port is None else port
    try:
        found = {
            (family, where[0], *where[2:])
            for family, _, _, _, where in socket.getaddrinfo(layout.host, layout.port, type=socket.SOCK_STREAM)
        }
        if not is_loopback(layout.host) and any(is_loopback(str(host)) for _, host, *_ in found):
            return [_listen_everywhere(port)]
        return _listen_on(found, port)
    except OSError as error:
        fix = "another port" if error.errno in _TAKEN else "an address of node 0"
        message = f"--rdzv-endpoint {layout.endpoint}: {error.strerror or error} on node 0; use {fix}"
        raise InvalidCase(message) from error


def _listen_on(found: set[tuple[Any, ...]], port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    failure: OSError | None = None
    for family, host, *more in sorted(found, key=str):
        try:
            listeners.append(_listen(family, (host, port, *more)))
        except OSError as error:  # noqa: PERF203 - one or two
            if error.errno not in _NOT_HERE:
                raise
            failure = error
    if not listeners and failure is not None:
        raise failure
    return listeners


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            source = source_address(family, (address[0], 1, *address[2:]))
            listener.bind((source[0], address[1], *source[2:]))
        listener.listen(_WAITING)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=_WAITING, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=_WAITING)
