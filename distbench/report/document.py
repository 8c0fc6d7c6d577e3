"""`report.json`: one document per run, the same keys in every version of one schema (docs/report-format.md)."""

from __future__ import annotations

import statistics
from collections import Counter
from datetime import datetime, timezone
from typing import Any

import msgspec

from distbench.case.entry import Entry
from distbench.case.expectations import is_met
from distbench.case.identity import case_hash, case_values
from distbench.case.injection import Injection, is_brought, parse_inject
from distbench.case.spec import Case
from distbench.errors import InvalidCase
from distbench.experts.coverage import blind_spots_of
from distbench.report.differences import differing_report
from distbench.report.environment import Environment
from distbench.report.findings import codes_behind, error_reports, finding_reports
from distbench.report.limit import limit_report
from distbench.report.schema import (
    CallerReport,
    ComparisonReport,
    InjectedReport,
    LostReport,
    RankReport,
    RateReport,
    Report,
)
from distbench.utils.stats import Rate, median_error, percentile
from distbench.verify.diagnosis import lost_tokens
from distbench.verify.records import (
    LISTED_TOKENS,
    Gathered,
    Observation,
    Outcome,
    ResolvedCase,
    RowComparison,
)
from distbench.workload.routing_spec import recorded_notes
from distbench.workload.version import INPUTS_VERSION

_MILLION = 1e6
ENDED = "%Y-%m-%dT%H:%M:%SZ"
DEVICE_CLOCK = "device events"
_RAW_KEPT = 512
_DOUBTS_SHOWN = 16
KEPT_SAMPLES = 1000
"""Iterations of a stage, the last ones, whose raw times the report keeps."""


def build_report(entry: Entry, outcome: Outcome, *, environment: Environment, wall_s: float) -> Report:
    """The document of an outcome; `wall_s` is the time of the case on rank 0, in seconds."""
    gathered, resolved = outcome.gathered, outcome.resolved
    records = gathered.observations if gathered else []
    verdict = outcome.judgement.verdict
    limit = limit_report(resolved, entry.sources) if resolved else None
    findings = finding_reports(outcome.judgement)
    codes = codes_behind(verdict, findings, outcome.judgement.reasons)
    blind = _blind_spots(outcome.case)
    measured = gathered.gaussian.observations if gathered and gathered.gaussian else []
    return Report(
        inputs_version=INPUTS_VERSION,
        suite=entry.suite,
        name=entry.name,
        tags=entry.tags,
        verdict=verdict,
        exit_code=verdict.exit_code,
        expect=entry.expect,
        as_expected=is_met(entry.expect, verdict, codes, safe=limit is None or limit.safe, policy=entry.case.policy),
        reasons=outcome.judgement.reasons,
        findings=findings,
        blind_spots=blind,
        emulated=bool(outcome.case.stand_ins),
        stand_ins=outcome.case.stand_ins,
        plugins=outcome.case.plugins,
        case=case_values(outcome.case) | {"hash": case_hash(outcome.case)},
        sources=entry.sources,
        warnings=[
            *entry.warnings,
            *(f"exact inputs are blind here: {spot}" for spot in blind),
            *_recorded(outcome.case),
            *_doubts(records, shared=outcome.case.share_devices),
            *kernel_doubts(records),
        ],
        limit=limit,
        environment=environment,
        transport=records[0].transport if records else {},
        ranks=[_rank(record) for record in records],
        comparison=_comparisons(gathered, outcome.case) if gathered else [],
        errors=error_reports(measured or records),
        gather=gathered.mode if gathered else None,
        lost=_lost(gathered),
        first_divergence=outcome.judgement.first_divergence,
        diagnosis=outcome.diagnosis,
        stacks=outcome.stacks,
        injected=_injected(outcome.case, [*records, *measured]),
        rate=_rate(records),
        timing=_timing(records) | {"wall_s": wall_s},
        ended=datetime.now(timezone.utc).strftime(ENDED),
        method=_method(resolved, records) if resolved and any(record.timed for record in records) else {},
        memory=_memory(gathered) if gathered else {},
        sent=outcome.sent,
        differing=differing_report(gathered, outcome.case) if gathered else None,
        caller=_caller(records),
    )


