"""`distbench trace`: recorded routing: its contents, and conversion of what other programs record."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.cli.argument_types import MOST_RANKS, whole
from distbench.errors import InvalidCase

_MOST_EXPERTS = 1 << 17


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "trace",
        description="info: show what a recorded routing has. convert: make one of SGLang's per_token recordings (.pt, "
        "one of each rank), or of experts as .npy, .safetensors, .csv or .jsonl.",
    )
    command.set_defaults(command=_trace)
    command.add_argument("action", choices=("info", "convert"), metavar="ACTION", help="info or convert")
    command.add_argument("files", metavar="FILE", nargs="+", help="the trace, or the recordings")
    command.add_argument("--out", metavar="FILE", default="", help="convert: the trace to write, .safetensors")
    command.add_argument(
        "--ep-size", type=whole(1, MOST_RANKS), default=8, metavar="RANKS", help="(default: %(default)s)"
    )
    command.add_argument("--num-experts", type=whole(1, _MOST_EXPERTS), metavar="N", help="convert: routed experts")


def _trace(options: argparse.Namespace) -> int:
    if options.action == "convert":
        return _convert(options)
    for path in options.files:
        _show(path)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from distbench.tools.recorded.convert import convert
    from distbench.workload.trace_file import write_trace

    if not options.out.endswith(".safetensors") or options.num_experts is None:
        message = "trace convert: give --out FILE.safetensors and --num-experts N, the routed experts of the recording"
        raise InvalidCase(message)
    if options.out in options.files:
        message = f"--out {options.out}: is read as well; name another file"
        raise InvalidCase(message)
    header, slices = convert(options.files, options.num_experts, options.ep_size)
    write_trace(options.out, header, slices)
    _show(options.out)
    return 0


def _show(path: str) -> None:
    from distbench.report.terminal import print_table, print_text
    from distbench.workload.trace_file import read_header, read_slice

    header = read_header(path)
    layers = sorted({layer for known in header.steps.values() for layer in known})
    print_text(
        f"{path}: {header.num_experts} experts, top-{header.topk}, {header.ep_size} ranks; {len(header.steps)} steps, "
        f"{len(layers)} layers ({layers[0]} to {layers[-1]}); from {header.source or 'no file named'}"
    )
    rows = []
    for step in list(header.steps)[:_SHOWN_STEPS]:
        slices = [(layer, read_slice(header, step, layer)) for layer in header.steps[step]]
        even = header.num_experts % header.ep_size == 0
        most = max(((int(one.received(header.num_experts).max()), layer) for layer, one in slices), default=(0, 0))
        tokens = slices[0][1].tokens
        told = (str(most[0]), str(most[1])) if even else ("", "")
        rows.append((str(step), str(int(tokens.sum())), str(int(tokens.max())), *told))
    print_table(rows, ("step", "tokens", "most of a rank", "fullest total_recv", "in layer"))


_SHOWN_STEPS = 8
