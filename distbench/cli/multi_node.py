"""A launch over several nodes: its options, and node 0's connections to the other nodes."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.cli.argument_types import LEAST_SECONDS, MOST_RANKS, seconds, whole
from distbench.cli.launcher_tasks import refuse_tasks
from distbench.cli.torchrun_rank import world_size
from distbench.errors import InvalidCase, Verdict

if TYPE_CHECKING:
    from distbench.launcher.job import NodeLayout
    from distbench.launcher.nodes.leader import Leader

_LOCAL_RANKS = 8
_PORTS = 65536
_REFUSED = "refused.log"
_ENDPOINT = re.compile(r"(?:\[(?P<v6>[^\s\[\]]+)\]|(?P<host>[^\s:\[\]]+)):(?P<port>\d{1,5})", re.ASCII)


def add_nodes(command: Any) -> None:
    """Add the options of a launch over several nodes."""
    from distbench.launcher.nodes.secret import VARIABLE

    group = command.group("nodes", "several nodes: the same command on each node, with its own --node-rank")
    nodes, node = whole(1, MOST_RANKS), whole(0, MOST_RANKS - 1)
    group.add_argument("--nnodes", type=nodes, metavar="NODES", help="nodes, with --nproc ranks on each (default: 1)")
    group.add_argument("--node-rank", type=node, metavar="NODE", default=0, help="this node; node 0 has the results")
    group.add_argument("--rdzv-endpoint", metavar="HOST:PORT", default="", help="an address of node 0, and a free port")
    group.add_argument(
        "--secret-file", metavar="FILE", default="", help=f"the launch's secret, mode 0600 (default: {VARIABLE})"
    )
    group.add_argument(
        "--join-timeout",
        type=seconds(LEAST_SECONDS),
        metavar="SECONDS",
        default=600.0,
        help="time to wait for nodes (default: %(default)s)",
    )


def nodes_of(options: argparse.Namespace) -> int:
    """Number of nodes that the options request.

    Raises:
        InvalidCase: none is requested, and a launcher started this process as one of several tasks.

    """
    if not hasattr(options, "nnodes"):
        return 1
    if options.nnodes is None and world_size() is None:
        refuse_tasks()
    return options.nnodes or 1


def layout_of(options: argparse.Namespace) -> NodeLayout | None:
    """Launch over several nodes, from the options; None for one node.

    Raises:
        InvalidCase: invalid values.

    """
    from distbench.launcher.job import NodeLayout

    nodes, node = nodes_of(options), getattr(options, "node_rank", 0)
    if nodes == 1 and node == 0:
        return None
    if node >= nodes:
        message = f"--nnodes {nodes} --node-rank {node}: node ranks go from 0 to nodes - 1"
        raise InvalidCase(message)
    host, port = _endpoint(options.rdzv_endpoint)
    if world_size() is not None:
        message = "--nnodes: torchrun started this process already; leave --nnodes out under torchrun"
        raise InvalidCase(message)
    nproc = options.nproc or _LOCAL_RANKS
    return NodeLayout(nodes=nodes, node=node, nproc=nproc, host=host, port=port, launch=0)


def _endpoint(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets."""
    found = _ENDPOINT.fullmatch(text)
    port = int(found["port"]) if found else 0
    if found is None or not 0 < port < _PORTS:
        message = (
            f"--rdzv-endpoint {text!r:.80}: give HOST:PORT or [IPV6]:PORT, an address of node 0 and a free port there"
        )
        raise InvalidCase(message)
    return found["host"] or found["v6"], port


class Nodes(msgspec.Struct):
    """The other nodes of a launch, as node 0 sees them, and the common exit code."""

    leader: Leader | None
    exit_code: int = Verdict.RANK_FAULT.exit_code


@contextlib.contextmanager
def other_nodes(options: argparse.Namespace) -> Iterator[Nodes]:
    """Let the other nodes of the launch join, if there are any; they are released when the context ends.

    Raises:
        InvalidCase: node 0's port is taken, or there is no secret.

    """
    from distbench.launcher.nodes.leader import Leader
    from distbench.launcher.nodes.secret import read_secret

    layout = layout_of(options)
    nodes = Nodes(None)
    if layout is not None:
        secret = read_secret(layout.host, options.secret_file)
        nodes.leader = Leader(layout, options.join_timeout, secret, Path(options.out) / _REFUSED)
    try:
        yield nodes
    finally:
        if nodes.leader is not None:
            nodes.leader.close(nodes.exit_code)
