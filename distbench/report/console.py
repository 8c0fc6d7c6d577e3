"""The report on a terminal or in a log: the ranks, the comparisons, and one verdict line at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.profiles import NO_PROFILE, PROFILES
from distbench.case.spec import Case
from distbench.case.stages import Arm
from distbench.errors import Verdict
from distbench.report.findings import ErrorReport
from distbench.report.journal import Summary
from distbench.report.schema import InjectedReport, RankReport, RateReport, Report
from distbench.utils.streams import speaks_all
from distbench.utils.text import printable
from distbench.verify.records import NOT_PROVEN, ORACLE

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_SHOWN_REASONS = 12
_SHOWN_TOKENS = 16
_LOG_WIDTH = 140
_INPUTS = {"both": "exact and gaussian", "exact": "exact", "gaussian": "gaussian"}


def print_report(report: Report) -> None:
    """Print the whole report to standard output, its verdict last."""
    console = _console()
    for part in _parts(report):
        console.print(printable(part) if isinstance(part, str) else part, markup=False)
    style = "bold green" if report.verdict is Verdict.PASS else "bold red"
    console.print(printable(verdict_line(report)), style=style, markup=False, soft_wrap=True)


def print_line(text: str) -> None:
    """Print one line to standard output at once; non-printable characters are escaped."""
    print(printable(text), flush=True)


def print_json(document: Any) -> None:
    """Print a document to standard output as JSON, escaped so that no terminal acts on it and any encoding has it."""
    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    any_character = speaks_all(sys.stdout)
    kept = (one == "\n" or (one.isprintable() and (any_character or one.isascii())) for one in text)
    print("".join(one if keep else json.dumps(one)[1:-1] for one, keep in zip(text, kept, strict=True)), flush=True)


def print_start(case: Case) -> None:
    """Announce on standard error a case that is about to run."""
    print_note(f"starting {case.ep_size} ranks, {case.model}, {sum(case.tokens)} tokens")


def print_note(text: str) -> None:
    """Report progress on standard error."""
    print(printable(f"distbench: {text}"), file=sys.stderr, flush=True)


def print_error(ending: str, message: str) -> None:
    """Print one line to standard error: the ending of the run, and its cause."""
    print(printable(f"distbench: {ending}: {message}"), file=sys.stderr, flush=True)


def case_line(report: Report) -> str:
    """One plain line for a case of a suite."""
    surprise = "" if report.as_expected else f" (expected {report.expect})"
    return f"{report.verdict.value:<16} {report.timing['wall_s']:7.3f} s  {report.name}{surprise}"


def print_summary(summary: Summary, out: str) -> None:
    """Print the outcome of a suite, the verdict line last."""
    for case in summary.unexpected:
        print_line(f"unexpected: {case['verdict']:<16} {case['name']}")
    for event in summary.events:
        print_line(f"event: {event}")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(summary.verdicts.items()))
    if summary.rate is not None:
        print_line(_rate_line(summary.rate))
    if summary.limits:
        limits = ", ".join(f"{count} {status}" for status, count in sorted(summary.limits.items()))
        print_line(
            f"limits by case: {limits} (proven: for any routing of these token counts; this batch: for its own only)"
        )
    stopped = f"; stopped early: {summary.stopped}" if summary.stopped else ""
    print_line(f"{summary.finished} of {summary.cases} cases ({counts}), {summary.as_expected} as expected{stopped}")
    print_line(f"exit {summary.exit_code}: results in {out}/results.jsonl and {out}/summary.json")


def print_sweep(rows: list[tuple[str, ...]], columns: tuple[str, ...], notes: list[str]) -> None:
    """Print the table of limits, and the notes to its figures."""
    console = _console()
    console.print(_table("", columns, rows))
    for note in notes:
        console.print(printable(note), markup=False)


def print_table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...]) -> None:
    """Print a table to standard output; non-printable characters are escaped."""
    _console().print(_table("", columns, rows))


def verdict_line(report: Report) -> str:
    """One line for the ending of a case, with `emulated` wherever a stand-in ran."""
    line = report.verdict.value
    if report.emulated:
        line += f" (emulated: {', '.join(report.stand_ins)})"
    if report.injected:
        line += f" (INJECTED FAULT: {report.case['inject']})"
    proven = [reason for reason in report.reasons if reason.code != NOT_PROVEN]
    findings = [reason.message for reason in proven]
    held = _held(report) if report.verdict is Verdict.PASS else ""
    if held:
        findings.insert(0, held)
    if findings:
        line += ": " + findings[0] + (f" (+{len(findings) - 1} more)" if len(findings) > 1 else "")
    if len(proven) < len(report.reasons):
        line += "; not proven for other routings"
    return line


def _equality(report: Report) -> str:
    compared = {arm for comparison in report.comparison for arm in comparison.arms}
    arms = [arm for arm in (*reversed(Arm), ORACLE) if arm in compared]
    tokens = report.comparison[0].tokens
    return f"{' == '.join(arms)}, bit for bit, {tokens} tokens on {len(report.ranks)} ranks"


def _held(report: Report) -> str:
    """Evidence of a PASS: bits with exact inputs, errors with gaussian ones."""
    compared = report.comparison
    bits = _equality(report) if compared and all(comparison.equal for comparison in compared) else ""
    ratios = [error.ratio for error in report.errors if error.ratio is not None]
    errors = ""
    if ratios:
        low, high = min(low for low, _ in ratios), max(high for _, high in ratios)
        errors = f"errors {low:.2f} to {high:.2f} of ideal"
    blind = f"{len(report.blind_spots)} blind spots of exact inputs (see warnings)" if report.blind_spots else ""
    return "; ".join(filter(None, (bits, errors, blind)))


def _parts(report: Report) -> list[RenderableType]:
    parts: list[RenderableType] = [f"warning: {warning}" for warning in report.warnings]
    parts += [_injected_line(one) for one in report.injected]
    parts += _headlines(report)
    if report.ranks:
        parts += [_rank_table(report), _comparison_table(report), *_caller_lines(report)]
    if report.errors:
        parts += [_error_table(report.errors), *_families(report.errors)]
    if report.method:
        parts.append(_timing_table(report))
    if report.lost.rows:
        parts.append(_lost_line(report))
    if len(report.reasons) > 1 or report.verdict is Verdict.PASS:
        parts += [f"- {reason.message}" for reason in report.reasons[:_SHOWN_REASONS]]
    if report.rate is not None and (report.rate.wrong_tokens or report.rate.repeats > 1):
        parts.append(_rate_line(report.rate))
    parts += [f"diagnosis: {found.cause} ({found.confidence}): {found.evidence}" for found in report.diagnosis]
    return parts


def _caller_lines(report: Report) -> list[str]:
    """The line of the caller's code, where the case has a caller."""
    caller = report.caller
    if isinstance(caller, msgspec.UnsetType):
        return []
    rows = ", ".join(sorted(set(map(str, caller.rows.values())), key=int))
    unlike = ", ".join(f"{name} = {theirs}, here {ours}" for name, (theirs, ours) in caller.arguments.items())
    text = f"production: {caller.package} {caller.version}, SHA-256 {caller.sha256[:12]}, M = {rows}"
    return [f"{text}; arguments of fused_moe unlike distbench's: {unlike or 'none'}"]


