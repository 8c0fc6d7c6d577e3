"""`distbench kernels`: the kernel for each number of rows, and the effect of a limit on it."""

from __future__ import annotations

import argparse
import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.spec import Case
from distbench.cli.argument_types import MOST_RANKS, plain_counts, whole
from distbench.cli.options import add_case_options, case_flags
from distbench.errors import InvalidCase
from distbench.report.terminal import Grid, folded, print_json, print_line, print_parts, print_table, print_text
from distbench.tools.kernel_map import NODE

if TYPE_CHECKING:
    from distbench.case.resolve import Layer
    from distbench.experts.selection.lookup import Lookup
    from distbench.tools.kernel_map import KernelMap, LimitEffect, Span

_WHERE_FROM = {
    NODE: " (this node's)",
    "default": " (assumed: this node has no ROCm device; --cu-count gives another number)",
}
_KEYS = (
    *("profile", "model", "hidden_size", "intermediate_size", "num_experts", "topk", "dispatch_dtype", "cu_count"),
    *("kernel_table", "aiter_version", "aiter_ksplit", "aiter_bypass_tune"),
    *("max_dispatch_tokens_per_rank", "prealloc_max_recv_tokens", "shared_experts", "physical_experts", "placement"),
)
_MOST_ROWS = 10**12 - 1
_NO_ANSWER = "no verdict: no tuned row for its kernel, and the library's own choice is unknown"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    from distbench.experts.selection.heuristics import ACTIVATIONS
    from distbench.experts.selection.lookup import QUANTS

    command = commands.add_parser(
        "kernels",
        description="Map row counts to aiter's kernels for one layer and device: by the tuned tables of the installed "
        "aiter, or --kernel-table, and by heuristics where they have no row.",
    )
    command.set_defaults(command=_kernels)
    ranks = whole(1, MOST_RANKS)
    command.add_argument("--ep-size", type=ranks, default=8, metavar="RANKS", help="ranks (default: %(default)s)")
    command.add_argument(
        "--limits", default="", metavar="ROWS,…", help="limits to examine (default: that of the environment)"
    )
    command.add_argument(
        "--quant",
        choices=tuple(QUANTS),
        metavar="NAME",
        help=f"quantisation to look up: {', '.join(QUANTS)} (default: the case's; `run` computes bf16 and fp8)",
    )
    command.add_argument("--activation", choices=tuple(ACTIVATIONS), default="silu", help="default: %(default)s")
    command.add_argument("--doweight-stage1", action="store_true", help="routing weights are applied in stage 1")
    command.add_argument(
        "--survey", metavar="DIR", help="print the share of rows that some key reaches, for each fmoe table of a folder"
    )
    command.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: %(default)s")
    add_case_options(command, _KEYS)


def _kernels(options: argparse.Namespace) -> int:
    from distbench.case.aiter_env import table_paths
    from distbench.case.environment import read_environment
    from distbench.case.resolve import resolve_case
    from distbench.experts import make_selector
    from distbench.experts.aiter.package import installed_release, installed_tables
    from distbench.experts.selection.choice import rules_for
    from distbench.experts.selection.releases import BUCKET_RULES
    from distbench.tools.kernel_map import limit_effects, map_kernels

    if options.survey:
        return _survey(options)
    flags = case_flags(options)
    environment = [layer for layer in read_environment(os.environ, flags) if not layer.unsupported]
    resolved = resolve_case([*flags, *environment, *_node()], options.ep_size)
    case = resolved.case
    release = case.aiter_version or installed_release()
    tables = table_paths(case.kernel_table) or installed_tables()
    rules, lookup = rules_for(release), _lookup(options, case)
    layer = make_selector(msgspec.structs.replace(case, kernel_table="")).layer
    layer = msgspec.structs.replace(layer, quant="bf16" if lookup.quant == "bf16" else "fp8") if lookup.quant else layer
    limits = _limits(plain_counts(options.limits) or (case.limit if case.limit.isdigit() else ""))
    named = release or f"{next(reversed(BUCKET_RULES))} or later"
    found = map_kernels(layer, named, rules, tables, case.capacity, lookup)
    found = msgspec.structs.replace(
        found,
        limits=limit_effects(layer, rules, tables, case.capacity, limits, lookup),
        cu_count_from=resolved.sources["cu_count"],
    )
    {"table": _print_tables, "json": print_json, "csv": _print_csv}[options.format](found)
    ignored = case.aiter_bypass_tune and rules.reads_overrides
    if lookup.explicit and not found.matched and not ignored:
        message = (
            f"kernel_table = {case.kernel_table}: no row for this key, so the table does not cover these kernels; "
            "give the table, --cu-count and --quant that belong to the layer"
        )
        raise InvalidCase(message)
    return 0


