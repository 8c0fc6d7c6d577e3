"""The network interface by which a node reaches another."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import MutableMapping

_SIOCGIFADDR = 0x8915
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_to(host: str, port: int) -> str:
    """Return the name of the interface on which `host` is reached, or empty where this cannot be told (IPv6).

    Raises:
        OSError: the name does not resolve, or no route leads there.

    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                content = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(content[20:24]) == address:
                    return name
    return ""


def choose_interfaces(host: str, port: int, environ: MutableMapping[str, str] = os.environ) -> str:
    """Have gloo and NCCL use the interface towards `host`, where nobody has chosen; return what was found, in words."""
    try:
        name = interface_to(host, port)
    except OSError as error:
        return f"no interface found for {host}: {error}; gloo and NCCL choose"
    for variable in _VARIABLES if name else ():
        environ.setdefault(variable, name)
    return ", ".join(f"{variable}={environ.get(variable, '(its own choice)')}" for variable in _VARIABLES)


def main() -> None:
    """Print the interface towards the host that is the only argument; for launch scripts."""
    import sys  # noqa: PLC0415

    sys.stdout.write(interface_to(sys.argv[1], 1) + "\n")


if __name__ == "__main__":
    main()
