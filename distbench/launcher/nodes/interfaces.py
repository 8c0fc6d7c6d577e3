"""Network interfaces of gloo and NCCL: those that the variables select, and the one that reaches another node.

For launch scripts `python -m distbench.launcher.nodes.interfaces HOST PORT` prints NAME=VALUE for each variable that
gloo and NCCL should have, and a summary on standard error.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from distbench.errors import InvalidCase
from distbench.utils.text import shown

_SIOCGIFADDR = 0x8915
_ADDRESSES_V6 = Path("/proc/net/if_inet6")
_GLOO, _NCCL = VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine on every node, so that all nodes are on it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    return host == "localhost"


def interface_names() -> tuple[str, ...]:
    """Names of the interfaces that have an address, in the kernel's order."""
    with_v6 = {name for _, name in _addresses_v6()}
    return tuple(name for _, name in socket.if_nameindex() if _address_v4(name) or name in with_v6)


def interface_complaints(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Complaint about each invalid variable that is set; `names` are the interfaces with an address."""
    complaints = {}
    for variable in VARIABLES:
        value = environ.get(variable, "")
        found = (_gloo_complaint if variable == _GLOO else _nccl_complaint)(value, names) if value else ""
        if found:
            there = ", ".join(names) or "none"
            complaints[variable] = (
                f"{variable}={shown(value)}: {found}; interfaces with an address here: {there}; unset it to have one "
                "chosen, or name one of them"
            )
    return complaints


def check_interfaces(*, accelerated: bool, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse variables that name no interface of this node; NCCL's only where cases may be `accelerated`.

    Raises:
        InvalidCase: names the variable, its value, and the interfaces that there are.

    """
    complaints = interface_complaints(environ, interface_names())
    wrong = [told for variable, told in complaints.items() if accelerated or variable == _GLOO]
    if wrong:
        raise InvalidCase("; ".join(wrong))


def nccl_selection(value: str, names: Sequence[str]) -> list[str]:
    """Interfaces that a value of NCCL_SOCKET_IFNAME selects: prefixes, after `=` whole names, after `^` all others.

    Source: NCCL's documentation of the variable; `^` and `=` stand once, before the whole list.
    """
    exclude, listed = value.startswith("^"), value.removeprefix("^")
    exact, listed = listed.startswith("="), listed.removeprefix("=")
    wanted = [part.partition(":")[0] for part in listed.split(",") if part]

    def held(name: str) -> bool:
        return any(name == one if exact else name.startswith(one) for one in wanted)

    return [name for name in names if held(name) != exclude]


def _gloo_complaint(value: str, names: Sequence[str]) -> str:
    """Complaint about gloo's variable: whole names, separated by commas; each rank fails at a missing one."""
    absent = [name for name in value.split(",") if name not in names]
    if not absent:
        return ""
    return f"gloo takes names as they are, and there is no {', '.join(shown(name) for name in absent)}"


def _nccl_complaint(value: str, names: Sequence[str]) -> str:
    return "" if nccl_selection(value, names) else "NCCL finds no interface by it"


def choose_loopback(environ: MutableMapping[str, str] = os.environ) -> str:
    """Restrict gloo and NCCL to loopback, unless the user chose; return the choice in words."""
    name = _interface_of("127.0.0.1")
    return _choose(name, environ)


def choose_interfaces(host: str, port: int, environ: MutableMapping[str, str] = os.environ) -> str:
    """Select the interface towards `host` for gloo and NCCL, unless the user chose; return the outcome in words.

    Selects loopback only where `host` says that all nodes are on this machine: a name that merely resolves to a
    loopback address here is reported, and nothing is selected.
    """
    if is_loopback(host):
        return choose_loopback(environ)
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        address = str(source_address(family, where)[0]).partition("%")[0]
    except OSError as error:
        return f"no interface found for {host}: {error}; gloo and NCCL choose"
    if ipaddress.ip_address(address).is_loopback:
        return (
            f"{host} is {address} on this node, which other machines do not reach; gloo and NCCL choose; "
            "name node 0 by an address that all nodes reach"
        )
    return _choose(_interface_of(address), environ)


def _choose(name: str, environ: MutableMapping[str, str]) -> str:
    for variable in VARIABLES if name else ():
        environ[variable] = environ.get(variable) or name
    return ", ".join(f"{variable}={environ.get(variable) or '(its own choice)'}" for variable in VARIABLES)


def source_address(family: int, where: tuple[Any, ...]) -> tuple[Any, ...]:
    """Socket address from which this node reaches another one.

    Raises:
        OSError: no route leads there.

    """
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # sends nothing
        address: tuple[Any, ...] = probe.getsockname()
        return address


def _interface_of(address: str) -> str:
    """Name of the interface that has `address`; empty where unknown."""
    if ":" in address:
        wanted = ipaddress.IPv6Address(address).packed.hex()
        return next((name for found, name in _addresses_v6() if found == wanted), "")
    return next((name for _, name in socket.if_nameindex() if _address_v4(name) == address), "")


def _address_v4(name: str) -> str:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        content = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(content[20:24])
    return ""


def _addresses_v6() -> list[tuple[str, str]]:
    """Addresses, as hexadecimal digits, with the names of their interfaces."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in _ADDRESSES_V6.read_text().splitlines())
        return [(found, name) for found, *_, name in lines]
    return []


def main() -> None:
    """Print the variables for a launch script."""
    import sys  # noqa: PLC0415

    environ = dict(os.environ)
    sys.stderr.write(
        f"distbench: {socket.gethostname()}: {choose_interfaces(sys.argv[1], int(sys.argv[2]), environ)}\n"
    )
    for variable in VARIABLES:
        if environ.get(variable):
            sys.stdout.write(f"{variable}={environ[variable]}\n")


if __name__ == "__main__":
    main()
