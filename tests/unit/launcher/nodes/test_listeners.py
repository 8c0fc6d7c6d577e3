"""Addresses on which node 0 listens: those of the endpoint only, wherever they can be resolved."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest

from distbench.errors import InvalidCase
from distbench.launcher.job import NodeLayout
from distbench.launcher.nodes.listeners import listen


def addresses(host: str, port: int = 0) -> list[str]:
    layout = NodeLayout(nodes=2, node=0, nproc=1, host=host, port=29500, launch=0)
    with contextlib.ExitStack() as stack:
        listeners = listen(layout, port)
        for listener in listeners:
            stack.callback(listener.close)
        return [listener.getsockname()[0] for listener in listeners]


def resolve_to(monkeypatch: pytest.MonkeyPatch, *found: tuple[int, str]) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        del host
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "::1"])
def test_loopback_endpoint_is_the_only_listening_address(host: str) -> None:
    assert addresses(host) == [host]


def test_host_name_of_this_machine_listens_on_its_own_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distbench.launcher.nodes.listeners.is_loopback", lambda _: False)  # as if it were on a network
    resolve_to(monkeypatch, (socket.AF_INET, "127.0.3.1"), (socket.AF_INET, "127.0.3.1"))
    assert addresses("node0") == ["127.0.3.1"]


def test_host_name_that_resolves_to_loopback_listens_on_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, (socket.AF_INET, "127.0.1.1"))
    assert addresses("node0") in (["::"], ["0.0.0.0"])  # noqa: S104 - what is looked for


def test_translated_address_listens_on_its_source_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distbench.launcher.nodes.listeners.source_address", lambda *_: ("127.0.3.2", 0))
    resolve_to(monkeypatch, (socket.AF_INET, "203.0.113.77"))
    assert addresses("node0") == ["127.0.3.2"]


def test_unavailable_address_family_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, (socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "203.0.113.77"))
    monkeypatch.setattr("distbench.launcher.nodes.listeners.source_address", lambda family, _: no_route(family))
    assert addresses("node0") == ["127.0.0.1"]


def no_route(family: int) -> tuple[Any, ...]:
    if family == socket.AF_INET6:
        raise OSError(101, "Network is unreachable")
    return ("127.0.0.1", 0)


def test_unresolvable_endpoint_host_is_refused() -> None:
    with pytest.raises(InvalidCase, match="on node 0; use an address of node 0"):
        addresses("no.such.host.invalid")


def test_occupied_port_is_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(InvalidCase, match="Address already in use on node 0; use another port"),
    ):
        addresses("127.0.0.1", other.getsockname()[1])
