"""The report on a terminal or in a log: the ranks, the comparisons, and one verdict line at the end."""

from __future__ import annotations

from typing import Any

import msgspec

from distbench.case.profiles import NO_PROFILE, PROFILES
from distbench.case.spec import Case
from distbench.case.stages import Arm
from distbench.errors import Verdict, exit_meaning
from distbench.report.bandwidth import bandwidth_of
from distbench.report.findings import ErrorReport
from distbench.report.journal import Summary
from distbench.report.rank_table import rank_parts
from distbench.report.schema import InjectedReport, RateReport, Report, parts_label
from distbench.report.terminal import Grid, folded, print_parts, print_step, print_text, print_verdict
from distbench.utils.text import counted, numbers
from distbench.utils.voice import Voice, voice
from distbench.verify.records import NOT_PROVEN, ORACLE

_SHOWN_REASONS = 12
_SHOWN_TOKENS = 16
_KEPT_OF_SWEEP = ("limit", "rows", "safe", "verdict")
_INPUTS = {"both": "exact and gaussian", "exact": "exact", "gaussian": "gaussian"}


def print_report(report: Report) -> None:
    """Print the report to standard output, its verdict last; with --quiet the verdict alone, with -v every rank."""
    if voice() is not Voice.QUIET:
        print_parts(_parts(report, verbose=voice() is Voice.VERBOSE))
        print_verdict(f"verdict: {report.verdict.meaning}", report.exit_code)
    print_verdict(verdict_line(report), report.exit_code)


def print_start(case: Case) -> None:
    """Announce on standard error a case that is about to run."""
    print_step(f"starting {counted(case.ep_size, 'rank')}, {case.model}, {counted(sum(case.tokens), 'token')}")


def case_line(report: Report) -> str:
    """One plain line for a case of a suite."""
    surprise = "" if report.as_expected else f" (expected {report.expect})"
    return f"{report.verdict.value:<16} {report.timing['wall_s']:7.3f} s  {report.name}{surprise}"


def print_summary(summary: Summary, out: str) -> None:
    """Print the outcome of a suite, the verdict line last."""
    for case in summary.unexpected:
        print_text(f"unexpected: {case['verdict']:<16} {case['name']}")
    for event in summary.events:
        print_text(f"event: {event}")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(summary.verdicts.items()))
    if summary.rate is not None:
        print_text(_rate_line(summary.rate))
    if summary.limits:
        limits = ", ".join(f"{count} {status}" for status, count in sorted(summary.limits.items()))
        print_text(
            f"limits by case: {limits} (proven: for any routing of these token counts; this batch: for its own only)"
        )
    stopped = f"; stopped early: {summary.stopped}" if summary.stopped else ""
    print_text(
        f"{summary.finished} of {counted(summary.cases, 'case')} ({counts}), {summary.as_expected} as expected{stopped}"
    )
    ending = f"exit {summary.exit_code}, {exit_meaning(summary.exit_code)}"
    print_verdict(f"{ending}: results in {out}/results.jsonl and {out}/summary.json", summary.exit_code)


def print_sweep(rows: list[tuple[str, ...]], columns: tuple[str, ...], notes: list[str]) -> None:
    """Print the table of a sweep, and the notes to its figures unless the command is quiet."""
    print_parts([*folded(Grid(columns, rows), _KEPT_OF_SWEEP), *([] if voice() is Voice.QUIET else notes)])


def verdict_line(report: Report) -> str:
    """One line for the ending of a case, with its plugins, and `emulated` wherever a stand-in ran."""
    line = report.verdict.value + parts_label(report.plugins, report.stand_ins)
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
    return f"{' == '.join(arms)}, bit for bit, {counted(tokens, 'token')} on {counted(len(report.ranks), 'rank')}"


