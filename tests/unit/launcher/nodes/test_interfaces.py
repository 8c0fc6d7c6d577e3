"""Choice of the network interface of a launch; tests/cluster tests it on real interfaces."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from distbench.cli import torchrun_rank
from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.launcher.job import Job
from distbench.launcher.nodes.interfaces import (
    check_interfaces,
    choose_interfaces,
    choose_loopback,
    interface_complaints,
    interface_names,
    is_loopback,
    nccl_selection,
)
from tests.hosts import ROOT

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1"])
def test_loopback_interface_is_never_chosen_for_several_nodes(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
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


def test_unresolvable_host_name_is_reported_and_no_interface_is_set() -> None:
    environ: dict[str, str] = {}
    assert "no interface found for no.such.host.invalid" in choose_interfaces("no.such.host.invalid", 1, environ)
    assert environ == {}


def test_interface_that_the_user_set_is_kept_by_the_launch_script() -> None:
    given = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "distbench.launcher.nodes.interfaces", "127.0.0.1", "29500"]
    chosen = given | {"GLOO_SOCKET_IFNAME": "ib0"}
    for environ, gloo in ((given, "lo"), (chosen, "ib0")):
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == f"GLOO_SOCKET_IFNAME={gloo}\nNCCL_SOCKET_IFNAME=lo\n"


NAMES = ("lo", "eth0", "eth1", "ib0", "docker0")


@pytest.mark.parametrize(
    ("value", "selected"),
    [
        ("eth", ["eth0", "eth1"]),
        ("eth0,ib", ["eth0", "ib0"]),
        ("=eth", []),
        ("=eth0,ib0", ["eth0", "ib0"]),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["lo", "eth1", "ib0", "docker0"]),
        ("bond", []),
        ("eth1:4000", ["eth1"]),
        ("^lo,eth,ib,docker", []),
    ],
)
def test_nccl_socket_ifname_syntax_is_parsed(value: str, selected: list[str]) -> None:
    assert nccl_selection(value, NAMES) == selected
    assert ("NCCL_SOCKET_IFNAME" in interface_complaints({"NCCL_SOCKET_IFNAME": value}, NAMES)) == (not selected)


@pytest.mark.parametrize(
    ("value", "absent"),
    [("eth9", "'eth9'"), ("eth", "'eth'"), ("eth0,eth9", "'eth9'"), ("^docker,lo", "'^docker'"), ("=eth0", "'=eth0'")],
)
def test_gloo_socket_ifname_that_is_no_interface_is_refused(value: str, absent: str) -> None:
    told = interface_complaints({"GLOO_SOCKET_IFNAME": value}, NAMES)["GLOO_SOCKET_IFNAME"]
    assert f"there is no {absent}" in told
    assert "interfaces with an address here: lo, eth0, eth1, ib0, docker0; unset it to have one chosen, or" in told
    assert "ranks of one host" not in told  # several nodes read it too


@pytest.mark.parametrize("value", ["eth0", "eth0,ib0", ""])
def test_gloo_socket_ifname_with_existing_interfaces_is_accepted(value: str) -> None:
    assert interface_complaints({"GLOO_SOCKET_IFNAME": value}, NAMES) == {}


def test_nccl_socket_ifname_is_checked_on_accelerators_only() -> None:
    check_interfaces(accelerated=False, environ={"NCCL_SOCKET_IFNAME": "eth9"})
    with pytest.raises(InvalidCase, match="NCCL_SOCKET_IFNAME='eth9': NCCL finds no interface by it"):
        check_interfaces(accelerated=True, environ={"NCCL_SOCKET_IFNAME": "eth9"})


def test_loopback_of_this_machine_is_chosen_and_user_values_are_kept() -> None:
    assert "lo" in interface_names()
    environ = {"NCCL_SOCKET_IFNAME": "eth0"}
    assert choose_loopback(environ) == "GLOO_SOCKET_IFNAME=lo, NCCL_SOCKET_IFNAME=eth0"
    assert environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize(("nodes", "chosen"), [("1", "lo"), ("2", None)])
def test_ranks_that_torchrun_started_on_one_node_keep_to_loopback(
    monkeypatch: pytest.MonkeyPatch, nodes: str, chosen: str | None
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "GROUP_WORLD_SIZE": nodes}.items():
        monkeypatch.setenv(name, value)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and again after the test
    monkeypatch.setattr(torchrun_rank, "_all_held", lambda *_, **__: nullcontext())
    with torchrun_rank.hold_as_rank(Job(entries=(), out="", supervised=False), 0.0):
        assert [os.environ.get(name) for name in VARIABLES] == [chosen] * len(VARIABLES)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("localhost", True),
        ("node0", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback_hosts_are_recognised_by_address(host: str, here: bool) -> None:
    assert is_loopback(host) == here


@pytest.mark.parametrize("command", [["run", "--model", "tiny"], ["suite", "smoke"]])
def test_missing_interface_is_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    assert main([*command, "--nproc", "2", "--num-experts", "8", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "INVALID: GLOO_SOCKET_IFNAME='eth9': gloo takes names as they are, and there is no 'eth9'" in told
    assert "interfaces with an address here: lo" in told
