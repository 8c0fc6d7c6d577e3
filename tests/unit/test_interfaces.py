"""Which interface a launch takes where a name leads nowhere else; tests/cluster has it on real interfaces."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from distbench.nodes.interfaces import choose_interfaces
from tests.hosts import ROOT

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1"])
def test_a_loopback_interface_is_never_chosen(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(family, socket.SOCK_DGRAM, 17, "", (address, 29500))]

    def resolve(host: str, *_: Any, **__: Any) -> Any:
        return found if host == "node0" else []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    environ: dict[str, str] = {}
    told = choose_interfaces("node0", 29500, environ)
    assert environ == {}
    source = "127.0.0.1" if family == socket.AF_INET else "::1"
    assert told.startswith(f"node0 is {source} on this node, which other machines do not reach")
    assert "name node 0 by an address that all nodes reach" in told


def test_a_name_that_nobody_knows_is_said() -> None:
    environ: dict[str, str] = {}
    assert "no interface found for no.such.host.invalid" in choose_interfaces("no.such.host.invalid", 1, environ)
    assert environ == {}


def test_a_launch_script_gets_what_was_chosen_before() -> None:
    given = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "distbench.nodes.interfaces", "localhost", "29500"]
    chosen = given | {"GLOO_SOCKET_IFNAME": "ib0"}
    for environ, printed in ((given, ""), (chosen, "GLOO_SOCKET_IFNAME=ib0\n")):
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == printed
        assert "localhost is " in done.stderr