def _held(report: Report) -> str:
    """Evidence of a PASS: bits with exact inputs, errors with gaussian ones."""
    compared = report.comparison
    bits = _equality(report) if compared and all(comparison.equal for comparison in compared) else ""
    ratios = [error.ratio for error in report.errors if error.ratio is not None and error.ideal_worst]
    errors = ""
    if ratios:
        low, high = min(low for low, _ in ratios), max(high for _, high in ratios)
        errors = f"errors {low:.2f} to {high:.2f} of ideal"
    blind = f"{len(report.blind_spots)} blind spots of exact inputs (see warnings)" if report.blind_spots else ""
    return "; ".join(filter(None, (bits, errors, blind)))


def _parts(report: Report, *, verbose: bool) -> list[str | Grid]:
    parts: list[str | Grid] = [f"warning: {warning}" for warning in report.warnings]
    parts += [_injected_line(one) for one in report.injected]
    parts += _headlines(report)
    if report.ranks:
        halves = [_sub_batch_table(report)] if report.ranks[0].sub_batches else []
        parts += [*rank_parts(report.ranks, every=verbose), *halves, _comparison_table(report), *_caller_lines(report)]
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
        f"wrong tokens: {rate.wrong_tokens} of {rate.tokens} in {counted(rate.repeats, 'repeat')}, "
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
        f"top-{case['topk']}{_slots(case)}, EP{case['ep_size']}, {case['dispatch_dtype']}, "
        f"{_INPUTS[case['numerics']]} inputs, "
        f"routing {case['routing']}, {case['transport']} + {case['experts']}, case {case['hash'][:12]}"
    )
    return [text, *_profile_lines(report), *([] if limit is None else [str(limit)])]


def _slots(case: dict[str, Any]) -> str:
    """What the case has besides k routed slots of a token, and one slot of each expert; empty for nothing."""
    told = {"shared_experts": "{} shared", "physical_experts": "{} slots of them", "dropped_slots": "{:g} of slots -1"}
    told["dropped_tokens"] = "{:g} of tokens without experts"
    return "".join(f", {text.format(case[key])}" for key, text in told.items() if case.get(key))


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


def _sub_batch_table(report: Report) -> Grid:
    columns = ("rank", "sub-batch", "tokens", "total_recv", "M padded", "M truncated")
    rows = [
        (
            str(rank.rank),
            one.name,
            str(one.tokens),
            str(one.total_recv),
            str(one.rows[Arm.PADDED]),
            str(one.rows.get(Arm.TRUNCATED, "not run")),
        )
        for rank in report.ranks
        for one in rank.sub_batches
    ]
    return Grid(columns, rows, "two-batch overlap")


def _timing_table(report: Report) -> Grid:
    method = report.method
    columns = ("arm", "stage", "min", "median", "p99", "alg GB/s", "bus GB/s")
    timed = [
        (arm, stage, figures)
        for arm, stages in report.timing.items()
        if isinstance(stages, dict)
        for stage, figures in stages.items()
        if "median_error" in figures
    ]
    rows = [
        (
            *(arm, stage),
            *(f"{figures[key]:.1f}" for key in ("min_us", "median_us", "p99_us")),
            *_bandwidth_cells(report, stage, figures["median_us"]),
        )
        for arm, stage, figures in timed
    ]
    found = {figures["iterations"] for _, _, figures in timed}
    iterations = "1 iteration" if found == {1} else f"{numbers(found)} iterations"
    graph = ", experts in a CUDA graph" if method["graph"] is True else ""
    how = f"{method['clock']}; {method['align']} start, L2 {method['l2']}{graph}"
    return Grid(columns, rows, f"µs of the slowest rank in {iterations}; {how}")


def _bandwidth_cells(report: Report, stage: str, median_us: float) -> tuple[str, str]:
    found = bandwidth_of(report, stage, median_us)
    return found.cells() if found else ("", "")


def _comparison_table(report: Report) -> Grid:
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
    return Grid(columns, rows)


def _error_table(errors: list[ErrorReport]) -> Grid:
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
    return Grid(columns, rows)


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
