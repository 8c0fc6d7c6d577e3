"""A trend on a terminal: the nights, the cases that end as they should not, and the times out of their bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator

from distbench.report.html.charts import microseconds
from distbench.report.terminal import Grid
from distbench.tools.trend.history import History
from distbench.tools.trend.times import REFERENCES, Level, StageTrend
from distbench.tools.trend.trend import Trend
from distbench.utils.text import counted

_MOST_NIGHTS, _MOST_CASES, _MOST_NAMED = 14, 20, 4
_MOST_OF_A_NAME, _MOST_OF_A_REASON = 80, 160
_DATE = len("2026-11-30")


def parts_of(trend: Trend, *, every: bool = False) -> Iterator[str | Grid]:
    """Lines and tables, the conclusion last; `every` night and case where asked, else the newest and the worst."""
    troubled = trend.troubled()
    nights, cases = (len(trend.nights), len(troubled)) if every else (_MOST_NIGHTS, _MOST_CASES)
    yield _nights(trend, nights)
    if len(trend.nights) > nights:
        yield f"{counted(len(trend.nights) - nights, 'earlier night')}: --verbose, or --report html,csv"
    if troubled:
        yield _cases(trend, troubled[:cases])
    if len(troubled) > cases:
        yield f"{counted(len(troubled) - cases, 'more case')} with a bad night: --verbose, or --report csv"
    if trend.stages:
        yield _stages(trend)
    yield conclusion(trend)


def conclusion(trend: Trend) -> str:
    """One line: the newest night, the cases that are bad now, the stages that are slower now."""
    night = trend.nights[-1]
    since = [first for case in trend.cases if (first := case.bad_since) is not None]
    slower = [f"{one.arm}/{one.stage}" for one in trend.stages if one.slower_since is not None]
    cases = f"bad now: {len(since)}, the longest since {trend.nights[min(since)].name}" if since else "none bad now"
    more = f" and {len(slower) - _MOST_NAMED} more" if len(slower) > _MOST_NAMED else ""
    times = f"slower than noise explains: {', '.join(slower[:_MOST_NAMED])}{more}" if slower else "none is slower"
    return (
        f"{counted(len(trend.nights), 'night')}; {night.name}: {night.as_expected} of {counted(night.planned, 'case')} "
        f"as expected; {cases}; of {counted(len(trend.stages), 'timed stage')} {times}"
    )


def short(text: str, most: int) -> str:
    """Text of at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def share(log_ratio: float) -> str:
    """A change as a percentage with its sign, or a multiple where it is large."""
    ratio = math.exp(min(log_ratio, 700.0))
    return f"{100 * (ratio - 1):+.1f} %" if ratio < 10 else f"x {ratio:.3g}"  # noqa: PLR2004 - tenfold


def bound_words(level: Level) -> str:
    """Distance of the upper bound from the mean of the earlier nights; `unknown` without bounds."""
    if level.bounds is None:
        return "unknown"
    return share((level.bounds[1] - level.bounds[0]) / 2)


def state_of(trend: Trend, stage: StageTrend) -> str:
    """Whether the newest night is slower or faster, and since when."""
    level, since = stage.last, stage.slower_since
    if since is not None:
        return f"SLOWER since {trend.nights[since].name}"
    if level is not None and level.faster:
        return "faster"
    return "" if level is None or level.bounds is not None else "too few nights"


def _nights(trend: Trend, most: int) -> Grid:
    """The newest nights; columns that say nothing are left out."""
    changes = [0] * len(trend.nights)
    for _, change in trend.changes():
        changes[change.night] += 1
    rows = [
        {
            "night": night.name,
            "ended": night.ended.rstrip("Z").replace("T", " "),
            "cases": str(night.planned),
            "as expected": str(night.as_expected),
            "bad": str(night.unexpected),
            "missing": str(night.missing),
            "exit": str(night.exit_code),
            "changes": str(count),
        }
        for night, count in zip(trend.nights, changes, strict=True)
    ][-most:]
    dated = all(row["night"].startswith(row["ended"][:_DATE]) for row in rows)
    whole = all(row["missing"] == "0" for row in rows)
    columns = tuple(name for name in rows[0] if not (name == "ended" and dated) and not (name == "missing" and whole))
    return Grid(columns, [tuple(row[name] for name in columns) for row in rows])


def _cases(trend: Trend, cases: list[History]) -> Grid:
    columns = ("case", "now", "bad since", "good nights", "reason")
    return Grid(columns, [_case_row(trend, case) for case in cases])


def _case_row(trend: Trend, case: History) -> tuple[str, ...]:
    last = case.last
    return (
        short(case.name, _MOST_OF_A_NAME),
        last.verdict.value if last else "",
        since_words(trend, case),
        f"{case.rate.seen} of {case.rate.tried}",
        short(last.reason, _MOST_OF_A_REASON) if last else "",
    )


def since_words(trend: Trend, case: History) -> str:
    """Night since when a case is bad; for one that is not bad now, the first night in which it was."""
    since, first = case.bad_since, case.went_bad
    if since is not None:
        return trend.nights[since].name
    return "" if first is None else f"not now, first {trend.nights[first].name}"


def _stages(trend: Trend) -> Grid:
    columns = ("arm/stage", "newest", "change", "bound", "")
    rows = [
        (
            f"{stage.arm}/{stage.stage}",
            microseconds(level.typical_us),
            share(level.change),
            bound_words(level),
            state_of(trend, stage),
        )
        for stage in trend.stages
        if (level := stage.last) is not None
    ]
    return Grid(
        columns, rows, f"times: mean over cases against up to {REFERENCES} nights before; noise stays within the bound"
    )
