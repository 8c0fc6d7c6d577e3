"""`distbench doctor`: problems of this node, each with its fix."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from distbench.case.resolve import Layer
from distbench.cli.argument_types import MOST_RANKS, whole
from distbench.cli.options import add_case_options, case_flags
from distbench.errors import InvalidCase
from distbench.report.terminal import print_json, print_step, print_text, print_verdict

if TYPE_CHECKING:
    from distbench.tools.doctor.findings import Fact, Path
    from distbench.tools.doctor.probe import Node

_KEYS = (
    *("profile", "model", "hidden_size", "num_experts", "topk"),
    *("max_dispatch_tokens_per_rank", "prealloc_max_recv_tokens", "shared_experts", "physical_experts", "placement"),
    *("dispatch_dtype", "mori_kernel", "gpu_per_node", "combine_quant", "combine_input"),
)
_MORI = Layer("doctor", {"transport": "mori"})
"""Transport of the case, whatever --for says: variables that MoRI's path alone reads count for its findings."""
_WORDS = ("ready", "degraded", "not usable")
_COLOURED_AS = (0, 77, 1)
"""Exit codes of other commands whose colours the words have: green, yellow, red."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    from distbench.tools.doctor.findings import Path

    command = commands.add_parser(
        "doctor",
        description="Examine this node. Exit codes: 0 ready, 1 degraded, 2 not usable for the given path.",
    )
    command.set_defaults(command=_doctor)
    paths, ranks = get_args(Path), whole(1, MOST_RANKS)
    command.add_argument("--for", dest="path", choices=paths, help="intended use (default: the purpose of its torch)")
    command.add_argument("--json", action="store_true", help="findings as JSON")
    command.add_argument(
        "-n", "--nproc", type=ranks, default=8, metavar="RANKS", help="ranks on this node (default: %(default)s)"
    )
    command.add_argument(
        "--nodes", type=ranks, default=1, metavar="NODES", help="nodes together (default: %(default)s)"
    )
    command.add_argument("--block-num", type=whole(1), metavar="BLOCKS", help="of mori's kernels (default: the case's)")
    command.add_argument("--rdma-block-num", type=whole(1), metavar="BLOCKS", help="blocks among them for the network")
    add_case_options(command, _KEYS)


def _doctor(options: argparse.Namespace) -> int:
    print_step("doctor: looking at this node")
    from distbench.case.resolve import resolve_case
    from distbench.tools.doctor.checks import check_node
    from distbench.tools.doctor.findings import exit_code
    from distbench.tools.doctor.probe import probe
    from distbench.tools.doctor.vendors import Network

    node = probe()
    flags = case_flags(options)
    layers, complaint = _environment(flags)
    case = resolve_case([*flags, _MORI, *layers], options.nproc * options.nodes).case
    network = Network(nodes=options.nodes, block_num=options.block_num, rdma_block_num=options.rdma_block_num)
    findings = [*complaint, *check_node(node, case, network)]
    path = options.path or _usual(node)
    code = exit_code(findings, path)
    if options.json:
        document = {"for": path, "exit_code": code, "node": _recorded(node), "findings": findings}
        print_json(document)
        return code
    for finding in findings:
        if path in finding.paths:
            fix = f"; {finding.fix}" if finding.fix else ""
            print_text(f"{finding.level:<9} {finding.topic:<17} {finding.found}{fix}")
    print_verdict(f"{_WORDS[code]} for {path}", _COLOURED_AS[code])
    return code


def _usual(node: Node) -> Path:
    return "mori" if node.flavour == "rocm" else "cuda" if node.devices else "cpu"


def _environment(flags: list[Layer]) -> tuple[list[Layer], list[Fact]]:
    """Layers of the environment for a case, and findings about values that cannot be run."""
    from distbench.case.environment import read_environment

    try:
        layers = read_environment(os.environ, flags)
    except InvalidCase as error:
        return [], [_complaint(str(error))]
    return [one for one in layers if not one.unsupported], [
        _complaint(one.unsupported) for one in layers if one.unsupported
    ]


def _complaint(found: str) -> Fact:
    from distbench.tools.doctor.findings import Fact

    return Fact(topic="environment", level="missing", found=found, fix="correct or unset it")


def _recorded(node: Node) -> dict[str, Any]:
    """Facts without the environment, which may hold anything."""
    facts: dict[str, Any] = msgspec.to_builtins(node)
    return {name: value for name, value in facts.items() if name != "environ"}
