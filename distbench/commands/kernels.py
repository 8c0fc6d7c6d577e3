"""`distbench kernels`: which kernel each number of rows selects, and what a limit changes by that."""

from __future__ import annotations

import argparse
import csv
import io
import os
from typing import Any

import msgspec

from distbench.commands.numbers import MOST_RANKS, whole
from distbench.commands.options import add_case_options, case_flags
from distbench.devices import compute_units
from distbench.errors import InvalidCase
from distbench.experts import make_selector
from distbench.experts.aiter.package import installed_release, installed_tables
from distbench.experts.rules import BUCKET_RULES
from distbench.experts.selection import rules_for
from distbench.kernel_map import NODE, KernelMap, LimitEffect, Span, limit_effects, map_kernels
from distbench.production import read_environment
from distbench.report.console import print_line, print_table
from distbench.resolve import Layer, resolve_case

_WHERE_FROM = {
    NODE: " (this node's)",
    "default": " (assumed: this node has no ROCm device; --cu-count gives another number)",
}
_KEYS = (
    *("model", "hidden_size", "intermediate_size", "num_experts", "topk", "dispatch_dtype", "cu_count"),
    *("kernel_table", "aiter_version", "max_dispatch_tokens_per_rank", "prealloc_max_recv_tokens"),
)


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "kernels",
        help="which kernel each number of rows selects",
        description="Map row counts to aiter's kernels for one layer and device: by the tuned tables of the installed "
        "aiter, or --kernel-table, and by heuristics where they have no row.",
    )
    command.set_defaults(command=_kernels)
    ranks = whole(1, MOST_RANKS)
    command.add_argument("--ep-size", type=ranks, default=8, metavar="W", help="ranks (default: %(default)s)")
    command.add_argument(
        "--limits", default="", metavar="L,…", help="limits to look at (default: that of the environment)"
    )
    command.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: %(default)s")
    add_case_options(command, _KEYS)


def _kernels(options: argparse.Namespace) -> int:
    environment = read_environment(os.environ)
    resolved = resolve_case([*case_flags(options), *environment, *_node()], options.ep_size)
    case = resolved.case
    release = case.aiter_version or installed_release()
    tables = [case.kernel_table] if case.kernel_table else installed_tables()
    layer, rules = make_selector(case).layer, rules_for(release)
    limits = _limits(options.limits or (case.limit if case.limit.isdigit() else ""))
    found = map_kernels(layer, release or f"{next(reversed(BUCKET_RULES))} or later", rules, tables, case.capacity)
    found = msgspec.structs.replace(
        found,
        limits=limit_effects(layer, rules, tables, case.capacity, limits),
        cu_count_from=resolved.sources["cu_count"],
    )
    {"table": _print_tables, "json": _print_json, "csv": _print_csv}[options.format](found)
    return 0


def _node() -> list[Layer]:
    """Return what this node's devices say of the case, where it has any."""
    units = compute_units()
    return [] if units is None else [Layer(source=NODE, values={"cu_count": units})]


def _limits(text: str) -> list[int]:
    try:
        limits = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        message = f"--limits {text!r:.80}: allowed are numbers of rows from 1 up, such as 64,256"
        raise InvalidCase(message) from error
    if any(limit < 1 for limit in limits):
        message = f"--limits {text!r:.80}: production reads a limit below 1 as off; give numbers of rows from 1 up"
        raise InvalidCase(message)
    return limits


def _print_json(found: KernelMap) -> None:
    print_line(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


def _print_csv(found: KernelMap) -> None:
    text = io.StringIO()
    columns = [field.name for field in msgspec.structs.fields(Span)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(msgspec.to_builtins(span) for span in found.spans)
    print_line(text.getvalue().rstrip("\n"))


def _print_tables(found: KernelMap) -> None:
    layer = found.layer
    told = _WHERE_FROM.get(found.cu_count_from, "")
    print_line(
        f"aiter {found.release}, {layer.arch} with {layer.cu_count} compute units{told}, {layer.quant}: model_dim "
        f"{layer.model_dim}, inter_dim {layer.inter_dim}, {layer.num_local_experts} local experts, top-k {layer.topk}"
    )
    print_line(f"tuned tables: {', '.join(found.tables) or 'none, so heuristics only'}")
    names: dict[str, str] = {}
    rows = [_cells(span, names) for span in found.spans]
    columns = ("rows", "bucket", "from", "stages", "block_m", "split-k", "kernels", "sum", "us", "a limit here")
    print_table(rows, columns)
    for name, letter in names.items():
        print_line(f"{letter:>3}  {name}")
    print_line(f"The padded buffer has {found.padded} rows; what a limit does is told against its kernel.")
    for one in found.limits:
        print_line(_limit_line(one))


def _cells(span: Span, names: dict[str, str]) -> tuple[str, ...]:
    rows = str(span.first) if span.first == span.last else f"{span.first}-{span.last}"
    kernels = [names.setdefault(name, f"k{len(names) + 1}") for name in (span.stage1, span.stage2) if name]
    numbers = (str(span.bucket), span.source, str(span.stages), str(span.block_m), str(span.ksplit))
    time = "" if span.us is None else f"{span.us:.1f}"
    return rows, *numbers, " ".join(kernels), "ordered" if span.ordered else "atomic", time, span.limit_here


def _limit_line(one: LimitEffect) -> str:
    releases: dict[str, list[str]] = {}
    for release, effect in one.by_release.items():
        releases.setdefault(effect, []).append(release)
    told = "; ".join(f"{effect}: {_spans(names, list(one.by_release))}" for effect, names in releases.items())
    return f"limit {one.limit}: bucket {one.bucket}, {one.effect}. By release: {told}"


def _spans(names: list[str], known: list[str]) -> str:
    """Return runs of consecutive releases: `0.1.5 to before 0.1.8, 0.1.14 on`."""
    runs: list[str] = []
    for name in names:
        position = known.index(name)
        if position and known[position - 1] in names:
            continue
        end = next((later for later in known[position:] if later not in names), "")
        runs.append(f"{name} to before {end}" if end else f"{name} on")
    return ", ".join(runs)
