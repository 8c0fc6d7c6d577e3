"""Geometry of the pictures, in the units of drawings that are WIDTH wide; the templates draw it.

A unit is a pixel on a phone. Every coordinate is rounded, since a page may hold thousands of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH = 360
"""Width of every drawing; its height follows from the content."""

_LABEL_GAP = 12.0
_BARS_TOP, _BARS_HEIGHT, _BARS_RIGHT = 8.0, 140.0, 150.0
_ROW, _ROW_LABEL = 30.0, 11.0
_SIDE = 6.0
_MOST_DOTS = 60
_LEAST_US, _MOST_US = 1e-3, 1e15
_TICK_GAP = 30.0
_NAME_GAP = 60.0
_ROOM = 1.04

_MOST_LABEL = 58
_RISES = 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 9.0, 99.0
_FALLS = -0.01, -0.02, -0.05, -0.1, -0.2, -0.5, -0.75, -0.9, -0.99
_PAIR, _BAR = 40.0, 7.0

_Place = Callable[[float], float]


def number(value: float) -> str:
    """A coordinate with at most one digit after the point."""
    return f"{value:.1f}".removesuffix(".0")


def path_of(parts: Iterable[str]) -> Markup:
    """Data of a path, which is numbers and commands that were made here, and must not be cut as a text is."""
    return Markup("".join(parts))  # noqa: S704


class Mark(NamedTuple):
    """A labelled line of a chart: where it is, where its label is, and the label."""

    at: float
    label_at: float
    label: str
    kind: str


class Bars(NamedTuple):
    """Rows received by rank: paths of bars within the limit and above it, and lines with labels at the right."""

    height: float
    bottom: float
    right: float
    within: Markup
    above: Markup
    marks: list[Mark]


def bars(received: Sequence[int], limit: int | None, lines: Mapping[str, int]) -> Bars:
    """Bars from the bottom up; `lines` are labels and the rows at which they are. The limit is one of them."""
    top = max([1, *received, *lines.values()]) * _ROOM
    bottom = _BARS_TOP + _BARS_HEIGHT
    right = WIDTH - _BARS_RIGHT
    step = right / max(len(received), 1)
    gap = step / 5 if len(received) <= right / 4 else 0.0
    parts: dict[bool, list[str]] = {False: [], True: []}
    for rank, rows in enumerate(received):
        tall = rows / top * _BARS_HEIGHT
        path = f"M{number(rank * step + gap / 2)} {number(bottom)}v-{number(tall)}h{step - gap:.2f}v{number(tall)}z"
        parts[limit is not None and rows > limit].append(path)
    at = {label: bottom - rows / top * _BARS_HEIGHT for label, rows in lines.items()}
    order = sorted(at, key=lambda label: at[label])
    placed = spread([at[label] for label in order], _LABEL_GAP)
    marks = [Mark(at[label], y, label, label.split()[0]) for label, y in zip(order, placed, strict=True)]
    height = max([bottom + 16, *(y + 4 for y in placed)])
    return Bars(height, bottom, right, path_of(parts[False]), path_of(parts[True]), marks)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions in rising order, moved down as little as needed to be `gap` apart."""
    placed: list[float] = []
    for one in positions:
        placed.append(max(one, placed[-1] + gap) if placed else max(one, gap))
    return placed


class Row(NamedTuple):
    """A row of a chart with horizontal axis: its label's and its own height, and what lies on it."""

    label: str
    label_y: float
    y: float
    dots: list[float]
    low: float
    high: float
    band: tuple[float, float] | None
    alarm: bool


class Tick(NamedTuple):
    """A place on the horizontal axis with its label, empty where labels would touch."""

    x: float
    label: str


class Rows(NamedTuple):
    """A chart of rows over one horizontal axis."""

    height: float
    rows: list[Row]
    ticks: list[Tick]


class Series(NamedTuple):
    """Content of a row: its label, values, a range behind them, an alarm, and an interval other than their range."""

    label: str
    values: Sequence[float]
    band: tuple[float, float] | None = None
    alarm: bool = False
    span: tuple[float, float] | None = None


def rows_over_time(series: Sequence[Series]) -> Rows:
    """Samples in microseconds over a logarithmic axis with a tick at each decade."""
    known = [max(value, _LEAST_US) for one in series for value in one.values]
    low = math.floor(math.log10(min(known, default=1.0)))
    high = max(math.ceil(math.log10(max(known, default=10.0))), low + 1)

    def place(value: float) -> float:
        return _SIDE + (math.log10(max(value, _LEAST_US)) - low) / (high - low) * (WIDTH - 2 * _SIDE)

    decades = [(float(f"1e{power}"), microseconds(float(f"1e{power}"))) for power in range(low, high + 1)]
    return _rows(series, place, decades)


def rows_over_ratio(series: Sequence[Series], one: str = "ideal") -> Rows:
    """Ratios over a linear axis that holds all values, all allowed ranges and 1, which is labelled `one`."""
    known: list[float] = [value for row in series for value in (*row.values, *(row.band or ()))]
    low, high = min([1.0, *known]), max([1.0, *known])
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return _SIDE + (value - low) / width * (WIDTH - 2 * _SIDE)

    ends = [(value, f"{value:.3g}") for value in (low, high) if abs(place(value) - place(1.0)) >= _NAME_GAP]
    return _rows(series, place, [(1.0, one), *ends])


