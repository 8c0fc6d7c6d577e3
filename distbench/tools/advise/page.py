"""HTML: the page of an advice, by the frame and the style of the pages of results."""

from __future__ import annotations

from distbench.report.html.charts import Bars, bars
from distbench.report.html.page import render
from distbench.tools.advise.advice import Advice, told_chance
from distbench.tools.advise.text import about_of, cells_of, columns_of, head_of, traffic_of
from distbench.utils.text import counted

_SHARES = (0, 10, 25, 50, 75, 90, 95, 99, 100)


def page_of(advice: Advice) -> str:
    """The page of an advice."""
    yours = next((one for one in advice.candidates if "yours" in one.reasons), None)
    rows = [cells_of(one, advice) for one in (*advice.candidates, advice.whole_buffer)]
    lines = _lines(advice, None if yours is None else yours.limit)
    return render(
        "advise.html",
        title=f"Which limit: {advice.model} on {counted(advice.ep_size, 'rank')}",
        kind="good" if yours is None or yours.proven else "bad",
        advice=advice,
        origin="recorded" if advice.recorded else "drawn",
        yours=None if yours is None else yours.limit,
        steps=" ".join(traffic_of(advice)),
        bars=_bars(advice, lines, None if yours is None else yours.limit),
        label=f"Rows of the fullest rank in each step, against {', '.join(lines)}",
        shares=[(f"{share} %", advice.seen.quantiles[share]) for share in _SHARES],
        columns=columns_of(advice),
        rows=rows,
        about=about_of(advice),
        layer=head_of(advice),
    )


def _bars(advice: Advice, lines: dict[str, int], yours: int | None) -> Bars:
    return bars(advice.seen.quantiles, yours, lines)


def _lines(advice: Advice, yours: int | None) -> dict[str, int]:
    """Labels of the rows that are proven, seen, asked for, and named by chance; their first word is their style."""
    named = {"proven": advice.bound, "fullest seen": advice.seen.most, "limit asked for": yours}
    if not advice.drift and advice.chance_limit <= advice.bound:
        named[f"chance {told_chance(advice.target_chance)}"] = advice.chance_limit
    return {f"{label} {rows}": rows for label, rows in named.items() if rows is not None}