def _injected_line(one: InjectedReport) -> str:
    options = ", ".join(f"{key} {value}" for key, value in one.options.items()) or "defaults"
    hits = ", ".join(f"{count} times on rank {rank}" for rank, count in one.hits.items())
    nothing = f"changed nothing: it needs {one.needs}" if one.needs else "the number of hits is unknown"
    return f"INJECTED FAULT, not a finding about this machine: {one.name} ({options}): {hits or nothing}"


def _rate_line(rate: RateReport) -> str:
    return (
        f"wrong tokens: {rate.wrong_tokens} of {rate.tokens} in {rate.repeats} repeats, "
        f"{_figure(rate.per_million)} per million, 95 % CI {_figure(rate.low_per_million)} to "
        f"{_figure(rate.high_per_million)}"
    )


def _figure(value: float) -> str:
    """A number with three significant digits, and commas between thousands."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _headlines(report: Report) -> list[str]:
    case = report.case
    limit = report.limit
    text = (
        f"{case['model']} H{case['hidden_size']} I{case['intermediate_size']} E{case['num_experts']} "
        f"top-{case['topk']}, EP{case['ep_size']}, {case['dispatch_dtype']}, {_INPUTS[case['numerics']]} inputs, "
        f"routing {case['routing']}, {case['transport']} + {case['experts']}, case {case['hash'][:12]}"
    )
    return [text, *_profile_lines(report), *([] if limit is None else [str(limit)])]


def _profile_lines(report: Report) -> list[str]:
    """The keys that the case's profile set, and those of its keys that something else set; nothing without one."""
    name = report.case.get("profile", NO_PROFILE)
    if name == NO_PROFILE:
        return []
    own = [key for key, source in report.sources.items() if source == f"profile:{name}"]
    known = PROFILES[name].values if name in PROFILES else {}
    others = [f"{key} ({report.sources[key]})" for key in known if key in report.sources and key not in own]
    text = f"profile {name}, defaults: {', '.join(f'{key} {_shown(report.case[key])}' for key in own)}"
    return [f"{text}; not its own: {', '.join(others)}" if others else text]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _rank_table(report: Report) -> Table:
    columns = (
        "rank",
        "host",
        "device",
        "tokens",
        "total_recv",
        "capacity",
        "limit",
        f"kernel padded → truncated ({OTHER_CODE}: other code)",
        "lost rows",
    )
    return _table("", columns, [_rank_row(rank) for rank in report.ranks])


