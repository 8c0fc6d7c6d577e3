"""What the page of a case says and draws, from its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec

from distbench.case.stages import LAYER_STAGES, Arm
from distbench.errors import InvalidCase, Verdict
from distbench.report.html import cells, charts
from distbench.report.html.view import Pictured, PicturedRank
from distbench.report.schema import CallerReport
from distbench.utils.text import one_line

MOST_NUMBERED = 16
"""Most ranks, or blocks of them, whose heat map is a table with numbers."""

_MOST_RANKS = 64
_HEADLINE = "model", "ep_size", "routing", "dispatch_dtype", "numerics", "transport", "experts"

MEANING = {verdict: verdict.meaning for verdict in Verdict}
GLYPHS: dict[Verdict, str] = {
    Verdict.PASS: "✓",
    Verdict.INVALID: "I",
    Verdict.UNSUPPORTED: "S",
    Verdict.HANG: "H",
    Verdict.RANK_FAULT: "R",
    Verdict.OVERFLOW: "O",
    Verdict.BASELINE_WRONG: "B",
    Verdict.CORRUPT: "C",
    Verdict.UNDER_LIMIT: "U",
    Verdict.NONDETERMINISTIC: "N",
    Verdict.DRIFT: "D",
}
"""The letter of a verdict, so that colour is never its only sign."""


class Step(NamedTuple):
    """A stage in the flow: its state (right, wrong, later, stopped, unknown), and that in words."""

    stage: str
    state: str
    words: str


class KernelRow(NamedTuple):
    """A kernel, with the arm and the ranks that run it alike."""

    ranks: str
    arm: str
    kernel: dict[str, Any]


class CasePage(NamedTuple):
    """Content of the page of a case; pictures are None where the report does not hold their data."""

    report: Pictured
    glyph: str
    meaning: str
    headline: str
    kind: str
    steps: list[Step]
    sent: list[list[tuple[int, int]]]
    heat: cells.HeatMap | None
    sent_of: str
    bars: charts.Bars | None
    above: str
    tokens: list[charts.Strip]
    columns: float | None
    differing: cells.CellMap | None
    errors: charts.Rows | None
    times: charts.Rows | None
    kernels: list[KernelRow]
    ranks: list[PicturedRank]
    environment: list[tuple[str, str]]


def case_page(report: Pictured) -> CasePage:
    """The page of a case.

    Raises:
        InvalidCase: times are no numbers.

    """
    rows = report.sent.rows if report.sent else []
    small = len(rows) <= MOST_NUMBERED
    low, high = cells.bounds_of(rows)
    return CasePage(
        report=report,
        glyph=GLYPHS[report.verdict],
        meaning=MEANING[report.verdict],
        headline=", ".join(f"{key} {report.case[key]}" for key in _HEADLINE if key in report.case),
        kind=kind_of(report.verdict, as_expected=report.as_expected),
        steps=_steps(report),
        sent=[[(value, cells.level_of(value, low, high)) for value in row] for row in rows] if small else [],
        heat=None if small else cells.heat_map(rows),
        sent_of="" if report.sent is None else _block(report.sent.ranks_per_block),
        bars=_bars(report),
        above=_above(report),
        tokens=_tokens(report),
        columns=_column(report),
        differing=_differing(report),
        errors=_errors(report),
        times=_times(report),
        kernels=list(_kernels(report.ranks)),
        ranks=sorted(report.ranks, key=lambda one: (-one.lost_rows, -one.total_recv, one.rank))[:_MOST_RANKS],
        environment=list(_environment(report)),
    )


def kind_of(verdict: Verdict, *, as_expected: bool) -> str:
    """Class of a verdict's colour: good, expected (not a PASS, as it should be), bad."""
    if not as_expected:
        return "bad"
    return "good" if verdict is Verdict.PASS else "expected"


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Ranks in order, neighbours as a range: `0-3, 7`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] + 1 == rank:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _steps(report: Pictured) -> list[Step]:
    """The flow, with the first wrong stage, or the stage in which a rank stood when the case ended."""
    stages = [stage.value for stage in LAYER_STAGES]
    wrong = report.first_divergence
    stopped = next((reason for reason in report.reasons if not report.ranks and reason.stage in stages), None)
    outside = {error.stage: error.arm for error in report.errors if not error.within}
    steps, state = [], "right" if report.ranks else "unknown"
    for stage in stages:
        if wrong is not None and wrong.stage == stage:
            steps.append(Step(stage, "wrong", f"first wrong stage: {wrong}"))
            state = "later"
        elif stopped is not None and stopped.stage == stage:
            steps.append(Step(stage, "stopped", f"a rank stood here: {stopped.message}"))
        elif stage in outside and state == "right":
            steps.append(Step(stage, "wrong", f"error of {outside[stage]} outside its bounds"))
        else:
            words = {"right": "no wrong row found", "later": "after the first wrong stage", "unknown": "not known"}
            steps.append(Step(stage, state, words[state]))
    return steps


def _block(ranks: int) -> str:
    return "one cell a pair of ranks" if ranks == 1 else f"one cell for {ranks} by {ranks} ranks together"


def _bars(report: Pictured) -> charts.Bars | None:
    if not report.ranks:
        return None
    ranks = sorted(report.ranks, key=lambda one: one.rank)
    received = [one.total_recv for one in ranks]
    fullest, limit = max(received), report.limit
    lines = {f"fullest rank {fullest}": fullest}
    effective = limit.effective if limit else None
    if limit and limit.proof and _near(limit.proof.bound, fullest, effective):
        lines[f"proven bound {limit.proof.bound}"] = limit.proof.bound
    if effective is not None and _near(effective, fullest, limit.proof.bound if limit and limit.proof else None):
        lines[f"limit {effective}"] = effective
    capacity = ranks[0].capacity
    if capacity and _near(capacity, fullest, effective):
        lines[f"capacity {capacity}"] = capacity
    return charts.bars(received, effective, lines)