def _rank(record: Observation) -> RankReport:
    return RankReport(
        rank=record.rank,
        host=record.host,
        device=record.device,
        tokens=record.tokens,
        total_recv=record.total_recv,
        capacity=record.capacity,
        limit=record.limit,
        lost_rows=record.lost.rows,
        kernels=record.kernels,
        digests=record.digests,
        peak_bytes=record.peak_bytes,
        packages=record.packages,
        layer_us={arm: timed.layer_us[:_RAW_KEPT] for arm, timed in record.timed.items()},
        device_state=record.device_state,
        replays=record.replays,
        layer_graphs=record.layer_graphs,
        sub_batches=record.sub_batches,
    )


def _comparisons(gathered: Gathered, case: Case) -> list[ComparisonReport]:
    return [_comparison(pair, found, sum(case.tokens)) for pair, found in gathered.comparisons.items()]


def _comparison(pair: str, found: RowComparison, tokens: int) -> ComparisonReport:
    first, second = pair.split("/")
    return ComparisonReport(
        arms=(first, second),
        equal=found.equal,
        tokens=tokens,
        differing_tokens=found.differing_tokens,
        differing_elements=found.differing_elements,
        max_ulp=found.max_ulp,
    )


def _lost(gathered: Gathered | None) -> LostReport:
    if gathered is None:
        return LostReport(rows=0, tokens=[], by_rank={})
    by_rank = {str(record.rank): record.lost.rows for record in gathered.observations if record.lost.rows}
    return LostReport(rows=sum(by_rank.values()), tokens=lost_tokens(gathered)[:LISTED_TOKENS], by_rank=by_rank)


def _injected(case: Case, records: list[Observation]) -> list[InjectedReport]:
    return [_injected_one(place, one, records) for place, one in enumerate(parse_inject(case.inject))]


def _injected_one(place: int, one: Injection, records: list[Observation]) -> InjectedReport:
    counted: Counter[str] = Counter()
    for record in records:
        counted[str(record.rank)] += record.injected.get(str(place), 0)
    hits = {rank: count for rank, count in counted.items() if count}
    needs, stage = "", ""
    if records and (not hits or is_brought(one.name)):
        from distbench.faults.injector import fault_kind, is_plugin  # noqa: PLC0415 - nothing of it is loaded where no fault is asked for

        kind = fault_kind(one)
        needs, stage = "" if hits else kind.wanted(one), str(kind.stage) if is_plugin(one) else ""
    said = [rules for record in records if (rules := record.accepted.get(str(place)))]
    accepted = {rule: all(rules[rule] for rules in said) for rule in (said[0] if said else ())}
    return InjectedReport(name=one.name, options=one.options, hits=hits, needs=needs, accepted=accepted, stage=stage)


def _caller(records: list[Observation]) -> CallerReport | msgspec.UnsetType:
    uses = {record.rank: record.caller for record in records if record.caller is not None}
    if not uses:
        return msgspec.UNSET
    arguments: dict[str, tuple[str, str]] = {}
    for use in uses.values():
        arguments = use.differing | arguments
    rows = {str(rank): use.rows for rank, use in uses.items()}
    return CallerReport(**msgspec.structs.asdict(next(iter(uses.values())).text), rows=rows, arguments=arguments)


def _rate(records: list[Observation]) -> RateReport | None:
    tokens, wrong = (sum(getattr(record.token_counts, name) for record in records) for name in ("tokens", "wrong"))
    return rate_report(wrong, tokens, records[0].token_counts.repeats if records else 0)


def rate_report(wrong: int, tokens: int, repeats: int) -> RateReport | None:
    """Rate of wrong results of tokens; None where none was examined."""
    if not tokens:
        return None
    rate = Rate(wrong, tokens)
    return RateReport(
        repeats=repeats,
        tokens=tokens,
        wrong_tokens=wrong,
        per_million=wrong / tokens * _MILLION,
        low_per_million=rate.low * _MILLION,
        high_per_million=rate.high * _MILLION,
    )


def _timing(records: list[Observation]) -> dict[str, Any]:
    """Figures of each arm and stage: of the timed iterations where there are some, else of the checked passes.

    Timed: statistics over iterations of the slowest rank's time in each. Checked: the slowest rank's value of each
    rank's own statistic over its repeats.
    """
    timing: dict[str, Any] = {}
    for arm, stages in (records[0].durations_us if records else {}).items():
        timing[arm] = {
            stage: _stage_timing([record.durations_us[arm][stage] for record in records])
            for stage in stages
            if stage != "timing"
        }
    for arm, timed in (records[0].timed if records else {}).items():
        timing[arm] = {stage: _timed_stage(samples) for stage, samples in timed.slowest_us.items()}
    return {arm: stages for arm, stages in timing.items() if stages}