def _lookup(options: argparse.Namespace, case: Case) -> Lookup:
    from distbench.experts import overrides_of
    from distbench.experts.selection.lookup import Lookup

    return Lookup(
        quant=options.quant or "",
        activation=options.activation,
        doweight_stage1=options.doweight_stage1,
        overrides=overrides_of(case),
        explicit=bool(case.kernel_table),
    )


def _survey(options: argparse.Namespace) -> int:
    """Print the reach of each table of a folder, and the sum."""
    from distbench.experts.selection.choice import rules_for
    from distbench.tools.table_survey import survey_tables, total_of

    version = next(
        (layer.values["aiter_version"] for layer in case_flags(options) if "aiter_version" in layer.values), ""
    )
    found = survey_tables(Path(options.survey), rules_for(version))
    if not found:
        message = f"--survey {options.survey}: no tuned fmoe table (*fmoe*.csv) there; name a folder that has some"
        raise InvalidCase(message)
    if options.format == "json":
        print_json(found)
    else:
        rows = [one.cells() for one in (*found, total_of(found))]
        print_table(rows, ("table", "rows", "reached by kernels", "by run", "not reached", "refused"))
    return 2 if any(one.refused for one in found) else 0


def _node() -> list[Layer]:
    """Layers of this node's devices, where it has any."""
    from distbench.case.resolve import Layer
    from distbench.utils.devices import compute_units

    units = compute_units()
    return [] if units is None else [Layer(source=NODE, values={"cu_count": units})]


def _limits(text: str) -> list[int]:
    try:
        limits = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        message = f"--limits {text!r:.80}: allowed are numbers of rows from 1 up, such as 64,256"
        raise InvalidCase(message) from error
    if any(limit > _MOST_ROWS for limit in limits):
        message = f"--limits {text!r:.80}: give numbers of rows up to {_MOST_ROWS}"
        raise InvalidCase(message)
    if any(limit < 1 for limit in limits):
        message = f"--limits {text!r:.80}: production reads a limit below 1 as off; give numbers of rows from 1 up"
        raise InvalidCase(message)
    return limits


