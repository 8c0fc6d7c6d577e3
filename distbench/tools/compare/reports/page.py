"""A comparison as a page: what became wrong or slower, and old beside new with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from distbench.report.html import charts
from distbench.report.html.case_page import GLYPHS
from distbench.report.html.page import render
from distbench.tools.compare.comparison import ALL_CASES, CaseFinding, Comparison, TimeFinding
from distbench.tools.compare.environment import EnvironmentFinding
from distbench.tools.compare.text import judgement_of, limit_lines, short_list, worst_first
from distbench.utils.text import counted

_SHOWN_CASES, _SHOWN_TIMES, _SHOWN_FACTS = 200, 50, 100
_NO_REGRESSION, _REGRESSION = 0, 1
_ALARMS = ("slower", "suspect")
_WORDS = (*_ALARMS, "not judged", "faster", "same")
_SIGNS = {verdict.value: glyph for verdict, glyph in GLYPHS.items()}


class CaseRow(NamedTuple):
    """A case whose result changed, and the signs of both verdicts."""

    found: CaseFinding
    old: str
    new: str
    kind: str


class TimeRow(NamedTuple):
    """Texts of a time's row in the table."""

    name: str
    case: str
    old: str
    new: str
    change: str
    least: str
    between: str
    samples: str
    judgement: str


class ComparisonPage(NamedTuple):
    """Content of the page of a comparison; of long lists the first ones, with the number of all."""

    kind: str
    glyph: str
    heading: str
    headline: str
    cases: list[CaseRow]
    more_cases: int
    limits: list[str]
    arms: list[tuple[str, charts.BarPairs]]
    changes: charts.Rows | None
    alone: charts.Rows | None
    more_alone: int
    times: list[TimeRow]
    environment: list[tuple[str, str, str]]
    more_facts: int


def write(comparison: Comparison, file: BinaryIO) -> None:
    """Write the page; a lone surrogate, which UTF-8 cannot hold, becomes `?`."""
    page = comparison_page(comparison)
    file.write(render("compare.html", title=f"{page.heading}: {page.headline}", page=page).encode("utf-8", "replace"))


def comparison_page(comparison: Comparison) -> ComparisonPage:
    """The page of a comparison."""
    cases = worst_first(comparison.cases)
    together = [time for time in comparison.times if time.case == ALL_CASES]
    alone = sorted((time for time in comparison.times if time.case != ALL_CASES), key=lambda one: -one.change.change)
    kind, glyph, heading = _ending(comparison.exit_code)
    return ComparisonPage(
        kind=kind,
        glyph=glyph,
        heading=heading,
        headline=_headline(comparison),
        cases=[_case_row(found) for found in cases[:_SHOWN_CASES]],
        more_cases=max(len(cases) - _SHOWN_CASES, 0),
        limits=list(limit_lines(comparison)),
        arms=_arms(together, comparison),
        changes=_changes(together, comparison),
        alone=_changes(alone[:_SHOWN_TIMES], comparison),
        more_alone=max(len(alone) - _SHOWN_TIMES, 0),
        times=[_time_row(time, comparison) for time in (*together, *alone[:_SHOWN_TIMES])],
        environment=[_fact(found) for found in comparison.environment[:_SHOWN_FACTS]],
        more_facts=max(len(comparison.environment) - _SHOWN_FACTS, 0),
    )


def _ending(exit_code: int) -> tuple[str, str, str]:
    """Colour, sign and words of an exit code."""
    if exit_code == _NO_REGRESSION:
        return "good", "✓", "No regression"
    if exit_code == _REGRESSION:
        return "bad", "✗", "Regression"
    return "expected", "?", "No regression found, but not everything could be judged"


