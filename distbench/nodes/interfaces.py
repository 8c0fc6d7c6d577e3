"""The network interface by which a node reaches another.

For launch scripts `python -m distbench.nodes.interfaces HOST PORT` prints NAME=VALUE for each variable that gloo and
NCCL should have, and says on standard error what was found.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import MutableMapping
from pathlib import Path

_SIOCGIFADDR = 0x8915
_ADDRESSES_V6 = Path("/proc/net/if_inet6")
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def choose_interfaces(host: str, port: int, environ: MutableMapping[str, str] = os.environ) -> str:
    """Have gloo and NCCL use the interface towards `host`, where nobody has chosen; return what was found, in words.

    Never a loopback interface, which leads to no other node: a name that stands for one is told, and no choice made.
    """
    try:
        address = _source_address(host, port)
    except OSError as error:
        return f"no interface found for {host}: {error}; gloo and NCCL choose"
    if ipaddress.ip_address(address).is_loopback:
        return (
            f"{host} is {address} on this node, which other machines do not reach; gloo and NCCL choose; "
            "name node 0 by an address that all nodes reach"
        )
    name = _interface_of(address)
    for variable in _VARIABLES if name else ():
        environ.setdefault(variable, name)
    return ", ".join(f"{variable}={environ.get(variable, '(its own choice)')}" for variable in _VARIABLES)


def _source_address(host: str, port: int) -> str:
    """Return the address from which this node reaches `host`.

    Raises:
        OSError: the name does not resolve, or no route leads there.

    """
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing
        address: str = probe.getsockname()[0]
        return address.partition("%")[0]


def _interface_of(address: str) -> str:
    """Return the name of the interface that has `address`, or empty where nothing tells."""
    return _interface_v6(address) if ":" in address else _interface_v4(address)


def _interface_v4(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                content = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(content[20:24]) == address:
                    return name
    return ""


def _interface_v6(address: str) -> str:
    wanted = ipaddress.IPv6Address(address).packed.hex()
    with contextlib.suppress(OSError):
        for line in _ADDRESSES_V6.read_text().splitlines():
            found, *_, name = line.split()
            if found == wanted:
                return name
    return ""


def main() -> None:
    """Print the variables for a launch script."""
    import sys  # noqa: PLC0415

    environ = dict(os.environ)
    sys.stderr.write(
        f"distbench: {socket.gethostname()}: {choose_interfaces(sys.argv[1], int(sys.argv[2]), environ)}\n"
    )
    for variable in _VARIABLES:
        if variable in environ:
            sys.stdout.write(f"{variable}={environ[variable]}\n")


if __name__ == "__main__":
    main()
