"""HTML: the page of a trend, by the frame and the style of the pages of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple

from markupsafe import Markup

from distbench.report.html.case_page import GLYPHS, kind_of
from distbench.report.html.charts import WIDTH, microseconds, number
from distbench.report.html.page import render
from distbench.tools.trend.history import Ending, History
from distbench.tools.trend.text import bound_words, conclusion, share, short, since_words, state_of
from distbench.tools.trend.times import Level, StageTrend
from distbench.tools.trend.trend import NightTotals, Trend
from distbench.utils.text import counted

MOST_CELLS = 6000
"""Most signs in the grid of cases by nights, for a page below 5 MiB."""

_MOST_CASES, _MOST_CHANGES, _MOST_FACTS = 200, 200, 100
_MOST_OF_A_NAME, _MOST_OF_A_VALUE, _MOST_OF_A_TICK = 120, 60, 24
_TOP, _BOTTOM, _HEIGHT = 14.0, 114.0, 130.0
_LEAST_REACH = 0.005
"""Half the height of a chart of levels, as a logarithm, where they are all alike."""


class Sign(NamedTuple):
    """A case in a night: its sign, colour and words; an empty sign where it has no result."""

    glyph: str
    kind: str
    words: str


class CaseRow(NamedTuple):
    """A case over the nights."""

    name: str
    signs: list[Sign]
    since: str
    rate: str
    reason: str


class NightBars(NamedTuple):
    """Cases of each night: paths of those as expected, and of the others on top."""

    height: float
    bottom: float
    within: Markup
    above: Markup
    most: int
    first: str
    last: str


class LevelChart(NamedTuple):
    """Level of a stage by night: bounds, dots within and out of them, and labels of the top and the bottom edge."""

    title: str
    words: str
    alarm: bool
    height: float
    bottom: float
    zero: float
    bounds: Markup
    dots: Markup
    out: Markup
    top_label: str
    bottom_label: str
    first: str
    last: str


class ChangeRow(NamedTuple):
    """A change of a case."""

    night: str
    name: str
    kind: str
    old: str
    new: str
    bad: bool


def write(trend: Trend, file: BinaryIO) -> None:
    """Write the page; a lone surrogate, which UTF-8 cannot hold, becomes `?`."""
    file.write(page_of(trend).encode("utf-8", "replace"))


def page_of(trend: Trend) -> str:
    """The page of a trend."""
    troubled = trend.troubled()
    most = min(_MOST_CASES, MOST_CELLS // len(trend.nights))
    changes = _changes(trend)
    return render(
        "trend.html",
        title=f"{', '.join(trend.suites) or 'results'} over {counted(len(trend.nights), 'night')}",
        kind=_kind(trend),
        headline=conclusion(trend),
        bars=_bars(trend.nights),
        nights=trend.nights,
        rows=[_row(trend, case) for case in troubled[:most]],
        hidden=len(troubled) - len(troubled[:most]),
        changes=changes[:_MOST_CHANGES],
        more_changes=max(len(changes) - _MOST_CHANGES, 0),
        stages=[chart for stage in trend.stages if (chart := _levels(trend, stage)) is not None],
        facts=_facts(trend),
    )


def _kind(trend: Trend) -> str:
    bad = any(case.bad_since is not None for case in trend.cases) or trend.nights[-1].missing
    return "bad" if bad else "good"


def _bars(nights: Sequence[NightTotals]) -> NightBars:
    most = max(1, *(night.planned for night in nights)) if nights else 1
    step = WIDTH / len(nights)
    within, above = [], []
    for place, night in enumerate(nights):
        good = night.as_expected / most * (_BOTTOM - _TOP)
        rest = (night.planned - night.as_expected) / most * (_BOTTOM - _TOP)
        left, wide = number(place * step), f"{step * 0.85:.2f}"
        within.append(f"M{left} {number(_BOTTOM)}v-{number(good)}h{wide}v{number(good)}z")
        if rest:
            above.append(f"M{left} {number(_BOTTOM - good)}v-{number(max(rest, 2))}h{wide}v{number(max(rest, 2))}z")
    return NightBars(
        _HEIGHT,
        _BOTTOM,
        _drawn(within),
        _drawn(above),
        most,
        short(nights[0].name, _MOST_OF_A_TICK),
        short(nights[-1].name, _MOST_OF_A_TICK),
    )


def _row(trend: Trend, case: History) -> CaseRow:
    signs = [_sign(night, ending) for night, ending in zip(trend.nights, case.endings, strict=True)]
    reason = case.last.reason if case.last else ""
    return CaseRow(short(case.name, _MOST_OF_A_NAME), signs, since_words(trend, case), str(case.rate), reason)


def _sign(night: NightTotals, ending: Ending | None) -> Sign:
    if ending is None:
        return Sign("", "", f"{night.name}: no result")
    kind = kind_of(ending.verdict, as_expected=ending.as_expected)
    mark = "!" if kind == "bad" else ""
    words = f"{night.name}: {ending.verdict.value}, expected {short(ending.expect, _MOST_OF_A_VALUE)}"
    return Sign(GLYPHS[ending.verdict] + mark, kind, words)


def _changes(trend: Trend) -> list[ChangeRow]:
    """Changes, the newest first."""
    found = sorted(trend.changes(), key=lambda one: -one[1].night)
    rows = []
    for case, change in found:
        ending = case.endings[change.night]
        bad = ending is None or not ending.as_expected
        name = short(case.name, _MOST_OF_A_NAME)
        rows.append(ChangeRow(trend.nights[change.night].name, name, change.kind, change.old, change.new, bad))
    return rows


def _levels(trend: Trend, stage: StageTrend) -> LevelChart | None:
    known = [(night, level) for night, level in enumerate(stage.levels) if level is not None]
    last = stage.last
    if last is None:
        return None
    places = [level.level for _, level in known]
    reach = max(_LEAST_REACH, 1.3 * (max(places) - min(places)) / 2)
    middle = (max(places) + min(places)) / 2
    step = WIDTH / max(len(trend.nights), 1)

    def up(level: float) -> float:
        kept = min(max(level, middle - reach), middle + reach)
        return _BOTTOM - (kept - middle + reach) / (2 * reach) * (_BOTTOM - _TOP)

    def dots(chosen: Iterable[tuple[int, Level]]) -> Markup:
        return _drawn(f"M{number((night + 0.5) * step)} {number(up(one.level))}h0" for night, one in chosen)

    bounds = [
        f"M{number(night * step)} {number(up(one.bounds[1]))}h{step:.2f}V{number(up(one.bounds[0]))}h-{step:.2f}z"
        for night, one in known
        if one.bounds is not None
    ]
    state = state_of(trend, stage)
    change = f"{share(last.change)} on {counted(last.references, 'night')} before, bound {bound_words(last)}"
    return LevelChart(
        title=f"{stage.arm}, {stage.stage}",
        words=f"newest {microseconds(last.typical_us)}, {change}{f'; {state}' if state else ''}",
        alarm=stage.slower_since is not None,
        height=_HEIGHT,
        bottom=_BOTTOM,
        zero=up(0.0),
        bounds=_drawn(bounds),
        dots=dots((night, one) for night, one in known if not one.slower),
        out=dots((night, one) for night, one in known if one.slower),
        top_label=share(middle + reach),
        bottom_label=share(middle - reach),
        first=short(trend.nights[0].name, _MOST_OF_A_TICK),
        last=short(trend.nights[-1].name, _MOST_OF_A_TICK),
    )


def _facts(trend: Trend) -> list[tuple[str, str, str, str]]:
    """What changed in the environment, the newest first: night, fact, values before and after."""
    found = [
        (
            trend.nights[night].name,
            one.what,
            short(", ".join(one.old), _MOST_OF_A_VALUE),
            short(", ".join(one.new), _MOST_OF_A_VALUE),
        )
        for night, facts in reversed(trend.environment)
        for one in facts
    ]
    return found[:_MOST_FACTS]


def _drawn(parts: Iterable[str]) -> Markup:
    """Data of a path, made of numbers here, which must not be cut as a text is."""
    return Markup("".join(parts))  # noqa: S704