def _timed_stage(samples: list[float]) -> dict[str, Any]:
    return {
        "min_us": min(samples),
        "median_us": statistics.median(samples),
        "p99_us": percentile(samples, 99),
        "max_over_ranks_us": max(samples),
        "iterations": len(samples),
        "median_error": median_error(samples),
        "samples_us": samples,
    }


def _stage_timing(per_rank: list[list[float]]) -> dict[str, Any]:
    return {
        "min_us": max(min(samples) for samples in per_rank),
        "median_us": max(statistics.median(samples) for samples in per_rank),
        "p99_us": max(percentile(samples, 99) for samples in per_rank),
        "max_over_ranks_us": max(max(samples) for samples in per_rank),
        "iterations": min(len(samples) for samples in per_rank),
        "samples_us": [max(laps) for laps in zip(*per_rank, strict=False)][-KEPT_SAMPLES:],
    }


def _method(resolved: ResolvedCase, records: list[Observation]) -> dict[str, Any]:
    """Method of timing, and the bytes that the fullest rank received and sent back in the process."""
    case = resolved.case
    emulated = records[0].device_state is None
    written = max(timed.flushed_bytes for record in records for timed in record.timed.values())
    scales = case.hidden_size // 128 * 4 if case.dispatch_dtype == "fp8" else 0
    row = case.hidden_size * (1 if case.dispatch_dtype == "fp8" else 2) + scales + 8 * case.topk_slots
    return {
        "clock": "host, emulated: a check of the harness, no figure of a device" if emulated else DEVICE_CLOCK,
        "statistic": "slowest rank of each iteration, then min, median, p99 over iterations",
        "align": case.align,
        "l2": f"flushed by {written} bytes written before each iteration" if written else "warm",
        "warmup": case.warmup,
        "graph": case.graph,
        "median_error_asked": case.median_error,
        "byte_basis": "copies: a row for each token and rank that it goes to, own rank included, with scales, weights "
        "and ids; fullest rank",
        "dispatch_bytes": resolved.traffic.max_recv * row,
        "combine_bytes": resolved.traffic.max_recv * case.hidden_size * 2,
    }


def _blind_spots(case: Case) -> list[str]:
    """Errors that the case's exact inputs cannot show; empty for a refused case."""
    try:
        return blind_spots_of(case)
    except InvalidCase:
        return []


def _recorded(case: Case) -> list[str]:
    """Note on recorded hidden states; empty for a refused case."""
    try:
        return recorded_notes(case)
    except InvalidCase:
        return []


def _doubts(records: list[Observation], *, shared: bool) -> list[str]:
    """Reasons to doubt the times: states that devices reported, and medians with a wide confidence interval."""
    found = [
        f"rank {record.rank}, {record.device_state.name}: {doubt}; its times are doubtful"
        for record in records
        if record.device_state is not None
        for doubt in record.device_state.doubts()
    ]
    if shared and any(record.timed for record in records):
        found = ["ranks that share a device take turns on it: times are no measurement of anything", *found]
    return found[:_DOUBTS_SHOWN]


def kernel_doubts(records: list[Observation]) -> list[str]:
    """Doubts whether a report's kernels are those that ran: a package's selection differs from its log."""
    found = [
        f"rank {record.rank}: {doubt}"
        for record in records
        for facts in record.packages.values()
        for doubt in facts.get("doubts", ())
    ]
    return found[:_DOUBTS_SHOWN]


def _memory(gathered: Gathered) -> dict[str, Any]:
    before = [record.peak_bytes for record in gathered.observations]
    return {
        "process": {"peak_bytes_max_over_ranks": max(before)},
        "gather": {"peak_bytes_added_on_rank_0": gathered.peak_bytes - before[0]},
        "device": {
            arm: {
                "peak_bytes_max_over_ranks": max(
                    record.timed[arm].peak_device_bytes or 0 for record in gathered.observations
                )
            }
            for arm, timed in gathered.observations[0].timed.items()
            if timed.peak_device_bytes is not None
        },
    }