def _headline(comparison: Comparison) -> str:
    old = "one older launch" if comparison.launches == 1 else f"{comparison.launches} older launches"
    told = [f"{_count(comparison.pairs, 'case')} compared with {old}"]
    kinds = Counter(found.kind for found in worst_first(comparison.cases))
    told += [f"{count} {kind}" for kind, count in kinds.items()]
    words = Counter(judgement_of(time, comparison) for time in comparison.times if time.case == ALL_CASES)
    told += [f"{_count(words[word], 'arm and stage', 'arms and stages')} {word}" for word in _WORDS if words[word]]
    told += (
        [f"{counted(len(comparison.environment), 'difference')} of the environment"] if comparison.environment else []
    )
    return ", ".join(told)


def _count(count: int, one: str, several: str = "") -> str:
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def _case_row(found: CaseFinding) -> CaseRow:
    kind = {"fixed": "good", "still failing": "expected", "no result": "expected"}.get(found.kind, "bad")
    return CaseRow(found, _SIGNS.get(found.old, ""), _SIGNS.get(found.new, ""), kind)


def _arms(times: Sequence[TimeFinding], comparison: Comparison) -> list[tuple[str, charts.BarPairs]]:
    """A picture for each arm: its stages, the old median above the new one."""
    arms: dict[str, list[tuple[str, str, charts.Estimate, charts.Estimate]]] = {}
    for time in times:
        word = judgement_of(time, comparison)
        label = f"{time.stage}: {charts.microseconds(time.old_us)} → {charts.microseconds(time.new_us)}, {word}"
        old = charts.Estimate(time.old_us, time.old_error_us or 0.0)
        new = charts.Estimate(time.new_us, time.new_error_us or 0.0)
        arms.setdefault(time.arm, []).append((label, _kind(word), old, new))
    return [(arm, charts.bar_pairs(pairs)) for arm, pairs in arms.items()]


def _kind(word: str) -> str:
    return "worse" if word in _ALARMS else "better" if word == "faster" else "new"


def _changes(times: Sequence[TimeFinding], comparison: Comparison) -> charts.Rows | None:
    """Changes with their intervals over the slowdowns that may go unnoticed; None where there are none."""
    series = [
        charts.Series(
            _label(time, judgement_of(time, comparison)),
            (time.change.change,),
            None if time.change.detectable is None else (0.0, time.change.detectable),
            judgement_of(time, comparison) in _ALARMS,
            time.change.interval,
        )
        for time in times
    ]
    return charts.rows_over_change(series) if series else None


def _label(time: TimeFinding, word: str) -> str:
    """Figures before a long name, whose end may be cut."""
    if time.case == ALL_CASES:
        return f"{time.arm}, {time.stage}: {_change(time)}, {word}"
    return f"{_change(time)} {time.arm}/{time.stage}, {time.case}"


def _change(time: TimeFinding) -> str:
    """The change, with its interval where that is known."""
    found = time.change
    if found.interval is None:
        return percent(found.change)
    low, high = map(percent, found.interval)
    return f"{percent(found.change)} ({low.removesuffix(' %')} to {high})"


def percent(share: float) -> str:
    """A share as a percentage with its sign, three digits where it is large."""
    return f"{100 * share:+.3g} %" if abs(share) >= 1 else f"{100 * share:+.1f} %"


def _time_row(time: TimeFinding, comparison: Comparison) -> TimeRow:
    found = time.change
    return TimeRow(
        name=f"{time.arm}, {time.stage}",
        case=time.case or ("all cases" if time.cases > 1 else "the case"),
        old=_median(time.old_us, time.old_error_us),
        new=_median(time.new_us, time.new_error_us),
        change=_change(time),
        least="none of any size" if found.detectable is None else percent(found.detectable),
        between="" if found.between is None else percent(found.between).lstrip("+"),
        samples=" and ".join(map(str, found.samples)),
        judgement=judgement_of(time, comparison),
    )


def _median(value: float, error: float | None) -> str:
    text = charts.microseconds(value)
    return text if error is None else f"{text} ± {charts.microseconds(error)}"


def _fact(found: EnvironmentFinding) -> tuple[str, str, str]:
    return found.what, short_list(found.old), short_list(found.new)