def _near(rows: int, *others: int | None) -> bool:
    """Whether a line at `rows` leaves the bars visible; else the text alone names it."""
    return rows <= 4 * max(filter(None, others), default=1)


def _above(report: Pictured) -> str:
    """Ranks that receive more than the limit keeps, in words; empty where there are none."""
    effective = report.limit.effective if report.limit else None
    above = [] if effective is None else [one.rank for one in report.ranks if one.total_recv > effective]
    return ranks_in_words(above)


def _tokens(report: Pictured) -> list[charts.Strip]:
    lost: dict[int, list[int]] = {}
    damaged: dict[int, list[int]] = {}
    for rank, token in report.lost.tokens:
        lost.setdefault(rank, []).append(token)
    for rank, token in _damaged(report):
        damaged.setdefault(rank, []).append(token)
    return charts.strips(lost, damaged, max([1, *(one.tokens for one in report.ranks)]))


def _damaged(report: Pictured) -> Iterator[tuple[int, int]]:
    for found in report.diagnosis:
        yield from found.tokens
    first = report.first_divergence
    if first is not None:
        yield from first.evidence.tokens
        if first.source_rank is not None and first.source_token is not None:
            yield first.source_rank, first.source_token


def _column(report: Pictured) -> float | None:
    """Place of the first wrong column as a share of the drawing's width."""
    first, hidden = report.first_divergence, report.case.get("hidden_size")
    if first is None or first.column is None or not isinstance(hidden, int) or hidden <= first.column:
        return None
    return first.column / hidden * charts.WIDTH


def _differing(report: Pictured) -> cells.CellMap | None:
    """The map with the rank at its first token; None where nothing differs.

    Raises:
        InvalidCase: a cell that is no digit.

    """
    found = report.differing
    if found is None:
        return None
    if not all(cell.isascii() and cell.isdecimal() for cell in found.cells):
        message = "differing: a cell is no digit from 0 to 8; run the case again"
        raise InvalidCase(message)
    ranks = sorted(report.ranks, key=lambda one: one.rank)
    starts = accumulate((one.tokens for one in ranks), initial=0)
    total = max(sum(one.tokens for one in ranks), 1)
    marks = {str(one.rank): start / total for one, start in zip(ranks, starts, strict=False)}
    return cells.cell_map(found.cells, marks)


def _errors(report: Pictured) -> charts.Rows | None:
    series = []
    for error in report.errors:
        low, high = error.allowed.get("ratio_low", 0.0), error.allowed.get("ratio_high", 0.0)
        ratio = "a NaN" if error.ratio is None else f"{error.ratio[0]:.3f} to {error.ratio[1]:.3f}"
        within = "within" if error.within else "outside"
        label = f"{error.arm}, {error.stage}: {ratio} {within} {low:.3f} to {high:.3f}"
        series.append(charts.Series(label, error.ratio or (), (low, high), not error.within))
    return charts.rows_over_ratio(series) if series else None


def _times(report: Pictured) -> charts.Rows | None:
    series = []
    for arm, stages in report.timing.items():
        for stage, figures in stages.items() if isinstance(stages, dict) else ():
            if isinstance(figures, dict) and "median_us" in figures:
                series.append(_times_of(arm, stage, figures))
    return charts.rows_over_time(series) if series else None


def _times_of(arm: str, stage: str, figures: dict[str, Any]) -> charts.Series:
    try:
        median = msgspec.convert(figures["median_us"], float)
        p99 = msgspec.convert(figures.get("p99_us"), float | None)
        samples = msgspec.convert(figures.get("samples_us", ()), tuple[float, ...])
    except msgspec.ValidationError as error:
        message = f"timing of {arm:.80}/{stage:.80}: {one_line(error)}; run the case again"
        raise InvalidCase(message) from error
    tail = "" if p99 is None else f", p99 {charts.microseconds(p99)}"
    count = f"{len(samples)} sample{'' if len(samples) == 1 else 's'}"
    return charts.Series(f"{arm}, {stage}: {charts.microseconds(median)}{tail}, {count}", samples or (median,))


def _kernels(ranks: Sequence[PicturedRank]) -> Iterator[KernelRow]:
    """Kernels by arm, ranks that run the same one together; control and repadded run the padded kernel."""
    for arm in (Arm.PADDED, Arm.TRUNCATED, Arm.PRODUCTION):
        alike: dict[str, list[PicturedRank]] = {}
        for one in ranks:
            if arm in one.kernels:
                alike.setdefault(str(one.kernels[arm]), []).append(one)
        for group in alike.values():
            yield KernelRow(ranks_in_words(one.rank for one in group), arm, group[0].kernels[arm])


def _environment(report: Pictured) -> Iterator[tuple[str, str]]:
    found = report.environment
    yield "hosts", ", ".join(found.hosts)
    yield "devices", ", ".join(found.devices)
    for what, facts in (
        ("version", found.versions),
        ("commit", found.commits),
        ("system", found.system),
        ("variable", found.variables),
        ("transport", report.transport),
        ("method", report.method),
    ):
        yield from ((f"{what} {name}", str(value)) for name, value in facts.items())
    if report.caller:
        yield from _caller(report.caller)


def _caller(caller: CallerReport) -> Iterator[tuple[str, str]]:
    """The code of the arm production, and its arguments of fused_moe unlike distbench's."""
    yield "caller", f"{caller.package} {caller.version}, {caller.origin}, SHA-256 {caller.sha256}"
    for name, (theirs, ours) in caller.arguments.items():
        yield f"caller's argument {name}", f"{theirs}, distbench's {ours}"