def rows_over_change(series: Sequence[Series]) -> Rows:
    """Changes as shares (0.1 is 10 % more) over a logarithmic axis that holds all of them and no change."""
    known = [value for one in series for value in (*one.values, *(one.band or ()), *(one.span or ()))]
    most, least = max([0.0, *known]), min([0.0, *known])
    high = next((share for share in _RISES if share >= most), _RISES[-1])
    low = next((share for share in _FALLS if share <= least), _FALLS[-1])
    start, width = math.log1p(low), math.log1p(high) - math.log1p(low)

    def place(value: float) -> float:
        return _SIDE + (math.log1p(min(max(value, low), high)) - start) / width * (WIDTH - 2 * _SIDE)

    return _rows(series, place, [(share, _change(share)) for share in _apart(place, low, high)])


def _apart(place: _Place, low: float, high: float) -> list[float]:
    """Shares to label: no change, both ends, and those between, where each leaves room for those before it."""
    kept = [0.0]
    for share in (low, high, *reversed(_RISES), *reversed(_FALLS)):
        if low <= share <= high and all(abs(place(share) - place(one)) >= _NAME_GAP for one in kept):
            kept.append(share)
    return sorted(kept)


def _change(share: float) -> str:
    return "no change" if share == 0 else f"{share:+.0%}".replace("%", " %")


def _rows(series: Sequence[Series], place: _Place, ticks: Sequence[tuple[float, str]]) -> Rows:
    rows = []
    for index, one in enumerate(series):
        top = index * _ROW
        dots = [place(value) for value in thinned(one.values)]
        band = None if one.band is None else (place(one.band[0]), place(one.band[1]))
        low, high = (min(dots), max(dots)) if dots else (0.0, 0.0)
        if one.span is not None:
            low, high = map(place, one.span)
        rows.append(Row(_cut(one.label), top + _ROW_LABEL, top + _ROW_LABEL + 9, dots, low, high, band, one.alarm))
    return Rows(len(series) * _ROW + 18, rows, ticks_of([(place(value), label) for value, label in ticks]))


def ticks_of(places: Sequence[tuple[float, str]]) -> list[Tick]:
    """Ticks in rising order, without the labels that would touch the one before."""
    found: list[Tick] = []
    last = -math.inf
    for x, label in sorted(places):
        shown = x - last >= _TICK_GAP
        found.append(Tick(x, label if shown else ""))
        last = x if shown else last
    return found


def thinned(values: Sequence[float]) -> list[float]:
    """Values in rising order; of many, equally spaced order statistics with the smallest and the largest."""
    ordered = sorted(values)
    if len(ordered) <= _MOST_DOTS:
        return ordered
    return [ordered[index * (len(ordered) - 1) // (_MOST_DOTS - 1)] for index in range(_MOST_DOTS)]


def _cut(label: str) -> str:
    return label if len(label) <= _MOST_LABEL else f"{label[: _MOST_LABEL - 1]}…"


def microseconds(value: float) -> str:
    """A time in µs, ms or s, three digits."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} µs"


class Strip(NamedTuple):
    """The tokens of one source rank: the label, its height, and the places of lost and of damaged tokens."""

    label: str
    y: float
    lost: list[float]
    damaged: list[float]


def strips(lost: Mapping[int, Sequence[int]], damaged: Mapping[int, Sequence[int]], tokens: int) -> list[Strip]:
    """A strip for each rank with such tokens, in order; the axis has `tokens` tokens."""

    def places(found: Sequence[int]) -> list[float]:
        return sorted({_SIDE + token / max(tokens - 1, token, 1) * (WIDTH - 2 * _SIDE) for token in found})

    ranks = sorted(lost.keys() | damaged.keys())
    return [
        Strip(f"rank {rank}", 14 + index * 26, places(lost.get(rank, ())), places(damaged.get(rank, ())))
        for index, rank in enumerate(ranks)
    ]


class Bar(NamedTuple):
    """A horizontal bar from the left edge: its top, its end, and the interval of the end."""

    y: float
    to: float
    low: float
    high: float


class BarPair(NamedTuple):
    """Two values of one thing, the old one above the new one."""

    label: str
    label_y: float
    old: Bar
    new: Bar
    kind: str


class BarPairs(NamedTuple):
    """Pairs of bars over one linear axis from 0."""

    height: float
    thickness: float
    pairs: list[BarPair]
    ticks: list[Tick]


class Estimate(NamedTuple):
    """A value with half the width of its interval; 0 where that is not known."""

    value: float
    error: float

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.error


def bar_pairs(series: Sequence[tuple[str, str, Estimate, Estimate]]) -> BarPairs:
    """Bars of times in microseconds, of (label, kind, old, new), over an axis with four parts of round numbers."""
    most = min(max([one.high for _, _, *both in series for one in both], default=1.0), _MOST_US)
    most = most if most > _LEAST_US else 1.0
    step = _round_step(most / 4)
    top = max(step * math.ceil(most / step), step)

    def across(value: float) -> float:
        return _SIDE + min(max(value, 0.0) / top, 1.0) * (WIDTH - 2 * _SIDE)

    def bar(y: float, one: Estimate) -> Bar:
        return Bar(y, across(one.value), across(one.value - one.error), across(one.high))

    pairs = [
        BarPair(_cut(label), index * _PAIR + _ROW_LABEL, bar(start, old), bar(start + _BAR + 2, new), kind)
        for index, (label, kind, old, new) in enumerate(series)
        for start in (index * _PAIR + _ROW_LABEL + 5,)
    ]
    marks = [step * count for count in range(round(top / step) + 1)]
    return BarPairs(
        len(series) * _PAIR + 18, _BAR, pairs, ticks_of([(across(value), microseconds(value)) for value in marks])
    )


def _round_step(least: float) -> float:
    """Smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((size * power for size in (1, 2, 5) if size * power >= least), 10 * power)