def _print_csv(found: KernelMap) -> None:
    from distbench.tools.kernel_map import Span

    text = io.StringIO()
    columns = [field.name for field in msgspec.structs.fields(Span)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(msgspec.to_builtins(span) for span in found.spans)
    for line in text.getvalue().splitlines():
        print_line(line)


def _print_tables(found: KernelMap) -> None:
    layer = found.layer
    told = _WHERE_FROM.get(found.cu_count_from, "")
    quant = found.lookup.quant or layer.quant
    print_text(
        f"aiter {found.release}, {layer.arch} with {layer.cu_count} compute units{told}, {quant}: model_dim "
        f"{layer.model_dim}, inter_dim {layer.inter_dim}, {layer.num_local_experts} local experts, top-k {layer.topk}"
    )
    for line in _table_lines(found):
        print_text(line)
    names: dict[str, str] = {}
    rows = [_cells(span, names) for span in found.spans]
    columns = ("rows", "bucket", "from", "stages", "block_m", "split-k", "kernels", "sum", "us", "a limit here")
    print_parts(folded(Grid(columns, rows), ("bucket", "a limit here")))
    for name, letter in names.items():
        print_text(f"{letter:>3}  {name}")
    print_text(f"The padded buffer has {found.padded} rows; a limit's effect is relative to its kernel.")
    for one in found.limits:
        print_text(_limit_line(one))


def _table_lines(found: KernelMap) -> list[str]:
    """Lines about the tables: the key, its matches, near misses, unreachable buckets, overrides."""
    from distbench.case.aiter_env import NOT_FOLLOWED

    key = msgspec.structs.asdict(found.key)
    told = ", ".join(f"{name} {value}" for name, value in key.items() if value is not None)
    lines = [f"tuned tables: {len(found.tables) or 'none, so heuristics only'}"]
    lines += [f"key looked up: {told}, token = the bucket"] if found.tables else []
    if found.tables and found.key.topk != found.layer.topk:
        lines.append("  topk: one less than the layer's, as aiter counts it with an expert_mask since 0.1.16")
    for table in found.matches:
        near = f"; nearest differs in {table.nearest}" if table.nearest else ""
        lines.append(f"{table.path}: {table.matching} of {table.rows} rows match{near}")
        if table.unreached:
            lines.append(f"  no number of rows leads to bucket {', '.join(map(str, table.unreached))} of them")
    if found.tables and not found.matched:
        answered = found.lookup.modelled and not found.lookup.explicit
        lines.append(f"no tuned row matches: {'heuristics decide' if answered else 'no verdict on any limit'}")
    overrides = found.lookup.overrides
    if overrides.bypass_tuned:
        lines.append("aiter_bypass_tune: tuned rows are ignored (since aiter 0.1.9)")
    if overrides.ksplit:
        lines.append(
            f"aiter_ksplit {overrides.ksplit}: not the table's and the heuristics' own split (since aiter 0.1.9)"
        )
    ignored = [
        f"{name}={os.environ[name]}" for name in NOT_FOLLOWED if os.environ.get(name, "").strip() not in ("", "0")
    ]
    if ignored:
        lines.append(f"not followed here, and aiter's choice may depend on it: {', '.join(ignored)}")
    return lines


def _cells(span: Span, names: dict[str, str]) -> tuple[str, ...]:
    from distbench.tools.kernel_map import UNKNOWN

    rows = str(span.first) if span.first == span.last else f"{span.first}-{span.last}"
    kernels = [names.setdefault(name, f"k{len(names) + 1}") for name in (span.stage1, span.stage2) if name]
    numbers = (str(span.bucket), span.source, str(span.stages), str(span.block_m), str(span.ksplit))
    time = "" if span.us is None else f"{span.us:.1f}"
    if span.source == UNKNOWN:
        return rows, str(span.bucket), "no row", "", "", "", "", "", "", UNKNOWN
    return rows, *numbers, " ".join(kernels), "ordered" if span.ordered else "atomic", time, span.limit_here


def _limit_line(one: LimitEffect) -> str:
    from distbench.tools.kernel_map import UNKNOWN

    if one.effect == UNKNOWN:
        return f"limit {one.limit}: bucket {one.bucket}, {_NO_ANSWER}"
    releases: dict[str, list[str]] = {}
    for release, effect in one.by_release.items():
        releases.setdefault(effect, []).append(release)
    told = "; ".join(
        f"{'no verdict' if effect == UNKNOWN else effect}: {_spans(names, list(one.by_release))}"
        for effect, names in releases.items()
    )
    return f"limit {one.limit}: bucket {one.bucket}, {one.effect}. By release: {told}"


def _spans(names: list[str], known: list[str]) -> str:
    """Runs of consecutive releases: `0.1.5 to before 0.1.8, 0.1.14 on`."""
    runs: list[str] = []
    for name in names:
        position = known.index(name)
        if position and known[position - 1] in names:
            continue
        end = next((later for later in known[position:] if later not in names), "")
        runs.append(f"{name} to before {end}" if end else f"{name} on")
    return ", ".join(runs)