def _rank_row(rank: RankReport) -> tuple[str, ...]:
    limit = "off" if rank.limit is None else str(rank.limit)
    counts = (rank.tokens, rank.total_recv, rank.capacity)
    return (
        str(rank.rank),
        rank.host,
        rank.device,
        *map(str, counts),
        limit,
        _kernels(rank.kernels[Arm.PADDED], rank.kernels.get(Arm.TRUNCATED)),
        str(rank.lost_rows),
    )


def _kernels(padded: dict[str, Any], truncated: dict[str, Any] | None) -> str:
    return f"{padded['label']} → {label_beside(truncated, padded) if truncated else 'not run'}"


def _timing_table(report: Report) -> Table:
    method = report.method
    columns = ("µs of the slowest rank", "stage", "min", "median", "p99", "iterations")
    rows = [
        (arm, stage, *(f"{figures[key]:.1f}" for key in ("min_us", "median_us", "p99_us")), str(figures["iterations"]))
        for arm, stages in report.timing.items()
        if isinstance(stages, dict)
        for stage, figures in stages.items()
        if "median_error" in figures
    ]
    graph = ", experts in a CUDA graph" if method["graph"] else ""
    return _table(f"{method['clock']}; {method['align']} start, L2 {method['l2']}{graph}", columns, rows)


def _comparison_table(report: Report) -> Table:
    columns = ("comparison", "equal", "tokens", "differing tokens", "differing elements", "max ulp")
    rows = [
        (
            " / ".join(comparison.arms),
            "yes" if comparison.equal else "NO",
            str(comparison.tokens),
            str(comparison.differing_tokens),
            str(comparison.differing_elements),
            str(comparison.max_ulp),
        )
        for comparison in report.comparison
    ]
    return _table("", columns, rows)


def _error_table(errors: list[ErrorReport]) -> Table:
    columns = ("error of", "stage", "rows", "of ideal", "allowed", "bias", "worst (ideal)", "within")
    rows = [
        (
            error.arm,
            error.stage,
            str(error.rows),
            "NaN" if error.ratio is None else f"{error.ratio[0]:.3f} to {error.ratio[1]:.3f}",
            f"{error.allowed.get('ratio_low', 0):.3f} to {error.allowed.get('ratio_high', 0):.3f}",
            "NaN" if error.bias is None else f"{error.bias:.1f}",
            f"{'NaN' if error.worst is None else f'{error.worst:.4f}'} ({error.ideal_worst:.4f})",
            "yes" if error.within else "NO",
        )
        for error in errors
    ]
    return _table("", columns, rows)


def _families(errors: list[ErrorReport]) -> list[str]:
    """Roundings of the ideal, each with the arms that are measured against it."""
    arms: dict[str, dict[str, None]] = {}
    for error in errors:
        arms.setdefault(error.family, {})[error.arm] = None
    return [f"ideal of {', '.join(of)}: {family}" for family, of in arms.items()]


def _lost_line(report: Report) -> str:
    tokens = [f"{rank}:{token}" for rank, token in report.lost.tokens[:_SHOWN_TOKENS]]
    more = " …" if len(report.lost.tokens) > _SHOWN_TOKENS else ""
    ranks = ", ".join(f"rank {rank}: {rows}" for rank, rows in report.lost.by_rank.items())
    return f"rows at or past the limit: {report.lost.rows} ({ranks}); source rank:token {' '.join(tokens)}{more}"


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)) if title else None, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _console() -> Console:
    """Console on standard output. A broken pipe is left to the CLI: rich would exit with 1."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)


OTHER_CODE = "*"


def label_beside(kernel: dict[str, Any], padded: dict[str, Any]) -> str:
    """Label of a kernel, marked where the padded kernel has the same label but other code."""
    other = any(kernel[stage] != padded[stage] for stage in ("stage1", "stage2"))
    label: str = kernel["label"]
    return label + OTHER_CODE * (other and label == padded["label"])
